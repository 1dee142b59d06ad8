//! Colours from the scanner's space to sRGB.

use std::fmt;
use std::sync::Arc;

use moxcms::{ColorProfile, Layout, Transform8BitExecutor, TransformOptions};

use super::{Slide, SlideError};

/// The conversion of a slide's stored colours to sRGB.
#[derive(Clone)]
pub(super) struct ToSrgb {
    transform: Arc<Transform8BitExecutor>,
}

impl ToSrgb {
    /// Reads the slide's profile; `None` if it has none, so that its colours are what they are.
    pub(super) fn of(slide: &Slide) -> Result<Option<Self>, SlideError> {
        let Some(bytes) = slide.icc_profile()? else { return Ok(None) };
        Self::from_profile(&bytes)
            .map(Some)
            .map_err(|source| SlideError::IccProfile { path: slide.path.clone(), source })
    }

    /// Converts RGB8 pixels in place, by way of `scratch`.
    pub(super) fn convert(&self, rgb: &mut Vec<u8>, scratch: &mut Vec<u8>) -> Result<(), moxcms::CmsError> {
        scratch.resize(rgb.len(), 0);
        self.transform.transform(rgb, scratch)?;
        std::mem::swap(rgb, scratch);
        Ok(())
    }

    fn from_profile(bytes: &[u8]) -> Result<Self, moxcms::CmsError> {
        let profile = ColorProfile::new_from_slice(bytes)?;
        let srgb = ColorProfile::new_srgb();
        let options = TransformOptions::default();
        Ok(Self { transform: profile.create_transform_8bit(Layout::Rgb, &srgb, Layout::Rgb, options)? })
    }
}

impl fmt::Debug for ToSrgb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ToSrgb")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn srgb_stays_and_a_wider_space_is_converted() {
        let mut scratch = Vec::new();
        let profile = ColorProfile::new_srgb().encode().unwrap();
        let mut rgb = vec![200, 100, 150, 255, 255, 255, 0, 0, 0];
        let before = rgb.clone();
        ToSrgb::from_profile(&profile).unwrap().convert(&mut rgb, &mut scratch).unwrap();
        assert!(rgb.iter().zip(&before).all(|(a, b)| a.abs_diff(*b) <= 1), "{rgb:?}");
        let profile = ColorProfile::new_display_p3().encode().unwrap();
        ToSrgb::from_profile(&profile).unwrap().convert(&mut rgb, &mut scratch).unwrap();
        // The same numbers in a wider space are a more saturated colour; grey stays grey.
        assert!(rgb[0] > 200 && rgb[1] < 100, "{rgb:?}");
        assert!(rgb[3..6].iter().all(|value| *value >= 254), "{rgb:?}");
    }

    #[test]
    fn garbage_is_no_profile() {
        assert!(ToSrgb::from_profile(b"not a profile").is_err());
    }
}
