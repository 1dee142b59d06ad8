//! Masks that the user brings: an image, or shapes drawn in a viewer.

use std::path::Path;

use geojson::{GeoJson, GeometryValue};
use image::DynamicImage;

use super::{Cell, TissueError, TissueMask};
use crate::geometry::Level0Rect;

/// Longest side of a mask drawn from shapes.
const MAX_SIDE: u32 = 4096;

/// Points of a closed line in level-0 pixels.
type Ring = Vec<(f64, f64)>;

impl TissueMask {
    /// Takes a PNG (or JPEG) of any size, stretched over the slide: what is neither black nor transparent is tissue.
    ///
    /// # Errors
    /// [`TissueError`] if the file can't be read or is no image.
    pub fn from_image_file(path: &Path, extent: Level0Rect) -> Result<Self, TissueError> {
        let reader = image::ImageReader::open(path)
            .and_then(image::ImageReader::with_guessed_format)
            .map_err(|source| TissueError::Io { path: path.to_owned(), source })?;
        let image = reader.decode().map_err(|source| TissueError::Image { path: path.to_owned(), source })?;
        let (width, height) = (image.width(), image.height());
        Ok(Self::new(width, height, extent, cells_of(&image)))
    }

    /// Takes polygons and multipolygons, with holes, in level-0 pixels; shapes that overlap are united.
    ///
    /// They are drawn on a raster of at most 4096 cells a side; a cell is tissue if its middle lies in a shape.
    ///
    /// # Errors
    /// [`TissueError`] if the file can't be read, is no GeoJSON or holds anything but areas.
    pub fn from_geojson_file(path: &Path, extent: Level0Rect) -> Result<Self, TissueError> {
        let text = std::fs::read_to_string(path).map_err(|source| TissueError::Io { path: path.to_owned(), source })?;
        let json: GeoJson =
            text.parse().map_err(|source| TissueError::GeoJson { path: path.to_owned(), source: Box::new(source) })?;
        let problem =
            |feature| move |problem: String| TissueError::Geometry { path: path.to_owned(), feature, problem };
        let mut polygons = Vec::new();
        match json {
            GeoJson::Geometry(geometry) => collect(&geometry.value, &mut polygons).map_err(problem(0))?,
            GeoJson::Feature(feature) => {
                let geometry = feature.geometry.ok_or_else(|| problem(0)("has no geometry".to_owned()))?;
                collect(&geometry.value, &mut polygons).map_err(problem(0))?;
            }
            GeoJson::FeatureCollection(collection) => {
                for (index, feature) in collection.features.into_iter().enumerate() {
                    let geometry = feature.geometry.ok_or_else(|| problem(index)("has no geometry".to_owned()))?;
                    collect(&geometry.value, &mut polygons).map_err(problem(index))?;
                }
            }
        }
        if polygons.is_empty() {
            return Err(TissueError::NoPolygon { path: path.to_owned() });
        }
        Ok(draw(&polygons, extent))
    }
}

fn cells_of(image: &DynamicImage) -> Vec<Cell> {
    let is_tissue = |[red, green, blue, alpha]: [u16; 4]| alpha > 0 && (red > 0 || green > 0 || blue > 0);
    let cell = |tissue| if tissue { Cell::Tissue } else { Cell::Background };
    // The common case without a copy four times as large.
    if let DynamicImage::ImageLuma8(grey) = image {
        return grey.iter().map(|value| cell(*value > 0)).collect();
    }
    image.to_rgba16().pixels().map(|pixel| cell(is_tissue(pixel.0))).collect()
}

/// Appends the polygons of a geometry, each its outline followed by its holes.
fn collect(geometry: &GeometryValue, polygons: &mut Vec<Vec<Ring>>) -> Result<(), String> {
    match geometry {
        GeometryValue::Polygon { coordinates } => {
            polygons.push(coordinates.iter().map(|line| ring(line)).collect::<Result<_, _>>()?);
        }
        GeometryValue::MultiPolygon { coordinates } => {
            for polygon in coordinates {
                polygons.push(polygon.iter().map(|line| ring(line)).collect::<Result<_, _>>()?);
            }
        }
        GeometryValue::GeometryCollection { geometries } => {
            for geometry in geometries {
                collect(&geometry.value, polygons)?;
            }
        }
        other => return Err(format!("is a {}, which has no area", other.type_name())),
    }
    Ok(())
}

fn ring(line: &[geojson::Position]) -> Result<Ring, String> {
    let points: Vec<_> = line
        .iter()
        .filter_map(|position| Some((*position.as_slice().first()?, *position.as_slice().get(1)?)))
        .filter(|(x, y)| x.is_finite() && y.is_finite())
        .collect();
    if points.len() < line.len() {
        return Err("has a point without two finite coordinates".to_owned());
    }
    if points.len() < 3 {
        return Err(format!("has an outline of {} points", points.len()));
    }
    Ok(points)
}

/// Fills every polygon by the even-odd rule, which needs no care for the direction of holes.
fn draw(polygons: &[Vec<Ring>], extent: Level0Rect) -> TissueMask {
    let longest = extent.width.max(extent.height) as f64;
    let shrink = (f64::from(MAX_SIDE) / longest).min(1.0);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between 1 and MAX_SIDE")]
    let side = |level0: i64| (level0 as f64 * shrink).round().max(1.0) as u32;
    let (width, height) = (side(extent.width), side(extent.height));
    let (scale_x, scale_y) = (extent.width as f64 / f64::from(width), extent.height as f64 / f64::from(height));
    let mut cells = vec![Cell::Background; width as usize * height as usize];
    // The first cell whose middle lies at or beyond a position.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "`as` saturates, clamped to the raster"
    )]
    let first_at = |position: f64, count: u32| ((position - 0.5).ceil().max(0.0) as usize).min(count as usize);
    for polygon in polygons {
        let mut crossings: Vec<Vec<f64>> = vec![Vec::new(); height as usize];
        for ring in polygon {
            for (index, &from) in ring.iter().enumerate() {
                let to = ring[(index + 1) % ring.len()];
                let cell = |(x, y): (f64, f64)| (x / scale_x, y / scale_y);
                let (a, b) = if from.1 <= to.1 { (cell(from), cell(to)) } else { (cell(to), cell(from)) };
                for (row, line) in
                    crossings.iter_mut().enumerate().take(first_at(b.1, height)).skip(first_at(a.1, height))
                {
                    line.push(a.0 + (row as f64 + 0.5 - a.1) / (b.1 - a.1) * (b.0 - a.0));
                }
            }
        }
        for (row, mut line) in crossings.into_iter().enumerate() {
            line.sort_by(f64::total_cmp);
            for inside in line.chunks_exact(2) {
                let (start, end) = (first_at(inside[0], width), first_at(inside[1], width));
                cells[row * width as usize..][start..end.max(start)].fill(Cell::Tissue);
            }
        }
    }
    TissueMask::new(width, height, extent, cells)
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXTENT: Level0Rect = Level0Rect { x: 0, y: 0, width: 100, height: 80 };

    fn geojson(text: &str) -> Result<TissueMask, TissueError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("mask.geojson");
        std::fs::write(&path, text).unwrap();
        TissueMask::from_geojson_file(&path, EXTENT)
    }

    fn area(mask: &TissueMask) -> f64 {
        mask.fraction(EXTENT) * 8000.0
    }

    #[test]
    fn shapes_are_filled_with_holes_left_open() {
        let square = "[[10,10],[50,10],[50,50],[10,50],[10,10]]";
        // The hole runs the same way round as the outline, as some tools write it.
        let hole = "[[20,20],[40,20],[40,40],[20,40],[20,20]]";
        let polygon = geojson(&format!(r#"{{"type":"Polygon","coordinates":[{square},{hole}]}}"#)).unwrap();
        assert!((area(&polygon) - 1200.0).abs() < 1e-6);
        assert_eq!(polygon.fraction(Level0Rect { x: 20, y: 20, width: 20, height: 20 }), 0.0);
        // Two features that overlap are united; one reaches beyond the slide.
        let collection = geojson(&format!(
            r#"{{"type":"FeatureCollection","features":[
            {{"type":"Feature","properties":null,"geometry":{{"type":"Polygon","coordinates":[{square}]}}}},
            {{"type":"Feature","properties":null,"geometry":{{"type":"MultiPolygon","coordinates":
              [[[[40,40],[60,40],[60,60],[40,60]]],[[[90,70],[500,70],[500,900],[90,900]]]]}}}}]}}"#
        ))
        .unwrap();
        assert!((area(&collection) - (1600.0 + 300.0 + 100.0)).abs() < 1e-6, "{}", area(&collection));
        let triangle = geojson(r#"{"type":"Polygon","coordinates":[[[0,0],[100,0],[0,80]]]}"#).unwrap();
        assert!((area(&triangle) - 4000.0).abs() < 60.0, "{}", area(&triangle));
    }

    #[test]
    fn what_has_no_area_is_refused_by_name() {
        for (text, expected) in [
            (r#"{"type":"Point","coordinates":[1,2]}"#, "feature 0 is a Point, which has no area"),
            (r#"{"type":"Polygon","coordinates":[[[1,2],[3,4]]]}"#, "feature 0 has an outline of 2 points"),
            (r#"{"type":"Feature","properties":null,"geometry":null}"#, "feature 0 has no geometry"),
            (r#"{"type":"FeatureCollection","features":[]}"#, "no polygon in it"),
            ("slide,mpp", "no GeoJSON"),
        ] {
            let error = geojson(text).unwrap_err();
            assert!(error.to_string().ends_with(expected), "{error}");
            assert!(error.hint().is_some());
        }
    }

    #[test]
    fn images_of_any_size_and_kind_are_stretched() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("mask.png");
        let grey = image::GrayImage::from_fn(5, 2, |x, y| image::Luma([u8::from(x == 1 && y == 0)]));
        let rgba = image::RgbaImage::from_fn(5, 2, |x, y| match (x, y) {
            (1, 0) => image::Rgba([0, 0, 1, 1]),
            (2, 0) => image::Rgba([255, 255, 255, 0]),
            _ => image::Rgba([0, 0, 0, 255]),
        });
        for image in [DynamicImage::from(grey), DynamicImage::from(rgba)] {
            image.save(&path).unwrap();
            let mask = TissueMask::from_image_file(&path, EXTENT).unwrap();
            assert_eq!((mask.scale_x(), mask.scale_y()), (20.0, 40.0));
            assert_eq!(area(&mask), 800.0);
            assert_eq!(mask.fraction(Level0Rect { x: 20, y: 0, width: 20, height: 40 }), 1.0);
        }
        std::fs::write(&path, "no image").unwrap();
        assert!(matches!(TissueMask::from_image_file(&path, EXTENT), Err(TissueError::Image { .. })));
        let missing = TissueMask::from_image_file(&folder.path().join("none.png"), EXTENT);
        assert!(matches!(missing, Err(TissueError::Io { .. })));
    }
}
