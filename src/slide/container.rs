//! What a file is, told from its first bytes and its TIFF directories: for messages and for the report, never for
//! reading pixels.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

/// What [`inspect`] found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Container {
    /// A TIFF whose directories could be followed.
    Tiff {
        /// Compression of its largest tiled image, `None` if nothing is tiled.
        compression: Option<String>,
    },
    /// A TIFF whose first directory lies beyond the end of the file.
    TruncatedTiff {
        /// Where the directory should be.
        needed: u64,
        /// Size of the file.
        actual: u64,
    },
    /// A DICOM file.
    Dicom,
    /// Something else, in words.
    Other(&'static str),
}

/// Directories followed at most: a real slide has fewer than a hundred.
const MAX_DIRECTORIES: usize = 1000;

const TILE_WIDTH: u16 = 322;
const IMAGE_WIDTH: u16 = 256;
const IMAGE_HEIGHT: u16 = 257;
const COMPRESSION: u16 = 259;

/// Looks at the file's head and, in a TIFF, at its directories.
pub(super) fn inspect(path: &Path) -> io::Result<Container> {
    let mut file = File::open(path)?;
    let size = file.metadata()?.len();
    let mut head = Vec::new();
    file.by_ref().take(512).read_to_end(&mut head)?;
    let little_endian = match head.get(..4) {
        Some([b'I', b'I', 42 | 43, 0]) => true,
        Some([b'M', b'M', 0, 42 | 43]) => false,
        _ => return Ok(other(&head)),
    };
    let big = head[2] == 43 || head[3] == 43;
    let mut tiff = Tiff { file, little_endian, big };
    let first = tiff.offset_at(if big { 8 } else { 4 }).unwrap_or(0);
    if first >= size {
        return Ok(Container::TruncatedTiff { needed: first, actual: size });
    }
    Ok(Container::Tiff { compression: tiff.largest_tiled_compression(first) })
}

/// A TIFF being walked. Anything unexpected ends the walk: OpenSlide is the judge of the file, not this.
struct Tiff {
    file: File,
    little_endian: bool,
    big: bool,
}

impl Tiff {
    fn largest_tiled_compression(&mut self, first: u64) -> Option<String> {
        let mut largest: Option<(u64, u64)> = None;
        let mut seen = HashSet::new();
        let mut offset = first;
        while offset != 0 && seen.len() < MAX_DIRECTORIES && seen.insert(offset) {
            let Ok((area, compression, is_tiled, next)) = self.directory(offset) else { break };
            if is_tiled && largest.is_none_or(|(largest_area, _)| area > largest_area) {
                largest = Some((area, compression));
            }
            offset = next;
        }
        largest.map(|(_, code)| compression_name(code))
    }

    /// Area, compression, whether it is tiled, and the offset of the next directory.
    fn directory(&mut self, offset: u64) -> io::Result<(u64, u64, bool, u64)> {
        let (count_bytes, entry_bytes) = if self.big { (8, 20) } else { (2, 12) };
        self.file.seek(SeekFrom::Start(offset))?;
        let count = self.number(count_bytes)?;
        if count > 4096 {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let (mut width, mut height, mut compression, mut is_tiled) = (0u64, 0u64, 1, false);
        for index in 0..count {
            self.file.seek(SeekFrom::Start(offset + count_bytes as u64 + index * entry_bytes))?;
            let (tag, kind) = (self.number(2)?, self.number(2)?);
            self.number(if self.big { 8 } else { 4 })?;
            let value_bytes = match kind {
                3 => 2,
                4 => 4,
                16 => 8,
                _ => continue,
            };
            let value = self.number(value_bytes)?;
            match u16::try_from(tag) {
                Ok(IMAGE_WIDTH) => width = value,
                Ok(IMAGE_HEIGHT) => height = value,
                Ok(COMPRESSION) => compression = value,
                Ok(TILE_WIDTH) => is_tiled = true,
                _ => {}
            }
        }
        let next = self.offset_at(offset + count_bytes as u64 + count * entry_bytes)?;
        Ok((width.saturating_mul(height), compression, is_tiled, next))
    }

    fn offset_at(&mut self, position: u64) -> io::Result<u64> {
        self.file.seek(SeekFrom::Start(position))?;
        self.number(if self.big { 8 } else { 4 })
    }

    fn number(&mut self, bytes: usize) -> io::Result<u64> {
        let mut raw = [0; 8];
        self.file.read_exact(&mut raw[..bytes])?;
        if !self.little_endian {
            raw[..bytes].reverse();
        }
        Ok(u64::from_le_bytes(raw))
    }
}

fn other(head: &[u8]) -> Container {
    if head.get(128..132) == Some(b"DICM") {
        return Container::Dicom;
    }
    Container::Other(match head {
        [] => "an empty file",
        [0x89, b'P', b'N', b'G', ..] => "a PNG image",
        [0xff, 0xd8, 0xff, ..] => "a JPEG image",
        [b'P', b'K', 3, 4, ..] => "a ZIP archive",
        _ if std::str::from_utf8(head).is_ok() => "a text file",
        _ => "unknown content",
    })
}

/// The usual name of a TIFF compression code.
fn compression_name(code: u64) -> String {
    match code {
        1 => "none".to_owned(),
        5 => "LZW".to_owned(),
        6 | 7 => "JPEG".to_owned(),
        8 | 32946 => "deflate".to_owned(),
        33003 => "JPEG 2000 (YCbCr)".to_owned(),
        33005 => "JPEG 2000 (RGB)".to_owned(),
        34712 => "JPEG 2000".to_owned(),
        50000 => "Zstandard".to_owned(),
        other => format!("TIFF code {other}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_are_told_apart() {
        let mut dicom = vec![0; 128];
        dicom.extend(b"DICM");
        for (head, expected) in [
            (&b""[..], Container::Other("an empty file")),
            (b"\x89PNG\r\n", Container::Other("a PNG image")),
            (b"slide,mpp\n", Container::Other("a text file")),
            (b"\x00\xff\xfe\x01", Container::Other("unknown content")),
            (&dicom, Container::Dicom),
        ] {
            assert_eq!(other(head), expected);
        }
    }

    #[test]
    fn hostile_directories_end_the_walk() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("loop.tif");
        // A directory without entries that names itself as the next one.
        std::fs::write(&path, [b'I', b'I', 42, 0, 8, 0, 0, 0, 0, 0, 8, 0, 0, 0]).unwrap();
        assert_eq!(inspect(&path).unwrap(), Container::Tiff { compression: None });
        // The first directory lies beyond the end.
        std::fs::write(&path, [b'M', b'M', 0, 42, 0, 1, 0, 0]).unwrap();
        assert_eq!(inspect(&path).unwrap(), Container::TruncatedTiff { needed: 65536, actual: 8 });
        // Cut within the header.
        std::fs::write(&path, [b'M', b'M', 0, 42, 0]).unwrap();
        assert_eq!(inspect(&path).unwrap(), Container::Tiff { compression: None });
    }
}
