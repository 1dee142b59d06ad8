//! The GeoJSON frame that tiles and regions share: features are streamed, one a line, and the text is valid JSON
//! however many there are. Coordinates are level-0 pixels, y downwards; rings follow RFC 7946 by their numbers.

use std::io::Write;
use std::path::{Path, PathBuf};

use serde::ser::{Serialize, SerializeSeq, Serializer};
use uuid::Uuid;

use super::{AtomicFile, OutputError, Written};

/// Namespace of the ids, so that the same slide and place always have the same id.
const NAMESPACE: Uuid = Uuid::from_u128(0x8c5d_6f0e_52a1_4e0b_9a36_1f7b_2d0c_94e3);

/// Streams features into a collection.
#[derive(Debug)]
pub(super) struct FeatureCollection {
    file: AtomicFile,
    path: PathBuf,
    count: u64,
}

impl FeatureCollection {
    pub(super) fn create(path: &Path) -> Result<Self, OutputError> {
        let mut file = AtomicFile::create(path)?;
        file.write_all(b"{\"type\":\"FeatureCollection\",\"features\":[").map_err(OutputError::write(path))?;
        Ok(Self { file, path: path.to_owned(), count: 0 })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn append(&mut self, feature: &impl Serialize) -> Result<(), OutputError> {
        let separator: &[u8] = if self.count == 0 { b"\n" } else { b",\n" };
        self.count += 1;
        self.file
            .write_all(separator)
            .and_then(|()| serde_json::to_writer(&mut self.file, feature).map_err(Into::into))
            .map_err(OutputError::write(&self.path))
    }

    pub(super) fn finish(mut self) -> Result<Written, OutputError> {
        self.file.write_all(b"\n]}\n").map_err(OutputError::write(&self.path))?;
        self.file.commit()
    }
}

/// The id of what lies at `place` on the slide.
pub(super) fn feature_id(slide_id: &str, place: &str) -> String {
    // The length keeps "a" + "b/c" apart from "a/b" + "c".
    Uuid::new_v5(&NAMESPACE, format!("{}:{slide_id}/{place}", slide_id.len()).as_bytes()).to_string()
}

/// A number in the shortest form: whole ones without a fraction, others to a thousandth of a pixel.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Coordinate(pub(super) f64);

impl Serialize for Coordinate {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let rounded = (self.0 * 1000.0).round() / 1000.0;
        if rounded.fract() == 0.0 && rounded.abs() < 1e15 {
            #[expect(clippy::cast_possible_truncation, reason = "whole and below 2^53")]
            let whole = rounded as i64;
            serializer.serialize_i64(whole)
        } else {
            serializer.serialize_f64(rounded)
        }
    }
}

/// A ring of points; the closing point is added.
#[derive(Debug)]
pub(super) struct Ring<'a>(pub(super) &'a [(f64, f64)]);

impl Serialize for Ring<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut seq = serializer.serialize_seq(Some(self.0.len() + 1))?;
        for (x, y) in self.0.iter().chain(self.0.first()) {
            seq.serialize_element(&[Coordinate(*x), Coordinate(*y)])?;
        }
        seq.end()
    }
}
