//! Reads tiled TIFF slides without OpenSlide: directories → [`pyramid`] → [`NativeLevel`] → [`decode`] → RGB8.
//!
//! ```text
//! pyramid    the directories, once: which are levels, where their tiles lie (tags, description: its parts)
//! agreement  whether pixels are those of OpenSlide, tried when a slide is opened
//! decode     one tile's bytes → its pixels (jpeg: JPEG's part of it)
//! cache      decoded tiles, shared by all threads, each decoded once
//! ```

pub(super) mod agreement;
mod cache;
mod decode;
mod description;
mod error;
#[cfg(any(test, fuzzing))]
#[cfg_attr(not(fuzzing), expect(unreachable_pub, reason = "fuzz targets alone call it from outside"))]
pub mod hostile;
mod jpeg;
pub(super) mod pyramid;
mod tags;
#[cfg(test)]
pub(super) mod tiff_builder;

use std::fs::File;
use std::io::BufReader;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use self::cache::TileCache;
use self::decode::{DecodeScratch, TileDecoder};
pub(super) use self::error::PyramidError;
pub use self::error::TileError;
use self::pyramid::{Pyramid, TiledLevel};
use super::error::DecodeError;
use super::source::{LevelRect, LevelSource, Shift, fill};
use super::{LevelInfo, Slide, SlideError};
use crate::geometry::Level;

/// Bytes of decoded tiles that are held at most. Reading row by row needs two rows of the file's tiles: 150 MB where a
/// slide 100,000 px wide has tissue from edge to edge.
const CACHE_BYTES: usize = 256 << 20;
/// How far beyond a tile that another thread decodes, in tiles, a thread looks for one to decode meanwhile.
const TILES_AHEAD: usize = 8;

/// Reads the directories of a file, and makes sure that each level can be decoded.
pub(super) fn pyramid_of(path: &Path) -> Result<Pyramid, PyramidError> {
    let pyramid = Pyramid::parse(BufReader::new(File::open(path)?))?;
    for level in &pyramid.levels {
        TileDecoder::new(level).map_err(|error| match error {
            TileError::Unsupported(what) => PyramidError::Unsupported(what),
            other => PyramidError::Unsupported(format!("a slide whose JPEG tables are unusable ({other})")),
        })?;
    }
    Ok(pyramid)
}

/// One level open for reading by any number of threads, which share what they decode.
#[derive(Debug)]
pub(super) struct NativeLevel {
    path: PathBuf,
    file: File,
    pyramid: Arc<Pyramid>,
    level: Level,
    info: LevelInfo,
    decoder: TileDecoder,
    /// The colour of what lies outside the slide and of tiles that the file doesn't have.
    background: [u8; 3],
    cache: TileCache,
    /// Down to which row the planned reads need each tile.
    rows: Vec<u16>,
}

/// A thread's access to a level, with what it needs while it decodes.
#[derive(Debug)]
pub(super) struct NativeSource {
    level: Arc<NativeLevel>,
    data: Vec<u8>,
    scratch: DecodeScratch,
}

/// The part of a tile that a read needs, all in pixels.
struct Overlap {
    /// Left and top edge within the tile.
    tile_x: usize,
    tile_y: usize,
    /// Left and top edge within the read.
    out_x: usize,
    out_y: usize,
    width: usize,
    height: usize,
}

impl NativeLevel {
    /// Opens a level of which `planned` will be read, each rectangle once.
    ///
    /// # Errors
    /// [`SlideError`] if the file can't be opened or there is no such level.
    pub(super) fn open(
        slide: &Slide,
        pyramid: &Arc<Pyramid>,
        level: Level,
        planned: impl Iterator<Item = LevelRect>,
    ) -> Result<Self, SlideError> {
        let path = slide.path.clone();
        let file = File::open(&path).map_err(|source| SlideError::Io { path: path.clone(), source })?;
        let info = slide.level_info(level)?;
        let absurd = SlideError::AbsurdLevel { path: path.clone(), level, width: info.width, height: info.height };
        let tiled = pyramid.levels.get(level.0 as usize).ok_or(absurd)?;
        let decoder = TileDecoder::new(tiled)
            .map_err(|error| SlideError::NotNative { path: path.clone(), reason: error.to_string() })?;
        let Needs { reads, rows } = needs(tiled, planned);
        let (pyramid, background) = (Arc::clone(pyramid), slide.background);
        let cache = TileCache::new(CACHE_BYTES, reads);
        Ok(Self { path, file, pyramid, level, info, decoder, background, cache, rows })
    }

    /// Access for one more thread.
    pub(super) fn source(self: &Arc<Self>) -> NativeSource {
        NativeSource { level: Arc::clone(self), data: Vec::new(), scratch: DecodeScratch::default() }
    }

    /// Lowers the memory that decoded tiles may take between two reads.
    pub(super) fn hold_at_most(&self, bytes: usize) {
        self.cache.hold_at_most(bytes);
    }

    fn tiled(&self) -> &TiledLevel {
        &self.pyramid.levels[self.level.0 as usize]
    }
}

impl LevelSource for NativeSource {
    fn hold_at_most(&mut self, bytes: usize) {
        self.level.hold_at_most(bytes);
    }

    fn read(&mut self, rect: LevelRect, rgb: &mut Vec<u8>) -> Result<Shift, SlideError> {
        let Self { level, data, scratch } = self;
        let tiled = level.tiled();
        let row_bytes = rect.width as usize * 3;
        rgb.resize(row_bytes * rect.height as usize, 0);
        let inside = rect.clipped((tiled.width, tiled.height));
        if inside.is_none_or(|part| (part.width, part.height) != (rect.width, rect.height)) {
            fill(rgb, level.background);
        }
        let mut failure = None;
        let mut place = |tile: u32, part: &Overlap| {
            if failure.is_some() {
                level.cache.forgo(tile);
                return;
            }
            let out = &mut rgb[part.out_y * row_bytes..];
            match level.tile(tile, part.tile_y + part.height, data, scratch) {
                Ok(Some(pixels)) => {
                    part.copy(&pixels, tiled.tile_width as usize * 3, out, row_bytes);
                    level.cache.give_back(pixels);
                }
                Ok(None) => {
                    for row in out.chunks_exact_mut(row_bytes).take(part.height) {
                        fill(&mut row[part.out_x * 3..][..part.width * 3], level.background);
                    }
                }
                Err(source) => {
                    level.cache.forgo(tile);
                    failure = Some(DecodeError::Native { tile, source });
                }
            }
        };
        // What another thread is about to have, comes last: there is no waiting while there is something to decode.
        let mut elsewhere = Vec::new();
        for (tile, part) in overlaps(tiled, rect) {
            match level.cache.is_pending(tile) {
                true => elsewhere.push((tile, part)),
                false => place(tile, &part),
            }
        }
        elsewhere.iter().for_each(|(tile, part)| place(*tile, part));
        match failure {
            None => Ok(Shift::default()),
            Some(source) => {
                let region = rect.level0(&level.info);
                Err(SlideError::Read { path: level.path.clone(), level: level.level, region, source })
            }
        }
    }
}

impl NativeLevel {
    /// The pixels of a tile down to row `rows` at least, `[rows, tile_width, 3]`; `None` if the file doesn't have the tile.
    fn tile(
        &self,
        tile: u32,
        rows: usize,
        data: &mut Vec<u8>,
        scratch: &mut DecodeScratch,
    ) -> Result<Option<Arc<Vec<u8>>>, TileError> {
        if self.tiled().tile_data(tile).is_none() {
            return Ok(None);
        }
        if rows > self.planned_rows(tile) as usize {
            let mut rgb = Vec::new();
            self.decode(tile, self.tiled().tile_height, data, scratch, &mut rgb)?;
            return Ok(Some(Arc::new(rgb)));
        }
        // While another thread decodes it, this one does what comes next instead of waiting.
        while self.cache.is_pending(tile) && self.decode_ahead(tile, data, scratch) {}
        let decode = |rgb: &mut Vec<u8>| self.decode(tile, self.planned_rows(tile), data, scratch, rgb);
        self.cache.get(tile, self.decoder.rgb_bytes(), decode).map(Some)
    }

    /// How much of a tile is decoded for all planned reads; the whole tile if none needs it.
    fn planned_rows(&self, tile: u32) -> u32 {
        let planned = self.rows.get(tile as usize).copied().filter(|rows| *rows > 0);
        planned.map_or(self.tiled().tile_height, u32::from)
    }

    /// Decodes one of the tiles to the right of `tile`; says whether there was one to decode.
    fn decode_ahead(&self, tile: u32, data: &mut Vec<u8>, scratch: &mut DecodeScratch) -> bool {
        let next = (tile.saturating_add(1)..).take(TILES_AHEAD).filter(|tile| self.tiled().tile_data(*tile).is_some());
        let decoded = self.cache.ahead(next, self.decoder.rgb_bytes(), |tile, rgb| {
            self.decode(tile, self.planned_rows(tile), data, scratch, rgb)
        });
        // An error is told by the read that needs the tile.
        decoded.unwrap_or(false)
    }

    fn decode(
        &self,
        tile: u32,
        rows: u32,
        data: &mut Vec<u8>,
        scratch: &mut DecodeScratch,
        rgb: &mut Vec<u8>,
    ) -> Result<(), TileError> {
        let (offset, bytes) = self.tiled().tile_data(tile).unwrap_or_default();
        data.resize(bytes as usize, 0);
        self.file.read_exact_at(data, offset)?;
        self.decoder.decode(data, rows, scratch, rgb)
    }
}

/// What planned reads need of each tile of a level.
struct Needs {
    /// How many need it.
    reads: Vec<u16>,
    /// Down to which row.
    rows: Vec<u16>,
}

fn needs(level: &TiledLevel, planned: impl Iterator<Item = LevelRect>) -> Needs {
    let tiles = level.tile_byte_counts.len();
    let mut needs = Needs { reads: vec![0; tiles], rows: vec![0; tiles] };
    for (tile, part) in planned.flat_map(|rect| overlaps(level, rect)) {
        if let Some((reads, rows)) = needs.reads.get_mut(tile as usize).zip(needs.rows.get_mut(tile as usize)) {
            *reads = reads.saturating_add(1);
            *rows = u16::try_from(part.tile_y + part.height).unwrap_or(u16::MAX).max(*rows);
        }
    }
    needs
}

/// Memory of the decoded tiles that are held at most between the reads of `planned`, and of one of them.
pub(super) fn held_bytes(
    pyramid: &Pyramid,
    level: Level,
    planned: impl Iterator<Item = LevelRect> + Clone,
) -> (u64, u64) {
    let Some(level) = pyramid.levels.get(level.0 as usize) else { return (0, 0) };
    let tile_bytes = u64::from(level.tile_width) * u64::from(level.tile_height) * 3;
    let all = needs(level, planned.clone()).reads;
    let mut left = all.clone();
    let (mut held, mut most) = (0, 0);
    for (tile, _) in planned.flat_map(|rect| overlaps(level, rect)) {
        let tile = tile as usize;
        let Some((left, all)) = left.get_mut(tile).zip(all.get(tile)) else { continue };
        held += u64::from(left == all && *all > 1);
        most = most.max(held);
        *left = left.saturating_sub(1);
        held -= u64::from(*left == 0 && *all > 1);
    }
    ((most * tile_bytes).min(CACHE_BYTES as u64), tile_bytes)
}

impl Overlap {
    fn copy(&self, tile: &[u8], tile_row_bytes: usize, out: &mut [u8], out_row_bytes: usize) {
        let rows = tile.chunks_exact(tile_row_bytes).skip(self.tile_y).take(self.height);
        for (from, to) in rows.zip(out.chunks_exact_mut(out_row_bytes)) {
            to[self.out_x * 3..][..self.width * 3].copy_from_slice(&from[self.tile_x * 3..][..self.width * 3]);
        }
    }
}

/// The tiles that a rectangle touches, row by row, each with what the rectangle needs of it.
fn overlaps(level: &TiledLevel, rect: LevelRect) -> impl Iterator<Item = (u32, Overlap)> + use<> {
    let across = level.tiles_across();
    let part = rect.clipped((level.width, level.height));
    let columns = part.map(|part| spans(part.x, part.width, part.left, level.tile_width));
    let rows = part.map(|part| spans(part.y, part.height, part.top, level.tile_height));
    rows.into_iter().flatten().flat_map(move |row| {
        columns.clone().into_iter().flatten().map(move |column| {
            let overlap = Overlap {
                tile_x: column.tile_start,
                tile_y: row.tile_start,
                out_x: column.out_start,
                out_y: row.out_start,
                width: column.len,
                height: row.len,
            };
            (row.tile * across + column.tile, overlap)
        })
    })
}

/// One axis of an [`Overlap`].
struct Span {
    tile: u32,
    tile_start: usize,
    out_start: usize,
    len: usize,
}

/// The tiles along one axis that `start..start+len` touches, a range within the level that begins `out_start` pixels
/// after the read does.
fn spans(start: u32, len: u32, out_start: usize, tile: u32) -> impl Iterator<Item = Span> + Clone {
    let end = start.saturating_add(len);
    (start / tile..end.div_ceil(tile)).map(move |index| {
        let tile_left = index * tile;
        let from = start.max(tile_left);
        let to = end.min(tile_left.saturating_add(tile));
        let out_start = out_start + (from - start) as usize;
        Span { tile: index, tile_start: (from - tile_left) as usize, out_start, len: (to - from) as usize }
    })
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use jpeg_encoder::{ColorType, Encoder, SamplingFactor};

    use super::tiff_builder::{TiffBuilder, Values, rgb_image, with};
    use super::*;
    use crate::slide::source;

    const WIDTH: i64 = 100;
    const HEIGHT: i64 = 60;

    fn pixel(x: i64, y: i64) -> [u8; 3] {
        [x, y, x * y].map(|value| value.to_le_bytes()[0])
    }

    fn is_absent(x: i64, y: i64) -> bool {
        (32..48).contains(&x) && (16..32).contains(&y)
    }

    /// 100 × 60 px in uncompressed tiles of 16 px, of which the one at (2, 1) is absent.
    fn slide(folder: &TempDir) -> Slide {
        let mut tiff = TiffBuilder::new(false, false);
        let mut tiles = Vec::new();
        for (row, column) in (0..4).flat_map(|row| (0..7).map(move |column| (row, column))) {
            let rgb = (0..256).flat_map(|at| pixel(column * 16 + at % 16, row * 16 + at / 16));
            let bytes: Vec<u8> = rgb.collect();
            let is_absent = is_absent(column * 16, row * 16);
            tiles.push(if is_absent { (0, 0) } else { (tiff.data(&bytes), 768) });
        }
        let entries = rgb_image((100, 60), 16, (1, 1), &tiles);
        tiff.directory(&entries);
        let path = folder.path().join("slide.tif");
        std::fs::write(&path, tiff.finish()).unwrap();
        let slide = Slide::of_pyramid(&path, pyramid_of(&path).unwrap()).unwrap();
        Slide { background: [0, 0, 200], ..slide }
    }

    fn expected(rect: LevelRect) -> Vec<u8> {
        let (width, height) = (i64::from(rect.width), i64::from(rect.height));
        (0..width * height)
            .flat_map(|at| {
                let (x, y) = (rect.x.saturating_add(at % width), rect.y.saturating_add(at / width));
                let is_inside = (0..WIDTH).contains(&x) && (0..HEIGHT).contains(&y) && !is_absent(x, y);
                if is_inside { pixel(x, y) } else { [0, 0, 200] }
            })
            .collect()
    }

    #[test]
    fn what_reads_share_is_known_before_them() {
        let folder = tempfile::tempdir().unwrap();
        let pyramid = slide(&folder).native.unwrap();
        // The first two share two tiles of the file; the last one one with the second.
        let rects = [(0, 20), (16, 20), (32, 16)].map(|(x, side)| LevelRect { x, y: 0, width: side, height: side });
        assert_eq!(held_bytes(&pyramid, Level(0), rects.iter().copied()), (2 * 16 * 16 * 3, 16 * 16 * 3));
        assert_eq!(held_bytes(&pyramid, Level(0), rects[..1].iter().copied()), (0, 16 * 16 * 3));
    }

    #[test]
    fn any_rectangle_has_its_pixels_and_the_background_elsewhere() {
        let folder = tempfile::tempdir().unwrap();
        let slide = slide(&folder);
        let mut source = source::open(&slide, Level(0), std::iter::empty(), 1).unwrap().remove(0);
        let mut rgb = vec![1; 7];
        for (x, y, width, height) in [
            (0, 0, 100, 60),
            (0, 0, 16, 16),
            (-5, -7, 30, 20),
            (90, 50, 30, 30),
            (17, 13, 40, 33),
            (99, 59, 1, 1),
            (100, 0, 5, 5),
            (-50, -50, 20, 20),
            (i64::MAX, i64::MIN, 3, 3),
            (i64::MIN, i64::MAX, 3, 3),
            (3, 3, 0, 9),
            (40, 20, 4, 4),
        ] {
            let rect = LevelRect { x, y, width, height };
            assert_eq!(source.read(rect, &mut rgb).unwrap(), Shift::default());
            assert_eq!(rgb, expected(rect), "{rect:?}");
        }
    }

    #[test]
    fn planned_reads_by_threads_decode_each_tile_once_and_keep_none() {
        let folder = tempfile::tempdir().unwrap();
        let slide = slide(&folder);
        let rects: Vec<LevelRect> = (0..60)
            .map(|index| LevelRect { x: index % 10 * 11 - 3, y: index / 10 * 11 - 3, width: 13, height: 13 })
            .collect();
        let pyramid = slide.native.clone().unwrap();
        let level = Arc::new(NativeLevel::open(&slide, &pyramid, Level(0), rects.iter().copied()).unwrap());
        std::thread::scope(|scope| {
            for part in rects.chunks(15) {
                let mut source = level.source();
                scope.spawn(move || {
                    let mut rgb = Vec::new();
                    for rect in part {
                        source.read(*rect, &mut rgb).unwrap();
                        assert_eq!(rgb, expected(*rect));
                    }
                });
            }
        });
        assert_eq!(level.cache.stats(), (27, 0));
    }

    #[test]
    fn tiles_of_which_only_the_upper_rows_are_planned_have_the_same_pixels() {
        let folder = tempfile::tempdir().unwrap();
        let mut tiff = TiffBuilder::new(false, false);
        let mut tiles = Vec::new();
        for number in 0..4 {
            let rgb: Vec<u8> = (0..64 * 64).flat_map(|at| pixel(at % 64 * 3 + number * 50, at / 64 * 2)).collect();
            let mut jpeg = Vec::new();
            let mut encoder = Encoder::new(&mut jpeg, 80);
            encoder.set_sampling_factor(SamplingFactor::R_4_2_0);
            encoder.encode(&rgb, 64, 64, ColorType::Rgb).unwrap();
            tiles.push((tiff.data(&jpeg), u32::try_from(jpeg.len()).unwrap()));
        }
        tiff.directory(&with(rgb_image((128, 128), 64, (7, 1), &tiles), 262, Values::Short(vec![6])));
        let path = folder.path().join("slide.tif");
        std::fs::write(&path, tiff.finish()).unwrap();
        let slide = Slide::of_pyramid(&path, pyramid_of(&path).unwrap()).unwrap();
        let mut whole = source::open(&slide, Level(0), std::iter::empty(), 1).unwrap().remove(0);
        let rects = [(0, 0, 100, 9), (40, 3, 10, 14), (100, 64, 28, 17), (0, 100, 20, 28)]
            .map(|(x, y, width, height)| LevelRect { x, y, width, height });
        let pyramid = slide.native.clone().unwrap();
        let level = Arc::new(NativeLevel::open(&slide, &pyramid, Level(0), rects.into_iter()).unwrap());
        assert_eq!(level.rows, [17, 9, 64, 17]);
        let mut planned = level.source();
        // The last one was not planned, and needs more.
        for rect in rects.into_iter().chain([LevelRect { x: 3, y: 2, width: 120, height: 121 }]) {
            let (mut rgb, mut expected) = (Vec::new(), Vec::new());
            planned.read(rect, &mut rgb).unwrap();
            whole.read(rect, &mut expected).unwrap();
            assert!(rgb == expected, "{rect:?}");
        }
        assert_eq!(level.cache.stats().1, 0);
    }

    #[test]
    fn a_file_that_shrinks_is_an_error_that_leaves_nothing_held() {
        let folder = tempfile::tempdir().unwrap();
        let slide = slide(&folder);
        let rects = [0, 16, 75].map(|x| LevelRect { x, y: 0, width: 20, height: 20 });
        let pyramid = slide.native.clone().unwrap();
        let level = Arc::new(NativeLevel::open(&slide, &pyramid, Level(0), rects.iter().copied()).unwrap());
        let mut source = level.source();
        std::fs::OpenOptions::new().write(true).open(&slide.path).unwrap().set_len(2000).unwrap();
        let mut rgb = Vec::new();
        for rect in rects {
            let error = source.read(rect, &mut rgb).unwrap_err();
            assert!(matches!(error, SlideError::Read { level: Level(0), .. }) && error.hint().is_some(), "{error}");
        }
        assert_eq!(level.cache.stats().1, 0);
        source.read(LevelRect { x: 0, y: 0, width: 16, height: 16 }, &mut rgb).unwrap();
    }
}
