//! Probability and class maps as pyramidal tiled TIFF: 8-bit grey, deflate, one directory per level.
//!
//! The map arrives top to bottom in bands of rows and is never whole in memory: each level holds one row of tiles, and
//! the levels grow side by side in the file. Level sizes are halved and rounded up until both sides fit one tile of
//! [`MAX_TOP_SIDE`]; the reduced levels carry NewSubfileType 1 and their own resolution, by which OpenSlide, QuPath and
//! libtiff know them. A tile of one value is compressed once per file and its bytes are shared: most of a slide is glass.
//! The container is classic TIFF unless the file might exceed 4 GiB, since some viewers still don't read BigTIFF.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use flate2::{Compress, Compression as Level, FlushCompress, Status};
use rayon::prelude::*;

use crate::geometry::PixelSize;
use crate::tiff::{Chunk, Compression, Container, Layout, Page, PageId, Photometric, TiffError, TiffWriter, Value};

use super::{AtomicFile, OutputError, Written};

/// The pyramid ends at the level whose sides are both at most this.
pub const MAX_TOP_SIDE: u32 = 512;

/// Columns of the next level that are reduced together: a piece and the pair it comes from lie in the first-level cache, and
/// few pieces at a border of glass hold both (benches/results/glass-on-vectors.json).
const PIECE: usize = 128;

/// XPosition and YPosition, in the resolution's unit.
const TAG_POSITION: [u16; 2] = [286, 287];
/// Software.
const TAG_SOFTWARE: u16 = 305;

/// How 2 × 2 pixels of a level become one of the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduce {
    /// Their mean, halves rounded up: for quantities such as probabilities.
    Mean,
    /// The value that most of them have, on a tie the first in reading order: for class indices, which have no mean.
    Mode,
}

/// What a pyramid is like.
#[derive(Clone, Debug, PartialEq)]
pub struct PyramidSpec {
    /// Width of the map in pixels, at least 1.
    pub width: u32,
    /// Height of the map in pixels, at least 1.
    pub height: u32,
    /// Side of the tiles in pixels, a multiple of 16.
    pub tile_size: u32,
    /// Size of a pixel of the map on the slide.
    pub pixel_size: PixelSize,
    /// Where the map's upper left corner lies on the slide, in µm along x and y, each at least 0.
    pub origin_um: (f64, f64),
    /// ImageDescription: what the map shows and of which slide.
    pub description: String,
    /// How the levels are reduced.
    pub reduce: Reduce,
    /// Effort of the compression, 0–9. A core deflates about 300 MB/s of smooth map at 2, half of that at 4, for a few
    /// percent of size.
    pub deflate_level: u32,
}

impl PyramidSpec {
    /// Memory that a [`PyramidWriter`] holds: a row of tiles of each level, and what it is reduced to.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        let rows = |most: u32| move |(width, height): &(u32, u32)| u64::from(*width) * u64::from(most.min(*height));
        let sizes = level_sizes(self.width, self.height);
        let bands: u64 = sizes.iter().map(rows(self.tile_size)).sum();
        let reduced: u64 = sizes.iter().skip(1).map(rows(self.tile_size / 2)).sum();
        bands + reduced
    }

    /// Memory of a row of tiles of the finest level, which it takes compressed at most.
    #[must_use]
    pub fn encoded_bytes(&self) -> u64 {
        u64::from(self.width.next_multiple_of(self.tile_size)) * u64::from(self.tile_size)
    }
}

/// Writes one pyramid.
#[derive(Debug)]
pub struct PyramidWriter {
    path: PathBuf,
    tiff: TiffWriter<AtomicFile>,
    levels: Vec<LevelBand>,
    tile_size: usize,
    reduce: Reduce,
    deflate_level: u32,
    /// Tiles of one value that are in the file already.
    constant: HashMap<u8, Chunk>,
}

/// The row of tiles of one level that is being filled.
#[derive(Debug)]
struct LevelBand {
    page: PageId,
    width: usize,
    height: usize,
    /// Rows that arrived, those in `pixels` included.
    rows: usize,
    /// Less than one row of tiles, `[rows, width]`.
    pixels: Vec<u8>,
    /// Memory for the reduction of a row of tiles.
    reduced: Vec<u8>,
}

impl PyramidWriter {
    /// Starts the file.
    ///
    /// # Errors
    /// [`OutputError::Write`], or [`OutputError::Map`] for a size that can't be a map.
    pub fn create(path: &Path, spec: &PyramidSpec) -> Result<Self, OutputError> {
        if spec.width == 0 || spec.height == 0 || spec.tile_size == 0 || !spec.tile_size.is_multiple_of(16) {
            let problem = "its sides must be at least 1 and its tiles a multiple of 16";
            return Err(OutputError::Map { path: path.to_owned(), problem });
        }
        let sizes = level_sizes(spec.width, spec.height);
        let container = Container::for_bytes(size_bound(&sizes, spec.tile_size));
        let file = AtomicFile::create(path)?.hashed_at_end();
        let mut tiff = TiffWriter::new(file, container).map_err(tiff_error(path))?;
        let mut levels = Vec::new();
        for (index, (width, height)) in sizes.into_iter().enumerate() {
            let page = tiff.add_page(page_of(spec, index, width, height));
            levels.push(LevelBand {
                page,
                width: width as usize,
                height: height as usize,
                rows: 0,
                pixels: Vec::new(),
                reduced: Vec::new(),
            });
        }
        Ok(Self {
            path: path.to_owned(),
            tiff,
            levels,
            tile_size: spec.tile_size as usize,
            reduce: spec.reduce,
            deflate_level: spec.deflate_level,
            constant: HashMap::new(),
        })
    }

    /// Appends rows of level 0, `[any, width]`.
    ///
    /// # Errors
    /// [`OutputError::RowLength`] if `rows` is not a number of whole rows, [`OutputError::Map`] for a row too many,
    /// [`OutputError::Write`].
    pub fn push_rows(&mut self, rows: &[u8]) -> Result<(), OutputError> {
        let width = self.levels[0].width;
        if !rows.len().is_multiple_of(width) {
            return Err(OutputError::RowLength { path: self.path.clone(), expected: width, found: rows.len() % width });
        }
        self.push(0, rows)
    }

    /// Completes the file.
    ///
    /// # Errors
    /// [`OutputError::Map`] if rows are missing, [`OutputError::Write`].
    pub fn finish(self) -> Result<Written, OutputError> {
        if self.levels.iter().any(|level| level.rows != level.height) {
            return Err(OutputError::Map { path: self.path, problem: "rows are missing" });
        }
        self.tiff.finish().map_err(tiff_error(&self.path))?.commit()
    }

    fn push(&mut self, index: usize, mut rows: &[u8]) -> Result<(), OutputError> {
        while !rows.is_empty() {
            let tile_size = self.tile_size;
            let level = &mut self.levels[index];
            let room = (tile_size - level.rows % tile_size).min(level.height - level.rows);
            if room == 0 {
                return Err(OutputError::Map { path: self.path.clone(), problem: "it got more rows than its height" });
            }
            let taken = room.min(rows.len() / level.width);
            let (now, later) = rows.split_at(taken * level.width);
            // No more than a row of tiles: memory that grows by doubling may be twice that.
            let rest = room * level.width;
            level.pixels.reserve_exact(rest);
            level.pixels.extend_from_slice(now);
            level.rows += taken;
            rows = later;
            if taken == room {
                self.flush_band(index)?;
            }
        }
        Ok(())
    }

    /// Writes the row of tiles of a level and hands its reduction to the next level.
    fn flush_band(&mut self, index: usize) -> Result<(), OutputError> {
        let pixels = std::mem::take(&mut self.levels[index].pixels);
        let (page, width) = (self.levels[index].page, self.levels[index].width);
        let (size, deflate_level) = (self.tile_size, self.deflate_level);
        let tile = |index: usize| {
            let left = index * size;
            TileView { pixels: &pixels, stride: width, left, right: width.min(left + size) }
        };
        // Compressing is nearly all of the work.
        let tiles = (0..width.div_ceil(size)).into_par_iter();
        let encoded: Result<Vec<EncodedTile>, TiffError> = tiles
            .map_init(|| TileEncoder::new(deflate_level), |encoder, index| tile(index).encoded(encoder, size))
            .collect();
        for tile in encoded.map_err(tiff_error(&self.path))? {
            self.write_tile(page, &tile).map_err(tiff_error(&self.path))?;
        }
        if index + 1 < self.levels.len() {
            let mut halved = std::mem::take(&mut self.levels[index].reduced);
            reduce(&pixels, width, self.reduce, &mut halved);
            self.push(index + 1, &halved)?;
            self.levels[index].reduced = halved;
        }
        // The memory is kept for the next band.
        self.levels[index].pixels = pixels;
        self.levels[index].pixels.clear();
        Ok(())
    }

    fn write_tile(&mut self, page: PageId, tile: &EncodedTile) -> Result<(), TiffError> {
        let value = match tile {
            EncodedTile::Varied(bytes) => return self.tiff.append(page, bytes).map(drop),
            EncodedTile::Constant(value) => *value,
        };
        if let Some(chunk) = self.constant.get(&value) {
            self.tiff.append_again(page, *chunk);
            return Ok(());
        }
        let mut encoder = TileEncoder::new(self.deflate_level);
        let chunk = self.tiff.append(page, encoder.encode(self.tile_size, |buffer, _| buffer.fill(value))?)?;
        self.constant.insert(value, chunk);
        Ok(())
    }
}

/// A tile ready for the file.
enum EncodedTile {
    /// All its pixels have this value.
    Constant(u8),
    /// Its compressed bytes.
    Varied(Vec<u8>),
}

/// The part of a band that one tile takes; at the borders it is smaller than the tile.
struct TileView<'a> {
    pixels: &'a [u8],
    stride: usize,
    left: usize,
    right: usize,
}

impl TileView<'_> {
    fn rows(&self) -> impl Iterator<Item = &[u8]> {
        self.pixels.chunks_exact(self.stride).map(|row| &row[self.left..self.right])
    }

    fn constant(&self) -> Option<u8> {
        let first = *self.pixels.get(self.left)?;
        self.rows().all(|row| is_constant(row, first)).then_some(first)
    }

    fn encoded(&self, encoder: &mut TileEncoder, size: usize) -> Result<EncodedTile, TiffError> {
        match self.constant() {
            Some(value) => Ok(EncodedTile::Constant(value)),
            None => Ok(EncodedTile::Varied(encoder.encode(size, |buffer, size| self.copy_to(buffer, size))?.to_vec())),
        }
    }

    /// Copies into a zeroed tile of side `size`.
    fn copy_to(&self, tile: &mut [u8], size: usize) {
        for (from, to) in self.rows().zip(tile.chunks_exact_mut(size)) {
            to[..from.len()].copy_from_slice(from);
        }
    }
}

/// Deflates tiles, reusing its tables and buffers.
#[derive(Debug)]
struct TileEncoder {
    deflate: Compress,
    tile: Vec<u8>,
    encoded: Vec<u8>,
}

impl TileEncoder {
    fn new(level: u32) -> Self {
        Self { deflate: Compress::new(Level::new(level.min(9)), true), tile: Vec::new(), encoded: Vec::new() }
    }

    /// Compresses the tile of side `size` that `fill` draws on zeros.
    fn encode(&mut self, size: usize, fill: impl FnOnce(&mut [u8], usize)) -> Result<&[u8], TiffError> {
        self.tile.clear();
        self.tile.resize(size * size, 0);
        fill(&mut self.tile, size);
        self.deflate.reset();
        self.encoded.clear();
        loop {
            self.encoded.reserve(self.tile.len() / 4 + 1024);
            #[expect(clippy::cast_possible_truncation, reason = "at most the tile's length, a usize")]
            let consumed = self.deflate.total_in() as usize;
            let input = &self.tile[consumed..];
            let status = self.deflate.compress_vec(input, &mut self.encoded, FlushCompress::Finish);
            match status.map_err(std::io::Error::other)? {
                Status::StreamEnd => return Ok(&self.encoded),
                Status::Ok | Status::BufError => {}
            }
        }
    }
}

/// Whether all of a row has this value. A row at a time, without a way out before its end, so that it runs on vectors.
fn is_constant(row: &[u8], value: u8) -> bool {
    row.iter().fold(0, |differing, other| differing | (value ^ other)) == 0
}

/// Halves a band of rows into `out`; a last odd row or column is reduced by itself.
fn reduce(pixels: &[u8], width: usize, how: Reduce, out: &mut Vec<u8>) {
    match how {
        Reduce::Mean => reduce_by(pixels, width, mean, out),
        Reduce::Mode => reduce_by(pixels, width, mode, out),
    }
}

fn reduce_by(pixels: &[u8], width: usize, reduce: impl Fn([u8; 4]) -> u8 + Sync, out: &mut Vec<u8>) {
    out.resize((pixels.len() / width).div_ceil(2) * width.div_ceil(2), 0);
    out.par_chunks_exact_mut(width.div_ceil(2)).zip(pixels.par_chunks(2 * width)).for_each(|(out, pair)| {
        let upper = &pair[..width];
        // Repeating the last row or column leaves mean and mode of what exists as they are.
        let lower = if pair.len() > width { &pair[width..] } else { upper };
        let pieces = upper.chunks(2 * PIECE).zip(lower.chunks(2 * PIECE)).zip(out.chunks_mut(PIECE));
        pieces.for_each(|((upper, lower), out)| match upper[0] {
            // Most of a slide is glass: it is its own mean and mode.
            value if is_constant(upper, value) && is_constant(lower, value) => out.fill(value),
            _ => reduce_pair(upper, lower, &reduce, out),
        });
    });
}

fn reduce_pair(upper: &[u8], lower: &[u8], reduce: impl Fn([u8; 4]) -> u8, out: &mut [u8]) {
    let (upper, lower) = (upper.chunks_exact(2), lower.chunks_exact(2));
    let last = upper.remainder().first().zip(lower.remainder().first());
    if let (Some(out), Some((a, b))) = (out.last_mut(), last) {
        *out = reduce([*a, *a, *b, *b]);
    }
    for ((a, b), out) in upper.zip(lower).zip(out) {
        *out = reduce([a[0], a[1], b[0], b[1]]);
    }
}

fn mean(four: [u8; 4]) -> u8 {
    let sum: u16 = four.into_iter().map(u16::from).sum();
    #[expect(clippy::cast_possible_truncation, reason = "the mean of bytes is a byte")]
    let mean = ((sum + 2) / 4) as u8;
    mean
}

fn mode([a, b, c, d]: [u8; 4]) -> u8 {
    // With four values, whatever occurs twice before anything else does wins; a tie of two pairs has `a` in one of them,
    // and three equal others can't exist if `a` has a partner. All is compared, so that it runs on vectors.
    let is_a = (a == b) | (a == c) | (a == d);
    let is_b = (b == c) | (b == d);
    let of_the_last = if c == d { c } else { a };
    let of_others = if is_b { b } else { of_the_last };
    if is_a { a } else { of_others }
}

/// Sizes from level 0 to the top, halved and rounded up.
fn level_sizes(width: u32, height: u32) -> Vec<(u32, u32)> {
    let halve = |&(width, height): &(u32, u32)| {
        (width.max(height) > MAX_TOP_SIDE).then(|| (width.div_ceil(2), height.div_ceil(2)))
    };
    std::iter::successors(Some((width, height)), halve).collect()
}

/// No file can be larger: every tile stored without gain, with its table entries and each directory.
fn size_bound(sizes: &[(u32, u32)], tile_size: u32) -> u64 {
    let tile_bytes = u64::from(tile_size) * u64::from(tile_size);
    let tiles =
        |&(width, height): &(u32, u32)| u64::from(width.div_ceil(tile_size)) * u64::from(height.div_ceil(tile_size));
    // At its fastest, deflate writes 9 bits for a byte it can't match, and a frame.
    let per_tile = tile_bytes + tile_bytes / 8 + 64;
    sizes.iter().map(|size| tiles(size) * per_tile + 65_536).sum()
}

fn page_of(spec: &PyramidSpec, index: usize, width: u32, height: u32) -> Page {
    // A pixel of level n covers exactly 2^n pixels of level 0, though the last one may reach beyond the map.
    let downsample = f64::powi(2.0, i32::try_from(index).unwrap_or(i32::MAX));
    let per_cm = |mpp: f64| 10_000.0 / (mpp * downsample);
    let centimetre = |um: f64| Value::Rational(vec![um / 10_000.0]);
    Page {
        width,
        height,
        layout: Layout::Tiles { width: spec.tile_size, height: spec.tile_size },
        samples: 1,
        photometric: Photometric::GREY,
        compression: Compression::DEFLATE,
        is_reduced: index > 0,
        description: Some(spec.description.clone()),
        pixels_per_cm: Some((per_cm(spec.pixel_size.x.get()), per_cm(spec.pixel_size.y.get()))),
        tags: vec![
            (TAG_POSITION[0], centimetre(spec.origin_um.0)),
            (TAG_POSITION[1], centimetre(spec.origin_um.1)),
            (TAG_SOFTWARE, Value::Ascii(concat!("slidestream ", env!("CARGO_PKG_VERSION")).into())),
        ],
    }
}

fn tiff_error(path: &Path) -> impl FnOnce(TiffError) -> OutputError + '_ {
    move |error| match error {
        TiffError::Io(source) => OutputError::Write { path: path.to_owned(), source },
        source => OutputError::Tiff { path: path.to_owned(), source },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::Mpp;
    use crate::tiff::TiffWriter;
    use proptest::prelude::*;
    use std::fs::File;
    use tiff::decoder::{Decoder, DecodingResult};
    use tiff::tags::Tag;

    fn spec(width: u32, height: u32, reduce: Reduce) -> PyramidSpec {
        PyramidSpec {
            width,
            height,
            tile_size: 256,
            pixel_size: PixelSize { x: Mpp::new(0.5).unwrap(), y: Mpp::new(0.25).unwrap() },
            origin_um: (1000.0, 0.0),
            description: "tumour probability of slide α".into(),
            reduce,
            deflate_level: 1,
        }
    }

    /// Writes `pixels` in bands of `band` rows and reads every level back.
    fn round_trip(spec: &PyramidSpec, pixels: &[u8], band: usize) -> Vec<((u32, u32), Vec<u8>)> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("map.tif");
        let mut writer = PyramidWriter::create(&path, spec).unwrap();
        for rows in pixels.chunks(band * spec.width as usize) {
            writer.push_rows(rows).unwrap();
        }
        writer.finish().unwrap();
        let mut decoder = Decoder::new(File::open(&path).unwrap()).unwrap();
        let mut levels = Vec::new();
        loop {
            let DecodingResult::U8(pixels) = decoder.read_image().unwrap() else { panic!("not 8-bit") };
            levels.push((decoder.dimensions().unwrap(), pixels));
            let reduced = decoder.get_tag_u32(Tag::NewSubfileType).unwrap();
            assert_eq!(reduced == 1, levels.len() > 1);
            if !decoder.more_images() {
                return levels;
            }
            decoder.next_image().unwrap();
        }
    }

    fn halved(pixels: &[u8], width: usize, how: Reduce) -> Vec<u8> {
        // What another row of tiles left there is overwritten.
        let mut out = vec![99; 3];
        reduce(pixels, width, how, &mut out);
        out
    }

    #[test]
    fn memory_known_by_hand() {
        let spec = PyramidSpec { tile_size: 512, ..spec(1000, 600, Reduce::Mean) };
        // A row of tiles of 1000 × 600, all of 500 × 300, and half a row of tiles reduced.
        assert_eq!(spec.memory_bytes(), 1000 * 512 + 500 * 300 + 500 * 256);
        assert_eq!(spec.encoded_bytes(), 1024 * 512);
    }

    #[test]
    fn four_values_become_one() {
        for (four, want_mean, want_mode) in [
            ([0, 0, 0, 0], 0, 0),
            ([255, 255, 255, 255], 255, 255),
            ([0, 0, 1, 1], 1, 0),
            ([0, 0, 0, 1], 0, 0),
            ([3, 1, 1, 2], 2, 1),
            ([3, 1, 2, 1], 2, 1),
            ([3, 1, 2, 2], 2, 2),
            ([4, 1, 2, 3], 3, 4),
            ([1, 2, 2, 1], 2, 1),
            ([1, 2, 2, 2], 2, 2),
        ] {
            assert_eq!((mean(four), mode(four)), (want_mean, want_mode), "{four:?}");
        }
    }

    #[test]
    fn odd_borders_are_reduced_from_what_exists() {
        // 3 × 3: the last column and row have one neighbour, the corner none.
        let pixels = [10, 20, 50, 30, 40, 70, 5, 6, 9];
        assert_eq!(halved(&pixels, 3, Reduce::Mean), [25, 60, 6, 9]);
        assert_eq!(halved(&[7, 8, 9], 1, Reduce::Mean), [8, 9]);
    }

    #[test]
    fn glass_and_what_borders_on_it_are_reduced_alike() {
        // Pieces of glass, of both, and of neither; the last column has no neighbour.
        let width = 6 * PIECE + 1;
        let row = |shift: usize| -> Vec<u8> {
            let value = |x: usize| if x < 2 * PIECE + 3 { 7 } else { (x * x / 5 + shift).to_le_bytes()[0] };
            (0..width).map(value).collect()
        };
        let (upper, lower) = (row(0), row(1));
        for (how, reduced) in [(Reduce::Mean, mean as fn([u8; 4]) -> u8), (Reduce::Mode, mode)] {
            let of_columns =
                |left: usize, right: usize| reduced([upper[left], upper[right], lower[left], lower[right]]);
            let want: Vec<u8> = (0..width).step_by(2).map(|left| of_columns(left, (left + 1).min(width - 1))).collect();
            assert_eq!(halved(&[&upper[..], &lower].concat(), width, how), want);
        }
    }

    #[test]
    fn levels_halve_until_they_fit() {
        assert_eq!(level_sizes(1, 1), [(1, 1)]);
        assert_eq!(level_sizes(512, 512), [(512, 512)]);
        assert_eq!(level_sizes(1025, 3), [(1025, 3), (513, 2), (257, 1)]);
        assert_eq!(level_sizes(1, 2000), [(1, 2000), (1, 1000), (1, 500)]);
    }

    #[test]
    fn the_container_is_decided_by_the_uncompressed_size() {
        let container = |side| Container::for_bytes(size_bound(&level_sizes(side, side), 512));
        assert_eq!(container(50_000), Container::Classic);
        assert_eq!(container(54_000), Container::Big);
    }

    #[test]
    fn one_value_is_stored_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("map.tif");
        let mut writer = PyramidWriter::create(&path, &spec(5000, 5000, Reduce::Mode)).unwrap();
        for _ in 0..5000 {
            writer.push_rows(&[3; 5000]).unwrap();
        }
        let written = writer.finish().unwrap();
        // 400 + 100 + 25 + 9 tiles with 8 bytes each in the tables, one of them stored.
        assert!(written.length_bytes < 8000, "{}", written.length_bytes);
    }

    #[test]
    fn misuse_is_an_error_and_leaves_no_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("map.tif");
        let mut writer = PyramidWriter::create(&path, &spec(3, 2, Reduce::Mean)).unwrap();
        assert!(matches!(writer.push_rows(&[0; 4]), Err(OutputError::RowLength { expected: 3, found: 1, .. })));
        writer.push_rows(&[0; 3]).unwrap();
        assert!(matches!(writer.finish(), Err(OutputError::Map { .. })));
        let mut writer = PyramidWriter::create(&path, &spec(3, 2, Reduce::Mean)).unwrap();
        assert!(matches!(writer.push_rows(&[0; 9]), Err(OutputError::Map { .. })));
        drop(writer);
        assert!(PyramidWriter::create(&path, &spec(0, 2, Reduce::Mean)).is_err());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_names_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("map.tif");
        let mut writer = PyramidWriter::create(&path, &spec(2, 2, Reduce::Mean)).unwrap();
        let full = crate::output::atomic::tests::on_full_disk(folder.path(), &path);
        writer.tiff = TiffWriter::new(full, Container::Classic).unwrap();
        writer.tiff.add_page(page_of(&spec(2, 2, Reduce::Mean), 0, 2, 2));
        let error = writer.push_rows(&[1, 2, 3, 4]).and_then(|()| writer.finish()).unwrap_err();
        assert!(error.to_string().contains("map.tif"), "{error}");
        assert_eq!(error.hint(), Some("free space or choose another `out`"));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn levels_read_back_as_written(
            width in 1u32..1300, height in 1u32..700, band in 1usize..600, seed: u32, mode: bool, flat: bool,
        ) {
            let reduce = if mode { Reduce::Mode } else { Reduce::Mean };
            let mut state = seed;
            let pixels: Vec<u8> = (0..width * height).map(|index| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                if flat { (index / 40_000).to_le_bytes()[0] } else { state.to_be_bytes()[0] }
            }).collect();
            let levels = round_trip(&spec(width, height, reduce), &pixels, band);
            prop_assert_eq!(&levels[0], &((width, height), pixels));
            for pair in levels.windows(2) {
                let ((width, _), above) = &pair[0];
                prop_assert_eq!(&pair[1].1, &halved(above, *width as usize, reduce));
            }
            let (top_width, top_height) = levels[levels.len() - 1].0;
            prop_assert!(top_width.max(top_height) <= MAX_TOP_SIDE);
        }
    }
}
