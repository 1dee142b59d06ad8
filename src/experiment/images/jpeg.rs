//! JPEG files, decoded whole or not at all, to the pixels that the `image` crate gives for a sound file.
//!
//! zune-jpeg paints what it can of a JPEG that ends early, and leaves the rest grey. Three precautions turn that into an
//! error: the end marker must be there; bits that no Huffman code has stand before it, so that data which lack blocks
//! can't be decoded further; and the decoder must have gone past all of it. What remains unnoticed is damage that decodes
//! to as many blocks as the image has.

use image::{DynamicImage, GrayImage, RgbImage};
use zune_core::bytestream::{ZByteReaderTrait, ZCursor};
use zune_core::colorspace::ColorSpace;
use zune_core::options::DecoderOptions;
use zune_jpeg::JpegDecoder;
use zune_jpeg::errors::DecodeErrors;

const TEM: u8 = 0x01;
const SOF0: u8 = 0xc0;
const SOF2: u8 = 0xc2;
const RST0: u8 = 0xd0;
const RST7: u8 = 0xd7;
const SOI: u8 = 0xd8;
const EOI: u8 = 0xd9;
const SOS: u8 = 0xda;
const DRI: u8 = 0xdd;

/// The end marker after more bits than the bit reader has fetched ahead when it meets one that it can't use: 128, for its 64.
/// They are ones (0x00 follows 0xff by JPEG's rule), as no Huffman code is all ones.
const END: [u8; 34] = {
    let mut end = [0; 34];
    let mut at = 0;
    while at < end.len() {
        end[at] = 0xff;
        at += 2;
    }
    end[33] = EOI;
    end
};

/// Why a JPEG has no pixels.
#[derive(Debug)]
pub(super) enum Fault {
    /// Its data are damaged or cut off.
    Damaged(String),
    /// It may be sound, but is of a kind that can't be decoded rightly.
    Unsupported(String),
}

impl From<DecodeErrors> for Fault {
    fn from(error: DecodeErrors) -> Self {
        match error {
            DecodeErrors::Unsupported(_) => Self::Unsupported(error.to_string()),
            other => Self::Damaged(other.to_string()),
        }
    }
}

/// A JPEG file whose header was read.
#[derive(Debug)]
pub(super) struct Jpeg {
    /// The file with [`END`] for an end.
    data: Vec<u8>,
    /// Width and height in pixels.
    pub(super) size: (u32, u32),
    is_grey: bool,
}

impl Jpeg {
    /// Reads the header and makes sure that the end is there.
    pub(super) fn read(mut data: Vec<u8>) -> Result<Self, Fault> {
        let outline = Outline::of(&data)?;
        data.truncate(outline.end);
        // A progressive JPEG of one scan must end with that scan's bits.
        let end = if outline.is_progressive && outline.scans < 2 { &END[END.len() - 2..] } else { &END };
        data.extend_from_slice(end);
        let mut decoder = JpegDecoder::new_with_options(ZCursor::new(data.as_slice()), options());
        decoder.decode_headers()?;
        let (Some((width, height)), Some(colors)) = (decoder.dimensions(), decoder.input_colorspace()) else {
            return Err(cut_off());
        };
        drop(decoder);
        let [width, height] = [width, height].map(|side| u32::try_from(side).unwrap_or(u32::MAX));
        Ok(Self { data, size: (width, height), is_grey: colors == ColorSpace::Luma })
    }

    /// Samples of a pixel.
    pub(super) fn channels(&self) -> u8 {
        if self.is_grey { 1 } else { 3 }
    }

    /// The pixels.
    pub(super) fn decode(&self) -> Result<DynamicImage, Fault> {
        let colors = if self.is_grey { ColorSpace::Luma } else { ColorSpace::RGB };
        let mut cursor = ZCursor::new(self.data.as_slice());
        let mut decoder = JpegDecoder::new_with_options(&mut cursor, options().jpeg_set_out_colorspace(colors));
        let pixels = decoder.decode()?;
        drop(decoder);
        if cursor.z_position().ok() != Some(self.data.len() as u64) {
            return Err(Fault::Damaged("its data end before all of the image is there".to_owned()));
        }
        let (width, height) = self.size;
        let image = if self.is_grey {
            GrayImage::from_raw(width, height, pixels).map(DynamicImage::from)
        } else {
            RgbImage::from_raw(width, height, pixels).map(DynamicImage::from)
        };
        image.ok_or_else(cut_off)
    }
}

/// Those of the `image` crate: what a header has too much is no reason against the pixels.
fn options() -> DecoderOptions {
    DecoderOptions::default().set_strict_mode(false).set_max_width(usize::MAX).set_max_height(usize::MAX)
}

fn cut_off() -> Fault {
    Fault::Damaged("its data end early".to_owned())
}

/// What the markers of a file tell.
#[derive(Debug, Default)]
struct Outline {
    /// Where the end marker lies; what follows, such as a second image, is no part of the first.
    end: usize,
    is_progressive: bool,
    scans: usize,
    /// Blocks of all components that belong together, in the whole image.
    units: u64,
    /// Whether such a unit has blocks below each other.
    has_tall_units: bool,
    /// Such units between two restart markers; 0 for no restarts.
    restart_interval: u64,
    restarts: u64,
}

impl Outline {
    fn of(data: &[u8]) -> Result<Self, Fault> {
        let mut outline = Self::default();
        let mut at = 2;
        loop {
            let is_marker = |pair: &[u8]| pair[0] == 0xff && !matches!(pair[1], 0 | 0xff);
            let found = data.get(at..).and_then(|rest| rest.windows(2).position(is_marker)).ok_or_else(cut_off)?;
            let marker = data[at + found + 1];
            at += found + 2;
            match marker {
                EOI => {
                    outline.end = at - 2;
                    return outline.checked();
                }
                RST0..=RST7 => outline.restarts += 1,
                TEM | SOI => {}
                _ => {
                    let length = data.get(at..).and_then(<[u8]>::first_chunk).ok_or_else(cut_off)?;
                    let length = usize::from(u16::from_be_bytes(*length));
                    let payload = data.get(at + 2..at + length).ok_or_else(cut_off)?;
                    outline.add(marker, payload)?;
                    at += length;
                }
            }
        }
    }

    fn add(&mut self, marker: u8, payload: &[u8]) -> Result<(), Fault> {
        match (marker, payload) {
            (SOF0..=SOF2, &[_, height_high, height_low, width_high, width_low, _, ref components @ ..]) => {
                self.is_progressive = marker == SOF2;
                let sampling: Vec<u8> = components.chunks_exact(3).map(|component| component[1]).collect();
                if sampling.len() == 4 && sampling[0] != sampling[3] {
                    // zune-jpeg panics on some of them.
                    return Err(Fault::Unsupported("is a CMYK JPEG whose inks differ in resolution".to_owned()));
                }
                // Of a single component a unit is one block, whatever its sampling.
                let most = |shift: u8| sampling.iter().map(|factors| factors >> shift & 15).max().unwrap_or(1).max(1);
                let [across, down] = if sampling.len() == 1 { [1, 1] } else { [most(4), most(0)] };
                let units =
                    |high, low, blocks: u8| u64::from(u16::from_be_bytes([high, low])).div_ceil(8 * u64::from(blocks));
                self.units = units(width_high, width_low, across) * units(height_high, height_low, down);
                self.has_tall_units = down > 1;
            }
            (DRI, &[high, low, ..]) => self.restart_interval = u64::from(u16::from_be_bytes([high, low])),
            (SOS, _) => self.scans += 1,
            _ => {}
        }
        Ok(())
    }

    fn checked(self) -> Result<Self, Fault> {
        if self.is_progressive {
            return Ok(self);
        }
        if self.scans > 1 && (self.restart_interval > 0 || self.has_tall_units) {
            // zune-jpeg loses count of the restarts from scan to scan, and of the rows of blocks.
            return Err(Fault::Unsupported("is a JPEG with a scan for each colour".to_owned()));
        }
        let expected = self
            .units
            .checked_div(self.restart_interval)
            .map_or(0, |_| self.units.div_ceil(self.restart_interval).saturating_sub(1));
        // At a restart a decoder would go on with what is there, or make up what is not.
        let are_too_many = self.restart_interval == 0 && self.restarts > 0;
        if self.restarts < expected || are_too_many {
            return Err(Fault::Damaged(format!("it has {} restart markers where {expected} are due", self.restarts)));
        }
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use jpeg_encoder::{ColorType, Encoder, SamplingFactor};

    use super::*;

    const SIZE: (u16, u16) = (50, 67);

    fn encoded(colors: ColorType, change: impl FnOnce(&mut Encoder<&mut Vec<u8>>)) -> Vec<u8> {
        let channels = match colors {
            ColorType::Luma => 1,
            ColorType::Rgb => 3,
            _ => 4,
        };
        let samples = channels * usize::from(SIZE.0) * usize::from(SIZE.1);
        let pixels: Vec<u8> = (0..samples).map(|at: usize| (at * 7 + at / 50 * 3 % 40).to_le_bytes()[0]).collect();
        let mut data = Vec::new();
        let mut encoder = Encoder::new(&mut data, 85);
        change(&mut encoder);
        encoder.encode(&pixels, SIZE.0, SIZE.1, colors).unwrap();
        data
    }

    /// Sound files of every kind that is met.
    fn sound() -> Vec<Vec<u8>> {
        let mut files = vec![encoded(ColorType::Luma, |_| {}), encoded(ColorType::CmykAsYcck, |_| {})];
        // A scan for each component.
        files.push(encoded(ColorType::Rgb, |encoder| {
            encoder.set_sampling_factor(SamplingFactor::R_4_4_4);
            encoder.set_optimized_huffman_tables(true);
        }));
        for sampling in [SamplingFactor::R_4_4_4, SamplingFactor::R_4_2_2, SamplingFactor::R_4_2_0] {
            files.push(encoded(ColorType::Rgb, |encoder| encoder.set_sampling_factor(sampling)));
            for interval in [1, 3, 7] {
                files.push(encoded(ColorType::Rgb, |encoder| {
                    encoder.set_sampling_factor(sampling);
                    encoder.set_restart_interval(interval);
                }));
            }
            files.push(encoded(ColorType::Rgb, |encoder| {
                encoder.set_sampling_factor(sampling);
                encoder.set_progressive(true);
            }));
        }
        files
    }

    fn decode(data: &[u8]) -> Result<DynamicImage, Fault> {
        Jpeg::read(data.to_vec())?.decode()
    }

    #[test]
    fn a_sound_file_has_the_pixels_of_the_image_crate() {
        for data in sound() {
            let expected = image::load_from_memory(&data).unwrap();
            assert_eq!(decode(&data).unwrap(), expected);
            // A second picture may follow the first.
            assert_eq!(decode(&[data.as_slice(), b"\0\xff\xd8\xff"].concat()).unwrap(), expected);
        }
    }

    #[test]
    fn a_file_that_is_cut_off_is_damaged_at_every_length() {
        for data in sound() {
            for length in (0..data.len()).filter(|length| length % 11 == 0 || length + 40 > data.len()) {
                assert!(matches!(decode(&data[..length]), Err(Fault::Damaged(_))), "{length} of {}", data.len());
            }
        }
    }

    #[test]
    fn a_baseline_file_that_was_cut_off_and_ended_is_damaged() {
        for interval in [None, Some(3)] {
            let data = encoded(ColorType::Rgb, |encoder| {
                if let Some(interval) = interval {
                    encoder.set_restart_interval(interval);
                }
            });
            let scan = data.windows(2).position(|pair| pair == [0xff, SOS]).unwrap() + 14;
            for length in (scan..data.len() - 6).filter(|length| data[length - 1] != 0xff) {
                let ended = [&data[..length], &[0xff, EOI]].concat();
                assert!(decode(&ended).is_err(), "{length} of {}", data.len());
            }
        }
    }

    #[test]
    fn what_would_be_decoded_wrongly_is_refused() {
        let restarts = encoded(ColorType::Rgb, |encoder| {
            encoder.set_sampling_factor(SamplingFactor::R_4_4_4);
            encoder.set_optimized_huffman_tables(true);
            encoder.set_restart_interval(7);
        });
        let tall = encoded(ColorType::Rgb, |encoder| {
            encoder.set_sampling_factor(SamplingFactor::R_4_2_0);
            encoder.set_optimized_huffman_tables(true);
        });
        let inks = encoded(ColorType::Cmyk, |encoder| encoder.set_sampling_factor(SamplingFactor::R_4_2_0));
        for data in [restarts, tall, inks] {
            assert!(matches!(decode(&data), Err(Fault::Unsupported(_))));
        }
    }
}
