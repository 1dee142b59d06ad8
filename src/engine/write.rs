//! One slide's results into its files: the end of the line of stages.
//!
//! Every file has a temporary name until [`SlideFiles::finish`]; a run that ends early leaves none of them.

use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::EngineError;
use super::config::{Emit, RunConfig};
use super::pictures::{self, EarlyPictures, SlidePicture};
use super::plan::SlidePlan;
use crate::geometry::{Level0Rect, PixelSize};
use crate::inference::{ModelCard, Task};
use crate::output::{
    Cells, ClassStyle, FeatureFormat, FeaturesWriter, PyramidSpec, PyramidWriter, Reduce, RegionClass, RegionMap,
    TileCsvWriter, TileGeoJsonWriter, Written, write_regions,
};
use crate::report::{FailedTile, OutputRecord};
use crate::stitch::{Overview, OverviewBuilder, StitchSpec, Strip};

/// Longest side of the map that pictures and regions are made from, in cells.
pub(super) const OVERVIEW_SIDE: usize = 4096;
/// Side of a tile of the maps' TIFFs.
const MAP_TILE: u32 = 512;
/// Effort of the maps' compression: higher levels cost twice the time for 2 % of the size.
const MAP_DEFLATE: u32 = 2;
/// Regions smaller than this are dust: a tenth of a typical cell's area is 10 µm².
const MIN_REGION_MM2: f64 = 100e-6;

/// The files of one slide while they are being written.
pub(super) struct SlideFiles<'a> {
    target: Target<'a>,
    csv: Option<TileCsvWriter>,
    geojson: Option<TileGeoJsonWriter>,
    features: Option<FeaturesWriter>,
    maps: Option<Maps>,
    inferred: u64,
    failed: Vec<FailedTile>,
}

/// What the files are about.
#[derive(Clone, Copy)]
pub(super) struct Target<'a> {
    pub(super) out: &'a Path,
    pub(super) id: &'a str,
    pub(super) plan: &'a SlidePlan,
    pub(super) card: &'a ModelCard,
    pub(super) config: &'a RunConfig,
    /// `None` for features.
    pub(super) stitch: Option<&'a StitchSpec>,
}

/// The stitched maps.
struct Maps {
    probabilities: Vec<PyramidWriter>,
    classes: Option<PyramidWriter>,
    overview: OverviewBuilder,
}

/// What became of a file: `None` if it was not asked for.
type Completed = Result<Option<Written>, EngineError>;

/// Name of each class and its share of the classified area.
type ClassShares = Vec<(String, f64)>;

/// What was written of one slide.
#[derive(Debug)]
pub(crate) struct SlideResults {
    pub(crate) outputs: Vec<OutputRecord>,
    pub(crate) inferred: u64,
    pub(crate) failed: Vec<FailedTile>,
    pub(crate) class_shares: ClassShares,
}

impl SlideResults {
    /// Takes the files away again: those of a slide that has failed.
    pub(super) fn remove(&self, out: &Path) {
        for output in &self.outputs {
            // What can't be removed is replaced when the slide is run again.
            std::fs::remove_file(out.join(&output.path)).ok();
        }
    }
}

impl Target<'_> {
    pub(super) fn emits(&self, kind: Emit) -> bool {
        self.config.emit.contains(&kind)
    }

    /// `OUT/FOLDER/ID.SUFFIX`.
    pub(super) fn path(&self, folder: &str, suffix: &str) -> PathBuf {
        self.out.join(folder).join(format!("{}.{suffix}", self.id))
    }

    pub(super) fn class_styles(&self) -> Vec<ClassStyle> {
        let style = |class: &crate::inference::Class| ClassStyle { name: class.name.clone(), color: class.color };
        self.card.classes.iter().map(style).collect()
    }
}

impl<'a> SlideFiles<'a> {
    /// Starts the files that are asked for.
    pub(super) fn create(target: Target<'a>) -> Result<Self, EngineError> {
        let names = target.card.class_names();
        let csv = target
            .emits(Emit::Csv)
            .then(|| TileCsvWriter::create(&target.path("model-outputs-csv", "csv"), &names))
            .transpose()?;
        let geojson = target
            .emits(Emit::GeoJson)
            .then(|| TileGeoJsonWriter::create(&target.path("model-outputs-geojson", "geojson"), target.id, &names))
            .transpose()?;
        let maps = target.stitch.map(|spec| Maps::create(&target, spec)).transpose()?;
        Ok(Self { target, csv, geojson, features: None, maps, inferred: 0, failed: Vec::new() })
    }

    /// Adds one tile: its class probabilities, or its features.
    pub(super) fn tile(&mut self, rect: Level0Rect, values: &[f32]) -> Result<(), EngineError> {
        self.inferred += 1;
        let probabilities = if self.target.card.task == Task::Features { &[] } else { values };
        if let Some(csv) = &mut self.csv {
            csv.append(rect, probabilities)?;
        }
        if let Some(geojson) = &mut self.geojson {
            geojson.append(rect, probabilities)?;
        }
        if self.target.card.task == Task::Features && self.target.emits(Emit::H5) {
            let features = match &mut self.features {
                Some(features) => features,
                None => self.features.insert(self.target.features_writer(values.len())?),
            };
            features.append(&[(rect.x, rect.y)], values)?;
        }
        Ok(())
    }

    /// Notes a tile without a result.
    pub(super) fn failed(&mut self, rect: Level0Rect, reason: String) {
        self.failed.push(FailedTile { rect: [rect.x, rect.y, rect.width, rect.height], reason });
    }

    /// Adds finished rows of the maps.
    pub(super) fn strip(&mut self, strip: &Strip) -> Result<(), EngineError> {
        let Some(Maps { probabilities, classes, overview }) = &mut self.maps else { return Ok(()) };
        // Compressing is most of the work, and each map has its own file.
        let push_rows = || {
            let probabilities = probabilities.par_iter_mut().enumerate();
            probabilities
                .map(|(class, map)| map.push_rows(strip.probabilities_of(class)))
                .chain(classes.par_iter_mut().map(|classes| classes.push_rows(&strip.classes)))
                .collect::<Result<(), _>>()
        };
        let (pushed, ()) = rayon::join(push_rows, || overview.add(strip));
        Ok(pushed?)
    }

    /// Completes all files under their final names.
    pub(super) fn finish(self, pictures: &EarlyPictures) -> Result<SlideResults, EngineError> {
        let Self { target, csv, geojson, mut features, maps, inferred, failed } = self;
        if features.is_none() && target.card.task == Task::Features && target.emits(Emit::H5) {
            // A slide without tissue has a file of no tiles; the width of a row is not known then.
            features = Some(target.features_writer(1)?);
        }
        // At once, since they wait for the disk.
        let ((csv, geojson), (features, maps)) = rayon::join(
            || {
                rayon::join(
                    || csv.map(TileCsvWriter::finish).transpose(),
                    || geojson.map(TileGeoJsonWriter::finish).transpose(),
                )
            },
            || {
                rayon::join(
                    || features.map(FeaturesWriter::finish).transpose(),
                    || maps.map(|maps| maps.finish(&target, pictures.slide.as_ref())),
                )
            },
        );
        let (maps, class_shares) = maps.unwrap_or_default();
        let tables = [csv, geojson, features].map(|table| table.map_err(EngineError::from));
        let mut written = all_or_none(tables.into_iter().chain(maps))?;
        written.extend(pictures.masks.iter().cloned());
        let outputs = written.into_iter().map(|file| target.record(&file)).collect();
        Ok(SlideResults { outputs, inferred, failed, class_shares })
    }
}

impl Target<'_> {
    fn features_writer(&self, dimension: usize) -> Result<FeaturesWriter, EngineError> {
        let path = self.path("features", "h5");
        let attributes = self.plan.tile_attributes(self.id, path.parent().unwrap_or(self.out));
        Ok(FeaturesWriter::create(&path, dimension, FeatureFormat::F32, attributes)?)
    }

    /// Regions whose class is sure enough: the most probable one, at or above the threshold.
    fn write_regions(&self, overview: &Overview) -> Result<Written, EngineError> {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a threshold is 0..=1")]
        let least = (self.config.threshold * 255.0).round() as u8;
        let sure = |(index, class): (usize, &u8)| match usize::from(*class).checked_sub(1) {
            Some(k) if k < overview.probabilities.len() && overview.probabilities[k][index] >= least => *class,
            _ => 0,
        };
        let values: Vec<u8> = overview.classes.iter().enumerate().map(sure).collect();
        let styles = self.class_styles();
        let classes: Vec<RegionClass<'_>> = (1u8..)
            .zip(&styles)
            .filter(|(value, _)| self.card.background != Some(usize::from(*value) - 1))
            .map(|(value, style)| RegionClass { value, style })
            .collect();
        let map = RegionMap {
            slide_id: self.id,
            cells: self.overview_cells(overview, &values),
            bounds: self.plan.plane.region,
            pixel_size: self.plan.pixel_size,
            min_area_mm2: MIN_REGION_MM2,
        };
        Ok(write_regions(&self.path("regions", "geojson"), &map, &classes)?.0)
    }

    /// The overview's raster with other values, laid over the slide.
    pub(super) fn overview_cells<'v>(&self, overview: &Overview, values: &'v [u8]) -> Cells<'v> {
        let side = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        Cells {
            values,
            width: side(overview.width),
            height: side(overview.height),
            origin_x: self.plan.plane.region.x as f64,
            origin_y: self.plan.plane.region.y as f64,
            cell_width: overview.cell_width,
            cell_height: overview.cell_height,
        }
    }

    fn record(&self, file: &Written) -> OutputRecord {
        let path = file.path.strip_prefix(self.out).unwrap_or(&file.path);
        OutputRecord {
            path: path.to_string_lossy().into_owned(),
            bytes: file.length_bytes,
            sha256: file.sha256.clone(),
        }
    }
}

impl Maps {
    /// Completes the maps and what is made from the overview: what became of each file, and the classes' shares.
    fn finish(self, target: &Target<'_>, picture: Option<&SlidePicture>) -> (Vec<Completed>, ClassShares) {
        let (overview, cells) = self.overview.finish();
        let writers: Vec<PyramidWriter> = self.probabilities.into_iter().chain(self.classes).collect();
        let regions = || target.emits(Emit::GeoJson).then(|| target.write_regions(&overview)).transpose();
        let overlay = || picture.map(|picture| pictures::write_overlay(target, picture, &overview)).transpose();
        let (mut files, (regions, overlay)) = rayon::join(
            || writers.into_par_iter().map(|writer| Ok(Some(writer.finish()?))).collect::<Vec<Completed>>(),
            || rayon::join(regions, overlay),
        );
        files.extend([regions, overlay]);
        (files, shares(&target.card.class_names(), &cells))
    }

    fn create(target: &Target<'_>, spec: &StitchSpec) -> Result<Self, EngineError> {
        let too_large = || EngineError::MapTooLarge { path: target.plan.slide.path.clone() };
        let overview = OverviewBuilder::new(spec, OVERVIEW_SIDE).ok_or_else(too_large)?;
        if !target.emits(Emit::Tiff) {
            return Ok(Self { probabilities: Vec::new(), classes: None, overview });
        }
        let description =
            |what: &str| format!("slidestream {what} of slide {} by model {}", target.id, target.card.name);
        let pyramid = pyramid_spec(target.plan, spec).ok_or_else(too_large)?;
        let mut probabilities = Vec::new();
        let names = target.card.class_names();
        for (name, file) in names.iter().zip(file_names(&names)) {
            let description = description(&format!("probability (0-255) of class {name}"));
            let path = target.path("heatmaps", &format!("{file}.tif"));
            probabilities.push(PyramidWriter::create(&path, &PyramidSpec { description, ..pyramid.clone() })?);
        }
        let names = names.join(", ");
        let description = description(&format!("class map (0 not inferred, then 1-based: {names})"));
        let spec = PyramidSpec { description, reduce: Reduce::Mode, ..pyramid };
        let classes = Some(PyramidWriter::create(&target.path("classes", "tif"), &spec)?);
        Ok(Self { probabilities, classes, overview })
    }
}

/// The files; if one could not be completed, those that could are taken away again.
fn all_or_none(files: impl Iterator<Item = Completed>) -> Result<Vec<Written>, EngineError> {
    let (mut written, mut failure) = (Vec::new(), None);
    for file in files {
        match file {
            Ok(file) => written.extend(file),
            Err(error) => failure = failure.or(Some(error)),
        }
    }
    let Some(error) = failure else { return Ok(written) };
    for file in &written {
        // What can't be removed is replaced when the slide is run again.
        std::fs::remove_file(&file.path).ok();
    }
    Err(error)
}

/// The pyramid of one class's probability, without a description; `None` if the map is too large for a TIFF.
pub(super) fn pyramid_spec(plan: &SlidePlan, spec: &StitchSpec) -> Option<PyramidSpec> {
    let cell = f64::from(spec.cell);
    let side = |pixels: u64| u32::try_from(pixels.div_ceil(u64::from(spec.cell))).ok();
    Some(PyramidSpec {
        width: side(spec.plane.width())?,
        height: side(spec.plane.height())?,
        tile_size: MAP_TILE,
        pixel_size: spec.plane.pixel_size.scaled(cell, cell).unwrap_or(spec.plane.pixel_size),
        origin_um: origin_um(spec.plane.region, plan.pixel_size),
        description: String::new(),
        reduce: Reduce::Mean,
        deflate_level: MAP_DEFLATE,
    })
}

fn origin_um(region: Level0Rect, pixel_size: PixelSize) -> (f64, f64) {
    (region.x as f64 * pixel_size.x.get(), region.y as f64 * pixel_size.y.get())
}

/// The class names as parts of file names, which differ even on a file system that does not tell cases apart.
fn file_names(classes: &[String]) -> Vec<String> {
    let is_plain = |c: char| c.is_alphanumeric() || matches!(c, '-' | '_' | '.');
    let plain = |class: &String| class.chars().map(|c| if is_plain(c) { c } else { '_' }).collect::<String>();
    let plain: Vec<String> = classes.iter().map(plain).collect();
    let count = |name: &String| plain.iter().filter(|other| other.to_lowercase() == name.to_lowercase()).count();
    let numbered = |(index, name): (usize, &String)| match count(name) {
        1 => name.clone(),
        _ => format!("{name}-{}", index + 1),
    };
    plain.iter().enumerate().map(numbered).collect()
}

/// Each class's share of the classified cells; `no class` where nothing reached the threshold.
fn shares(names: &[String], cells: &[u64]) -> ClassShares {
    let total = cells.iter().sum::<u64>().max(1) as f64;
    let names = names.iter().cloned().chain(["no class".to_owned()]);
    let shares = names.zip(cells).map(|(name, count)| (name, *count as f64 / total));
    let all: ClassShares = shares.collect();
    let has_rest = cells.last().is_some_and(|count| *count > 0);
    if has_rest { all } else { all[..all.len() - 1].to_vec() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_whose_names_differ_by_signs_have_files_of_their_own() {
        let names = ["ER+", "ER-", "ER?", "er_", "stroma"].map(str::to_owned);
        assert_eq!(file_names(&names), ["ER_-1", "ER-", "ER_-3", "er_-4", "stroma"]);
    }
}
