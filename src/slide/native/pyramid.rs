//! Tells from a TIFF's directories which of its images are the levels of the pyramid and where their tiles lie.
//!
//! Everything is checked here, once: past [`Pyramid::parse`] every tile lies within the file, and its decoded size is
//! bounded. The `tiff` crate reads directories and tags only, never pixels.

use std::collections::HashSet;
use std::io::{Read, Seek, SeekFrom};

use ::tiff::Directory;
use ::tiff::decoder::{Decoder, Limits};
use ::tiff::tags::{IfdPointer, Tag};

use super::description::{aperio_mpp, attribute, ome_mpp};
use super::error::PyramidError;
use super::tags::Tags;

/// Longest side of a level in pixels.
const MAX_SIDE: u64 = 1 << 31;
/// Longest side of a tile in pixels.
const MAX_TILE_SIDE: u64 = 16_384;
/// Decoded size of a tile in bytes: one hostile tile must not exhaust the memory.
const MAX_TILE_BYTES: u64 = 256 << 20;
/// Compressed size of a tile in bytes.
const MAX_TILE_DATA_BYTES: u64 = 64 << 20;
/// Tiles of a pyramid: the `tiff` crate's limit of 256 MiB at 32 bytes a value.
const MAX_TILES: u64 = 1 << 23;
/// Directories followed; a real slide has fewer than a hundred.
const MAX_DIRECTORIES: usize = 4096;
/// Entries of a directory; a real one has fewer than a hundred.
const MAX_ENTRIES: u64 = 4096;
/// Length of the JPEG tables in bytes.
const MAX_JPEG_TABLES_BYTES: u64 = 1 << 20;
/// Length of an ICC profile in bytes; scanners' have some hundred thousand.
const MAX_ICC_BYTES: u64 = 16 << 20;

const NEW_SUBFILE_TYPE: Tag = Tag::NewSubfileType;
const FILL_ORDER: Tag = Tag::Unknown(266);
const IMAGE_DEPTH: Tag = Tag::Unknown(32_997);
/// Hamamatsu's; marks an NDPI, whose 32-bit offsets are not what they seem.
const NDPI_FORMAT: Tag = Tag::Unknown(65_420);

const REDUCED: u64 = 1;
const MASK: u64 = 4;

/// A slide's pyramid.
#[derive(Clone, Debug)]
pub(crate) struct Pyramid {
    /// The levels, finest first; at least one, each smaller than the one before.
    pub levels: Vec<TiledLevel>,
    /// Whose conventions the file follows.
    pub dialect: Dialect,
    /// Microns per pixel of level 0 along x and y, if the file says.
    pub mpp: Option<(f64, f64)>,
    /// The ImageDescription of level 0, empty if it has none.
    pub description: String,
    /// The ICC profile of level 0, if it has one.
    pub icc_profile: Option<Vec<u8>>,
}

/// Whose conventions a file follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dialect {
    /// Aperio SVS.
    Aperio,
    /// OME-TIFF; levels are sub-directories.
    Ome,
    /// Philips TIFF; levels are padded to whole tiles, and their true sizes lie in XML, which OpenSlide reads.
    Philips,
    /// A plain pyramid of tiled images.
    Generic,
}

impl Dialect {
    /// OpenSlide's name of the format, if it has one.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Aperio => "aperio",
            Self::Ome => "ome-tiff",
            Self::Philips => "philips",
            Self::Generic => "generic-tiff",
        }
    }
}

/// One tiled image of a TIFF.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TiledLevel {
    /// Width in pixels, at least 1.
    pub width: u32,
    /// Height in pixels, at least 1.
    pub height: u32,
    /// Width of a tile in pixels, `1..=16384`.
    pub tile_width: u32,
    /// Height of a tile in pixels, `1..=16384`.
    pub tile_height: u32,
    /// TIFF code of the compression.
    pub compression: Compression,
    /// TIFF code of the photometric interpretation: 2 is RGB, 6 YCbCr.
    pub photometric: u16,
    /// Samples per pixel, at least 1.
    pub samples: u16,
    /// Whether each sample has its own tiles.
    pub is_planar: bool,
    /// Bits per sample, the largest of them.
    pub bits: u16,
    /// TIFF code of the sample format: 1 is unsigned.
    pub sample_format: u16,
    /// TIFF code of the predictor: 1 is none, 2 the difference to the left neighbour.
    pub predictor: u16,
    /// Whether the bits of each byte are reversed.
    pub is_bit_reversed: bool,
    /// The JPEG tables shared by all tiles, as stored: a JPEG of tables only.
    pub jpeg_tables: Option<Vec<u8>>,
    /// Where each tile's data starts in the file, row by row.
    pub tile_offsets: Vec<u64>,
    /// Length of each tile's data in bytes; 0 if the tile is absent.
    pub tile_byte_counts: Vec<u32>,
}

/// How tiles are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Compression {
    /// Not at all (1).
    None,
    /// LZW (5).
    Lzw,
    /// JPEG (7).
    Jpeg,
    /// Deflate with zlib's framing (8, 32946).
    Deflate,
    /// JPEG 2000 (Aperio's 33003 and 33005, 34712): known, but not decoded here.
    Jpeg2000,
    /// Anything else, not decoded here.
    Other(u16),
}

impl Compression {
    fn of(code: u16) -> Self {
        match code {
            1 => Self::None,
            5 => Self::Lzw,
            7 => Self::Jpeg,
            8 | 32_946 => Self::Deflate,
            33_003 | 33_005 | 34_712 => Self::Jpeg2000,
            other => Self::Other(other),
        }
    }
}

impl TiledLevel {
    /// Tiles per row.
    pub(crate) fn tiles_across(&self) -> u32 {
        self.width.div_ceil(self.tile_width)
    }

    /// Where the data of a tile lies in the file as offset and length, `None` if the tile is absent.
    pub(crate) fn tile_data(&self, tile: u32) -> Option<(u64, u32)> {
        let tile = tile as usize;
        let (offset, bytes) = (*self.tile_offsets.get(tile)?, *self.tile_byte_counts.get(tile)?);
        (bytes > 0).then_some((offset, bytes))
    }
}

impl Pyramid {
    /// Reads the directories of a TIFF or BigTIFF of either byte order.
    ///
    /// # Errors
    /// [`PyramidError`] if the file is no TIFF, is of a kind whose levels mean something else than their pixels
    /// (Leica, Trestle, Ventana, Hamamatsu), contradicts itself or points beyond its end.
    pub(crate) fn parse<R: Read + Seek>(mut file: R) -> Result<Self, PyramidError> {
        let header = Header::read(&mut file)?;
        header.check_entry_count(&mut file, header.first)?;
        file.rewind()?;
        let located = |source| PyramidError::Directory { offset: header.first, source };
        let decoder = Decoder::new(file).map_err(located)?.with_limits(Limits::default());
        let mut directories = Directories { decoder, header, visited: HashSet::new() };
        let mut candidates = directories.chain()?;
        let Some((first_offset, first)) = candidates.first() else {
            return Err(PyramidError::Unsupported("a TIFF without images".to_owned()));
        };
        let (dialect, description) = directories.dialect(*first_offset, first)?;
        let mpp = match dialect {
            Dialect::Aperio => aperio_mpp(&description),
            Dialect::Ome => ome_mpp(&description),
            Dialect::Philips | Dialect::Generic => None,
        };
        let mpp = match mpp {
            Some(mpp) => Some(mpp),
            None => directories.resolution(*first_offset, first)?,
        };
        if dialect == Dialect::Ome {
            let children = directories.children(*first_offset, first)?;
            candidates.truncate(1);
            candidates.extend(children);
        }
        let icc_profile = directories.tags(candidates[0].0, &candidates[0].1).bytes(Tag::IccProfile, MAX_ICC_BYTES)?;
        let levels = directories.levels(dialect, &candidates)?;
        // OpenSlide paints them from the next finer level.
        if dialect == Dialect::Aperio && levels.iter().skip(1).any(|level| level.tile_byte_counts.contains(&0)) {
            return Err(PyramidError::Unsupported("a coarse Aperio level with tiles left out".to_owned()));
        }
        Ok(Self { levels, dialect, mpp, description, icc_profile })
    }

    /// The pyramid, if it can be understood without OpenSlide.
    ///
    /// # Errors
    /// [`PyramidError::Unsupported`] for Philips TIFF, whose levels are larger than they should be.
    pub(crate) fn without_openslide(self) -> Result<Self, PyramidError> {
        match self.dialect {
            Dialect::Philips => {
                Err(PyramidError::Unsupported("a Philips TIFF that OpenSlide does not open".to_owned()))
            }
            _ => Ok(self),
        }
    }

    /// Takes the padding off the levels of a Philips TIFF. Of other files, and where the sizes are not those of levels
    /// padded to whole tiles, nothing is changed.
    pub(crate) fn crop(&mut self, sizes: &[(u32, u32)]) {
        let is_padded = |(level, (width, height)): (&TiledLevel, &(u32, u32))| {
            let tiles = |side: u32, tile: u32| side.div_ceil(tile);
            tiles(level.width, level.tile_width) == tiles(*width, level.tile_width)
                && tiles(level.height, level.tile_height) == tiles(*height, level.tile_height)
        };
        let fits = self.levels.len() == sizes.len() && self.levels.iter().zip(sizes).all(is_padded);
        if self.dialect == Dialect::Philips && fits {
            for (level, (width, height)) in self.levels.iter_mut().zip(sizes) {
                (level.width, level.height) = (level.width.min(*width), level.height.min(*height));
            }
        }
    }
}

/// What a file's first bytes say.
#[derive(Clone, Copy)]
struct Header {
    is_big_endian: bool,
    is_big_tiff: bool,
    first: u64,
    file_bytes: u64,
}

impl Header {
    fn read<R: Read + Seek>(file: &mut R) -> Result<Self, PyramidError> {
        let file_bytes = file.seek(SeekFrom::End(0))?;
        file.rewind()?;
        let mut head = [0; 4];
        file.read_exact(&mut head).map_err(|_| PyramidError::NotTiff)?;
        let (is_big_endian, is_big_tiff) = match head {
            [b'I', b'I', 42, 0] => (false, false),
            [b'I', b'I', 43, 0] => (false, true),
            [b'M', b'M', 0, 42] => (true, false),
            [b'M', b'M', 0, 43] => (true, true),
            _ => return Err(PyramidError::NotTiff),
        };
        let mut header = Self { is_big_endian, is_big_tiff, first: 0, file_bytes };
        header.first = if is_big_tiff {
            file.seek(SeekFrom::Start(8))?;
            header.number::<8, R>(file)?
        } else {
            header.number::<4, R>(file)?
        };
        Ok(header)
    }

    /// Refuses a directory that can't be one, before the `tiff` crate loops over its entries: it has no limit.
    fn check_entry_count<R: Read + Seek>(self, file: &mut R, offset: u64) -> Result<(), PyramidError> {
        let absurd = |fault: String| PyramidError::Absurd { offset, fault };
        if offset >= self.file_bytes {
            return Err(absurd(format!("it lies beyond the end of the file, {} bytes long", self.file_bytes)));
        }
        file.seek(SeekFrom::Start(offset))?;
        let count = if self.is_big_tiff { self.number::<8, R>(file) } else { self.number::<2, R>(file) }?;
        if count > MAX_ENTRIES {
            return Err(absurd(format!("it has {count} entries, more than {MAX_ENTRIES}")));
        }
        Ok(())
    }

    fn number<const BYTES: usize, R: Read>(self, file: &mut R) -> Result<u64, PyramidError> {
        let mut raw = [0; BYTES];
        file.read_exact(&mut raw)?;
        if self.is_big_endian {
            raw.reverse();
        }
        Ok(raw.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)))
    }
}

/// The directories of an open TIFF.
struct Directories<R: Read + Seek> {
    decoder: Decoder<R>,
    header: Header,
    /// Offsets read so far: a directory that comes twice is a loop.
    visited: HashSet<u64>,
}

type Located = (u64, Directory);

impl<R: Read + Seek> Directories<R> {
    /// All directories of the main chain, in the order of the file.
    fn chain(&mut self) -> Result<Vec<Located>, PyramidError> {
        let mut chain = Vec::new();
        let mut next = Some(self.header.first).filter(|offset| *offset != 0);
        while let Some(offset) = next {
            let directory = self.read(offset)?;
            next = directory.next().map(|pointer| pointer.0);
            chain.push((offset, directory));
        }
        Ok(chain)
    }

    /// The sub-directories of a directory.
    fn children(&mut self, offset: u64, directory: &Directory) -> Result<Vec<Located>, PyramidError> {
        let pointers = self.tags(offset, directory).numbers(Tag::SubIfd, MAX_DIRECTORIES as u64)?.unwrap_or_default();
        pointers.into_iter().map(|offset| Ok((offset, self.read(offset)?))).collect()
    }

    fn read(&mut self, offset: u64) -> Result<Directory, PyramidError> {
        let absurd = |fault: &str| PyramidError::Absurd { offset, fault: fault.to_owned() };
        if !self.visited.insert(offset) {
            return Err(absurd("it comes twice: the directories form a loop"));
        }
        if self.visited.len() > MAX_DIRECTORIES {
            return Err(absurd("more than 4096 directories come before it"));
        }
        self.header.check_entry_count(self.decoder.inner(), offset)?;
        let read = self.decoder.read_directory(IfdPointer(offset));
        read.map_err(|source| PyramidError::Directory { offset, source })
    }

    fn tags<'a>(&'a mut self, offset: u64, directory: &'a Directory) -> Tags<'a> {
        Tags::new(offset, self.decoder.read_directory_tags(directory))
    }

    fn dialect(&mut self, offset: u64, first: &Directory) -> Result<(Dialect, String), PyramidError> {
        let mut tags = self.tags(offset, first);
        let description = tags.text(Tag::ImageDescription)?;
        let software = tags.text(Tag::Software)?;
        let make = tags.text(Tag::Make)?;
        if description.starts_with("Aperio") {
            return Ok((Dialect::Aperio, description));
        }
        if software.starts_with("Philips") || description.contains("<DataObject") {
            return Ok((Dialect::Philips, description));
        }
        // These cut, pad or overlap their levels, so that pixels are not where a plain pyramid has them.
        let vendor = if first.contains(NDPI_FORMAT) || make.starts_with("Hamamatsu") {
            Some("Hamamatsu NDPI")
        } else if software.starts_with("MedScan") {
            Some("Trestle TIFF")
        } else if description.contains("leica-microsystems") {
            Some("Leica SCN")
        } else if description.contains("iScan") || first.contains(Tag::Unknown(700)) {
            // Ventana keeps its XML in the XMP tag; a plain TIFF seldom has one.
            Some("a TIFF with XMP metadata (Ventana)")
        } else {
            None
        };
        if let Some(vendor) = vendor {
            return Err(PyramidError::Unsupported(vendor.to_owned()));
        }
        if !description.contains("<OME") && !description.contains(":OME") {
            return Ok((Dialect::Generic, description));
        }
        let planes = |name| attribute(&description, "Pixels", name).and_then(|text| text.parse::<u64>().ok());
        if ["SizeZ", "SizeT"].into_iter().any(|name| planes(name).is_some_and(|count| count > 1)) {
            return Err(PyramidError::Unsupported("an OME-TIFF with several focal planes or times".to_owned()));
        }
        Ok((Dialect::Ome, description))
    }

    /// Those of the candidates that are levels, finest first.
    fn levels(&mut self, dialect: Dialect, candidates: &[Located]) -> Result<Vec<TiledLevel>, PyramidError> {
        let mut levels: Vec<TiledLevel> = Vec::new();
        for (offset, directory) in candidates {
            if !directory.contains(Tag::TileWidth) {
                continue;
            }
            let (level, subfile_type) = self.level(*offset, directory)?;
            let tiles: u64 = levels.iter().chain([&level]).map(|level| level.tile_byte_counts.len() as u64).sum();
            if tiles > MAX_TILES {
                return Err(PyramidError::Unsupported(format!("a pyramid of more than {MAX_TILES} tiles")));
            }
            let Some((base, last)) = levels.first().zip(levels.last()) else {
                levels.push(level);
                continue;
            };
            let is_smaller = is_smaller(&level, last);
            if dialect == Dialect::Generic {
                // Without the tag a smaller image of the same shape is taken for a level; with it, the tag decides.
                let is_reduced = subfile_type.is_none_or(|kind| kind & REDUCED != 0 && kind & MASK == 0);
                if is_smaller && is_reduced && has_aspect_of(&level, base) {
                    levels.push(level);
                }
            } else if is_smaller {
                levels.push(level);
            } else {
                let what = "a pyramid with a level that is no smaller than the one before";
                return Err(PyramidError::Unsupported(what.to_owned()));
            }
        }
        if levels.is_empty() {
            return Err(PyramidError::Unsupported("a TIFF that is not tiled".to_owned()));
        }
        Ok(levels)
    }

    fn level(&mut self, offset: u64, directory: &Directory) -> Result<(TiledLevel, Option<u64>), PyramidError> {
        let file_bytes = self.header.file_bytes;
        let mut tags = self.tags(offset, directory);
        let subfile_type = tags.number(NEW_SUBFILE_TYPE)?;
        let width = tags.side(Tag::ImageWidth, MAX_SIDE)?;
        let height = tags.side(Tag::ImageLength, MAX_SIDE)?;
        let tile_width = tags.side(Tag::TileWidth, MAX_TILE_SIDE)?;
        let tile_height = tags.side(Tag::TileLength, MAX_TILE_SIDE)?;
        let samples = tags.code(Tag::SamplesPerPixel, 1)?;
        let is_planar = tags.code(Tag::PlanarConfiguration, 1)? == 2;
        let depth = tags.code(IMAGE_DEPTH, 1)?;
        if samples == 0 || samples > 64 || depth != 1 {
            return Err(tags.absurd(format!("{samples} samples per pixel in {depth} planes")));
        }
        let tile_bytes = u64::from(tile_width) * u64::from(tile_height) * u64::from(samples.max(3));
        if tile_bytes > MAX_TILE_BYTES {
            return Err(tags.absurd(format!("a tile of {tile_bytes} bytes, more than {MAX_TILE_BYTES}")));
        }
        let grid = u64::from(width.div_ceil(tile_width)) * u64::from(height.div_ceil(tile_height));
        let tile_count = grid.saturating_mul(if is_planar { samples.into() } else { 1 });
        if tile_count > MAX_TILES {
            return Err(tags.absurd(format!("{tile_count} tiles, more than {MAX_TILES}")));
        }
        let tile_offsets = tags.per_tile(Tag::TileOffsets, tile_count)?;
        let byte_counts = tags.per_tile(Tag::TileByteCounts, tile_count)?;
        let mut tile_byte_counts = Vec::with_capacity(byte_counts.len());
        for (index, (start, bytes)) in tile_offsets.iter().zip(byte_counts).enumerate() {
            // Writers mark an absent tile by either.
            let bytes = if *start == 0 { 0 } else { bytes };
            let is_inside = start.checked_add(bytes).is_some_and(|end| end <= file_bytes);
            match u32::try_from(bytes) {
                Ok(count) if bytes == 0 || (is_inside && bytes <= MAX_TILE_DATA_BYTES) => tile_byte_counts.push(count),
                _ => {
                    return Err(tags.absurd(format!(
                        "tile {index} has {bytes} bytes from byte {start} on; the file has {file_bytes}, and a tile \
                         at most {MAX_TILE_DATA_BYTES}"
                    )));
                }
            }
        }
        let level = TiledLevel {
            width,
            height,
            tile_width,
            tile_height,
            compression: Compression::of(tags.code(Tag::Compression, 1)?),
            photometric: tags.code(Tag::PhotometricInterpretation, u16::MAX)?,
            samples,
            is_planar,
            bits: tags.largest_code(Tag::BitsPerSample, 1)?,
            sample_format: tags.largest_code(Tag::SampleFormat, 1)?,
            predictor: tags.code(Tag::Predictor, 1)?,
            is_bit_reversed: tags.code(FILL_ORDER, 1)? == 2,
            jpeg_tables: tags.bytes(Tag::JPEGTables, MAX_JPEG_TABLES_BYTES)?,
            tile_offsets,
            tile_byte_counts,
        };
        Ok((level, subfile_type))
    }

    /// Microns per pixel by the TIFF's own resolution tags.
    fn resolution(&mut self, offset: u64, directory: &Directory) -> Result<Option<(f64, f64)>, PyramidError> {
        let mut tags = self.tags(offset, directory);
        let unit_um = match tags.code(Tag::ResolutionUnit, 2)? {
            2 => 25_400.0,
            3 => 10_000.0,
            _ => return Ok(None),
        };
        let (x, y) = (tags.ratio(Tag::XResolution)?, tags.ratio(Tag::YResolution)?);
        Ok(x.zip(y).map(|(x, y)| (unit_um / x, unit_um / y)))
    }
}

fn is_smaller(level: &TiledLevel, last: &TiledLevel) -> bool {
    level.width <= last.width && level.height <= last.height && (level.width, level.height) != (last.width, last.height)
}

/// Whether the level has the base's aspect within 1 %, or as near as whole pixels allow.
fn has_aspect_of(level: &TiledLevel, base: &TiledLevel) -> bool {
    let downsample_x = f64::from(base.width) / f64::from(level.width);
    let downsample_y = f64::from(base.height) / f64::from(level.height);
    let rounding = 1.0 / f64::from(level.width.min(level.height));
    (downsample_x / downsample_y - 1.0).abs() <= 0.01 + rounding
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;
    use crate::slide::native::tiff_builder::{Entry, TiffBuilder, Values, rgb_image, with};

    fn parse(bytes: Vec<u8>) -> Result<Pyramid, PyramidError> {
        Pyramid::parse(Cursor::new(bytes))
    }

    /// An image of 16 px tiles whose data doesn't matter.
    fn image(tiff: &mut TiffBuilder, width: u32, height: u32) -> Vec<Entry> {
        let count = width.div_ceil(16) * height.div_ceil(16);
        let at = tiff.data(&[7; 32]);
        rgb_image((width, height), 16, (1, 1), &vec![(at, 32); count as usize])
    }

    fn sizes(pyramid: &Pyramid) -> Vec<(u32, u32)> {
        pyramid.levels.iter().map(|level| (level.width, level.height)).collect()
    }

    /// A file of a single image, changed in one entry.
    fn one_image(tag: u16, values: Values) -> Result<Pyramid, PyramidError> {
        let mut tiff = TiffBuilder::new(false, false);
        let entries = image(&mut tiff, 100, 60);
        tiff.directory(&with(entries, tag, values));
        parse(tiff.finish())
    }

    #[test]
    fn both_byte_orders_and_both_widths_tell_the_same() {
        for (is_big_endian, is_big_tiff) in [(false, false), (false, true), (true, false), (true, true)] {
            let mut tiff = TiffBuilder::new(is_big_endian, is_big_tiff);
            let base = image(&mut tiff, 100, 60);
            let base = with(base, 282, Values::Ratio(20_000, 1));
            let base = with(base, 283, Values::Ratio(40_000, 1));
            tiff.directory(&with(base, 296, Values::Short(vec![3])));
            for (width, height, subfile_type) in [(50, 30, 1), (50, 10, 1), (25, 15, 1), (20, 12, 0), (12, 7, 5)] {
                let entries = image(&mut tiff, width, height);
                tiff.directory(&with(entries, 254, Values::Long(vec![subfile_type])));
            }
            let pyramid = parse(tiff.finish()).unwrap();
            // Neither another shape, nor a full image of its own, nor a mask.
            assert_eq!(sizes(&pyramid), [(100, 60), (50, 30), (25, 15)]);
            assert_eq!((pyramid.dialect, pyramid.mpp), (Dialect::Generic, Some((0.5, 0.25))));
            let level = &pyramid.levels[0];
            assert_eq!((level.tiles_across(), level.tile_offsets.len()), (7, 28));
            assert_eq!((level.compression, level.bits, level.samples), (Compression::None, 8, 3));
        }
    }

    #[test]
    fn aperio_has_its_tiled_images_and_its_mpp() {
        let mut tiff = TiffBuilder::new(false, false);
        let base = image(&mut tiff, 100, 60);
        tiff.directory(&with(base, 270, Values::Text("Aperio Image Library\r\n100x60|AppMag = 20|MPP = 0.4990|X = 1")));
        let mut stripped = image(&mut tiff, 80, 48);
        stripped.retain(|(tag, _)| !(322..=325).contains(tag));
        tiff.directory(&stripped);
        let level = image(&mut tiff, 25, 15);
        tiff.directory(&level);
        let pyramid = parse(tiff.finish()).unwrap();
        assert_eq!(sizes(&pyramid), [(100, 60), (25, 15)]);
        assert_eq!((pyramid.dialect, pyramid.mpp), (Dialect::Aperio, Some((0.499, 0.499))));
    }

    #[test]
    fn ome_has_sub_directories() {
        for is_big_tiff in [false, true] {
            let mut tiff = TiffBuilder::new(false, is_big_tiff);
            let children: Vec<u32> = [(50, 30), (25, 15)]
                .into_iter()
                .map(|(width, height)| {
                    let entries = image(&mut tiff, width, height);
                    tiff.loose_directory(&entries).0
                })
                .collect();
            let base = with(image(&mut tiff, 100, 60), 330, Values::Long(children));
            let xml = "<?xml version=\"1.0\"?><OME><Image><Pixels ID='P' PhysicalSizeX=\"250\" PhysicalSizeXUnit=\"nm\" \
                       PhysicalSizeY=\"0.5\" SizeZ=\"1\"><Channel/></Pixels></Image></OME>";
            tiff.directory(&with(base, 270, Values::Text(xml)));
            let other = image(&mut tiff, 90, 54);
            tiff.directory(&other);
            let pyramid = parse(tiff.finish()).unwrap();
            assert_eq!(sizes(&pyramid), [(100, 60), (50, 30), (25, 15)]);
            assert_eq!((pyramid.dialect, pyramid.mpp), (Dialect::Ome, Some((0.25, 0.5))));
        }
        let several = one_image(270, Values::Text("<ome:OME><ome:Pixels SizeZ = '3'/></ome:OME>"));
        assert!(matches!(several, Err(PyramidError::Unsupported(_))), "{several:?}");
    }

    #[test]
    fn the_padding_of_philips_levels_comes_off() {
        // 100 × 60 px in tiles of 16 px.
        let philips = || one_image(305, Values::Text("Philips DP v1.0")).unwrap();
        assert_eq!((philips().dialect, sizes(&philips())), (Dialect::Philips, vec![(100, 60)]));
        assert!(matches!(philips().without_openslide(), Err(PyramidError::Unsupported(_))));
        let cropped = |sizes_of_openslide: &[(u32, u32)]| {
            let mut pyramid = philips();
            pyramid.crop(sizes_of_openslide);
            sizes(&pyramid)
        };
        assert_eq!(cropped(&[(97, 49)]), [(97, 49)]);
        // Another grid, more pixels than there are, another number of levels.
        assert_eq!(cropped(&[(96, 49)]), [(100, 60)]);
        assert_eq!(cropped(&[(112, 64)]), [(100, 60)]);
        assert_eq!(cropped(&[(97, 49), (48, 24)]), [(100, 60)]);
        let mut other = one_image(305, Values::Text("vips")).unwrap();
        other.crop(&[(97, 49)]);
        assert_eq!(sizes(&other), [(100, 60)]);
        assert!(other.without_openslide().is_ok());
    }

    #[test]
    fn other_vendors_are_refused() {
        for (tag, text) in [
            (305, "MedScan"),
            (270, "<?xml?><scn xmlns=\"http://www.leica-microsystems.com/scn/2010/10/01\">"),
            (271, "Hamamatsu"),
            (270, "<iScan/>"),
        ] {
            let error = one_image(tag, Values::Text(text)).unwrap_err();
            assert!(matches!(error, PyramidError::Unsupported(_)), "{text}: {error}");
        }
    }

    #[test]
    fn hostile_values_are_refused() {
        let long = |value| Values::Long(vec![value]);
        for (tag, values, expected) in [
            (256, long(0), "ImageWidth is 0"),
            (257, long(u32::MAX), "ImageLength is 4294967295"),
            (322, long(0), "TileWidth is 0"),
            (323, long(16_385), "TileLength is 16385"),
            (322, long(1), "values for a grid"),
            (324, Values::Long(vec![8; 27]), "27 values for a grid of 28 tiles"),
            (324, Values::Long(vec![4_000_000_000; 28]), "from byte 4000000000 on"),
            (325, Values::Long(vec![u32::MAX; 28]), "tile 0 has 4294967295 bytes"),
            (325, Values::Raw(4, 0xffff_ffff, 8), "values for a grid"),
            (277, Values::Short(vec![0]), "0 samples"),
            (258, Values::Raw(3, 0xffff_ffff, 8), "4294967295 values"),
            (270, Values::Raw(2, 0xffff_ffff, 8), "4294967295 bytes"),
            (347, Values::Raw(7, 0x1000_0000, 8), "268435456 bytes"),
        ] {
            let error = one_image(tag, values).unwrap_err();
            let text = match &error {
                // The `tiff` crate looks at the first directory before this module does.
                PyramidError::Directory { source, .. } => source.to_string(),
                _ => error.to_string(),
            };
            let is_named = text.contains(expected) || matches!(error, PyramidError::Directory { .. });
            assert!(is_named, "tag {tag}: {text}");
        }
    }

    #[test]
    fn loops_and_endless_directories_are_refused() {
        let mut tiff = TiffBuilder::new(false, false);
        let entries = image(&mut tiff, 100, 60);
        let first = tiff.directory(&entries);
        let entries = image(&mut tiff, 50, 30);
        tiff.directory(&entries);
        tiff.link_to(first.into());
        let error = parse(tiff.finish()).unwrap_err();
        assert!(error.to_string().contains("loop"), "{error}");

        // A BigTIFF directory of 2^60 entries.
        let mut bytes = vec![b'I', b'I', 43, 0, 8, 0, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0];
        bytes.extend((1u64 << 60).to_le_bytes());
        bytes.extend([0; 64]);
        let error = parse(bytes).unwrap_err();
        assert!(error.to_string().contains("more than 4096"), "{error}");

        // The same sub-directory twice.
        let mut tiff = TiffBuilder::new(false, false);
        let child = image(&mut tiff, 50, 30);
        let (child, _) = tiff.loose_directory(&child);
        let entries = with(image(&mut tiff, 100, 60), 270, Values::Text("<OME/>"));
        tiff.directory(&with(entries, 330, Values::Long(vec![child, child])));
        let error = parse(tiff.finish()).unwrap_err();
        assert!(error.to_string().contains("loop"), "{error}");
    }

    #[test]
    fn damaged_files_never_panic() {
        let mut tiff = TiffBuilder::new(true, true);
        let child = image(&mut tiff, 50, 30);
        let (child, _) = tiff.loose_directory(&child);
        let base = with(image(&mut tiff, 100, 60), 330, Values::Long(vec![child]));
        tiff.directory(&with(base, 270, Values::Text("<OME><Pixels PhysicalSizeX='1'/></OME>")));
        let sound = tiff.finish();
        for len in 0..sound.len() {
            let _ = parse(sound[..len].to_vec());
        }
        let mut state = 1u32;
        for _ in 0..20_000 {
            let mut damaged = sound.clone();
            for _ in 0..3 {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let at = (state >> 8) as usize % damaged.len();
                damaged[at] = state.to_le_bytes()[0];
            }
            let _ = parse(damaged);
        }
    }
}
