//! What can be wrong with a slide: where, why, and what to set or do.

use std::io;
use std::path::PathBuf;

use openslide_rs::errors::OpenSlideError;

use super::native::TileError;
use crate::geometry::{Level, Level0Rect};
use crate::native::NativeError;

/// Why a slide can't be opened, understood or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SlideError {
    /// OpenSlide itself is missing.
    #[error(transparent)]
    Library(#[from] NativeError),
    /// No such file.
    #[error("{}: no such file", path.display())]
    NotFound {
        /// The path as given.
        path: PathBuf,
    },
    /// A folder where a file is needed.
    #[error("{}: is a directory, not a slide", path.display())]
    IsDirectory {
        /// The path as given.
        path: PathBuf,
    },
    /// The operating system refuses the file.
    #[error("{}: can't be read", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason, such as a missing permission.
        source: io::Error,
    },
    /// A file of another kind.
    #[error("{}: no format that OpenSlide reads ({found})", path.display())]
    NotASlide {
        /// The file.
        path: PathBuf,
        /// What it looks like.
        found: &'static str,
    },
    /// The file ends before its own index.
    #[error("{}: truncated: its index lies at byte {needed}, the file ends at byte {actual}", path.display())]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Where the index should be.
        needed: u64,
        /// Size of the file in bytes.
        actual: u64,
    },
    /// OpenSlide knows the format but not this file.
    #[error("{}: can't be opened", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// OpenSlide's message.
        source: OpenSlideError,
    },
    /// A level without pixels, larger than any scanner's, or larger than the level it is made from.
    #[error("{}: level {} claims to be {width} x {height} px", path.display(), level.0)]
    AbsurdLevel {
        /// The file.
        path: PathBuf,
        /// The level.
        level: Level,
        /// Its claimed width.
        width: u32,
        /// Its claimed height.
        height: u32,
    },
    /// Nothing in the file tells the resolution.
    #[error("{}: no resolution (mpp) in the metadata", path.display())]
    MissingMpp {
        /// The file.
        path: PathBuf,
        /// Magnification of the objective, if the file tells that much.
        objective_power: Option<f64>,
    },
    /// The resolution is no number, or none that a microscope has.
    #[error("{}: {property} is {value:?}, no believable resolution", path.display())]
    InvalidMpp {
        /// The file.
        path: PathBuf,
        /// Which property, or the setting that overrides it.
        property: &'static str,
        /// Its text.
        value: String,
        /// Magnification of the objective, if known.
        objective_power: Option<f64>,
    },
    /// A region can't be decoded.
    #[error(
        "{}: level {}, region {},{} of {} x {} level-0 px can't be read",
        path.display(), level.0, region.x, region.y, region.width, region.height
    )]
    Read {
        /// The file.
        path: PathBuf,
        /// The level that was read.
        level: Level,
        /// Where, on the level-0 frame.
        region: Level0Rect,
        /// Why.
        source: DecodeError,
    },
    /// The native reader was asked for, and can't read the file right.
    #[error("{}: the native reader can't read it: {reason}", path.display())]
    NotNative {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A single read that would need too much memory.
    #[error(
        "{}: one tile needs {width} x {height} px of level {}, more than {max_px} px",
        path.display(), level.0
    )]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// The level to read.
        level: Level,
        /// Width of the source window.
        width: u64,
        /// Height of the source window.
        height: u64,
        /// The limit.
        max_px: u64,
    },
    /// Pixels can't be resampled: the window or its scale is degenerate.
    #[error("{}: can't resample level {}", path.display(), level.0)]
    Resample {
        /// The file.
        path: PathBuf,
        /// The level that was read.
        level: Level,
        /// The resizer's reason.
        source: fast_image_resize::ResizeError,
    },
    /// No associated image of that name.
    #[error("{}: no associated image {name:?}", path.display())]
    NoAssociatedImage {
        /// The file.
        path: PathBuf,
        /// The name asked for.
        name: String,
    },
    /// An associated image or the colour profile can't be decoded.
    #[error("{}: {part} can't be read", path.display())]
    Part {
        /// The file.
        path: PathBuf,
        /// Which part.
        part: String,
        /// OpenSlide's message.
        source: OpenSlideError,
    },
    /// The colour profile can't be turned into a conversion to sRGB.
    #[error("{}: the ICC profile is unusable", path.display())]
    IccProfile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: moxcms::CmsError,
    },
    /// A folder of slides that can't be listed.
    #[error("can't list the directory")]
    Walk(#[from] walkdir::Error),
}

/// Why a region can't be decoded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// OpenSlide says so.
    #[error(transparent)]
    OpenSlide(OpenSlideError),
    /// One of the file's tiles is damaged.
    #[error("the file's tile {tile}: {source}")]
    Native {
        /// Index of the tile in the level, row by row.
        tile: u32,
        /// What is wrong with it.
        source: TileError,
    },
}

impl SlideError {
    /// What to do about it, in the words of the settings.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::Library(error) => return Some(error.hint()),
            Self::MissingMpp { objective_power, .. } | Self::InvalidMpp { objective_power, .. } => {
                return Some(mpp_hint(*objective_power));
            }
            Self::IsDirectory { .. } => "name one file; of a DICOM series or a MIRAX slide, the .dcm or .mrxs file",
            Self::Io { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                "let the user that runs this read the file"
            }
            Self::NotASlide { found, .. } if found.contains("TIFF") => {
                "write it as a tiled pyramid, e.g. with `vips tiffsave --tile --pyramid`"
            }
            Self::Truncated { .. } => "copy the file again: the transfer was cut off",
            Self::TooLarge { .. } => {
                "set a finer `target_mpp` or a smaller `tile_size`: the slide has no coarser level"
            }
            Self::NotNative { .. } => "set `reader` to auto: what the native reader can't read, OpenSlide reads",
            Self::Read { source: DecodeError::Native { .. }, .. } => {
                "the file is damaged there; `on_tile_error = \"skip\"` leaves such tiles out, and `reader = \"openslide\"` may \
                 forgive more"
            }
            Self::Read { .. } => "the file is damaged there; `on_tile_error = \"skip\"` leaves such tiles out",
            Self::IccProfile { .. } => "set `icc` to false to take the colours as they are stored",
            _ => return None,
        };
        Some(hint.to_owned())
    }
}

/// Names the setting and, where the objective is known, what is usual for it. Never applied: scanners differ by 10 %.
fn mpp_hint(objective_power: Option<f64>) -> String {
    match objective_power {
        // A 10x objective on the usual scanner cameras samples about 1 µm.
        Some(power) if power.is_finite() && power >= 1.0 => format!(
            "set `slide_mpp` to the scanner's resolution; the file says {power}x, for which about {:.2} is usual",
            10.0 / power
        ),
        _ => "set `slide_mpp` to the scanner's resolution in microns per pixel".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mpp_hints_name_the_setting_and_the_usual_value() {
        for (power, expected) in [(Some(20.0), "about 0.50"), (Some(40.0), "about 0.25"), (Some(5.0), "about 2.00")] {
            let hint = mpp_hint(power);
            assert!(hint.contains("`slide_mpp`") && hint.contains(expected), "{hint}");
        }
        for power in [None, Some(0.0), Some(f64::NAN), Some(-40.0)] {
            let hint = mpp_hint(power);
            assert!(hint.contains("`slide_mpp`") && !hint.contains("usual"), "{hint}");
        }
    }

    #[test]
    fn a_missing_permission_has_a_hint() {
        let source = io::Error::from(io::ErrorKind::PermissionDenied);
        assert!(SlideError::Io { path: "a.svs".into(), source }.hint().is_some());
    }
}
