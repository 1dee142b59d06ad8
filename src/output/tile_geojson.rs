//! One closed square per inferred tile with its probabilities, as QuPath shows them.

use std::path::Path;

use serde::Serialize;
use serde::ser::{SerializeMap, Serializer};

use crate::geometry::Level0Rect;

use super::feature_collection::{FeatureCollection, Ring, feature_id};
use super::{OutputError, Written};

/// Streams tiles into a GeoJSON FeatureCollection.
#[derive(Debug)]
pub struct TileGeoJsonWriter {
    collection: FeatureCollection,
    slide_id: String,
    classes: Vec<String>,
}

impl TileGeoJsonWriter {
    /// Starts the file; `classes` may be empty.
    ///
    /// # Errors
    /// [`OutputError::Write`].
    pub fn create(path: &Path, slide_id: &str, classes: &[String]) -> Result<Self, OutputError> {
        let collection = FeatureCollection::create(path)?;
        Ok(Self { collection, slide_id: slide_id.to_owned(), classes: classes.to_vec() })
    }

    /// Appends a tile with one probability per class; callers go in ascending (x, y).
    ///
    /// # Errors
    /// [`OutputError::RowLength`] if the numbers of classes and probabilities differ, [`OutputError::Write`].
    pub fn append(&mut self, tile: Level0Rect, probabilities: &[f32]) -> Result<(), OutputError> {
        if probabilities.len() != self.classes.len() {
            let (expected, found) = (self.classes.len(), probabilities.len());
            return Err(OutputError::RowLength { path: self.collection.path().to_owned(), expected, found });
        }
        let Level0Rect { x, y, width, height } = tile;
        let corners = [(x, y), (x + width, y), (x + width, y + height), (x, y + height)];
        let ring = corners.map(|(x, y)| (x as f64, y as f64));
        self.collection.append(&TileFeature {
            kind: "Feature",
            id: feature_id(&self.slide_id, &format!("tile/{x},{y},{width},{height}")),
            geometry: Geometry { kind: "Polygon", coordinates: [Ring(&ring)] },
            properties: Properties {
                is_locked: true,
                object_type: "tile",
                measurements: Measurements { classes: &self.classes, probabilities },
            },
        })
    }

    /// Completes the file.
    ///
    /// # Errors
    /// [`OutputError::Write`].
    pub fn finish(self) -> Result<Written, OutputError> {
        self.collection.finish()
    }
}

#[derive(Serialize)]
struct TileFeature<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    id: String,
    geometry: Geometry<'a>,
    properties: Properties<'a>,
}

#[derive(Serialize)]
struct Geometry<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    coordinates: [Ring<'a>; 1],
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Properties<'a> {
    is_locked: bool,
    object_type: &'static str,
    measurements: Measurements<'a>,
}

struct Measurements<'a> {
    classes: &'a [String],
    probabilities: &'a [f32],
}

impl Serialize for Measurements<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        // JSON knows no NaN, and QuPath expects numbers: a value that is none is left out.
        for (class, value) in self.classes.iter().zip(self.probabilities).filter(|(_, value)| value.is_finite()) {
            map.serialize_entry(class, value)?;
        }
        map.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn write(classes: &[&str], tiles: &[(Level0Rect, Vec<f32>)]) -> Value {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s.geojson");
        let classes: Vec<String> = classes.iter().map(|class| (*class).to_owned()).collect();
        let mut writer = TileGeoJsonWriter::create(&path, "slide 1", &classes).unwrap();
        for (tile, probabilities) in tiles {
            writer.append(*tile, probabilities).unwrap();
        }
        let written = writer.finish().unwrap();
        serde_json::from_slice(&std::fs::read(written.path).unwrap()).unwrap()
    }

    #[test]
    fn no_tiles_are_still_a_collection() {
        assert_eq!(write(&["a"], &[]), json!({"type": "FeatureCollection", "features": []}));
    }

    #[test]
    fn a_tile_is_a_closed_locked_square_with_its_probabilities() {
        let tile = Level0Rect { x: -5, y: 10, width: 100, height: 50 };
        let value = write(&["tumor \"α\"", "rest\n"], &[(tile, vec![0.1, 0.9]), (tile, vec![f32::NAN, 1.0])]);
        let feature = &value["features"][0];
        assert_eq!(feature["type"], "Feature");
        assert_eq!(feature["id"].as_str().unwrap().as_bytes()[14], b'5', "UUID version 5");
        assert_eq!(
            feature["geometry"],
            json!({"type": "Polygon", "coordinates": [[[-5, 10], [95, 10], [95, 60], [-5, 60], [-5, 10]]]})
        );
        assert_eq!(feature["properties"]["isLocked"], true);
        assert_eq!(feature["properties"]["objectType"], "tile");
        let measurements = feature["properties"]["measurements"].to_string();
        assert_eq!(measurements, "{\"tumor \\\"α\\\"\":0.1,\"rest\\n\":0.9}");
        assert_eq!(value["features"][1]["properties"]["measurements"], json!({"rest\n": 1.0}));
        assert_eq!(value["features"][1]["id"], feature["id"], "the same tile has the same id");
    }

    #[test]
    fn ids_differ_by_slide_and_place() {
        let ids = [feature_id("a", "b/c"), feature_id("a/b", "c"), feature_id("a", "b/d")];
        assert!(ids[0] != ids[1] && ids[0] != ids[2] && ids[1] != ids[2]);
    }

    #[test]
    fn a_wrong_number_of_probabilities_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = TileGeoJsonWriter::create(&folder.path().join("s"), "s", &["a".into()]).unwrap();
        let error = writer.append(Level0Rect { x: 0, y: 0, width: 1, height: 1 }, &[]).unwrap_err();
        assert!(matches!(error, OutputError::RowLength { expected: 1, found: 0, .. }));
    }
}
