//! Turns a tile's compressed bytes into its pixels: `[rows, tile_width, 3]`, RGB8.
//!
//! Either all rows that are needed are decoded or there is an error; nothing is made up for data that is cut off.

use std::borrow::Cow;

use flate2::{Decompress, FlushDecompress, Status};
use weezl::{BitOrder, LzwStatus};

use super::error::TileError;
use super::jpeg::{self, JpegTables, JpegTile};
use super::pyramid::{Compression, TiledLevel};

const RGB: u16 = 2;
const YCBCR: u16 = 6;
/// Difference of each sample to the same one of the pixel to the left.
const HORIZONTAL: u16 = 2;

/// Decodes the tiles of one level.
#[derive(Debug)]
pub(crate) struct TileDecoder {
    width: usize,
    height: usize,
    codec: Codec,
}

#[derive(Debug)]
enum Codec {
    Jpeg { tables: JpegTables, tile: JpegTile },
    Samples { compression: SampleCompression, has_predictor: bool },
}

#[derive(Clone, Copy, Debug)]
enum SampleCompression {
    None,
    Deflate,
    Lzw,
}

/// Memory that decoding needs, kept from tile to tile.
#[derive(Debug, Default)]
pub(crate) struct DecodeScratch(Vec<u8>);

impl TileDecoder {
    /// Prepares decoding of a level.
    ///
    /// # Errors
    /// [`TileError::Unsupported`], naming what, unless the level has 8-bit RGB (or, in JPEG, YCbCr) pixels and
    /// a compression known here. [`TileError::Damaged`] if the JPEG tables can't be parsed.
    pub(crate) fn new(level: &TiledLevel) -> Result<Self, TileError> {
        let refuse = |what: String| Err(TileError::Unsupported(what));
        if level.is_planar && level.samples > 1 {
            return refuse("an image with a plane per colour".to_owned());
        }
        if level.bits != 8 || level.sample_format != 1 {
            return refuse(format!("an image of {}-bit samples of format {}", level.bits, level.sample_format));
        }
        if level.is_bit_reversed {
            return refuse("an image with reversed bits".to_owned());
        }
        let (photometric, samples) = (level.photometric, level.samples);
        let codec = match level.compression {
            Compression::Jpeg => {
                if !matches!((photometric, samples), (RGB | YCBCR, 3)) {
                    return refuse(format!("a JPEG image of {samples} samples and photometric {photometric}"));
                }
                let tables = level.jpeg_tables.as_deref().map(JpegTables::parse).transpose()?.unwrap_or_default();
                let is_rgb = photometric == RGB;
                Codec::Jpeg { tables, tile: JpegTile { width: level.tile_width, height: level.tile_height, is_rgb } }
            }
            Compression::None | Compression::Deflate | Compression::Lzw => {
                if !matches!((photometric, samples), (RGB, 3)) {
                    return refuse(format!("an image of {samples} samples and photometric {photometric}"));
                }
                let (compression, has_predictor) = match (level.compression, level.predictor) {
                    // A predictor means nothing there, as in libtiff.
                    (Compression::None, _) => (SampleCompression::None, false),
                    (Compression::Lzw, 1 | HORIZONTAL) => (SampleCompression::Lzw, level.predictor == HORIZONTAL),
                    (_, 1 | HORIZONTAL) => (SampleCompression::Deflate, level.predictor == HORIZONTAL),
                    (_, other) => return refuse(format!("predictor {other}")),
                };
                Codec::Samples { compression, has_predictor }
            }
            Compression::Jpeg2000 => return refuse("JPEG 2000".to_owned()),
            Compression::Other(code) => return refuse(format!("TIFF compression {code}")),
        };
        Ok(Self { width: level.tile_width as usize, height: level.tile_height as usize, codec })
    }

    /// Size of a whole decoded tile in bytes.
    pub(crate) fn rgb_bytes(&self) -> usize {
        self.width * self.height * 3
    }

    /// Decodes a tile down to row `rows` at least, into `rgb`, whose content is replaced. It becomes as long as the rows that
    /// were decoded: of JPEG little more than were asked for, else all.
    ///
    /// # Errors
    /// [`TileError`] if the data is damaged or cut off within these rows, or of another size or kind than the level's; `rgb`
    /// is then undefined.
    pub(crate) fn decode(
        &self,
        data: &[u8],
        rows: u32,
        scratch: &mut DecodeScratch,
        rgb: &mut Vec<u8>,
    ) -> Result<(), TileError> {
        match &self.codec {
            Codec::Jpeg { tables, tile } => jpeg::decode(data, tables, *tile, rows, &mut scratch.0, rgb),
            Codec::Samples { compression, has_predictor } => {
                rgb.resize(self.rgb_bytes(), 0);
                self.decode_samples(data, *compression, *has_predictor, rgb)
            }
        }
    }

    fn decode_samples(
        &self,
        data: &[u8],
        compression: SampleCompression,
        has_predictor: bool,
        out: &mut [u8],
    ) -> Result<(), TileError> {
        match compression {
            SampleCompression::None => copy(data, out)?,
            SampleCompression::Deflate => inflate(data, out)?,
            SampleCompression::Lzw => unlzw(data, out)?,
        }
        if has_predictor {
            for row in out.chunks_exact_mut(self.width * 3) {
                for at in 3..row.len() {
                    row[at] = row[at].wrapping_add(row[at - 3]);
                }
            }
        }
        Ok(())
    }
}

fn copy(data: &[u8], out: &mut [u8]) -> Result<(), TileError> {
    let pixels = data.get(..out.len()).ok_or_else(|| too_short(data.len(), out.len()))?;
    out.copy_from_slice(pixels);
    Ok(())
}

/// Inflates exactly as many bytes as `out` takes: a bomb is noticed at its first byte too many.
fn inflate(data: &[u8], out: &mut [u8]) -> Result<(), TileError> {
    let damaged = |fault: Cow<'static, str>| TileError::Damaged { compression: "deflate", fault: fault.into_owned() };
    let mut inflater = Decompress::new(true);
    let mut status =
        inflater.decompress(data, out, FlushDecompress::Finish).map_err(|error| damaged(error.to_string().into()))?;
    let expected = out.len();
    if status != Status::StreamEnd && inflater.total_out() == expected as u64 {
        // `out` is full before the end of the stream and its checksum were seen.
        let rest = usize::try_from(inflater.total_in()).ok().and_then(|read| data.get(read..)).unwrap_or_default();
        let mut extra = [0; 1];
        status = inflater
            .decompress(rest, &mut extra, FlushDecompress::Finish)
            .map_err(|error| damaged(error.to_string().into()))?;
        if inflater.total_out() > expected as u64 {
            let (found, expected) = ("more".to_owned(), format!("{expected} bytes"));
            return Err(TileError::WrongSize { found, expected });
        }
    }
    match status {
        Status::StreamEnd if inflater.total_out() == expected as u64 => Ok(()),
        Status::StreamEnd => Err(too_short(inflater.total_out(), expected)),
        _ => Err(damaged("it is cut off".into())),
    }
}

/// Unpacks exactly as many bytes as `out` takes; what may follow is ignored, as some writers leave the end code out.
fn unlzw(data: &[u8], out: &mut [u8]) -> Result<(), TileError> {
    // Before TIFF 6 the codes' bits lay the other way round.
    if let [0, second, ..] = data
        && second & 1 == 1
    {
        return Err(TileError::Unsupported("LZW of the old kind".to_owned()));
    }
    let mut decoder = weezl::decode::Decoder::with_tiff_size_switch(BitOrder::Msb, 8);
    let (mut read, mut written) = (0, 0);
    while written < out.len() {
        let step = decoder.decode_bytes(&data[read..], &mut out[written..]);
        read += step.consumed_in;
        written += step.consumed_out;
        match step.status {
            Ok(LzwStatus::Ok) if step.consumed_in + step.consumed_out > 0 => {}
            Ok(_) => break,
            Err(error) => return Err(TileError::Damaged { compression: "LZW", fault: error.to_string() }),
        }
    }
    if written < out.len() { Err(too_short(written, out.len())) } else { Ok(()) }
}

fn too_short(found: impl std::fmt::Display, expected: usize) -> TileError {
    TileError::WrongSize { found: format!("{found} bytes"), expected: format!("{expected} bytes") }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::Compression as Effort;
    use flate2::write::ZlibEncoder;

    use super::*;

    /// A level of one tile of 32 x 16 px.
    fn level(compression: Compression) -> TiledLevel {
        TiledLevel {
            width: 32,
            height: 16,
            tile_width: 32,
            tile_height: 16,
            compression,
            photometric: RGB,
            samples: 3,
            is_planar: false,
            bits: 8,
            sample_format: 1,
            predictor: 1,
            is_bit_reversed: false,
            jpeg_tables: None,
            tile_offsets: vec![8],
            tile_byte_counts: vec![1],
        }
    }

    fn pixels() -> Vec<u8> {
        (0..32 * 16 * 3_usize).map(|at| (at * 7 % 251).to_le_bytes()[0]).collect()
    }

    fn differences(pixels: &[u8]) -> Vec<u8> {
        let row = |row: &[u8]| -> Vec<u8> {
            (0..row.len()).map(|at| row[at].wrapping_sub(if at < 3 { 0 } else { row[at - 3] })).collect()
        };
        pixels.chunks_exact(32 * 3).flat_map(row).collect()
    }

    fn deflate(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = ZlibEncoder::new(Vec::new(), Effort::default());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn lzw(bytes: &[u8]) -> Vec<u8> {
        weezl::encode::Encoder::with_tiff_size_switch(BitOrder::Msb, 8).encode(bytes).unwrap()
    }

    fn decode(level: &TiledLevel, data: &[u8]) -> Result<Vec<u8>, TileError> {
        let decoder = TileDecoder::new(level)?;
        let mut rgb = vec![0xaa; 5];
        decoder.decode(data, 1, &mut DecodeScratch::default(), &mut rgb)?;
        assert_eq!(rgb.len(), decoder.rgb_bytes());
        Ok(rgb)
    }

    #[test]
    fn samples_come_back_with_and_without_predictor() {
        let plain = pixels();
        for predictor in [1, HORIZONTAL] {
            let stored = if predictor == 1 { plain.clone() } else { differences(&plain) };
            for (compression, data) in [
                (Compression::None, plain.clone()),
                (Compression::Deflate, deflate(&stored)),
                (Compression::Lzw, lzw(&stored)),
            ] {
                let level = TiledLevel { predictor, ..level(compression) };
                assert_eq!(decode(&level, &data).unwrap(), plain, "{compression:?} {predictor}");
            }
        }
    }

    #[test]
    fn data_that_is_cut_off_is_an_error_at_every_length() {
        for (compression, data) in [
            (Compression::None, pixels()),
            (Compression::Deflate, deflate(&pixels())),
            (Compression::Lzw, lzw(&pixels())),
        ] {
            // LZW's last bytes hold its end code, which may be missing.
            let end = if compression == Compression::Lzw { data.len() - 3 } else { data.len() };
            for len in 0..end {
                let error = decode(&level(compression), &data[..len]).unwrap_err();
                assert!(matches!(error, TileError::Damaged { .. } | TileError::WrongSize { .. }), "{error}");
            }
        }
    }

    #[test]
    fn bombs_and_wrong_checksums_are_refused() {
        let bomb = deflate(&vec![0; 10 << 20]);
        let error = decode(&level(Compression::Deflate), &bomb).unwrap_err();
        assert!(matches!(error, TileError::WrongSize { .. }), "{error}");
        let mut data = deflate(&pixels());
        *data.last_mut().unwrap() ^= 1;
        let error = decode(&level(Compression::Deflate), &data).unwrap_err();
        assert!(matches!(error, TileError::Damaged { .. }), "{error}");
    }

    #[test]
    fn what_is_not_supported_is_named() {
        let base = level(Compression::Deflate);
        for (level, expected) in [
            (TiledLevel { bits: 16, ..base.clone() }, "16-bit"),
            (TiledLevel { is_planar: true, ..base.clone() }, "plane per colour"),
            (TiledLevel { photometric: 1, samples: 1, ..base.clone() }, "1 samples"),
            (TiledLevel { photometric: YCBCR, ..base.clone() }, "photometric 6"),
            (TiledLevel { samples: 4, ..base.clone() }, "4 samples"),
            (TiledLevel { predictor: 3, ..base.clone() }, "predictor 3"),
            (TiledLevel { is_bit_reversed: true, ..base.clone() }, "reversed"),
            (TiledLevel { compression: Compression::Jpeg2000, ..base.clone() }, "JPEG 2000"),
            (TiledLevel { compression: Compression::Other(50_000), ..base }, "50000"),
        ] {
            let error = TileDecoder::new(&level).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
