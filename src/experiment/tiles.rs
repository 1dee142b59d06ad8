//! Tiles to learn from: of real slides, of images, or made up.

use std::path::{Path, PathBuf};

use rand::SeedableRng;
use rand::rngs::StdRng;
use walkdir::WalkDir;

use super::{ExperimentError, images};
use crate::engine::config::TilingConfig;
use crate::engine::inputs::{self, SlideInput};
use crate::engine::plan;
use crate::geometry::TilePosition;
use crate::inference::ModelCard;
use crate::slide::synthetic::{SyntheticSlide, Tissue};
use crate::slide::{ReadOptions, Slide, TileReader};

/// Tiles of one size, and where they come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TileSet {
    /// Each `[tile, tile, 3]`, RGB8.
    pub tiles: Vec<Vec<u8>>,
    /// In words, for the report.
    pub source: String,
}

impl TileSet {
    /// `count` tiles of what is at `paths`: slides, or folders of slides or of images at the model's resolution. Every
    /// slide, or image, gives its equal share, drawn by `seed`; of slides tissue alone.
    ///
    /// # Errors
    /// [`ExperimentError`] if something can't be read, or nothing is found.
    pub fn read(paths: &[PathBuf], card: &ModelCard, count: usize, seed: u64) -> Result<Self, ExperimentError> {
        let mut slides = Vec::new();
        let mut images = Vec::new();
        for path in paths {
            let files = files(path)?;
            let found: Vec<PathBuf> =
                files.iter().filter(|path| images::is_image(path) && !is_slide(path)).cloned().collect();
            // Without images it must be slides, and if it is none either that is an error.
            if found.is_empty() || files.iter().any(|file| is_slide(file)) {
                slides.extend(inputs::slides(std::slice::from_ref(path))?);
            }
            images.extend(found);
        }
        let tiling = TilingConfig::of(card);
        let sources = (slides.len() + images.len()).max(1);
        // Of a remainder the last ones give one more each.
        let mut shares = (0..sources).map(|index| (index + 1) * count / sources - index * count / sources);
        let mut share = || shares.next().unwrap_or(0);
        let mut random = StdRng::seed_from_u64(seed);
        let mut tiles = Vec::with_capacity(count);
        for slide in &slides {
            tiles.extend(of_slide(slide, &tiling, share(), &mut random)?);
        }
        for image in &images {
            tiles.extend(of_image(image, card.tile_size, share(), &mut random)?);
        }
        if tiles.is_empty() {
            return Err(ExperimentError::NoTiles { path: paths.first().cloned().unwrap_or_default() });
        }
        let source =
            format!("{} tiles of {} slides and {} images, seed {seed}", tiles.len(), slides.len(), images.len());
        Ok(Self { tiles, source })
    }

    /// `count` made-up tiles that look like stained tissue.
    #[must_use]
    pub fn synthetic(side: u32, count: usize, seed: u64) -> Self {
        let slide = SyntheticSlide { tissue: Tissue::Everywhere, ..SyntheticSlide::new(side, side, seed) };
        let columns = 64;
        let at = |index: usize| u32::try_from(index).unwrap_or(0);
        let tile = |index| slide.pixels(at(index % columns) * side, at(index / columns) * side, side, side);
        Self { tiles: (0..count).map(tile).collect(), source: format!("{count} made-up tiles, seed {seed}") }
    }

    /// The tiles as sessions take them.
    #[must_use]
    pub fn slices(&self) -> Vec<&[u8]> {
        self.tiles.iter().map(Vec::as_slice).collect()
    }
}

fn is_slide(path: &Path) -> bool {
    path.is_file() && crate::slide::detect(path).is_some()
}

/// The files of a folder and of those in it, or the file itself; none for a path that does not exist.
fn files(path: &Path) -> Result<Vec<PathBuf>, ExperimentError> {
    if !path.exists() {
        return Ok(Vec::new());
    }
    let unreadable = |error: walkdir::Error| ExperimentError::File {
        path: error.path().unwrap_or(path).to_owned(),
        doing: "read",
        source: error.into(),
    };
    let entries = WalkDir::new(path).sort_by_file_name().into_iter();
    entries.map(|entry| entry.map(walkdir::DirEntry::into_path).map_err(unreadable)).collect()
}

fn of_slide(
    input: &SlideInput,
    tiling: &TilingConfig,
    count: usize,
    random: &mut StdRng,
) -> Result<Vec<Vec<u8>>, ExperimentError> {
    let plan = plan::plan(Slide::open(&input.path, tiling.reader)?, &input.tiling(tiling))?;
    let options = ReadOptions { tile_size: tiling.tile_size, icc: false };
    let mut chosen = rand::seq::index::sample(random, plan.positions.len(), count.min(plan.positions.len())).into_vec();
    // In the slide's order, which is that of its file.
    chosen.sort_unstable();
    let chosen: Vec<TilePosition> = chosen.into_iter().map(|index| plan.positions[index]).collect();
    let mut reader = TileReader::new(&plan.slide, &plan.choice, options, &chosen)?;
    let mut read = |position: &TilePosition| {
        let mut pixels = Vec::new();
        reader.read(*position, &mut pixels)?;
        Ok(pixels)
    };
    chosen.iter().map(&mut read).collect()
}

/// Tiles cut from an image at random places; an image smaller than a tile is resized to one.
fn of_image(path: &Path, side: u32, count: usize, random: &mut StdRng) -> Result<Vec<Vec<u8>>, ExperimentError> {
    let mut image = images::pixels(path)?;
    if image.width() < side || image.height() < side {
        image = image::imageops::resize(&image, side, side, image::imageops::FilterType::CatmullRom);
    }
    let (columns, rows) = (image.width() - side + 1, image.height() - side + 1);
    let places = columns as usize * rows as usize;
    let chosen = rand::seq::index::sample(random, places, count.min(places)).into_vec();
    let cut = |place: usize| {
        let at = |index: usize| u32::try_from(index).unwrap_or(0);
        let (x, y) = (at(place % columns as usize), at(place / columns as usize));
        image::imageops::crop_imm(&image, x, y, side, side).to_image().into_raw()
    };
    Ok(chosen.into_iter().map(cut).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::slide::synthetic::SvsOptions;

    #[test]
    fn made_up_tiles_differ_and_repeat_with_the_seed() {
        let set = TileSet::synthetic(64, 4, 7);
        assert_eq!(set, TileSet::synthetic(64, 4, 7));
        assert_ne!(set.tiles, TileSet::synthetic(64, 4, 8).tiles);
        assert!(set.tiles.iter().all(|tile| tile.len() == 64 * 64 * 3));
        assert_ne!(set.tiles[0], set.tiles[1]);
    }

    #[test]
    fn images_are_cut_by_the_seed() {
        let folder = tempfile::tempdir().unwrap();
        let gradient = image::RgbImage::from_fn(40, 30, |x, y| {
            image::Rgb([u8::try_from(x).unwrap(), u8::try_from(y).unwrap(), 9])
        });
        gradient.save(folder.path().join("a.png")).unwrap();
        let cut = |seed| of_image(&folder.path().join("a.png"), 16, 3, &mut StdRng::seed_from_u64(seed)).unwrap();
        assert_eq!(cut(1), cut(1));
        assert_ne!(cut(1), cut(2));
        for tile in cut(1) {
            // The gradient tells where a tile was cut; it must go on from there.
            let (x, y) = (tile[0], tile[1]);
            assert!(x <= 24 && y <= 14);
            assert_eq!(tile[(16 * 16 - 1) * 3..], [x + 15, y + 15, 9]);
        }
    }

    #[test]
    fn a_folder_may_hold_slides_and_images() {
        let folder = tempfile::tempdir().unwrap();
        let card = ModelCard::load(Path::new("models/cells-vit"), &crate::inference::BareModel::default()).unwrap();
        let slide = SyntheticSlide { tissue: Tissue::Everywhere, ..SyntheticSlide::new(400, 300, 1) };
        slide.write(&folder.path().join("a.svs"), &SvsOptions::default()).unwrap();
        image::RgbImage::from_pixel(200, 200, image::Rgb([200, 100, 150])).save(folder.path().join("b.png")).unwrap();
        let set = TileSet::read(&[folder.path().to_owned()], &card, 4, 1).unwrap();
        assert_eq!((set.tiles.len(), set.source.as_str()), (4, "4 tiles of 1 slides and 1 images, seed 1"));
    }

    #[test]
    fn every_source_gives_its_share() {
        let folder = tempfile::tempdir().unwrap();
        let card = ModelCard::load(Path::new("models/cells-vit"), &crate::inference::BareModel::default()).unwrap();
        for shade in [10, 20, 30] {
            let image = image::RgbImage::from_pixel(200, 200, image::Rgb([shade; 3]));
            image.save(folder.path().join(format!("{shade}.png"))).unwrap();
        }
        let set = TileSet::read(&[folder.path().to_owned()], &card, 4, 1).unwrap();
        assert_eq!(set.tiles.iter().map(|tile| tile[0]).collect::<Vec<_>>(), [10, 20, 30, 30]);
        assert_eq!(TileSet::read(&[folder.path().to_owned()], &card, 2, 1).unwrap().tiles.len(), 2);
    }
}
