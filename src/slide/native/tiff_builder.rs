//! Builds TIFFs byte by byte, sound or hostile, for tests.

/// The values of a tag.
pub(crate) enum Values {
    Short(Vec<u16>),
    Long(Vec<u32>),
    Text(&'static str),
    Ratio(u32, u32),
    /// Type, count and the bytes of the value field as they are: for lies.
    Raw(u16, u64, u64),
}

/// A tag and its values.
pub(crate) type Entry = (u16, Values);

/// A TIFF in the making.
pub(crate) struct TiffBuilder {
    is_big_endian: bool,
    is_big_tiff: bool,
    bytes: Vec<u8>,
    /// Where the offset of the next directory of the chain belongs.
    link: usize,
}

impl TiffBuilder {
    pub(crate) fn new(is_big_endian: bool, is_big_tiff: bool) -> Self {
        let mut builder = Self { is_big_endian, is_big_tiff, bytes: Vec::new(), link: 0 };
        builder.bytes.extend(if is_big_endian { b"MM" } else { b"II" });
        builder.number(if is_big_tiff { 43 } else { 42 }, 2);
        if is_big_tiff {
            builder.number(8, 2);
            builder.number(0, 2);
        }
        builder.link = builder.bytes.len();
        builder.number(0, builder.offset_bytes());
        builder
    }

    /// Appends data and says where it lies.
    pub(crate) fn data(&mut self, data: &[u8]) -> u32 {
        let at = self.bytes.len();
        self.bytes.extend(data);
        u32::try_from(at).unwrap()
    }

    /// Appends a directory to the chain.
    pub(crate) fn directory(&mut self, entries: &[Entry]) -> u32 {
        let (at, link) = self.loose_directory(entries);
        self.patch(self.link, at.into());
        self.link = link;
        at
    }

    /// Appends a directory outside the chain; says where it and its link lie.
    pub(crate) fn loose_directory(&mut self, entries: &[Entry]) -> (u32, usize) {
        let fields: Vec<_> = entries.iter().map(|(tag, values)| (*tag, self.field(values))).collect();
        let at = self.bytes.len();
        self.number(fields.len() as u64, if self.is_big_tiff { 8 } else { 2 });
        for (tag, (kind, count, value)) in fields {
            self.number(tag.into(), 2);
            self.number(kind.into(), 2);
            self.number(count, self.offset_bytes());
            self.bytes.extend(value);
        }
        let link = self.bytes.len();
        self.number(0, self.offset_bytes());
        (u32::try_from(at).unwrap(), link)
    }

    /// Makes the chain go on at `offset`.
    pub(crate) fn link_to(&mut self, offset: u64) {
        self.patch(self.link, offset);
    }

    pub(crate) fn finish(self) -> Vec<u8> {
        self.bytes
    }

    fn offset_bytes(&self) -> usize {
        if self.is_big_tiff { 8 } else { 4 }
    }

    fn field(&mut self, values: &Values) -> (u16, u64, Vec<u8>) {
        let mut encoded = Vec::new();
        let (kind, count) = match values {
            Values::Short(values) => {
                values.iter().for_each(|value| encoded.extend(self.encode((*value).into(), 2)));
                (3, values.len())
            }
            Values::Long(values) => {
                values.iter().for_each(|value| encoded.extend(self.encode((*value).into(), 4)));
                (4, values.len())
            }
            Values::Text(text) => {
                encoded.extend(text.bytes().chain([0]));
                (2, encoded.len())
            }
            Values::Ratio(numerator, denominator) => {
                encoded.extend(self.encode((*numerator).into(), 4));
                encoded.extend(self.encode((*denominator).into(), 4));
                (5, 1)
            }
            Values::Raw(kind, count, value) => return (*kind, *count, self.encode(*value, self.offset_bytes())),
        };
        if encoded.len() > self.offset_bytes() {
            let at = self.data(&encoded);
            encoded = self.encode(at.into(), self.offset_bytes());
        }
        encoded.resize(self.offset_bytes(), 0);
        (kind, count as u64, encoded)
    }

    fn patch(&mut self, at: usize, value: u64) {
        let encoded = self.encode(value, self.offset_bytes());
        self.bytes[at..at + encoded.len()].copy_from_slice(&encoded);
    }

    fn number(&mut self, value: u64, bytes: usize) {
        let encoded = self.encode(value, bytes);
        self.bytes.extend(encoded);
    }

    fn encode(&self, value: u64, bytes: usize) -> Vec<u8> {
        let mut encoded = value.to_le_bytes()[..bytes].to_vec();
        if self.is_big_endian {
            encoded.reverse();
        }
        encoded
    }
}

/// The entries of an 8-bit RGB image of `tile` x `tile` px tiles that lie at `offsets`.
pub(crate) fn rgb_image(
    (width, height): (u32, u32),
    tile: u16,
    (compression, predictor): (u16, u16),
    tiles: &[(u32, u32)],
) -> Vec<Entry> {
    vec![
        (256, Values::Long(vec![width])),
        (257, Values::Long(vec![height])),
        (258, Values::Short(vec![8; 3])),
        (259, Values::Short(vec![compression])),
        (262, Values::Short(vec![2])),
        (277, Values::Short(vec![3])),
        (317, Values::Short(vec![predictor])),
        (322, Values::Short(vec![tile])),
        (323, Values::Short(vec![tile])),
        (324, Values::Long(tiles.iter().map(|(offset, _)| *offset).collect())),
        (325, Values::Long(tiles.iter().map(|(_, bytes)| *bytes).collect())),
    ]
}

/// Replaces or adds an entry.
pub(crate) fn with(mut entries: Vec<Entry>, tag: u16, values: Values) -> Vec<Entry> {
    entries.retain(|(known, _)| *known != tag);
    entries.push((tag, values));
    entries.sort_by_key(|(tag, _)| *tag);
    entries
}
