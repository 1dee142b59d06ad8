//! The series that a DICOM file belongs to: one slide is one series of files.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::Path;

/// Group and element of SeriesInstanceUID.
const SERIES_INSTANCE_UID: (u16, u16) = (0x0020, 0x000e);
const UNDEFINED_LENGTH: u32 = u32::MAX;
/// Nested sequences followed at most.
const MAX_DEPTH: u32 = 16;

/// The file's SeriesInstanceUID; `None` if it is no DICOM file or has none.
///
/// Read here and not through OpenSlide, which would open all files of the series for each of them. Whole-slide
/// images are always explicit-VR little endian (their pixels are encapsulated), so only that is understood.
pub(super) fn series_uid(path: &Path) -> Option<String> {
    let mut file = BufReader::new(File::open(path).ok()?);
    let mut head = [0; 132];
    file.read_exact(&mut head).ok()?;
    if &head[128..] != b"DICM" {
        return None;
    }
    loop {
        let (tag, length) = element(&mut file).ok()?;
        if tag == SERIES_INSTANCE_UID {
            // A UID has at most 64 characters.
            let mut text = vec![0; usize::try_from(length).ok().filter(|length| *length <= 64)?];
            file.read_exact(&mut text).ok()?;
            let text = String::from_utf8(text).ok()?;
            return Some(text.trim_end_matches(['\0', ' ']).to_owned());
        }
        // Elements are in ascending order.
        if tag > SERIES_INSTANCE_UID {
            return None;
        }
        skip_value(&mut file, length, 0).ok()?;
    }
}

/// Reads the head of an element: its tag and the length of its value.
fn element(file: &mut impl Read) -> io::Result<((u16, u16), u32)> {
    let mut head = [0; 8];
    file.read_exact(&mut head)?;
    let tag = (u16::from_le_bytes([head[0], head[1]]), u16::from_le_bytes([head[2], head[3]]));
    // Items and delimiters carry no VR, their length is 32 bits.
    if tag.0 == 0xfffe {
        return Ok((tag, u32::from_le_bytes([head[4], head[5], head[6], head[7]])));
    }
    let is_long = matches!(
        &head[4..6],
        b"OB" | b"OD" | b"OF" | b"OL" | b"OV" | b"OW" | b"SQ" | b"SV" | b"UC" | b"UN" | b"UR" | b"UT" | b"UV"
    );
    if !is_long {
        return Ok((tag, u32::from(u16::from_le_bytes([head[6], head[7]]))));
    }
    let mut length = [0; 4];
    file.read_exact(&mut length)?;
    Ok((tag, u32::from_le_bytes(length)))
}

/// Skips a value; one of undefined length is a sequence (or an item) that ends with a delimiter.
fn skip_value(file: &mut (impl Read + Seek), length: u32, depth: u32) -> io::Result<()> {
    if length != UNDEFINED_LENGTH {
        file.seek(SeekFrom::Current(i64::from(length)))?;
        return Ok(());
    }
    if depth == MAX_DEPTH {
        return Err(io::ErrorKind::InvalidData.into());
    }
    loop {
        let (tag, length) = element(file)?;
        if matches!(tag, (0xfffe, 0xe00d | 0xe0dd)) {
            return Ok(());
        }
        skip_value(file, length, depth + 1)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn short(group: u16, number: u16, vr: [u8; 2], value: &[u8]) -> Vec<u8> {
        let length = u16::try_from(value.len()).unwrap();
        [&group.to_le_bytes()[..], &number.to_le_bytes(), &vr, &length.to_le_bytes(), value].concat()
    }

    fn file_with(elements: &[Vec<u8>]) -> Option<String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.dcm");
        std::fs::write(&path, [vec![0; 128], b"DICM".to_vec(), elements.concat()].concat()).unwrap();
        series_uid(&path)
    }

    #[test]
    fn series_is_found_behind_nested_sequences() {
        let uid = short(0x0020, 0x000e, *b"UI", b"1.2.3\0");
        // A sequence of undefined length with one item of undefined length that holds the same tag.
        let item = [&[0xfe, 0xff, 0x00, 0xe0, 0xff, 0xff, 0xff, 0xff][..], &short(0x0020, 0x000e, *b"UI", b"9.9\0")];
        let ends = [0xfe, 0xff, 0x0d, 0xe0, 0, 0, 0, 0, 0xfe, 0xff, 0xdd, 0xe0, 0, 0, 0, 0];
        let head = [0x08, 0x00, 0x15, 0x11, b'S', b'Q', 0, 0, 0xff, 0xff, 0xff, 0xff];
        let sequence = [&head[..], &item.concat(), &ends].concat();
        let modality = short(0x0008, 0x0060, *b"CS", b"SM");
        assert_eq!(file_with(&[modality.clone(), sequence, uid.clone()]).as_deref(), Some("1.2.3"));
        assert_eq!(file_with(&[modality.clone(), uid[..10].to_vec()]), None, "cut");
        assert_eq!(file_with(&[modality, short(0x0028, 0x0010, *b"US", &[1, 0])]), None, "absent");
        assert_eq!(file_with(&[short(0x0020, 0x000e, *b"UI", &[b'1'; 200])]), None, "absurd length");
    }
}
