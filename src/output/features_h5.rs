//! Features and tile coordinates in HDF5, with the attributes that TRIDENT and CLAM write and read.
//!
//! `features` is `[tiles, dimension]` in f32 or f16, appended chunk by chunk, so a slide's features are never whole in
//! memory; `coords` is `[tiles, 2]` int64, the upper left corner of each tile in level-0 px. Both tools call the tile's
//! side `patch_size` but mean different pixels: TRIDENT those of the target resolution, CLAM those of the level
//! `patch_level`. On a grid that lies on a level the two agree and the file carries both sets of attributes. On a
//! resampled grid no single number is right for both, so [`Profile`] decides, and the other tool's key attributes are
//! left out: it then stops with a missing key instead of reading tiles of the wrong size.

use std::path::{Path, PathBuf};

use half::f16;
use rust_hdf5::{DatatypeMessage, H5Attribute, H5Dataset, H5File, H5Type, Hdf5Error, VarLenUnicode};

use crate::geometry::Mpp;

use super::{AtomicFile, OutputError, Written};

/// Size of a chunk of `features`: large enough for few seeks, small enough that a slide of one tile stays small.
const CHUNK_BYTES: usize = 256 * 1024;

/// Number format of the features in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FeatureFormat {
    /// 32-bit floats.
    F32,
    /// 16-bit floats, rounded to nearest.
    F16,
}

/// Whose meaning of `patch_size` a resampled grid is written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Profile {
    /// Tile side at the target resolution, with `patch_size_level0`.
    Trident,
    /// Tile side in level-0 px at `patch_level` 0.
    Clam,
}

/// The level that a grid lies on without resampling.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GridLevel {
    /// Index of the level.
    pub index: u32,
    /// Level-0 pixels per pixel of the level, along x and y.
    pub downsample: (f64, f64),
    /// Width and height of the level in its pixels.
    pub size: (i64, i64),
}

/// What the attributes say of the tiles.
#[derive(Clone, Debug, PartialEq)]
pub struct TileAttributes {
    /// Whose meaning decides on a resampled grid.
    pub profile: Profile,
    /// Tile side in pixels of the target resolution.
    pub tile_size: u32,
    /// Overlap of neighbouring tiles in pixels of the target resolution.
    pub overlap: u32,
    /// Tile side in level-0 px.
    pub tile_size_level0: i64,
    /// The level that the grid lies on; `None` if tiles are resampled.
    pub level: Option<GridLevel>,
    /// Width and height of the slide in level-0 px.
    pub slide_size: (i64, i64),
    /// Nominal magnification of level 0: see [`nominal_magnification`].
    pub level0_magnification: u32,
    /// Nominal magnification of the target resolution.
    pub target_magnification: u32,
    /// The slide's id.
    pub name: String,
    /// The folder that the file is written to, as text.
    pub folder: String,
}

/// The objective magnification that a resolution goes by, as TRIDENT counts it; 1 or more.
#[must_use]
pub fn nominal_magnification(mpp: Mpp) -> u32 {
    // Upper bounds in µm/px; scanners differ by a few percent around 0.25 µm/px for 40×.
    const BOUNDS: [(f64, u32); 6] = [(0.16, 80), (0.2, 60), (0.3, 40), (0.6, 20), (1.2, 10), (2.4, 5)];
    let coarse = if mpp.get() < 6.7 { 2 } else { 1 };
    BOUNDS.into_iter().find(|(bound, _)| mpp.get() < *bound).map_or(coarse, |(_, magnification)| magnification)
}

/// Streams features and their coordinates into one file.
pub struct FeaturesWriter {
    hdf5: H5File,
    features: H5Dataset,
    file: AtomicFile,
    path: PathBuf,
    dimension: usize,
    format: FeatureFormat,
    coords: Vec<i64>,
    attributes: TileAttributes,
}

impl std::fmt::Debug for FeaturesWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FeaturesWriter").field("path", &self.path).finish_non_exhaustive()
    }
}

impl FeaturesWriter {
    /// Starts the file for features of `dimension` numbers.
    ///
    /// # Errors
    /// [`OutputError::Write`], [`OutputError::Hdf5`].
    pub fn create(
        path: &Path,
        dimension: usize,
        format: FeatureFormat,
        attributes: TileAttributes,
    ) -> Result<Self, OutputError> {
        let file = AtomicFile::create(path)?;
        let hdf5 = create_hdf5(file.temporary_path()).map_err(hdf5_error(path))?;
        let features = match format {
            FeatureFormat::F32 => create_features::<f32>(&hdf5, dimension),
            FeatureFormat::F16 => create_features::<Half>(&hdf5, dimension),
        };
        let features = features.map_err(hdf5_error(path))?;
        let path = path.to_owned();
        Ok(Self { hdf5, features, file, path, dimension, format, coords: Vec::new(), attributes })
    }

    /// Appends tiles: `corners[i]` is the upper left corner in level-0 px of the tile whose features are row `i` of
    /// `features`, `[tiles, dimension]`; callers go in ascending (x, y).
    ///
    /// # Errors
    /// [`OutputError::RowLength`] if the shapes differ, [`OutputError::Write`], [`OutputError::Hdf5`].
    pub fn append(&mut self, corners: &[(i64, i64)], features: &[f32]) -> Result<(), OutputError> {
        let expected = corners.len() * self.dimension;
        if features.len() != expected {
            return Err(OutputError::RowLength { path: self.path.clone(), expected, found: features.len() });
        }
        if corners.is_empty() || self.dimension == 0 {
            return Ok(());
        }
        match self.format {
            FeatureFormat::F32 => self.features.append(features),
            FeatureFormat::F16 => {
                let rounded: Vec<Half> = features.iter().map(|value| Half(f16::from_f32(*value))).collect();
                self.features.append(&rounded)
            }
        }
        .map_err(hdf5_error(&self.path))?;
        self.coords.extend(corners.iter().flat_map(|(x, y)| [*x, *y]));
        Ok(())
    }

    /// Completes the file.
    ///
    /// # Errors
    /// [`OutputError::Write`], [`OutputError::Hdf5`].
    pub fn finish(self) -> Result<Written, OutputError> {
        let Self { hdf5, features, file, path, coords, attributes, .. } = self;
        set_text(&features, "name", &attributes.name)
            .and_then(|()| set_text(&features, "savetodir", &attributes.folder))
            .and_then(|()| create_coords(&hdf5, &coords, &attributes))
            .and_then(|()| {
                // The dataset holds the file open.
                drop(features);
                hdf5.close()
            })
            .map_err(hdf5_error(&path))?;
        file.commit_foreign()
    }
}

/// Writes a file of coordinates only.
///
/// # Errors
/// [`OutputError::Write`], [`OutputError::Hdf5`].
pub fn write_coords_h5(
    path: &Path,
    corners: &[(i64, i64)],
    attributes: &TileAttributes,
) -> Result<Written, OutputError> {
    let file = AtomicFile::create(path)?;
    let coords: Vec<i64> = corners.iter().flat_map(|(x, y)| [*x, *y]).collect();
    create_hdf5(file.temporary_path())
        .and_then(|hdf5| {
            create_coords(&hdf5, &coords, attributes)?;
            hdf5.close()
        })
        .map_err(hdf5_error(path))?;
    file.commit_foreign()
}

/// Coordinates that this or another tool wrote.
#[derive(Clone, Debug, PartialEq)]
pub struct Coords {
    /// Upper left corners in level-0 px, in the file's order.
    pub points: Vec<(i64, i64)>,
    /// `patch_size`: TRIDENT's target pixels or CLAM's pixels of `patch_level`.
    pub patch_size: Option<i64>,
    /// `patch_level`, of CLAM.
    pub patch_level: Option<i64>,
    /// `patch_size_level0`, of TRIDENT.
    pub patch_size_level0: Option<i64>,
    /// `downsample` of the level, of CLAM, along x and y.
    pub downsample: Option<(f64, f64)>,
    /// `target_magnification`, of TRIDENT.
    pub target_magnification: Option<f64>,
    /// `overlap` in target pixels, of TRIDENT.
    pub overlap: Option<i64>,
}

impl Coords {
    /// Width and height of the tiles in level-0 px; `None` if the attributes don't tell.
    #[must_use]
    pub fn tile_size_level0(&self) -> Option<(i64, i64)> {
        if let Some(side) = self.patch_size_level0 {
            return Some((side, side));
        }
        let side = self.patch_size?;
        let (x, y) = match (self.patch_level, self.downsample) {
            (Some(0), _) => (1.0, 1.0),
            (_, Some(downsample)) => downsample,
            _ => return None,
        };
        #[expect(clippy::cast_possible_truncation, reason = "saturates, and tiles are far below 2^53 px")]
        let scaled = |factor: f64| (side as f64 * factor).round() as i64;
        Some((scaled(x), scaled(y)))
    }
}

/// Reads `coords` and its attributes, as this tool, TRIDENT or CLAM write them.
///
/// # Errors
/// [`OutputError::Read`], [`OutputError::Hdf5`], or [`OutputError::CoordsShape`] if `coords` is not `[tiles, 2]`.
pub fn read_coords_h5(path: &Path) -> Result<Coords, OutputError> {
    // The library's own error for a missing file has no kind.
    std::fs::File::open(path).map_err(OutputError::read(path))?;
    let wrap = |error| match io_error(error) {
        Ok(source) => OutputError::read(path)(source),
        Err(source) => OutputError::Hdf5 { path: path.to_owned(), source },
    };
    let file = H5File::options().best_effort_locking().open(path).map_err(wrap)?;
    let dataset = file.dataset("coords").map_err(wrap)?;
    let shape = dataset.shape();
    if shape.len() != 2 || shape[1] != 2 {
        return Err(OutputError::CoordsShape { path: path.to_owned(), shape });
    }
    let values = if shape[0] == 0 { Vec::new() } else { dataset.read_numeric_as::<i64>().map_err(wrap)? };
    let names = dataset.attr_names().map_err(wrap)?;
    let numbers = |name: &str| {
        names.iter().any(|known| known == name).then(|| dataset.attr(name).ok().map(|attr| numbers_of(&attr)))??
    };
    let number = |name: &str| numbers(name)?.first().copied();
    #[expect(clippy::cast_possible_truncation, reason = "whole and below 2^53 by the test")]
    let whole = |name: &str| number(name).filter(|value| value.fract() == 0.0 && value.abs() < 9e15).map(|v| v as i64);
    let pair = |values: Vec<f64>| match values[..] {
        [both] => Some((both, both)),
        [x, y] => Some((x, y)),
        _ => None,
    };
    Ok(Coords {
        points: values.chunks_exact(2).map(|point| (point[0], point[1])).collect(),
        patch_size: whole("patch_size"),
        patch_level: whole("patch_level"),
        patch_size_level0: whole("patch_size_level0"),
        downsample: numbers("downsample").and_then(pair),
        target_magnification: number("target_magnification"),
        overlap: whole("overlap"),
    })
}

/// A half-precision float as the HDF5 library takes it.
#[derive(Clone, Copy)]
#[repr(transparent)]
struct Half(f16);

impl H5Type for Half {
    fn hdf5_type() -> DatatypeMessage {
        DatatypeMessage::f16_type()
    }

    fn element_size() -> usize {
        size_of::<f16>()
    }
}

fn create_hdf5(path: &Path) -> Result<H5File, Hdf5Error> {
    // Best effort: network file systems without locks are common, and the name is ours alone.
    H5File::options().best_effort_locking().create(path)
}

fn create_features<T: H5Type>(file: &H5File, dimension: usize) -> Result<H5Dataset, Hdf5Error> {
    let rows = (CHUNK_BYTES / (dimension * T::element_size()).max(1)).max(1);
    file.new_dataset::<T>()
        .shape([0, dimension])
        .chunk(&[rows, dimension.max(1)])
        .max_shape(&[None, Some(dimension)])
        .create("features")
}

fn create_coords(file: &H5File, coords: &[i64], attributes: &TileAttributes) -> Result<(), Hdf5Error> {
    let dataset = file.new_dataset::<i64>().shape([coords.len() / 2, 2]).create("coords")?;
    if !coords.is_empty() {
        dataset.write_raw(coords)?;
    }
    let TileAttributes { profile, tile_size, level, tile_size_level0, slide_size, .. } = *attributes;
    set_whole(&dataset, "patch_size_level0", tile_size_level0)?;
    set_whole(&dataset, "level0_width", slide_size.0)?;
    set_whole(&dataset, "level0_height", slide_size.1)?;
    set_text(&dataset, "name", &attributes.name)?;
    let clam = match (level, profile) {
        (Some(level), _) => Some((i64::from(tile_size), level)),
        (None, Profile::Trident) => None,
        (None, Profile::Clam) => {
            Some((tile_size_level0, GridLevel { index: 0, downsample: (1.0, 1.0), size: slide_size }))
        }
    };
    if let Some((patch_size, level)) = clam {
        set_whole(&dataset, "patch_size", patch_size)?;
        set_whole(&dataset, "patch_level", i64::from(level.index))?;
        set_array(&dataset, "downsample", [level.downsample.0, level.downsample.1])?;
        set_array(&dataset, "downsampled_level_dim", [level.size.0, level.size.1])?;
        set_array(&dataset, "level_dim", [level.size.0, level.size.1])?;
        set_text(&dataset, "save_path", &attributes.folder)?;
    } else {
        set_whole(&dataset, "patch_size", i64::from(tile_size))?;
    }
    if level.is_some() || profile == Profile::Trident {
        set_whole(&dataset, "level0_magnification", i64::from(attributes.level0_magnification))?;
        set_whole(&dataset, "target_magnification", i64::from(attributes.target_magnification))?;
        set_whole(&dataset, "overlap", i64::from(attributes.overlap))?;
        set_text(&dataset, "savetodir", &attributes.folder)?;
    }
    Ok(())
}

fn set_whole(dataset: &H5Dataset, name: &str, value: i64) -> Result<(), Hdf5Error> {
    dataset.new_attr::<i64>().shape(()).create(name)?.write_numeric(&value)
}

fn set_array<T: H5Type>(dataset: &H5Dataset, name: &str, values: [T; 2]) -> Result<(), Hdf5Error> {
    dataset.new_attr::<T>().shape([2]).create(name)?.write_array(&values)
}

fn set_text(dataset: &H5Dataset, name: &str, value: &str) -> Result<(), Hdf5Error> {
    dataset.new_attr::<VarLenUnicode>().shape(()).create(name)?.write_string(value)
}

/// The numbers of an attribute, whatever their type; `None` for text.
fn numbers_of(attribute: &H5Attribute) -> Option<Vec<f64>> {
    if let Ok(values) = attribute.read_numeric_as::<i64>() {
        return Some(values.into_iter().map(|value| value as f64).collect());
    }
    attribute.read_numeric_as::<f64>().ok()
}

/// The system's error behind one of the library, or the library's own.
fn io_error(error: Hdf5Error) -> Result<std::io::Error, Hdf5Error> {
    match error {
        Hdf5Error::Io(source) => Ok(source),
        // The library keeps the system's error in a private type without `source`: only its text shows the number.
        Hdf5Error::IoLayer(_) => {
            let text = error.to_string();
            let code = text.rsplit_once("(os error ").and_then(|(_, rest)| rest.split(')').next()?.parse().ok());
            code.map(std::io::Error::from_raw_os_error).ok_or(error)
        }
        other => Err(other),
    }
}

fn hdf5_error(path: &Path) -> impl Fn(Hdf5Error) -> OutputError + '_ {
    move |error| match io_error(error) {
        Ok(source) => OutputError::write(path)(source),
        Err(source) => OutputError::Hdf5 { path: path.to_owned(), source },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attributes(profile: Profile, level: Option<GridLevel>) -> TileAttributes {
        TileAttributes {
            profile,
            tile_size: 256,
            overlap: 0,
            tile_size_level0: 512,
            level,
            slide_size: (40_000, 30_000),
            level0_magnification: 40,
            target_magnification: 20,
            name: "slide µ".into(),
            folder: "out/features".into(),
        }
    }

    const LEVEL_1: GridLevel = GridLevel { index: 1, downsample: (2.0, 2.0), size: (20_000, 15_000) };

    fn names(path: &Path) -> Vec<String> {
        let mut names = H5File::open(path).unwrap().dataset("coords").unwrap().attr_names().unwrap();
        names.sort();
        names
    }

    #[test]
    fn features_are_appended_in_both_formats() {
        let folder = tempfile::tempdir().unwrap();
        for format in [FeatureFormat::F32, FeatureFormat::F16] {
            for count in [0i64, 1, 1000] {
                let path = folder.path().join("s.h5");
                let mut writer = FeaturesWriter::create(&path, 96, format, attributes(Profile::Trident, None)).unwrap();
                let corners: Vec<_> = (0..count).map(|index| (index * 512, -index)).collect();
                for batch in corners.chunks(33) {
                    let features: Vec<f32> = batch.iter().flat_map(|(x, _)| [*x as f32 / 512.0 + 0.5; 96]).collect();
                    writer.append(batch, &features).unwrap();
                }
                writer.finish().unwrap();
                assert_eq!(read_coords_h5(&path).unwrap().points, corners);
                let file = H5File::open(&path).unwrap();
                let features = file.dataset("features").unwrap();
                assert_eq!(features.shape(), [corners.len(), 96]);
                let bytes = if count == 0 { Vec::new() } else { features.read_raw_bytes().unwrap() };
                let values: Vec<f32> = match format {
                    FeatureFormat::F32 => {
                        bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
                    }
                    FeatureFormat::F16 => {
                        bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
                    }
                };
                // 0.5 steps up to 1000 are exact in f16.
                let want: Vec<f32> = corners.iter().flat_map(|(x, _)| [*x as f32 / 512.0 + 0.5; 96]).collect();
                assert_eq!(values, want);
            }
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_grid_on_a_level_carries_both_sets_of_attributes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s.h5");
        for profile in [Profile::Trident, Profile::Clam] {
            write_coords_h5(&path, &[(3, 4)], &attributes(profile, Some(LEVEL_1))).unwrap();
            let coords = read_coords_h5(&path).unwrap();
            assert_eq!(
                (coords.patch_size, coords.patch_level, coords.patch_size_level0),
                (Some(256), Some(1), Some(512))
            );
            assert_eq!((coords.downsample, coords.target_magnification), (Some((2.0, 2.0)), Some(20.0)));
            assert_eq!(coords.tile_size_level0(), Some((512, 512)));
            assert_eq!(names(&path).len(), 14);
        }
    }

    #[test]
    fn a_resampled_grid_is_right_for_one_tool_and_refused_by_the_other() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s.h5");
        write_coords_h5(&path, &[], &attributes(Profile::Trident, None)).unwrap();
        let coords = read_coords_h5(&path).unwrap();
        assert_eq!((coords.patch_size, coords.patch_level, coords.patch_size_level0), (Some(256), None, Some(512)));
        assert_eq!(names(&path).len(), 9);
        write_coords_h5(&path, &[], &attributes(Profile::Clam, None)).unwrap();
        let coords = read_coords_h5(&path).unwrap();
        assert_eq!((coords.patch_size, coords.patch_level, coords.target_magnification), (Some(512), Some(0), None));
        assert_eq!(coords.tile_size_level0(), Some((512, 512)));
    }

    #[test]
    fn files_of_h5py_are_read() {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
        let clam = read_coords_h5(&golden.join("coords_clam.h5")).unwrap();
        assert_eq!(clam.points, (0..5).map(|index| (1000 + 512 * index, 2048)).collect::<Vec<_>>());
        assert_eq!((clam.patch_size, clam.patch_level, clam.downsample), (Some(256), Some(1), Some((4.0, 4.0))));
        assert_eq!(clam.tile_size_level0(), Some((1024, 1024)));
        let trident = read_coords_h5(&golden.join("coords_trident.h5")).unwrap();
        assert_eq!(trident.points, [(0, 0), (448, 0), (0, 448)]);
        assert_eq!(
            (trident.patch_size, trident.overlap, trident.target_magnification),
            (Some(224), Some(0), Some(20.0))
        );
        assert_eq!(trident.tile_size_level0(), Some((448, 448)));
    }

    #[test]
    fn what_is_no_coordinate_file_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s.h5");
        assert!(matches!(read_coords_h5(&path), Err(OutputError::Read { .. })));
        std::fs::write(&path, b"minx,miny\n").unwrap();
        let error = read_coords_h5(&path).unwrap_err();
        assert!(error.to_string().contains("s.h5") && error.hint().is_some(), "{error}");
        let file = H5File::create(&path).unwrap();
        file.new_dataset::<i64>().shape([2, 3]).create("coords").unwrap().write_raw(&[0i64; 6]).unwrap();
        file.close().unwrap();
        let error = read_coords_h5(&path).unwrap_err();
        assert!(matches!(error, OutputError::CoordsShape { ref shape, .. } if shape == &[2, 3]), "{error}");
    }

    #[test]
    fn an_unfinished_file_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s.h5");
        let mut writer = FeaturesWriter::create(&path, 2, FeatureFormat::F32, attributes(Profile::Clam, None)).unwrap();
        writer.append(&[(0, 0)], &[1.0, 2.0]).unwrap();
        assert!(matches!(writer.append(&[(0, 0)], &[1.0]), Err(OutputError::RowLength { expected: 2, found: 1, .. })));
        drop(writer);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_is_an_error_of_the_system() {
        let error = create_hdf5(Path::new("/dev/full"))
            .and_then(|file| {
                let features = create_features::<f32>(&file, 1024)?;
                features.append(&[1.0f32; 1024 * 1024])?;
                drop(features);
                file.close()
            })
            .map_err(hdf5_error(Path::new("out/s.h5")))
            .unwrap_err();
        assert!(matches!(error, OutputError::Write { .. }), "{error:?}");
        assert_eq!(error.hint(), Some("free space or choose another `out`"));
    }

    #[test]
    fn magnifications_go_by_their_usual_names() {
        for (mpp, want) in [(0.1, 80), (0.23, 40), (0.25, 40), (0.5, 20), (1.0, 10), (2.0, 5), (4.0, 2), (16.0, 1)] {
            assert_eq!(nominal_magnification(Mpp::new(mpp).unwrap()), want, "{mpp}");
        }
    }

    #[test]
    fn the_writer_can_move_to_a_worker_thread() {
        fn is_send<T: Send>() {}
        is_send::<FeaturesWriter>();
    }
}
