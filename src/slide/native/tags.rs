//! Reads the values of one TIFF directory. Counts are checked before a value is read, so that none takes more memory than
//! it may.

use ::tiff::decoder::{IfdDecoder, ifd::Value};
use ::tiff::tags::Tag;

use super::error::PyramidError;

/// Length of a text in bytes: OME descriptions reach megabytes.
const MAX_TEXT_BYTES: u64 = 32 << 20;

/// The tags of one directory.
pub(crate) struct Tags<'a> {
    offset: u64,
    ifd: IfdDecoder<'a>,
}

impl<'a> Tags<'a> {
    pub(crate) fn new(offset: u64, ifd: IfdDecoder<'a>) -> Self {
        Self { offset, ifd }
    }

    /// An error about this directory.
    pub(crate) fn absurd(&self, fault: String) -> PyramidError {
        PyramidError::Absurd { offset: self.offset, fault }
    }

    /// Whole numbers, at most `max_count` of them; `None` without the tag.
    pub(crate) fn numbers(&mut self, tag: Tag, max_count: u64) -> Result<Option<Vec<u64>>, PyramidError> {
        let count = self.ifd.find_entry(tag).map_or(0, |entry| entry.count());
        if count > max_count {
            return Err(self.absurd(format!("{tag:?} has {count} values, more than {max_count}")));
        }
        let found = self.ifd.find_tag_unsigned_vec(tag);
        found.map_err(|source| PyramidError::Directory { offset: self.offset, source })
    }

    /// The first of some whole numbers.
    pub(crate) fn number(&mut self, tag: Tag) -> Result<Option<u64>, PyramidError> {
        Ok(self.numbers(tag, 64)?.and_then(|values| values.first().copied()))
    }

    /// A 16-bit number, `default` without the tag.
    pub(crate) fn code(&mut self, tag: Tag, default: u16) -> Result<u16, PyramidError> {
        let value = self.number(tag)?.unwrap_or(default.into());
        u16::try_from(value).map_err(|_| self.absurd(format!("{tag:?} is {value}")))
    }

    /// The largest of some 16-bit numbers, `default` without the tag.
    pub(crate) fn largest_code(&mut self, tag: Tag, default: u16) -> Result<u16, PyramidError> {
        let value = self.numbers(tag, 64)?.and_then(|values| values.into_iter().max()).unwrap_or(default.into());
        u16::try_from(value).map_err(|_| self.absurd(format!("{tag:?} is {value}")))
    }

    /// A length in pixels, `1..=max`.
    pub(crate) fn side(&mut self, tag: Tag, max: u64) -> Result<u32, PyramidError> {
        let value = self.number(tag)?.unwrap_or(0);
        let side = u32::try_from(value).ok().filter(|_| (1..=max).contains(&value));
        side.ok_or_else(|| self.absurd(format!("{tag:?} is {value}, not 1 to {max}")))
    }

    /// A number for each of `tile_count` tiles.
    pub(crate) fn per_tile(&mut self, tag: Tag, tile_count: u64) -> Result<Vec<u64>, PyramidError> {
        let count = self.ifd.find_entry(tag).map_or(0, |entry| entry.count());
        if count != tile_count {
            return Err(self.absurd(format!("{tag:?} has {count} values for a grid of {tile_count} tiles")));
        }
        Ok(self.numbers(tag, tile_count)?.unwrap_or_default())
    }

    /// A single positive number that need not be whole; `None` if it is something else.
    pub(crate) fn ratio(&mut self, tag: Tag) -> Result<Option<f64>, PyramidError> {
        if self.ifd.find_entry(tag).is_none_or(|entry| entry.count() != 1) {
            return Ok(None);
        }
        let found = self.ifd.find_tag(tag).map_err(|source| PyramidError::Directory { offset: self.offset, source });
        let value = match found? {
            Some(Value::Rational(numerator, denominator)) => f64::from(numerator) / f64::from(denominator),
            Some(Value::Float(value)) => value.into(),
            Some(Value::Double(value)) => value,
            _ => return Ok(None),
        };
        Ok(Some(value).filter(|value| value.is_finite() && *value > 0.0))
    }

    /// Raw bytes of a value of single bytes.
    pub(crate) fn bytes(&mut self, tag: Tag, max: u64) -> Result<Option<Vec<u8>>, PyramidError> {
        let Some(entry) = self.ifd.find_entry(tag) else { return Ok(None) };
        let count = entry.count();
        let Some(len) = usize::try_from(count).ok().filter(|_| count <= max) else {
            return Err(self.absurd(format!("{tag:?} has {count} bytes, more than {max}")));
        };
        let mut bytes = vec![0; len];
        self.ifd
            .find_tag_bytes(tag, &mut bytes, 0)
            .map_err(|source| PyramidError::Directory { offset: self.offset, source })?;
        Ok(Some(bytes))
    }

    /// A text up to its NUL; not strictly UTF-8, as scanners write Latin-1 too.
    pub(crate) fn text(&mut self, tag: Tag) -> Result<String, PyramidError> {
        let bytes = self.bytes(tag, MAX_TEXT_BYTES)?.unwrap_or_default();
        let text = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
        Ok(String::from_utf8_lossy(text).into_owned())
    }
}
