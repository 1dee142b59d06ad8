//! The whole slide as one small picture, in bounded memory.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use fast_image_resize::{ResizeError, Resizer};
use image::imageops::replace;
use image::{Rgb, RgbImage};
use rayon::prelude::*;

use super::resample::{Crop, resample};
use super::source::{self, LevelRect, LevelSource, fill};
use super::{LevelInfo, Slide, SlideError};
use crate::geometry::{Level, Level0Rect};

/// Pixels of a level decoded at a time along each axis, about: one row of the usual tiles, and few tiles cut.
const CHUNK: (u32, u32) = (4096, 256);
/// Side below which an unreadable part is not cut any further.
const SMALLEST_PART: u32 = 512;
/// Unreadable parts after which the slide is given up.
const MAX_UNREADABLE: usize = 64;
/// Handles of OpenSlide that read one level side by side.
const MAX_HANDLES: usize = 4;
/// Block averaged at most; beyond it the rest is left to the filter.
const MAX_BLOCK: u32 = 1024;

/// The whole of level 0, made small.
#[derive(Clone, Debug)]
pub struct Thumbnail {
    /// The picture.
    pub image: RgbImage,
    /// Level-0 pixels per pixel along x, exact.
    pub scale_x: f64,
    /// Level-0 pixels per pixel along y, exact.
    pub scale_y: f64,
    /// The level it was made from.
    pub level: Level,
    /// Parts that couldn't be decoded; they have the background colour.
    pub unreadable: Vec<Level0Rect>,
}

impl Slide {
    /// The whole slide with its longer side at most `max_side` pixels; never enlarged.
    ///
    /// Made from the coarsest level that is large enough, part by part: memory is bounded by the result, not by the
    /// level, but a slide with only one level is decoded as a whole. Damaged parts are left out and listed.
    ///
    /// # Errors
    /// [`SlideError`] if the file can't be opened any more or is damaged all over.
    pub fn thumbnail(&self, max_side: u32) -> Result<Thumbnail, SlideError> {
        let extent = self.extent();
        let Scaling { level, info, block, size: (width, height) } = self.scaling(max_side);
        let parts = parts((info.width, info.height), block);
        let planned = parts.iter().map(|part| part.rect());
        let threads = self.thumbnail_threads(parts.len());
        let unreadable_count = AtomicUsize::new(0);
        let sources = source::open(self, level, planned, threads)?;
        let walks = sources.into_par_iter().zip(parts.par_chunks(parts.len().div_ceil(threads).max(1)));
        let means = Mutex::new(RgbImage::new(info.width.div_ceil(block.0), info.height.div_ceil(block.1)));
        let unreadable: Vec<Vec<Level0Rect>> = walks
            .map(|(source, parts)| {
                let (background, all) = (self.background, &unreadable_count);
                let mut walk = Walk { background, source, means: &means, unreadable: Vec::new(), all };
                walk.over(parts, block)?;
                Ok(walk.unreadable)
            })
            .collect::<Result<_, SlideError>>()?;
        let (means, unreadable) = (means.into_inner().unwrap_or_else(PoisonError::into_inner), unreadable.concat());
        // The last block of a row may be cut off by the slide's edge.
        let covered = (f64::from(info.width) / f64::from(block.0), f64::from(info.height) / f64::from(block.1));
        let image = shrink_to(means, covered, (width, height)).map_err(|source| SlideError::Resample {
            path: self.path.clone(),
            level,
            source,
        })?;
        let (scale_x, scale_y) = (extent.width as f64 / f64::from(width), extent.height as f64 / f64::from(height));
        Ok(Thumbnail { image, scale_x, scale_y, level, unreadable })
    }

    /// Memory that [`thumbnail`](Self::thumbnail) takes while it is made, the picture included.
    ///
    /// # Errors
    /// [`SlideError`] if the slide has no level.
    pub fn thumbnail_bytes(&self, max_side: u32) -> Result<u64, SlideError> {
        let Scaling { level, info, block, size } = self.scaling(max_side);
        let parts = parts((info.width, info.height), block);
        let rgb = |width: u32, height: u32| u64::from(width) * u64::from(height) * 3;
        let threads = self.thumbnail_threads(parts.len());
        let part = parts.iter().map(|part| rgb(part.width, part.height)).max().unwrap_or(0);
        let read = source::memory(self, level, parts.iter().map(|part| part.rect()), threads)?;
        // Each thread also holds the tiles that the edge of its neighbour's parts cuts.
        let held = if self.native.is_some() { read.held * threads as u64 } else { read.held };
        let means = rgb(info.width.div_ceil(block.0), info.height.div_ceil(block.1));
        Ok(means + rgb(size.0, size.1) + held + threads as u64 * (part + read.per_reader))
    }

    /// How the picture of a size is made.
    fn scaling(&self, max_side: u32) -> Scaling {
        let extent = self.extent();
        let longest = extent.width.max(extent.height) as f64;
        let shrink = (f64::from(max_side.max(1)) / longest).min(1.0);
        let (width, height) = (pixels(extent.width, shrink), pixels(extent.height, shrink));
        let large_enough = |info: &LevelInfo| info.width >= width && info.height >= height;
        let chosen = (0..).map(Level).zip(&self.levels).filter(|(_, info)| large_enough(info)).last();
        let (level, info) = chosen.map_or((Level(0), self.levels[0]), |(level, info)| (level, *info));
        let block = ((info.width / width).min(MAX_BLOCK), (info.height / height).min(MAX_BLOCK));
        Scaling { level, info, block, size: (width, height) }
    }

    /// Threads that read the parts: OpenSlide opens the file anew for each.
    fn thumbnail_threads(&self, parts: usize) -> usize {
        let most = if self.native.is_some() { rayon::current_num_threads() } else { MAX_HANDLES };
        rayon::current_num_threads().min(most).min(parts).max(1)
    }
}

/// A level, the blocks of it that are averaged, and the size of the picture.
struct Scaling {
    level: Level,
    info: LevelInfo,
    block: (u32, u32),
    size: (u32, u32),
}

/// Parts of a level being read one by one.
struct Walk<'a> {
    background: [u8; 3],
    source: Box<dyn LevelSource>,
    /// The level with its blocks averaged, of all walks; blocks at the edges may be smaller.
    means: &'a Mutex<RgbImage>,
    unreadable: Vec<Level0Rect>,
    /// Unreadable parts of all walks.
    all: &'a AtomicUsize,
}

/// A rectangle of the level.
#[derive(Clone, Copy)]
struct Part {
    x: u32,
    y: u32,
    width: u32,
    height: u32,
}

/// The parts of a level that are read at a time, each of whole blocks.
fn parts((width, height): (u32, u32), (block_x, block_y): (u32, u32)) -> Vec<Part> {
    let step_x = CHUNK.0.div_ceil(block_x) * block_x;
    let step_y = CHUNK.1.div_ceil(block_y) * block_y;
    // Down first: tiles cut by the lower edge of a part are still in OpenSlide's cache for the next one.
    let columns = (0..width).step_by(step_x as usize);
    let part = move |x: u32, y: u32| Part { x, y, width: step_x.min(width - x), height: step_y.min(height - y) };
    columns.flat_map(|x| (0..height).step_by(step_y as usize).map(move |y| part(x, y))).collect()
}

impl Walk<'_> {
    /// Averages the blocks of some parts.
    fn over(&mut self, parts: &[Part], block: (u32, u32)) -> Result<(), SlideError> {
        let mut rgb = Vec::new();
        for part in parts {
            self.read(*part, &mut rgb)?;
            let part_means = average(&rgb, *part, block);
            let mut means = self.means.lock().unwrap_or_else(PoisonError::into_inner);
            replace(&mut *means, &part_means, (part.x / block.0).into(), (part.y / block.1).into());
        }
        Ok(())
    }

    /// Reads `part` into `rgb`, whose content is replaced; what is damaged is narrowed down, filled and listed.
    fn read(&mut self, part: Part, rgb: &mut Vec<u8>) -> Result<(), SlideError> {
        match self.source.read(part.rect(), rgb) {
            Ok(_) => Ok(()),
            Err(error @ SlideError::Read { .. }) if self.all.load(Ordering::Relaxed) >= MAX_UNREADABLE => Err(error),
            Err(SlideError::Read { .. }) if part.width.max(part.height) > SMALLEST_PART => {
                let mut half_rgb = Vec::new();
                rgb.resize(part.width as usize * part.height as usize * 3, 0);
                for half in part.halves() {
                    self.read(half, &mut half_rgb)?;
                    let rows = rgb.chunks_exact_mut(part.width as usize * 3).skip((half.y - part.y) as usize);
                    for (row, source) in rows.zip(half_rgb.chunks_exact(half.width as usize * 3)) {
                        row[(half.x - part.x) as usize * 3..][..source.len()].copy_from_slice(source);
                    }
                }
                Ok(())
            }
            Err(SlideError::Read { region, .. }) => {
                self.all.fetch_add(1, Ordering::Relaxed);
                self.unreadable.push(region);
                fill(rgb, self.background);
                Ok(())
            }
            Err(error) => Err(error),
        }
    }
}

impl Part {
    fn rect(self) -> LevelRect {
        LevelRect { x: self.x.into(), y: self.y.into(), width: self.width, height: self.height }
    }

    /// Both halves of the longer side.
    fn halves(self) -> [Self; 2] {
        if self.width >= self.height {
            let width = self.width / 2;
            [Self { width, ..self }, Self { x: self.x + width, width: self.width - width, ..self }]
        } else {
            let height = self.height / 2;
            [Self { height, ..self }, Self { y: self.y + height, height: self.height - height, ..self }]
        }
    }
}

/// Averages the blocks of a part, which starts on a block.
fn average(rgb: &[u8], part: Part, (block_x, block_y): (u32, u32)) -> RgbImage {
    let mut means = RgbImage::new(part.width.div_ceil(block_x), part.height.div_ceil(block_y));
    let cols = part.width.div_ceil(block_x) as usize;
    let mut sums = vec![[0u32; 3]; cols];
    let rows: Vec<&[u8]> = rgb.chunks_exact(part.width as usize * 3).collect();
    for (block_row, rows) in (0..).zip(rows.chunks(block_y as usize)) {
        sums.fill([0; 3]);
        for row in rows {
            for (sum, block) in sums.iter_mut().zip(row.chunks(block_x as usize * 3)) {
                for pixel in block.chunks_exact(3) {
                    for channel in 0..3 {
                        sum[channel] += u32::from(pixel[channel]);
                    }
                }
            }
        }
        for (index, sum) in (0..).zip(&sums) {
            let block_width = block_x.min(part.width - index * block_x);
            let count = block_width * u32::try_from(rows.len()).unwrap_or(u32::MAX);
            let [red, green, blue] = sum.map(|sum| u8::try_from((sum + count / 2) / count).unwrap_or(u8::MAX));
            means.put_pixel(index, block_row, Rgb([red, green, blue]));
        }
    }
    means
}

/// Filters the last bit of the way, a factor between 1 and 2.
fn shrink_to(means: RgbImage, covered: (f64, f64), (width, height): (u32, u32)) -> Result<RgbImage, ResizeError> {
    if covered == (f64::from(width), f64::from(height)) {
        return Ok(means);
    }
    let mut small = RgbImage::new(width, height);
    let crop = Crop { left: 0.0, top: 0.0, width: covered.0, height: covered.1 };
    let source = (means.width(), means.height(), means.as_raw().as_slice());
    resample(&mut Resizer::new(), source, crop, (width, height, &mut small))?;
    Ok(small)
}

fn pixels(level0: i64, shrink: f64) -> u32 {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "`as` saturates; sizes are checked")]
    let pixels = (level0 as f64 * shrink).round().max(1.0) as u32;
    pixels
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::slide::synthetic::{Encoding, SvsOptions, SyntheticSlide};

    fn write(slide: &SyntheticSlide, options: SvsOptions) -> (tempfile::TempDir, Slide) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.tif");
        slide.write(&path, &SvsOptions { encoding: Encoding::Deflate, ..options }).unwrap();
        let slide = Slide::open(&path, None).unwrap();
        (folder, slide)
    }

    #[test]
    fn thumbnails_show_the_same_from_any_level() {
        let synthetic = SyntheticSlide::new(5003, 1201, 2);
        let (_one_folder, one) = write(&synthetic, SvsOptions { downsamples: vec![1], ..SvsOptions::default() });
        let (_three_folder, three) = write(&synthetic, SvsOptions::default());
        let (from0, from1) = (one.thumbnail(1000).unwrap(), three.thumbnail(1000).unwrap());
        assert_eq!((from0.level, from1.level), (Level(0), Level(1)));
        assert_eq!(from0.image.dimensions(), (1000, 240));
        assert_eq!((from0.scale_x, from0.scale_y), (5.003, 1201.0 / 240.0));
        let sum: f64 = from0.image.iter().zip(from1.image.iter()).map(|(a, b)| f64::from(a.abs_diff(*b))).sum();
        assert!(sum / (from0.image.len() as f64) < 2.0, "{}", sum / from0.image.len() as f64);
        assert_eq!(one.thumbnail(1).unwrap().image.dimensions(), (1, 1));
        assert_eq!(one.thumbnail(u32::MAX).unwrap().image.dimensions(), (5003, 1201));
    }

    #[test]
    fn damaged_parts_are_left_out_and_listed() {
        let options = SvsOptions { downsamples: vec![1], damaged_tiles: vec![(0, 3, 1)], ..SvsOptions::default() };
        let (_folder, slide) = write(&SyntheticSlide::new(1500, 900, 2), options);
        let thumbnail = slide.thumbnail(300).unwrap();
        assert!(!thumbnail.unreadable.is_empty());
        let damaged = Level0Rect { x: 768, y: 256, width: 256, height: 256 };
        assert!(thumbnail.unreadable.iter().all(|part| part.intersection(damaged).is_some()));
        assert_eq!(thumbnail.image.get_pixel(180, 76).0, [255; 3]);
    }
}
