//! Regions of one class as merged polygons with their area, for maps of classes and for contours of tissue.
//!
//! Each edge-connected region is one annotation, so that a viewer can select, measure and delete it. Nothing reaches
//! outside the slide: cells at the border are cut, cells beyond it left out.

use std::path::Path;

use serde::Serialize;

use crate::geometry::{Level0Rect, PixelSize};

use super::feature_collection::{FeatureCollection, Ring, feature_id};
use super::polygon::{CellPolygon, Cells};
use super::{ClassStyle, OutputError, Written};

/// The map whose regions are written.
#[derive(Clone, Copy, Debug)]
pub struct RegionMap<'a> {
    /// Identity of the slide, the seed of the regions' ids.
    pub slide_id: &'a str,
    /// The map.
    pub cells: Cells<'a>,
    /// The slide's extent.
    pub bounds: Level0Rect,
    /// Size of a level-0 pixel.
    pub pixel_size: PixelSize,
    /// Regions smaller than this are left out and counted; 0 keeps all.
    pub min_area_mm2: f64,
}

/// A cell value and the class that it stands for.
#[derive(Clone, Copy, Debug)]
pub struct RegionClass<'a> {
    /// Value in [`Cells::values`].
    pub value: u8,
    /// Name and colour of its regions.
    pub style: &'a ClassStyle,
}

/// What was written of one class.
#[derive(Clone, Debug, PartialEq)]
pub struct RegionSummary {
    /// Name of the class.
    pub class: String,
    /// Regions in the file.
    pub region_count: u64,
    /// Area of the regions in the file.
    pub area_mm2: f64,
    /// Regions left out as smaller than [`RegionMap::min_area_mm2`].
    pub dropped_count: u64,
    /// Area of the regions left out.
    pub dropped_area_mm2: f64,
}

/// Writes the regions of `classes`, class by class, as a GeoJSON FeatureCollection of annotations.
///
/// Each has `classification` (name and colour), a measurement `Area mm^2` and the property `area_mm2`.
///
/// # Errors
/// [`OutputError::Map`] if the map's values don't match its size, [`OutputError::Write`].
pub fn write_regions(
    path: &Path,
    map: &RegionMap<'_>,
    classes: &[RegionClass<'_>],
) -> Result<(Written, Vec<RegionSummary>), OutputError> {
    if map.cells.values.len() as u64 != u64::from(map.cells.width) * u64::from(map.cells.height) {
        return Err(OutputError::Map { path: path.to_owned(), problem: "its values don't match its size" });
    }
    let mut collection = FeatureCollection::create(path)?;
    let mut summaries = Vec::with_capacity(classes.len());
    for class in classes {
        summaries.push(write_class(&mut collection, map, class)?);
    }
    Ok((collection.finish()?, summaries))
}

fn write_class(
    collection: &mut FeatureCollection,
    map: &RegionMap<'_>,
    class: &RegionClass<'_>,
) -> Result<RegionSummary, OutputError> {
    let name = &class.style.name;
    let (mut region_count, mut area_mm2, mut dropped_count, mut dropped_area_mm2) = (0, 0.0, 0, 0.0);
    for polygon in map.cells.polygons_within(class.value, map.bounds) {
        let rings = rings_of(&polygon, map);
        let area = area_mm2_of(&rings, map.pixel_size);
        if area < map.min_area_mm2 {
            dropped_count += 1;
            dropped_area_mm2 += area;
            continue;
        }
        region_count += 1;
        area_mm2 += area;
        // The first cell of a region in reading order belongs to no other.
        let (column, row) = polygon.exterior.iter().min_by_key(|(x, y)| (*y, *x)).copied().unwrap_or_default();
        collection.append(&Region {
            kind: "Feature",
            id: feature_id(map.slide_id, &format!("region/{name}/{column},{row}")),
            geometry: Geometry { kind: "Polygon", coordinates: rings.iter().map(|ring| Ring(ring)).collect() },
            properties: Properties {
                object_type: "annotation",
                classification: Classification { name, color: class.style.color },
                area_mm2: area,
                measurements: Measurements { area_mm2: area },
            },
        })?;
    }
    Ok(RegionSummary { class: name.clone(), region_count, area_mm2, dropped_count, dropped_area_mm2 })
}

/// The exterior, then the holes, in level-0 px.
fn rings_of(polygon: &CellPolygon, map: &RegionMap<'_>) -> Vec<Vec<(f64, f64)>> {
    let rings = std::iter::once(&polygon.exterior).chain(&polygon.holes);
    rings.map(|ring| ring.iter().map(|corner| map.cells.point_within(*corner, map.bounds)).collect()).collect()
}

/// Area of the rings; for uncut cells this is their number times their size, up to the last bits.
fn area_mm2_of(rings: &[Vec<(f64, f64)>], pixel_size: PixelSize) -> f64 {
    let twice: f64 = rings.iter().map(|ring| twice_area(ring)).sum();
    twice / 2.0 * (pixel_size.x.get() / 1000.0) * (pixel_size.y.get() / 1000.0)
}

fn twice_area(ring: &[(f64, f64)]) -> f64 {
    // From the first corner: products of small differences lose no digits far from the slide's origin.
    let Some(&(x0, y0)) = ring.first() else { return 0.0 };
    let pairs = ring.iter().zip(ring.iter().cycle().skip(1));
    pairs.map(|(a, b)| (a.0 - x0) * (b.1 - y0) - (b.0 - x0) * (a.1 - y0)).sum()
}

#[derive(Serialize)]
struct Region<'a> {
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
    coordinates: Vec<Ring<'a>>,
}

#[derive(Serialize)]
struct Properties<'a> {
    #[serde(rename = "objectType")]
    object_type: &'static str,
    classification: Classification<'a>,
    area_mm2: f64,
    measurements: Measurements,
}

#[derive(Serialize)]
struct Classification<'a> {
    name: &'a str,
    color: [u8; 3],
}

#[derive(Serialize)]
struct Measurements {
    #[serde(rename = "Area mm^2")]
    area_mm2: f64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::Mpp;
    use serde_json::{Value, json};

    fn class(name: &str) -> ClassStyle {
        ClassStyle { name: name.into(), color: [200, 0, 10] }
    }

    /// 4 × 3 cells of 1000 × 500 px at 0.5 µm/px from (0, 100): a cell is 0.125 mm².
    fn map(values: &[u8]) -> RegionMap<'_> {
        let cells = Cells {
            values,
            width: 4,
            height: 3,
            origin_x: 0.0,
            origin_y: 100.0,
            cell_width: 1000.0,
            cell_height: 500.0,
        };
        let bounds = Level0Rect { x: 0, y: 0, width: 3500, height: 1600 };
        let pixel_size = PixelSize::square(Mpp::new(0.5).unwrap());
        RegionMap { slide_id: "s", cells, bounds, pixel_size, min_area_mm2: 0.0 }
    }

    fn write(map: &RegionMap<'_>, classes: &[RegionClass<'_>]) -> (Value, Vec<RegionSummary>) {
        let folder = tempfile::tempdir().unwrap();
        let (written, summaries) = write_regions(&folder.path().join("s.geojson"), map, classes).unwrap();
        (serde_json::from_slice(&std::fs::read(written.path).unwrap()).unwrap(), summaries)
    }

    #[test]
    fn regions_are_cut_at_the_slide_and_measured() {
        #[rustfmt::skip]
        let values = [
            1, 1, 0, 2,
            1, 0, 0, 2,
            1, 1, 0, 1,
        ];
        let (tumour, rest) = (class("tumour"), class("rest"));
        let classes = [RegionClass { value: 1, style: &tumour }, RegionClass { value: 2, style: &rest }];
        let (value, summaries) = write(&map(&values), &classes);
        let features = value["features"].as_array().unwrap();
        assert_eq!(features.len(), 3);
        let first = &features[0];
        assert_eq!(first["properties"]["objectType"], "annotation");
        assert_eq!(first["properties"]["classification"], json!({"name": "tumour", "color": [200, 0, 10]}));
        assert_eq!(first["properties"]["area_mm2"], 0.625);
        assert_eq!(first["properties"]["measurements"]["Area mm^2"], 0.625);
        let ring = json!([
            [2000, 100],
            [2000, 600],
            [1000, 600],
            [1000, 1100],
            [2000, 1100],
            [2000, 1600],
            [0, 1600],
            [0, 100],
            [2000, 100]
        ]);
        assert_eq!(first["geometry"], json!({"type": "Polygon", "coordinates": [ring]}));
        // The last column is cut to half its width.
        assert_eq!(features[1]["properties"]["area_mm2"], 0.0625);
        assert_eq!(features[2]["properties"]["area_mm2"], 0.125);
        let ids: std::collections::HashSet<_> = features.iter().map(|feature| feature["id"].to_string()).collect();
        assert_eq!(ids.len(), 3);
        assert_eq!((summaries[0].region_count, summaries[0].area_mm2), (2, 0.6875));
        assert_eq!((summaries[1].region_count, summaries[1].area_mm2), (1, 0.125));
    }

    #[test]
    fn specks_are_left_out_and_counted() {
        let values = [1, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0];
        let style = class("tissue");
        let map = RegionMap { min_area_mm2: 0.2, ..map(&values) };
        let (value, summaries) = write(&map, &[RegionClass { value: 1, style: &style }]);
        assert_eq!(value["features"].as_array().unwrap().len(), 1);
        assert_eq!((summaries[0].dropped_count, summaries[0].dropped_area_mm2), (1, 0.125));
    }

    #[test]
    fn an_empty_map_is_still_a_collection_and_a_broken_one_an_error() {
        let style = class("x");
        let classes = [RegionClass { value: 1, style: &style }];
        let (value, _) = write(&map(&[0; 12]), &classes);
        assert_eq!(value["features"], json!([]));
        let folder = tempfile::tempdir().unwrap();
        let error = write_regions(&folder.path().join("s"), &map(&[0; 11]), &classes).unwrap_err();
        assert!(matches!(error, OutputError::Map { .. }));
    }
}
