//! The TIFF container, written: pages of tiles or strips that the caller has already encoded, in classic or BigTIFF.
//!
//! Written here and not taken from a crate because two needs met in none: the levels of a pyramid grow side by side in
//! one stream, and equal tiles (most of a heatmap is one value) share one run of bytes. Pages are listed in the order of
//! [`TiffWriter::add_page`]; their chunks may come interleaved. The directories follow the pixels, so that nothing but
//! the header's pointer is ever rewritten. The module knows the container only: no codec, no slide, no file system.

use std::io::{self, Seek, SeekFrom, Write};

/// Which of the two containers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Container {
    /// 32-bit offsets: read everywhere, up to 4 GiB.
    Classic,
    /// 64-bit offsets.
    Big,
}

impl Container {
    /// Classic wherever a file of at most `bytes` fits it.
    #[must_use]
    pub fn for_bytes(bytes: u64) -> Self {
        if bytes <= u64::from(u32::MAX) { Self::Classic } else { Self::Big }
    }
}

/// TIFF tag 259.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compression(pub u16);

impl Compression {
    /// Plain samples.
    pub const NONE: Self = Self(1);
    /// JPEG streams, abbreviated if the page has tag 347 (JPEGTables).
    pub const JPEG: Self = Self(7);
    /// zlib streams ("Adobe deflate").
    pub const DEFLATE: Self = Self(8);
}

/// TIFF tag 262.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Photometric(pub u16);

impl Photometric {
    /// Grey, 0 is black.
    pub const GREY: Self = Self(1);
    /// Red, green, blue.
    pub const RGB: Self = Self(2);
    /// Luma and two chromas, as most JPEG streams have them.
    pub const YCBCR: Self = Self(6);
}

/// How a page is cut into chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Tiles of one size, whole even at the right and lower border; both sides multiples of 16.
    Tiles {
        /// Tile width in pixels.
        width: u32,
        /// Tile height in pixels.
        height: u32,
    },
    /// Strips over the whole width; the last may be lower.
    Strips {
        /// Rows of pixels per strip.
        rows: u32,
    },
}

/// The value of a tag that [`Page`] has no field for.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Text, without the closing zero.
    Ascii(String),
    /// 16-bit numbers.
    Short(Vec<u16>),
    /// 32-bit numbers.
    Long(Vec<u32>),
    /// Numbers of 0 or more, kept to nine digits.
    Rational(Vec<f64>),
    /// Bytes of no further type.
    Undefined(Vec<u8>),
    /// 64-bit numbers, in [`Container::Big`] only.
    Long8(Vec<u64>),
}

/// A page: one image in 8-bit samples, interleaved.
#[derive(Clone, Debug, PartialEq)]
pub struct Page {
    /// Width in pixels.
    pub width: u32,
    /// Height in pixels.
    pub height: u32,
    /// The cut into chunks.
    pub layout: Layout,
    /// Samples per pixel.
    pub samples: u16,
    /// What the samples mean.
    pub photometric: Photometric,
    /// How the chunks are encoded.
    pub compression: Compression,
    /// Whether it is a reduced version of another page (NewSubfileType 1).
    pub is_reduced: bool,
    /// ImageDescription.
    pub description: Option<String>,
    /// Pixels per centimetre along x and y.
    pub pixels_per_cm: Option<(f64, f64)>,
    /// Further tags, by number; one that is already set above is replaced.
    pub tags: Vec<(u16, Value)>,
}

impl Page {
    /// Number of chunks that the page takes.
    #[must_use]
    pub fn chunk_count(&self) -> u64 {
        match self.layout {
            Layout::Tiles { width, height } => {
                u64::from(self.width.div_ceil(width)) * u64::from(self.height.div_ceil(height))
            }
            Layout::Strips { rows } => u64::from(self.height.div_ceil(rows)),
        }
    }
}

/// A page of a [`TiffWriter`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageId(usize);

/// An encoded tile or strip that lies in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    offset: u64,
    length: u32,
}

/// Why a TIFF can't be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TiffError {
    /// The stream refused a write.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// An offset above 4 GiB in [`Container::Classic`], or a single value above it.
    #[error("too large for this kind of TIFF")]
    TooLarge,
    /// A page got too few or too many chunks.
    #[error("page {page} has {found} tiles or strips instead of {expected}")]
    ChunkCount {
        /// Index of the page.
        page: usize,
        /// What its size asks for.
        expected: u64,
        /// What was appended.
        found: u64,
    },
}

/// Writes a TIFF to a stream that starts at position 0.
#[derive(Debug)]
pub struct TiffWriter<W> {
    stream: W,
    position: u64,
    container: Container,
    pages: Vec<(Page, Vec<Chunk>)>,
}

impl<W: Write + Seek> TiffWriter<W> {
    /// Starts the file.
    ///
    /// # Errors
    /// [`TiffError::Io`].
    pub fn new(stream: W, container: Container) -> Result<Self, TiffError> {
        let mut writer = Self { stream, position: 0, container, pages: Vec::new() };
        // Little-endian; the pointer to the first directory is filled in by `finish`.
        match container {
            Container::Classic => writer.write(b"II\x2a\0\0\0\0\0")?,
            Container::Big => writer.write(b"II\x2b\0\x08\0\0\0\0\0\0\0\0\0\0\0")?,
        }
        Ok(writer)
    }

    /// Adds a page after those there are.
    pub fn add_page(&mut self, page: Page) -> PageId {
        self.pages.push((page, Vec::new()));
        PageId(self.pages.len() - 1)
    }

    /// Appends the next chunk of a page, encoded as the page says; chunks go row by row, left to right.
    ///
    /// # Errors
    /// [`TiffError::Io`], or [`TiffError::TooLarge`] for a classic file above 4 GiB.
    pub fn append(&mut self, page: PageId, encoded: &[u8]) -> Result<Chunk, TiffError> {
        let length = u32::try_from(encoded.len()).map_err(|_| TiffError::TooLarge)?;
        let chunk = Chunk { offset: self.position, length };
        self.offset_bytes(chunk.offset + u64::from(length))?;
        self.write(encoded)?;
        self.append_again(page, chunk);
        Ok(chunk)
    }

    /// Appends a chunk that is already in the file, of this or another page: the bytes are shared.
    pub fn append_again(&mut self, page: PageId, chunk: Chunk) {
        self.pages[page.0].1.push(chunk);
    }

    /// Writes the directories and returns the stream, not flushed.
    ///
    /// # Errors
    /// [`TiffError::ChunkCount`] if a page is not complete, and as [`append`](Self::append).
    pub fn finish(mut self) -> Result<W, TiffError> {
        let mut pointer_at = if self.container == Container::Big { 8 } else { 4 };
        let pages = std::mem::take(&mut self.pages);
        for (index, (page, chunks)) in pages.into_iter().enumerate() {
            let (expected, found) = (page.chunk_count(), chunks.len() as u64);
            if expected != found {
                return Err(TiffError::ChunkCount { page: index, expected, found });
            }
            pointer_at = self.write_directory(&page, &chunks, pointer_at)?;
        }
        Ok(self.stream)
    }

    /// Writes a page's directory, points `pointer_at` to it and returns where its own pointer to the next one lies.
    fn write_directory(&mut self, page: &Page, chunks: &[Chunk], pointer_at: u64) -> Result<u64, TiffError> {
        let mut entries = Vec::new();
        for (tag, value) in self.tags_of(page, chunks) {
            let (kind, count, bytes) = encode(&value)?;
            let inline = self.container.offset_size();
            let mut field = bytes;
            if field.len() > inline {
                self.align()?;
                let offset = self.offset_bytes(self.position)?;
                self.write(&field)?;
                field = offset;
            }
            field.resize(inline, 0);
            entries.push((tag, kind, count, field));
        }
        self.align()?;
        let start = self.position;
        let mut directory = Vec::new();
        match self.container {
            Container::Classic => directory.extend(to_u16(entries.len())?.to_le_bytes()),
            Container::Big => directory.extend((entries.len() as u64).to_le_bytes()),
        }
        for (tag, kind, count, field) in entries {
            directory.extend(tag.to_le_bytes());
            directory.extend(kind.to_le_bytes());
            directory.extend(self.offset_bytes(count)?);
            directory.extend(field);
        }
        let next_pointer_at = start + directory.len() as u64;
        directory.extend(self.offset_bytes(0)?);
        self.write(&directory)?;
        let pointer = self.offset_bytes(start)?;
        self.stream.seek(SeekFrom::Start(pointer_at))?;
        self.stream.write_all(&pointer)?;
        self.stream.seek(SeekFrom::Start(self.position))?;
        Ok(next_pointer_at)
    }

    /// All tags of a page, ascending as the format demands.
    fn tags_of(&self, page: &Page, chunks: &[Chunk]) -> std::collections::BTreeMap<u16, Value> {
        let lengths = chunks.iter().map(|chunk| chunk.length).collect();
        let offsets = match self.container {
            #[expect(
                clippy::cast_possible_truncation,
                reason = "`append` refuses offsets above 4 GiB in a classic file"
            )]
            Container::Classic => Value::Long(chunks.iter().map(|chunk| chunk.offset as u32).collect()),
            Container::Big => Value::Long8(chunks.iter().map(|chunk| chunk.offset).collect()),
        };
        let mut tags = std::collections::BTreeMap::from([
            (254, Value::Long(vec![u32::from(page.is_reduced)])),
            (256, Value::Long(vec![page.width])),
            (257, Value::Long(vec![page.height])),
            (258, Value::Short(vec![8; usize::from(page.samples)])),
            (259, Value::Short(vec![page.compression.0])),
            (262, Value::Short(vec![page.photometric.0])),
            (277, Value::Short(vec![page.samples])),
            (284, Value::Short(vec![1])),
        ]);
        if let Some(description) = &page.description {
            tags.insert(270, Value::Ascii(description.clone()));
        }
        if let Some((x, y)) = page.pixels_per_cm {
            tags.insert(282, Value::Rational(vec![x]));
            tags.insert(283, Value::Rational(vec![y]));
            tags.insert(296, Value::Short(vec![3]));
        }
        match page.layout {
            Layout::Tiles { width, height } => {
                tags.insert(322, Value::Long(vec![width]));
                tags.insert(323, Value::Long(vec![height]));
                tags.insert(324, offsets);
                tags.insert(325, Value::Long(lengths));
            }
            Layout::Strips { rows } => {
                tags.insert(273, offsets);
                tags.insert(278, Value::Long(vec![rows]));
                tags.insert(279, Value::Long(lengths));
            }
        }
        tags.extend(page.tags.iter().cloned());
        tags
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), TiffError> {
        self.stream.write_all(bytes)?;
        self.position += bytes.len() as u64;
        Ok(())
    }

    /// Directories and values start on even offsets, in BigTIFF on multiples of 8.
    fn align(&mut self) -> Result<(), TiffError> {
        let unit = if self.container == Container::Big { 8 } else { 2 };
        while !self.position.is_multiple_of(unit) {
            self.write(&[0])?;
        }
        Ok(())
    }

    /// An offset or count in the width of the container.
    fn offset_bytes(&self, offset: u64) -> Result<Vec<u8>, TiffError> {
        match self.container {
            Container::Classic => Ok(u32::try_from(offset).map_err(|_| TiffError::TooLarge)?.to_le_bytes().to_vec()),
            Container::Big => Ok(offset.to_le_bytes().to_vec()),
        }
    }
}

impl Container {
    fn offset_size(self) -> usize {
        match self {
            Self::Classic => 4,
            Self::Big => 8,
        }
    }
}

/// Type code, count and little-endian bytes of a value.
fn encode(value: &Value) -> Result<(u16, u64, Vec<u8>), TiffError> {
    let (kind, count, bytes): (u16, usize, Vec<u8>) = match value {
        Value::Ascii(text) => (2, text.len() + 1, text.bytes().chain([0]).collect()),
        Value::Short(values) => (3, values.len(), values.iter().flat_map(|value| value.to_le_bytes()).collect()),
        Value::Long(values) => (4, values.len(), values.iter().flat_map(|value| value.to_le_bytes()).collect()),
        Value::Rational(values) => {
            let pairs = values.iter().map(|value| rational(*value));
            (
                5,
                values.len(),
                pairs.flat_map(|(over, under)| [over.to_le_bytes(), under.to_le_bytes()].concat()).collect(),
            )
        }
        Value::Undefined(bytes) => (7, bytes.len(), bytes.clone()),
        Value::Long8(values) => (16, values.len(), values.iter().flat_map(|value| value.to_le_bytes()).collect()),
    };
    Ok((kind, count as u64, bytes))
}

/// The fraction nearest to `value` with the largest denominator that fits; whole numbers stay whole.
fn rational(value: f64) -> (u32, u32) {
    const MAX: f64 = u32::MAX as f64;
    // NaN becomes 0 too.
    let value = if value > 0.0 { value.min(MAX) } else { 0.0 };
    let under = if value.fract() == 0.0 { 1.0 } else { (MAX / value).floor().clamp(1.0, MAX) };
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "both lie in 0..=u32::MAX by the lines above"
    )]
    let pair = ((value * under).round().min(MAX) as u32, under as u32);
    pair
}

fn to_u16(count: usize) -> Result<u16, TiffError> {
    u16::try_from(count).map_err(|_| TiffError::TooLarge)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Cursor;
    use tiff::decoder::{Decoder, DecodingResult};
    use tiff::tags::Tag;

    fn grey(width: u32, height: u32, layout: Layout) -> Page {
        Page {
            width,
            height,
            layout,
            samples: 1,
            photometric: Photometric::GREY,
            compression: Compression::NONE,
            is_reduced: false,
            description: None,
            pixels_per_cm: None,
            tags: Vec::new(),
        }
    }

    fn pixels(decoder: &mut Decoder<Cursor<Vec<u8>>>) -> Vec<u8> {
        match decoder.read_image().unwrap() {
            DecodingResult::U8(pixels) => pixels,
            other => panic!("unexpected samples {other:?}"),
        }
    }

    #[test]
    fn pages_interleave_and_share_tiles_in_both_containers() {
        for container in [Container::Classic, Container::Big] {
            let mut writer = TiffWriter::new(Cursor::new(Vec::new()), container).unwrap();
            let tiles = Layout::Tiles { width: 16, height: 16 };
            let mut first = grey(20, 16, tiles);
            first.description = Some("first µ".into());
            first.pixels_per_cm = Some((20_000.0, 19_999.5));
            let first = writer.add_page(first);
            let mut second = grey(3, 2, Layout::Strips { rows: 1 });
            second.is_reduced = true;
            second.tags.push((305, Value::Ascii("odd".into())));
            let second = writer.add_page(second);
            let shared = writer.append(first, &[7; 256]).unwrap();
            writer.append(second, &[1, 2, 3]).unwrap();
            writer.append_again(first, shared);
            writer.append(second, &[4, 5, 6]).unwrap();
            let bytes = writer.finish().unwrap().into_inner();
            assert!(bytes.len() < 256 + 3 * 300, "the tile is stored once");

            let mut decoder = Decoder::new(Cursor::new(bytes)).unwrap();
            assert_eq!(decoder.dimensions().unwrap(), (20, 16));
            assert_eq!(pixels(&mut decoder), [7; 320]);
            assert_eq!(decoder.get_tag_ascii_string(Tag::ImageDescription).unwrap(), "first µ");
            assert_eq!(decoder.get_tag_u32(Tag::ResolutionUnit).unwrap(), 3);
            decoder.next_image().unwrap();
            assert_eq!(pixels(&mut decoder), [1, 2, 3, 4, 5, 6]);
            assert_eq!(decoder.get_tag_u32(Tag::NewSubfileType).unwrap(), 1);
            assert_eq!(decoder.get_tag_ascii_string(Tag::Software).unwrap(), "odd");
            assert!(!decoder.more_images());
        }
    }

    #[test]
    fn an_incomplete_page_is_refused() {
        let mut writer = TiffWriter::new(Cursor::new(Vec::new()), Container::Classic).unwrap();
        let page = writer.add_page(grey(1, 3, Layout::Strips { rows: 2 }));
        writer.append(page, &[1, 2]).unwrap();
        let error = writer.finish().unwrap_err();
        assert_eq!(error.to_string(), "page 0 has 1 tiles or strips instead of 2");
    }

    #[test]
    fn fractions_keep_nine_digits() {
        assert_eq!(rational(20_000.0), (20_000, 1));
        assert_eq!(rational(0.0), (0, 1));
        assert_eq!(rational(f64::NAN), (0, 1));
        for value in [1e-3, 0.1, 1.0 / 3.0, 2.2, 10_000.0 / 0.2527, 39_999.9, 4e9 + 0.5] {
            let (over, under) = rational(value);
            assert!((f64::from(over) / f64::from(under) / value - 1.0).abs() < 1e-6, "{value}");
        }
    }

    #[test]
    fn the_container_follows_the_size() {
        assert_eq!(Container::for_bytes(u64::from(u32::MAX)), Container::Classic);
        assert_eq!(Container::for_bytes(u64::from(u32::MAX) + 1), Container::Big);
    }
}
