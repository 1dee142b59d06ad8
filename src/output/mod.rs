//! The files that a run leaves behind, one file of code per format.
//!
//! Every file is written to a temporary name beside its target, synced and renamed ([`AtomicFile`]), so whatever bears
//! a final name is whole. Coordinates in files are level-0 pixels. The writers are plain calls: they start no threads,
//! print nothing and know neither models nor tissue; what they need comes as numbers, names and colours.

mod atomic;
mod feature_collection;
mod features_h5;
mod figure;
mod mask;
mod overlay;
mod png;
mod polygon;
mod pyramid;
mod region_geojson;
mod tile_csv;
mod tile_geojson;

pub use atomic::{AtomicFile, Written, is_partial, try_folder, write_atomic};
pub use features_h5::{
    Coords, FeatureFormat, FeaturesWriter, GridLevel, Profile, TileAttributes, nominal_magnification, read_coords_h5,
    write_coords_h5,
};
pub use mask::{MaskLabel, MaskPicture, draw_mask};
pub use overlay::{MapArea, Overlay, OverlayClass, Thumbnail, draw_overlay};
pub use png::{write_grey_png, write_png};
pub use polygon::{CellPolygon, CellRing, Cells};
pub use pyramid::{MAX_TOP_SIDE, PyramidSpec, PyramidWriter, Reduce};
pub use region_geojson::{RegionClass, RegionMap, RegionSummary, write_regions};
pub use tile_csv::{CoordsProblem, TileCsvWriter, read_coords_csv};
pub use tile_geojson::TileGeoJsonWriter;

use std::io;
use std::path::{Path, PathBuf};

use crate::tiff::TiffError;

/// A class as the outputs name and colour it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClassStyle {
    /// Name, as in the model card; any text.
    pub name: String,
    /// Red, green, blue.
    pub color: [u8; 3],
}

/// A colour for the class at `index` if none is given: ten that are told apart on a faded stain, then again from the first.
#[must_use]
pub fn class_color(index: usize) -> [u8; 3] {
    const COLORS: [[u8; 3]; 10] = [
        [214, 39, 40],
        [31, 119, 180],
        [44, 160, 44],
        [255, 127, 14],
        [148, 103, 189],
        [23, 190, 207],
        [227, 119, 194],
        [188, 189, 34],
        [140, 86, 75],
        [70, 70, 70],
    ];
    COLORS[index % COLORS.len()]
}

/// Why an output file can't be written, or a coordinate file not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OutputError {
    /// The file system refused a write, a sync or a rename.
    #[error("{}: can't be written", path.display())]
    Write {
        /// The file that was to be made.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file system refused a read.
    #[error("{}: can't be read", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A row has more or fewer values than the file has columns.
    #[error("{}: a row of {found} values where {expected} are due", path.display())]
    RowLength {
        /// The file.
        path: PathBuf,
        /// Values per row.
        expected: usize,
        /// Values given.
        found: usize,
    },
    /// A line of a coordinate table can't be used.
    #[error("{}: line {line}: {problem}", path.display())]
    CoordsLine {
        /// The table.
        path: PathBuf,
        /// The line, from 1.
        line: u64,
        /// What is wrong with it.
        problem: CoordsProblem,
    },
    /// The dataset `coords` has not two columns.
    #[error("{}: `coords` has the shape {shape:?} instead of [tiles, 2]", path.display())]
    CoordsShape {
        /// The file.
        path: PathBuf,
        /// The shape found.
        shape: Vec<usize>,
    },
    /// The HDF5 library refused a file or its content.
    #[error("{}: HDF5", path.display())]
    Hdf5 {
        /// The file.
        path: PathBuf,
        /// Why.
        source: rust_hdf5::Hdf5Error,
    },
    /// A picture can't be encoded.
    #[error("{}: the picture can't be written", path.display())]
    Image {
        /// The file.
        path: PathBuf,
        /// Why.
        source: image::ImageError,
    },
    /// A map's size and its rows don't agree, or can't be a map.
    #[error("{}: the map can't be written: {problem}", path.display())]
    Map {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: &'static str,
    },
    /// The TIFF container refused its content.
    #[error("{}: can't be written as TIFF", path.display())]
    Tiff {
        /// The file.
        path: PathBuf,
        /// Why.
        source: TiffError,
    },
}

impl OutputError {
    /// What the user can do about it.
    #[must_use]
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Write { source, .. } => write_hint(source),
            Self::Read { source, .. } if source.kind() == io::ErrorKind::NotFound => Some("check the path"),
            Self::CoordsLine { .. } => {
                Some("`coords` is a CSV file with the columns minx,miny,width,height in level-0 pixels")
            }
            Self::Hdf5 { .. } | Self::CoordsShape { .. } => {
                Some("a coordinate file holds the dataset `coords`, [tiles, 2], as this tool, TRIDENT or CLAM write it")
            }
            _ => None,
        }
    }

    /// Wraps an I/O error with the file that was being written.
    fn write(path: &Path) -> impl FnOnce(io::Error) -> Self + '_ {
        move |source| Self::Write { path: path.to_owned(), source }
    }

    /// Wraps an I/O error with the file that was being read.
    fn read(path: &Path) -> impl FnOnce(io::Error) -> Self + '_ {
        move |source| Self::Read { path: path.to_owned(), source }
    }
}

/// What helps against a refused write.
fn write_hint(source: &io::Error) -> Option<&'static str> {
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Some("free space or choose another `out`"),
        io::ErrorKind::FileTooLarge => {
            Some("choose an `out` where larger files may be written, or raise the limit (ulimit -f)")
        }
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            Some("choose an `out` that you may write to")
        }
        io::ErrorKind::NotADirectory | io::ErrorKind::IsADirectory | io::ErrorKind::AlreadyExists => {
            Some("choose another `out`: a file or folder of that name is in the way")
        }
        _ => None,
    }
}
