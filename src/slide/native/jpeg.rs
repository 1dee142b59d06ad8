//! JPEG tiles: shared tables and a tile's data become one complete JPEG, which is decoded without forgiveness.
//!
//! zune-jpeg, even when strict, paints what it can of a JPEG that ends early. Two precautions turn every such end into
//! an error: the end marker is replaced by [`SENTINEL`], at which its bit reader fails, and the decoder must have gone
//! past it. What remains unnoticed is damage that decodes to as many blocks as are needed.
//!
//! Where only the upper rows of a tile are needed, its frame header is given a lower height, and the decoder stops there:
//! it then looks for the next marker, which must be the sentinel as well.

use zune_core::bytestream::{ZByteReaderTrait, ZCursor};
use zune_core::colorspace::ColorSpace;
use zune_core::options::DecoderOptions;
use zune_jpeg::JpegDecoder;

use super::error::TileError;

const SOI: u8 = 0xd8;
const EOI: u8 = 0xd9;
const SOS: u8 = 0xda;
const DQT: u8 = 0xdb;
const DHT: u8 = 0xc4;
const DRI: u8 = 0xdd;
/// Where a frame's segment has its height: behind the marker, the length and the precision.
const HEIGHT_AT: usize = 5;

/// Takes the end marker's place: 64 bits that the bit reader may fetch ahead, then a marker that has no meaning. The bits
/// are ones (0x00 follows 0xff by JPEG's rule), as no Huffman code is all ones: needed for decoding they are an error.
const SENTINEL: [u8; 18] = [0xff, 0, 0xff, 0, 0xff, 0, 0xff, 0, 0xff, 0, 0xff, 0, 0xff, 0, 0xff, 0, 0xff, 0x02];

/// Tables shared by the tiles of a level: the segments of a JPEG of tables only, without its start and end.
#[derive(Clone, Debug, Default)]
pub(crate) struct JpegTables(Vec<u8>);

impl JpegTables {
    /// Takes the value of the JPEGTables tag.
    pub(crate) fn parse(stored: &[u8]) -> Result<Self, TileError> {
        let mut tables = Vec::with_capacity(stored.len());
        // The end marker may be missing: the tag's length is an end, too.
        for segment in Segments::of(stored)? {
            let segment = segment?;
            if is_table(&segment)? {
                tables.extend_from_slice(segment.whole);
            }
        }
        Ok(Self(tables))
    }
}

/// What the TIFF says about a JPEG tile.
#[derive(Clone, Copy, Debug)]
pub(crate) struct JpegTile {
    pub(crate) width: u32,
    pub(crate) height: u32,
    /// Whether the components are R, G and B. The TIFF decides, not the JPEG's markers, as in libtiff.
    pub(crate) is_rgb: bool,
}

/// Decodes at least the first `rows` rows of a tile's data into `rgb`; what both held before is lost.
pub(crate) fn decode(
    data: &[u8],
    tables: &JpegTables,
    tile: JpegTile,
    rows: u32,
    scratch: &mut Vec<u8>,
    rgb: &mut Vec<u8>,
) -> Result<(), TileError> {
    let height = complete(data, tables, tile, rows, scratch)?;
    rgb.resize(tile.width as usize * usize::from(height) * 3, 0);
    let options = DecoderOptions::new_fast()
        .set_strict_mode(true)
        .set_max_width(tile.width as usize)
        .set_max_height(tile.height as usize)
        .jpeg_set_out_colorspace(ColorSpace::RGB);
    let mut cursor = ZCursor::new(scratch.as_slice());
    let mut decoder = JpegDecoder::new_with_options(&mut cursor, options);
    decoder.decode_headers().map_err(|error| damaged(error.to_string()))?;
    match (tile.is_rgb, decoder.input_colorspace()) {
        // Equal colour spaces on both sides mean no conversion. (An Adobe marker with transform 0 would say the same,
        // but to zune-jpeg it says CMYK, which a strict decoder refuses for 3 components.)
        (true, Some(stored)) => decoder.set_options(options.jpeg_set_out_colorspace(stored)),
        (false, Some(ColorSpace::YCbCr)) => {}
        (_, stored) => return Err(TileError::Unsupported(format!("a YCbCr image of {stored:?} JPEGs"))),
    }
    decoder.decode_into(rgb).map_err(|error| damaged(error.to_string()))?;
    drop(decoder);
    if cursor.z_position().ok() != Some(scratch.len() as u64) {
        return Err(damaged("it ends before all blocks are there".to_owned()));
    }
    Ok(())
}

/// Writes one complete JPEG into `out`, with the sentinel for an end, and a height that suffices for `rows`; returns that.
fn complete(data: &[u8], tables: &JpegTables, tile: JpegTile, rows: u32, out: &mut Vec<u8>) -> Result<u16, TileError> {
    // Some writers pad a tile to an even length.
    let end = data.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    let data = data[..end].strip_suffix(&[0xff, EOI]);
    let data = data.ok_or_else(|| damaged("it has no end marker, so it is cut off".to_owned()))?;
    out.clear();
    out.extend_from_slice(&[0xff, SOI]);
    out.extend_from_slice(&tables.0);
    let mut frame = None;
    let mut segments = Segments::of(data)?;
    while let Some(segment) = segments.next() {
        let segment = segment?;
        match segment.marker {
            0xc0 | 0xc1 => {
                frame = Some((out.len(), check_frame(segment.payload, tile)?));
                out.extend_from_slice(segment.whole);
            }
            0xc2..=0xcf if segment.marker != DHT => {
                let kind = if segment.marker == 0xc2 { "a progressive" } else { "a lossless, arithmetic or other" };
                return Err(TileError::Unsupported(format!("{kind} JPEG (marker {:02x})", segment.marker)));
            }
            SOS => {
                let Some((at, frame)) = frame else { return Err(damaged("its scan has no frame".to_owned())) };
                if segment.payload.first() != Some(&3) {
                    return Err(TileError::Unsupported("a JPEG with a scan for each component".to_owned()));
                }
                if has_marker(segments.rest) {
                    return Err(damaged("it has a marker amid its data".to_owned()));
                }
                let height = frame.height_for(rows);
                out[at + HEIGHT_AT..][..2].copy_from_slice(&height.to_be_bytes());
                out.extend_from_slice(segment.whole);
                out.extend_from_slice(segments.rest);
                out.extend_from_slice(&SENTINEL);
                return Ok(height);
            }
            // Comments and application markers are not passed on: what they may say about colours, the TIFF has said.
            _ if is_table(&segment)? => out.extend_from_slice(segment.whole),
            _ => {}
        }
    }
    Err(damaged("it has no scan".to_owned()))
}

/// Whether a scan's data, which has no restarts, is interrupted: the decoder would go on as if nothing were missing.
fn has_marker(scan: &[u8]) -> bool {
    // No early end, so that the compiler compares many bytes at once. 0xff may fill up the data before its end.
    let after = scan.iter().skip(1);
    scan.iter().zip(after).fold(false, |found, (byte, next)| found | (*byte == 0xff && *next != 0 && *next != 0xff))
}

/// What a frame header says.
#[derive(Clone, Copy)]
struct Frame {
    height: u16,
    /// Rows of blocks in a unit of the scan.
    block_rows: u16,
}

impl Frame {
    /// The height down to which must be decoded for the first `rows` rows. Enlarging colour takes rows from the next unit.
    fn height_for(self, rows: u32) -> u16 {
        let unit = 8 * self.block_rows;
        let beyond = if self.block_rows > 1 { unit } else { 0 };
        let rows = u16::try_from(rows).unwrap_or(u16::MAX);
        rows.checked_next_multiple_of(unit).map_or(self.height, |rows| rows.saturating_add(beyond).min(self.height))
    }
}

/// Checks a frame header's payload: precision, height, width, number of components, then three bytes for each.
fn check_frame(frame: &[u8], tile: JpegTile) -> Result<Frame, TileError> {
    let &[bits, height_high, height_low, width_high, width_low, components, ref each @ ..] = frame else {
        return Err(damaged("its frame header is cut off".to_owned()));
    };
    if bits != 8 || components != 3 {
        return Err(TileError::Unsupported(format!("a JPEG of {components} components of {bits} bits")));
    }
    let width = u16::from_be_bytes([width_high, width_low]);
    let height = u16::from_be_bytes([height_high, height_low]);
    if (u32::from(width), u32::from(height)) != (tile.width, tile.height) {
        let (found, expected) = (format!("{width} x {height} px"), format!("{} x {} px", tile.width, tile.height));
        return Err(TileError::WrongSize { found, expected });
    }
    let block_rows = each.chunks_exact(3).map(|component| u16::from(component[1] & 15)).max();
    Ok(Frame { height, block_rows: block_rows.unwrap_or(0).max(1) })
}

/// Whether a segment has tables, which the decoder needs. Restarts are refused: the decoder takes the sentinel for a damaged
/// one, and without the sentinel it makes up pixels where data is missing.
fn is_table(segment: &Segment<'_>) -> Result<bool, TileError> {
    if segment.marker == DRI && segment.payload.iter().any(|byte| *byte != 0) {
        return Err(TileError::Unsupported("a JPEG with restart intervals".to_owned()));
    }
    Ok(matches!(segment.marker, DQT | DHT))
}

fn damaged(fault: String) -> TileError {
    TileError::Damaged { compression: "JPEG", fault }
}

/// A marker segment.
struct Segment<'a> {
    marker: u8,
    /// From the marker's 0xff to the end of the payload.
    whole: &'a [u8],
    /// What follows the length.
    payload: &'a [u8],
}

/// The marker segments after the start marker, up to the end marker or the end of the bytes.
struct Segments<'a> {
    /// What was not read yet.
    rest: &'a [u8],
}

impl<'a> Segments<'a> {
    fn of(jpeg: &'a [u8]) -> Result<Self, TileError> {
        let rest = jpeg.strip_prefix(&[0xff, SOI]);
        Ok(Self { rest: rest.ok_or_else(|| damaged("it has no start marker".to_owned()))? })
    }
}

impl<'a> Iterator for Segments<'a> {
    type Item = Result<Segment<'a>, TileError>;

    fn next(&mut self) -> Option<Self::Item> {
        // A marker may be preceded by any number of 0xff.
        while let [0xff, 0xff, ..] = self.rest {
            self.rest = &self.rest[1..];
        }
        let &[0xff, marker, ref after @ ..] = self.rest else {
            let is_end = self.rest.is_empty();
            self.rest = &[];
            return (!is_end).then(|| Err(damaged("its header has bytes between segments".to_owned())));
        };
        if marker == EOI {
            self.rest = &[];
            return None;
        }
        let len = after.first_chunk().map_or(0, |len| usize::from(u16::from_be_bytes(*len)));
        let Some((body, _)) = after.split_at_checked(len).filter(|_| len >= 2) else {
            self.rest = &[];
            return Some(Err(damaged("its header is cut off".to_owned())));
        };
        let (whole, rest) = self.rest.split_at(2 + len);
        self.rest = rest;
        Some(Ok(Segment { marker, whole, payload: &body[2..] }))
    }
}

#[cfg(test)]
mod tests {
    use jpeg_encoder::{ColorType, Encoder, SamplingFactor};

    use super::*;

    const TILE: JpegTile = JpegTile { width: 48, height: 64, is_rgb: false };

    fn pixels() -> Vec<u8> {
        let low = |value: usize| value.to_le_bytes()[0];
        let noise = |at: usize| low(at.wrapping_mul(2_654_435_761) >> 7) / 4;
        (0..48 * 64).flat_map(|at| [low(at % 48 * 4) + noise(at) / 4, low(at / 48 * 3), 90 + noise(at)]).collect()
    }

    fn jpeg(sampling: SamplingFactor) -> Vec<u8> {
        let mut data = Vec::new();
        let mut encoder = Encoder::new(&mut data, 90);
        encoder.set_sampling_factor(sampling);
        encoder.encode(&pixels(), 48, 64, ColorType::Rgb).unwrap();
        data
    }

    /// Takes the tables out of a JPEG, as TIFF writers do.
    fn split(jpeg: &[u8]) -> (Vec<u8>, Vec<u8>) {
        let (mut tables, mut rest) = (vec![0xff, SOI], vec![0xff, SOI]);
        let mut segments = Segments::of(jpeg).unwrap();
        while let Some(segment) = segments.next() {
            let segment = segment.unwrap();
            if is_table(&segment).unwrap() { &mut tables } else { &mut rest }.extend(segment.whole);
            if segment.marker == SOS {
                rest.extend(segments.rest);
                break;
            }
        }
        tables.extend([0xff, EOI]);
        (tables, rest)
    }

    fn decode_tile(data: &[u8], tables: &JpegTables, tile: JpegTile) -> Result<Vec<u8>, TileError> {
        decode_rows(data, tables, tile, tile.height)
    }

    fn decode_rows(data: &[u8], tables: &JpegTables, tile: JpegTile, rows: u32) -> Result<Vec<u8>, TileError> {
        let mut rgb = vec![7; 9];
        decode(data, tables, tile, rows, &mut Vec::new(), &mut rgb).map(|()| rgb)
    }

    /// Rows that were decoded.
    fn height(rgb: &[u8]) -> usize {
        rgb.len() / (48 * 3)
    }

    fn mean_difference(left: &[u8], right: &[u8]) -> f64 {
        left.iter().zip(right).map(|(left, right)| f64::from(left.abs_diff(*right))).sum::<f64>() / left.len() as f64
    }

    #[test]
    fn tables_may_be_apart_and_tiles_padded() {
        for sampling in [SamplingFactor::R_4_4_4, SamplingFactor::R_4_2_2, SamplingFactor::R_4_2_0] {
            let whole = jpeg(sampling);
            let expected = decode_tile(&whole, &JpegTables::default(), TILE).unwrap();
            let limit = if sampling == SamplingFactor::R_4_4_4 { 5.0 } else { 15.0 };
            let difference = mean_difference(&expected, &pixels());
            assert!(difference < limit, "{difference}");
            let (tables, mut data) = split(&whole);
            data.push(0);
            let spliced = decode_tile(&data, &JpegTables::parse(&tables).unwrap(), TILE).unwrap();
            assert_eq!(spliced, expected);
            // Without the tables there is nothing to decode by.
            assert!(decode_tile(&data, &JpegTables::default(), TILE).is_err());
        }
    }

    #[test]
    fn the_first_rows_are_those_of_the_whole_tile() {
        let samplings =
            [SamplingFactor::R_4_4_4, SamplingFactor::R_4_4_0, SamplingFactor::R_4_2_2, SamplingFactor::R_4_2_0];
        for sampling in samplings {
            let data = jpeg(sampling);
            let whole = decode_tile(&data, &JpegTables::default(), TILE).unwrap();
            for rows in 1..=64 {
                let rgb = decode_rows(&data, &JpegTables::default(), TILE, rows).unwrap();
                let needed = rows as usize * 48 * 3;
                assert!(rgb[..needed] == whole[..needed], "{sampling:?}: {rows} rows");
                assert!(rows > 32 || height(&rgb) < 64, "{sampling:?}: {} for {rows} rows", height(&rgb));
            }
        }
    }

    #[test]
    fn a_scan_for_each_component_is_refused() {
        // This encoder writes 4:1:1 so. Cut off before its second scan, the decoder would make up the colours.
        let data = jpeg(SamplingFactor::R_4_1_1);
        let scans: Vec<usize> = (0..data.len() - 1).filter(|at| data[*at..*at + 2] == [0xff, SOS]).collect();
        assert_eq!(scans.len(), 3);
        for end in [data.len(), scans[1], scans[2]] {
            let error = decode_tile(&[&data[..end], &[0xff, EOI]].concat(), &JpegTables::default(), TILE).unwrap_err();
            assert!(matches!(&error, TileError::Unsupported(what) if what.contains("each component")), "{error}");
        }
    }

    #[test]
    fn nothing_but_data_may_follow_the_head_of_a_scan() {
        let data = jpeg(SamplingFactor::R_4_2_0);
        let scan = data.windows(2).position(|pair| pair == [0xff, SOS]).unwrap();
        let amid = (scan + 100..).find(|at| data[*at - 1] != 0xff).unwrap();
        for segment in [&data[scan..scan + 14], &[0xff, DRI, 0, 4, 0, 1], &[0xff, EOI], &[0xff, 0xd0]] {
            let interrupted = [&data[..amid], segment, &data[amid..]].concat();
            let error = decode_tile(&interrupted, &JpegTables::default(), TILE).unwrap_err();
            assert!(error.to_string().contains("marker amid its data"), "{error}");
        }
    }

    #[test]
    fn restarts_are_refused_wherever_they_are_announced() {
        let mut data = Vec::new();
        let mut encoder = Encoder::new(&mut data, 90);
        encoder.set_restart_interval(2);
        encoder.encode(&pixels(), 48, 64, ColorType::Rgb).unwrap();
        let error = decode_tile(&data, &JpegTables::default(), TILE).unwrap_err();
        assert!(matches!(&error, TileError::Unsupported(what) if what.contains("restart")), "{error}");
        let announced = data.windows(2).position(|pair| pair == [0xff, DRI]).unwrap();
        let tables = [&[0xff, SOI], &data[announced..announced + 6], &[0xff, EOI]].concat();
        assert!(matches!(JpegTables::parse(&tables), Err(TileError::Unsupported(_))));
        // An interval of nothing announces none.
        let plain = jpeg(SamplingFactor::R_4_4_4);
        let none = [&plain[..2], &[0xff, DRI, 0, 4, 0, 0], &plain[2..]].concat();
        let decode = |data| decode_tile(data, &JpegTables::default(), TILE).unwrap();
        assert!(decode(&none) == decode(&plain));
    }

    #[test]
    fn what_ends_within_the_needed_rows_is_an_error() {
        for sampling in [SamplingFactor::R_4_4_4, SamplingFactor::R_4_2_0] {
            let data = jpeg(sampling);
            let whole = decode_tile(&data, &JpegTables::default(), TILE).unwrap();
            let scan = data.windows(2).position(|pair| pair == [0xff, SOS]).unwrap() + 14;
            let (mut sound, mut refused) = (0, 0);
            for len in (scan..data.len() - 2).filter(|len| data[len - 1] != 0xff) {
                let cut = [&data[..len], &[0xff, EOI]].concat();
                match decode_rows(&cut, &JpegTables::default(), TILE, 16) {
                    // All of the needed rows was there.
                    Ok(rgb) if rgb[..16 * 48 * 3] == whole[..16 * 48 * 3] => sound += 1,
                    Ok(_) => panic!("pixels were made up for data cut at {len} of {}", data.len()),
                    Err(_) => refused += 1,
                }
                // A marker amid the data, wherever it is.
                let mut ended = data.clone();
                ended[len..len + 2].copy_from_slice(&[0xff, EOI]);
                assert!(decode_rows(&ended, &JpegTables::default(), TILE, 16).is_err(), "marker at {len}");
            }
            assert!(sound > 100 && refused > 100, "{sampling:?}: {sound} sound, {refused} refused");
        }
    }

    #[test]
    fn the_tiff_decides_on_colours() {
        // An Adobe marker of any opinion changes nothing.
        let plain = jpeg(SamplingFactor::R_4_4_4);
        let as_rgb = JpegTile { is_rgb: true, ..TILE };
        let converted = decode_tile(&plain, &JpegTables::default(), TILE).unwrap();
        let raw = decode_tile(&plain, &JpegTables::default(), as_rgb).unwrap();
        assert!(mean_difference(&raw, &converted) > 20.0);
        for transform in [0, 1, 2] {
            let mut marked = plain[..2].to_vec();
            marked.extend(*b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00");
            marked.push(transform);
            marked.extend(&plain[2..]);
            assert_eq!(decode_tile(&marked, &JpegTables::default(), TILE).unwrap(), converted);
            assert_eq!(decode_tile(&marked, &JpegTables::default(), as_rgb).unwrap(), raw);
        }
    }

    #[test]
    fn components_named_r_g_b_are_not_converted() {
        let mut data = jpeg(SamplingFactor::R_4_4_4);
        let expected = decode_tile(&data, &JpegTables::default(), JpegTile { is_rgb: true, ..TILE }).unwrap();
        let frame = data.windows(2).position(|pair| pair == [0xff, 0xc0]).unwrap();
        let scan = data.windows(2).position(|pair| pair == [0xff, SOS]).unwrap();
        for (index, name) in (0..).zip(*b"RGB") {
            data[frame + 10 + 3 * index] = name;
            data[scan + 5 + 2 * index] = name;
        }
        let rgb = decode_tile(&data, &JpegTables::default(), JpegTile { is_rgb: true, ..TILE }).unwrap();
        assert_eq!(rgb, expected);
        let error = decode_tile(&data, &JpegTables::default(), TILE).unwrap_err();
        assert!(matches!(error, TileError::Unsupported(_)), "{error}");
    }

    #[test]
    fn a_tile_that_ends_early_is_an_error() {
        for sampling in [SamplingFactor::R_4_4_4, SamplingFactor::R_4_2_0] {
            let data = jpeg(sampling);
            for len in (0..data.len()).filter(|len| len % 5 == 0 || len + 60 > data.len()) {
                assert!(decode_tile(&data[..len], &JpegTables::default(), TILE).is_err(), "cut at {len}");
            }
            // Cut off and ended properly, as a repairing copy would.
            let scan = data.windows(2).position(|pair| pair == [0xff, SOS]).unwrap() + 14;
            let end = data.len() - 2;
            for len in (scan..end - 2).filter(|len| len % 7 == 0 || len + 60 > end) {
                let mut cut = data[..len].to_vec();
                if cut.ends_with(&[0xff]) {
                    continue;
                }
                cut.extend([0xff, EOI]);
                assert!(decode_tile(&cut, &JpegTables::default(), TILE).is_err(), "cut at {len} of {end}");
                // An end marker, or a restart that no one announced, amid the data.
                for marker in [EOI, 0xd0] {
                    let mut ended = data.clone();
                    ended[len..len + 2].copy_from_slice(&[0xff, marker]);
                    if ended[len - 1] != 0xff {
                        assert!(decode_tile(&ended, &JpegTables::default(), TILE).is_err(), "{marker:x} at {len}");
                    }
                }
            }
        }
    }

    #[test]
    fn damaged_jpegs_never_panic() {
        let sound = jpeg(SamplingFactor::R_4_2_0);
        let mut state = 1u32;
        for _ in 0..5000 {
            let mut damaged = sound.clone();
            for _ in 0..2 {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let at = (state >> 8) as usize % damaged.len();
                damaged[at] = state.to_le_bytes()[0];
            }
            let _ = decode_tile(&damaged, &JpegTables::default(), TILE);
        }
    }

    #[test]
    fn other_sizes_and_kinds_are_refused() {
        let data = jpeg(SamplingFactor::R_4_4_4);
        let error = decode_tile(&data, &JpegTables::default(), JpegTile { width: 64, height: 48, ..TILE }).unwrap_err();
        assert!(matches!(error, TileError::WrongSize { .. }), "{error}");
        let mut progressive = Vec::new();
        let mut encoder = Encoder::new(&mut progressive, 90);
        encoder.set_progressive(true);
        encoder.encode(&pixels(), 48, 64, ColorType::Rgb).unwrap();
        let error = decode_tile(&progressive, &JpegTables::default(), TILE).unwrap_err();
        assert!(error.to_string().contains("progressive"), "{error}");
        let mut gray = Vec::new();
        Encoder::new(&mut gray, 90).encode(&pixels()[..48 * 64], 48, 64, ColorType::Luma).unwrap();
        let error = decode_tile(&gray, &JpegTables::default(), TILE).unwrap_err();
        assert!(error.to_string().contains("1 components"), "{error}");
    }
}
