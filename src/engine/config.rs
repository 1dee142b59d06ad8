//! What a run is asked to do: validated settings, and what of them shapes the results.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use crate::geometry::{Level0Rect, Mpp};
use crate::inference::ModelCard;
use crate::slide::Reader;

/// How a slide is cut into tiles.
#[derive(Clone, Debug, PartialEq)]
pub struct TilingConfig {
    /// Side of the square tiles in pixels at the target resolution, at least 1.
    pub tile_size: u32,
    /// Pixels that neighbouring tiles share, below `tile_size`.
    pub overlap: u32,
    /// The resolution that the model asks for.
    pub target_mpp: Mpp,
    /// Relative difference up to which a level counts as being at the target, `0..1`.
    pub mpp_tolerance: f64,
    /// Who decodes the slide; `None` chooses the fastest that is right.
    pub reader: Option<Reader>,
    /// The slide's resolution, instead of what its metadata say.
    pub slide_mpp: Option<Mpp>,
    /// The part of the slide to cover; `None` is all of it.
    pub region: Option<Level0Rect>,
    /// Take only so many of the tissue tiles, evenly sampled.
    pub max_tiles: Option<NonZeroUsize>,
    /// What is tissue.
    pub tissue: TissueSource,
    /// Share of a tile that must be tissue, `0..=1`; a tile without any is never taken.
    pub min_tissue: f64,
    /// Take the tiles of this file instead of a grid.
    pub coords: Option<PathBuf>,
}

impl TilingConfig {
    /// How a run without further settings cuts slides for a model.
    #[must_use]
    pub fn of(card: &ModelCard) -> Self {
        Self {
            tile_size: card.tile_size,
            overlap: card.overlap,
            target_mpp: card.mpp,
            mpp_tolerance: 0.05,
            reader: None,
            slide_mpp: None,
            region: None,
            max_tiles: None,
            tissue: TissueSource::Otsu,
            min_tissue: 0.1,
            coords: None,
        }
    }
}

/// Where the tissue mask comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TissueSource {
    /// Otsu's threshold on a low level.
    Otsu,
    /// No mask: all tiles are taken.
    None,
    /// An image stretched over the slide; not black is tissue.
    Png(PathBuf),
    /// Polygons in level-0 pixels.
    GeoJson(PathBuf),
}

impl TissueSource {
    /// The source that a mask file is, by its extension: polygons or an image.
    #[must_use]
    pub fn of_file(path: &Path) -> Self {
        let is = |known: &str| path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case(known));
        if is("geojson") || is("json") { Self::GeoJson(path.to_owned()) } else { Self::Png(path.to_owned()) }
    }
}

/// What a failure of one tile does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnFailure {
    /// The slide fails.
    Fail,
    /// The tile is counted, listed and left out.
    Skip,
}

/// A kind of output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Emit {
    /// The tile table.
    Csv,
    /// Tiles, regions and tissue as GeoJSON.
    GeoJson,
    /// Probability maps and the class map as pyramidal TIFFs.
    Tiff,
    /// Overlay and tissue mask as pictures.
    Png,
    /// Features as HDF5.
    H5,
}

impl Emit {
    /// All kinds, in the order of the table in the manual.
    pub const ALL: [Self; 5] = [Self::Csv, Self::GeoJson, Self::Tiff, Self::Png, Self::H5];

    /// The word in settings.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Csv => "csv",
            Self::GeoJson => "geojson",
            Self::Tiff => "tiff",
            Self::Png => "png",
            Self::H5 => "h5",
        }
    }
}

/// What a run does with each slide.
#[derive(Clone, Debug, PartialEq)]
pub struct RunConfig {
    /// How slides are cut.
    pub tiling: TilingConfig,
    /// Probability from which a cell belongs to a region, `0..=1`.
    pub threshold: f64,
    /// What is written.
    pub emit: Vec<Emit>,
    /// What an unreadable tile does.
    pub on_tile_error: OnFailure,
    /// What a NaN or infinite output does.
    pub on_nonfinite: OnFailure,
    /// Whether ICC profiles are applied.
    pub icc: bool,
}

impl OnFailure {
    fn as_str(self) -> &'static str {
        match self {
            Self::Fail => "fail",
            Self::Skip => "skip",
        }
    }
}

impl RunConfig {
    /// Everything that shapes the results, by the names of the settings.
    ///
    /// Batch size, readers, sessions, device and provider are left out: they change the speed, and results only within
    /// rounding, so a cohort may be continued on another machine. `digests` are the SHA-256 sums of the mask and
    /// coordinates files, so that a file changed under the same name is noticed.
    #[must_use]
    pub fn shaping_settings(&self, digests: &InputDigests) -> Map<String, Value> {
        let tiling = &self.tiling;
        let tissue = match &tiling.tissue {
            TissueSource::Otsu => json!("otsu"),
            TissueSource::None => json!("none"),
            TissueSource::Png(path) | TissueSource::GeoJson(path) => {
                json!({ "file": path.display().to_string(), "sha256": digests.mask })
            }
        };
        let coords =
            tiling.coords.as_ref().map(|path| json!({ "file": path.display().to_string(), "sha256": digests.coords }));
        let region = tiling.region.map(|rect| json!([rect.x, rect.y, rect.width, rect.height]));
        let emit: Vec<&str> = self.emit.iter().map(|kind| kind.as_str()).collect();
        let settings = json!({
            "tile_size": tiling.tile_size,
            "overlap": tiling.overlap,
            "target_mpp": tiling.target_mpp.get(),
            "mpp_tolerance": tiling.mpp_tolerance,
            "reader": tiling.reader.map_or("auto", Reader::as_str),
            "slide_mpp": tiling.slide_mpp.map(Mpp::get),
            "region": region,
            "max_tiles": tiling.max_tiles,
            "tissue": tissue,
            "min_tissue": tiling.min_tissue,
            "coords": coords,
            "threshold": self.threshold,
            "emit": emit,
            "on_tile_error": self.on_tile_error.as_str(),
            "on_nonfinite": self.on_nonfinite.as_str(),
            "icc": self.icc,
        });
        match settings {
            Value::Object(map) => map,
            _ => Map::new(),
        }
    }
}

/// SHA-256 sums of files that shape the results besides slide and model.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct InputDigests {
    /// Of the tissue mask.
    pub mask: Option<String>,
    /// Of the coordinates file.
    pub coords: Option<String>,
}
