//! What a rate means for a slide: how many tiles it has, how long they take, and what bounds it.

use std::panic::resume_unwind;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::engine::config::TilingConfig;
use crate::engine::plan::{self, SlidePlan};
use crate::experiment::ExperimentError;
use crate::geometry::{GridError, Level0Rect, Mpp, Overlap, PixelSize, TileGrid, TilePlane, TilePosition};
use crate::inference::{ModelCard, Task};
use crate::report::EstimateRecord;
use crate::slide::{ReadOptions, Slide, TileReader};

/// Tiles of a slide that reading is measured on, at most.
const MOST_READ: usize = 512;
/// Tiles that are read one after the other: neighbours share what is stored of a slide, as in a run.
const STRETCH: usize = 64;
/// How long reading is measured, at most.
const MOST_READ_TIME: Duration = Duration::from_secs(5);
/// Ends the sentence on what bounds a segmentation model.
const LEFT_OUT: &str =
    "; stitching and writing the maps are not part of this estimate, `run` ends with what bounded it";

/// A slide whose time is asked for.
#[derive(Clone, Debug, PartialEq)]
pub enum SlideQuestion {
    /// A slide of some size.
    Size(SlideSize),
    /// So many tiles to infer.
    Tiles {
        /// What has them.
        name: String,
        /// How many.
        tiles: u64,
    },
    /// A real one, with its own size and tissue.
    File {
        /// The slide.
        path: PathBuf,
        /// Its resolution at level 0, if the file does not tell.
        mpp: Option<Mpp>,
        /// What neighbouring tiles share.
        overlap: Overlap,
    },
}

/// A slide whose tiles are counted, so that only their rate is missing.
#[derive(Debug)]
pub struct CountedSlide {
    record: EstimateRecord,
    /// Of a real slide.
    plan: Option<SlidePlan>,
    /// Whether a run would stitch and write maps.
    has_maps: bool,
}

impl SlideQuestion {
    /// Counts the tiles for a model, which for a real slide looks for its tissue.
    ///
    /// # Errors
    /// [`ExperimentError`] if the slide can't be read or cut into tiles, or has none with tissue.
    pub fn count(&self, card: &ModelCard) -> Result<CountedSlide, ExperimentError> {
        let (record, plan) = match self {
            Self::Size(size) => {
                let counts = size.tiles(card)?;
                let record = EstimateRecord {
                    name: size.name.clone(),
                    width: Some(size.width),
                    height: Some(size.height),
                    mpp: Some(size.mpp.unwrap_or(card.mpp).get()),
                    overlap: Some(size.overlap.in_pixels(card.tile_size)),
                    grid_tiles: Some(counts.grid),
                    full_tiles: Some(counts.full),
                    tissue_fraction: Some(size.tissue_fraction),
                    tiles: counts.tissue,
                    ..EstimateRecord::default()
                };
                (record, None)
            }
            Self::Tiles { name, tiles } => {
                let record = EstimateRecord { name: name.clone(), tiles: *tiles, ..EstimateRecord::default() };
                (record, None)
            }
            Self::File { path, mpp, overlap } => {
                let pixels = overlap.in_pixels(card.tile_size);
                let tiling = TilingConfig { overlap: pixels, slide_mpp: *mpp, ..TilingConfig::of(card) };
                let plan = plan::plan(Slide::open(path, tiling.reader)?, &tiling)?;
                (of_plan(&plan, *overlap), Some(plan))
            }
        };
        if record.tiles == 0 {
            return Err(ExperimentError::NoTiles { path: PathBuf::from(&record.name) });
        }
        Ok(CountedSlide { record, plan, has_maps: card.task == Task::Segmentation })
    }
}

fn of_plan(plan: &SlidePlan, overlap: Overlap) -> EstimateRecord {
    let (extent, tiles) = (plan.slide.extent(), plan.positions.len() as u64);
    EstimateRecord {
        name: plan.slide.path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        width: u64::try_from(extent.width).ok(),
        height: u64::try_from(extent.height).ok(),
        mpp: Some(plan.pixel_size.x.get()),
        overlap: Some(plan.overlap),
        grid_tiles: Some(plan.grid_tiles),
        full_tiles: Some(full_tiles(&plan.plane, overlap)),
        tissue_fraction: Some(tiles as f64 / plan.grid_tiles.max(1) as f64),
        tiles,
        ..EstimateRecord::default()
    }
}

/// A slide described by numbers.
#[derive(Clone, Debug, PartialEq)]
pub struct SlideSize {
    /// What it is called.
    pub name: String,
    /// Level-0 pixels.
    pub width: u64,
    /// Level-0 pixels.
    pub height: u64,
    /// Resolution at level 0; the model's own if it is not given.
    pub mpp: Option<Mpp>,
    /// What neighbouring tiles share.
    pub overlap: Overlap,
    /// Share of the grid's tiles that have tissue, 0–1.
    pub tissue_fraction: f64,
}

impl SlideSize {
    /// The tiles of the slide: all of the grid, those wholly on the slide, and those with tissue.
    fn tiles(&self, card: &ModelCard) -> Result<TileCounts, ExperimentError> {
        let downsample = card.mpp.get() / self.mpp.unwrap_or(card.mpp).get();
        let side = |pixels: u64| i64::try_from(pixels).unwrap_or(i64::MAX);
        let plane = TilePlane {
            region: Level0Rect { x: 0, y: 0, width: side(self.width), height: side(self.height) },
            downsample_x: downsample,
            downsample_y: downsample,
            pixel_size: PixelSize::square(card.mpp),
            tile_size: card.tile_size,
        };
        let tile = u64::from(card.tile_size);
        if plane.width() < tile || plane.height() < tile {
            let (width, height) = (plane.width(), plane.height());
            return Err(ExperimentError::TileLargerThanSlide { tile: card.tile_size, width, height });
        }
        let grid = TileGrid::new(plane, self.overlap.in_pixels(card.tile_size)).map_err(|error| match error {
            GridError::TooManyTiles(tiles) => ExperimentError::TooManyTiles { tiles },
            other => other.into(),
        })?;
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of a count")]
        let tissue = (grid.len() as f64 * self.tissue_fraction).round().max(1.0) as u64;
        Ok(TileCounts { grid: grid.len(), full: full_tiles(&plane, self.overlap), tissue })
    }
}

/// Tiles that lie wholly on the plane, by the usual formula: `(⌊(w − tile) / stride⌋ + 1) · (⌊(h − tile) / stride⌋ + 1)`.
/// The stride is a fraction of pixels where the overlap is a share, unlike that of the grid.
fn full_tiles(plane: &TilePlane, overlap: Overlap) -> u64 {
    let tile = f64::from(plane.tile_size);
    // In hundredths of a pixel the stride of a whole percentage is a whole number, so that no step is lost to rounding.
    let hundredths = match overlap {
        Overlap::Pixels(pixels) => 100.0 * (tile - f64::from(pixels)),
        Overlap::Percent(percent) => tile * (100.0 - percent),
    };
    let along = |extent: u64| {
        let rest = extent as f64 - tile;
        if rest < 0.0 { 0.0 } else { (100.0 * rest / hundredths).floor() + 1.0 }
    };
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a count")]
    let full = (along(plane.width()) * along(plane.height())) as u64;
    full
}

/// Tiles of a slide.
struct TileCounts {
    /// Of the engine's grid, which covers every pixel.
    grid: u64,
    /// Those that lie wholly on the slide.
    full: u64,
    /// Those of the grid with tissue.
    tissue: u64,
}

/// The machine as far as an estimate needs it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Machine {
    /// Tiles per second of the model alone.
    pub(super) inference: f64,
    /// Whether reading and inference share the cores.
    pub(super) shares_cores: bool,
    /// Reader threads of a run.
    pub(super) readers: usize,
    pub(super) cores: usize,
    /// Power while it infers.
    pub(super) watts: Option<f64>,
    /// Whether that is what the GPUs tell, which is theirs alone.
    pub(super) watts_are_of_gpus: bool,
}

impl CountedSlide {
    /// The time of the slide on a machine.
    ///
    /// # Errors
    /// [`ExperimentError`] if the slide can't be read, or nothing was inferred.
    pub(super) fn estimate(&self, machine: &Machine) -> Result<EstimateRecord, ExperimentError> {
        if machine.inference.is_nan() || machine.inference <= 0.0 {
            return Err(ExperimentError::NoThroughput);
        }
        let reading = self.plan.as_ref().map(|plan| reading_rate(plan, machine.readers)).transpose()?;
        let (tiles_per_sec, mut bound_by) = together(machine, reading);
        if self.has_maps {
            bound_by.push_str(LEFT_OUT);
        }
        let seconds = self.record.tiles as f64 / tiles_per_sec;
        let per_hour = 3600.0 / seconds;
        Ok(EstimateRecord {
            inference_tiles_per_sec: machine.inference,
            reading_tiles_per_sec: reading,
            tiles_per_sec,
            seconds,
            bound_by,
            slides_per_hour: per_hour,
            slides_per_day: 24.0 * per_hour,
            watts: machine.watts,
            watts_are_of_gpus: machine.watts_are_of_gpus,
            kwh_per_1000_slides: machine.watts.map(|watts| watts * seconds * 1000.0 / 3.6e6),
            ..self.record.clone()
        })
    }
}

/// Tiles per second of all readers, with nothing else to do: stretches of neighbours that lie evenly over the slide's
/// tissue, of which each reader takes the next tile, as in a run.
fn reading_rate(plan: &SlidePlan, readers: usize) -> Result<f64, ExperimentError> {
    let options = ReadOptions { tile_size: plan.plane.tile_size, icc: false };
    let chosen: Vec<TilePosition> = stretches(plan.positions.len()).map(|index| plan.positions[index]).collect();
    let (next, start) = (AtomicUsize::new(0), Instant::now());
    let read = |mut reader: TileReader| {
        let (mut pixels, mut done) = (Vec::new(), 0_usize);
        while done == 0 || start.elapsed() < MOST_READ_TIME {
            let Some(position) = chosen.get(next.fetch_add(1, Ordering::Relaxed)) else { break };
            reader.read(*position, &mut pixels)?;
            done += 1;
        }
        Ok::<usize, ExperimentError>(done)
    };
    let opened = TileReader::several(&plan.slide, &plan.choice, options, &chosen, readers)?;
    let read = std::thread::scope(|scope| {
        let workers: Vec<_> = opened.into_iter().map(|reader| scope.spawn(move || read(reader))).collect();
        workers
            .into_iter()
            .map(|worker| worker.join().unwrap_or_else(|panic| resume_unwind(panic)))
            .sum::<Result<usize, _>>()
    })?;
    Ok(read as f64 / start.elapsed().as_secs_f64())
}

/// Indices of at most [`MOST_READ`] of `count` tiles: whole stretches, evenly spread.
fn stretches(count: usize) -> impl Iterator<Item = usize> {
    let all = count.div_ceil(STRETCH);
    let taken = all.min(MOST_READ / STRETCH);
    (0..taken).flat_map(move |stretch| {
        let begin = stretch * all / taken * STRETCH;
        begin..(begin + STRETCH).min(count)
    })
}

/// The rate of reading and inference together, and what bounds it.
fn together(machine: &Machine, reading: Option<f64>) -> (f64, String) {
    let Machine { inference, shares_cores, readers, cores, .. } = *machine;
    let Some(reading) = reading else {
        return (
            inference,
            "inference; how fast slides are read was not measured, a slide of your own tells".to_owned(),
        );
    };
    if shares_cores {
        // Each tile takes the cores for as long as both take on their own.
        let rate = 1.0 / (1.0 / inference + 1.0 / reading);
        let share = rate / inference;
        let (what, share) = if share >= 0.5 { ("inference", share) } else { ("reading", 1.0 - share) };
        return (rate, format!("{what} takes {:.0} % of the cores' time, which both share", 100.0 * share));
    }
    if reading >= inference {
        return (inference, format!("inference; reading could feed {:.1} times as much", reading / inference));
    }
    let more = 2;
    let gain = |readers_then: usize| (reading * readers_then as f64 / readers as f64).min(inference) / reading - 1.0;
    let relief = if readers + more <= cores {
        format!("{more} more readers would give up to +{:.0} %", 100.0 * gain(readers + more))
    } else {
        format!("all {cores} cores read; twice as many would give up to +{:.0} %", 100.0 * gain(2 * readers))
    };
    (reading, format!("reading (decode-bound): {relief}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inference::BareModel;
    use crate::onnx::vit::VitConfig;
    use std::path::Path;

    fn card(tile_size: u32) -> ModelCard {
        let card = ModelCard::load(Path::new("models/cells-vit"), &BareModel::default()).unwrap();
        ModelCard { tile_size, ..card }
    }

    fn size(width: u64, height: u64, overlap: &str) -> SlideSize {
        let overlap = overlap.parse().unwrap();
        SlideSize { name: "a slide".to_owned(), width, height, mpp: None, overlap, tissue_fraction: 0.4 }
    }

    const MACHINE: Machine = Machine {
        inference: 100.0,
        shares_cores: false,
        readers: 4,
        cores: 16,
        watts: Some(500.0),
        watts_are_of_gpus: true,
    };

    #[test]
    fn tiles_are_counted_by_both_rules() {
        // Stride 168: ⌊99,776 / 168⌋ + 1 = 594, ⌊79,776 / 168⌋ + 1 = 475; the grid covers the remainder too.
        let counts = size(100_000, 80_000, "25%").tiles(&card(224)).unwrap();
        assert_eq!((counts.full, counts.grid), (594 * 475, 595 * 476));
        assert_eq!(counts.tissue, 113_288);
        // No remainder: both are the same.
        let even = size(2240, 448, "0px").tiles(&card(224)).unwrap();
        assert_eq!((even.full, even.grid), (20, 20));
        // At twice the resolution the slide has half as many pixels of the model's to a side.
        let mpp = Mpp::new(card(224).mpp.get() / 2.0).ok();
        let finer = SlideSize { mpp, ..size(4480, 896, "0px") }.tiles(&card(224)).unwrap();
        assert_eq!(finer.full, 20);
    }

    #[test]
    fn full_tiles_are_counted_with_the_stride_as_it_is() {
        let vit: VitConfig = "vit_base".parse().unwrap();
        let card = card(u32::try_from(vit.image).unwrap());
        // Tiles of 224 px. At 10 % the stride is 201.6: ⌊99,776 / 201.6⌋ + 1 = 495, ⌊79,776 / 201.6⌋ + 1 = 396.
        let counts = [
            ("0%", 446 * 357),
            ("10%", 495 * 396),
            ("15%", 525 * 419),
            ("20%", 557 * 446),
            ("25%", 594 * 475),
            ("35%", 686 * 548),
            // 160 px from one to the next.
            ("64px", 624 * 499),
        ];
        for (overlap, count) in counts {
            assert_eq!(size(100_000, 80_000, overlap).tiles(&card).unwrap().full, count, "{overlap}");
        }
        assert_eq!([495 * 396, 525 * 419, 557 * 446, 686 * 548], [196_020, 219_975, 248_422, 375_928]);
        // The grid's stride is whole: 202 at 10 %, ⌈99,776 / 202⌉ + 1 = 495, ⌈79,776 / 202⌉ + 1 = 396.
        assert_eq!(size(100_000, 80_000, "10%").tiles(&card).unwrap().grid, 495 * 396);
        // Ten strides of 201.6 and not a pixel more.
        assert_eq!(size(224 + 2016, 224, "10%").tiles(&card).unwrap().full, 11);
        assert_eq!(size(224 + 2015, 224, "10%").tiles(&card).unwrap().full, 10);
    }

    #[test]
    fn what_can_not_be_cut_is_told() {
        let error = size(200, 1000, "0px").tiles(&card(224)).err().unwrap().to_string();
        assert!(error.contains("224") && error.contains("200"), "{error}");
        let error = size(1000, 1000, "224px").tiles(&card(224)).err().unwrap().to_string();
        assert!(error.contains("no step"), "{error}");
        let nothing = Machine { inference: 0.0, ..MACHINE };
        let counted = SlideQuestion::Size(size(1000, 1000, "0px")).count(&card(224)).unwrap();
        let error = counted.estimate(&nothing).err().unwrap().to_string();
        assert_eq!(error, "the model inferred no tile, so that no time of a slide follows");
    }

    #[test]
    fn what_an_estimate_of_maps_leaves_out_is_told() {
        let question = SlideQuestion::Tiles { name: "many".to_owned(), tiles: 1000 };
        let bound_by = |task| {
            let card = ModelCard { task, ..card(224) };
            question.count(&card).unwrap().estimate(&MACHINE).unwrap().bound_by
        };
        assert!(bound_by(Task::Segmentation).starts_with("inference; "));
        assert!(bound_by(Task::Segmentation).ends_with(LEFT_OUT));
        assert!(!bound_by(Task::Classification).contains("stitching"));
    }

    #[test]
    fn time_and_energy_follow_from_the_rate() {
        let question = SlideQuestion::Tiles { name: "prostatectomy".to_owned(), tiles: 190_000 };
        let record = question.count(&card(224)).unwrap().estimate(&MACHINE).unwrap();
        assert_eq!((record.seconds, record.slides_per_day), (1900.0, 24.0 * 3600.0 / 1900.0));
        // 500 W for 1,900 s are 0.264 kWh.
        assert!((record.kwh_per_1000_slides.unwrap() - 263.9).abs() < 0.1);
        assert_eq!((record.watts, record.watts_are_of_gpus), (Some(500.0), true));
    }

    #[test]
    fn neighbours_are_read_together_all_over_the_slide() {
        assert_eq!(stretches(100).collect::<Vec<_>>(), (0..100).collect::<Vec<_>>());
        let chosen: Vec<usize> = stretches(64 * 32).collect();
        // Every fourth of 32 stretches.
        assert_eq!((chosen.len(), chosen[63], chosen[64], chosen[511]), (512, 63, 256, 28 * 64 + 63));
        assert_eq!(stretches(0).count(), 0);
    }

    #[test]
    fn the_slower_stage_bounds_a_gpu_and_both_share_a_cpu() {
        let (rate, why) = together(&MACHINE, Some(50.0));
        assert_eq!(rate, 50.0);
        assert!(why.contains("2 more readers would give up to +50 %"), "{why}");
        let (rate, why) = together(&MACHINE, Some(300.0));
        assert_eq!(rate, 100.0);
        assert!(why.contains("3.0 times"), "{why}");
        let (rate, why) = together(&Machine { shares_cores: true, ..MACHINE }, Some(300.0));
        assert_eq!(rate, 75.0);
        assert!(why.contains("inference takes 75 %"), "{why}");
        let (_, why) = together(&Machine { readers: 16, ..MACHINE }, Some(50.0));
        assert!(why.contains("all 16 cores read; twice as many would give up to +100 %"), "{why}");
    }
}
