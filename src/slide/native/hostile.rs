//! What fuzzing calls (`fuzz/`): nothing that a file can hold may crash the reader or make it take memory without limit.

use std::io::Cursor;

use super::decode::{DecodeScratch, TileDecoder};
use super::pyramid::{Compression, Pyramid, TiledLevel};

/// Tiles of a level that are decoded.
const TILES: usize = 4;
/// Levels with larger tiles than this are parsed, but not decoded: zeroing their pixels would be all that is fuzzed.
const MOST_BYTES: usize = 1 << 20;

/// Reads `bytes` as a slide: its directories, then the first tiles of every level.
pub fn read_file(bytes: &[u8]) {
    let Ok(pyramid) = Pyramid::parse(Cursor::new(bytes)) else { return };
    for level in &pyramid.levels {
        let places = level.tile_offsets.iter().zip(&level.tile_byte_counts).take(TILES);
        let tiles = places.filter_map(|(offset, count)| {
            let start = usize::try_from(*offset).ok()?;
            bytes.get(start..start.checked_add(*count as usize)?)
        });
        decode(level, level.tile_height, tiles);
    }
}

/// Decodes `bytes` as a tile: the first byte says what kind of level it is of, the second its size and how much of it is
/// needed, the third how many bytes of JPEG tables follow.
pub fn read_tile(bytes: &[u8]) {
    let &[kind, size, tables, ref rest @ ..] = bytes else { return };
    let compression = match kind % 4 {
        0 => Compression::Jpeg,
        1 => Compression::None,
        2 => Compression::Deflate,
        _ => Compression::Lzw,
    };
    let (tables, data) = rest.split_at(usize::from(tables).min(rest.len()));
    let side = |step: u8| 16 * (u32::from(step) + 1);
    let level = TiledLevel {
        width: side(size & 7),
        height: side(size >> 3 & 7),
        tile_width: side(size & 7),
        tile_height: side(size >> 3 & 7),
        compression,
        photometric: if kind & 4 == 0 { 2 } else { 6 },
        samples: 3,
        is_planar: false,
        bits: 8,
        sample_format: 1,
        predictor: if kind & 8 == 0 { 1 } else { 2 },
        is_bit_reversed: false,
        jpeg_tables: (!tables.is_empty()).then(|| tables.to_vec()),
        tile_offsets: vec![8],
        tile_byte_counts: vec![1],
    };
    let quarters = 4 - u32::from(size >> 6);
    decode(&level, level.tile_height * quarters / 4, [data].into_iter());
}

fn decode<'a>(level: &TiledLevel, rows: u32, tiles: impl Iterator<Item = &'a [u8]>) {
    let Ok(decoder) = TileDecoder::new(level) else { return };
    if decoder.rgb_bytes() > MOST_BYTES {
        return;
    }
    let (mut scratch, mut rgb) = (DecodeScratch::default(), Vec::new());
    for data in tiles {
        // Either is right; what counts is that it returns.
        decoder.decode(data, rows, &mut scratch, &mut rgb).ok();
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// What fuzzing has found worth keeping, read again; one input per file.
    fn corpus(target: &str, read: fn(&[u8])) {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
        let mut count = 0;
        for entry in std::fs::read_dir(&folder).unwrap() {
            read(&std::fs::read(entry.unwrap().path()).unwrap());
            count += 1;
        }
        assert!(count > 10, "{} holds {count} inputs", folder.display());
    }

    #[test]
    fn every_file_of_the_corpus_is_survived() {
        corpus("file", read_file);
    }

    #[test]
    fn every_tile_of_the_corpus_is_survived() {
        corpus("tile", read_tile);
    }
}
