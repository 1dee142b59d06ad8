//! A run whose session answers at once, against the bare rate of its reader on the same tiles, in turns.
//!
//! `cargo bench --bench reading_bound -- SLIDE TILE_SIZE ROUNDS` prints JSON, which benches/results/ keeps: tiles per second
//! of both in every round, the run's as a part of the bare rate (of the rounds the median and the middle half), and the
//! stages of every run. The bare rate is that of a reader on each core, which reads into one buffer again and again; a run
//! goes from the first tile to the last output, of which there is the tile table alone.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a benchmark fails by panicking and prints its result")]

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use ndarray::Array2;
use serde_json::json;
use slidestream::engine::cohort::{self, CohortOptions, OutputFolder};
use slidestream::engine::config::{Emit, OnFailure, RunConfig, TilingConfig};
use slidestream::engine::plan::{self, SlidePlan};
use slidestream::engine::{Engine, inputs};
use slidestream::inference::{BareModel, ModelCard, Prediction, Session, SessionError, device};
use slidestream::measure::percentile;
use slidestream::pipeline::Cancel;
use slidestream::report::{ExecutionRecord, ModelRecord, TimingRecord};
use slidestream::slide::{ReadOptions, Slide, TileReader};

/// Says of every tile that all classes are as probable.
struct AtOnce {
    classes: usize,
}

impl Session for AtOnce {
    fn predict(&mut self, tiles: &[&[u8]]) -> Result<Prediction, SessionError> {
        Ok(Prediction::Classes(Array2::from_elem((tiles.len(), self.classes), 1.0 / self.classes as f32)))
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let [slide, tile_size, rounds] = &arguments[..] else {
        // Without a slide (`cargo test --benches`) there is nothing to measure.
        println!("usage: cargo bench --bench reading_bound -- SLIDE TILE_SIZE ROUNDS");
        return;
    };
    let (slide, rounds): (PathBuf, usize) = (slide.into(), rounds.parse().unwrap());
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/cells-vit");
    let mut card = ModelCard::load(&models, &BareModel::default()).unwrap();
    card.tile_size = tile_size.parse().unwrap();
    let tiling = TilingConfig { overlap: 0, ..TilingConfig::of(&card) };
    let plan = plan::plan(Slide::open(&slide, None).unwrap(), &tiling).unwrap();
    let readers = std::thread::available_parallelism().unwrap().get();

    let (mut bare, mut runs) = (Vec::new(), Vec::new());
    // The first round warms caches up. Who comes first changes, so that neither always has what the other one left.
    for round in 0..=rounds {
        let (rate, timing) = if round % 2 == 0 {
            let rate = bare_rate(&plan, readers);
            (rate, run(&slide, &card, &tiling, readers))
        } else {
            let timing = run(&slide, &card, &tiling, readers);
            (bare_rate(&plan, readers), timing)
        };
        if round > 0 {
            bare.push(rate);
            runs.push(timing);
        }
    }
    let rates: Vec<f64> = runs.iter().map(|timing| timing.tiles_per_sec).collect();
    let stages: Vec<_> = runs.iter().map(|timing| &timing.stages).collect();
    let mut ratios: Vec<f64> = rates.iter().zip(&bare).map(|(run, bare)| run / bare).collect();
    ratios.sort_by(f64::total_cmp);
    let [lower, median, upper] = [25.0, 50.0, 75.0].map(|percent| percentile(&ratios, percent));
    let name = slide.file_name().unwrap_or_default().to_string_lossy();
    let result = json!({
        "command": format!("cargo bench --bench reading_bound -- {name} {tile_size} {rounds}"),
        "version": env!("CARGO_PKG_VERSION"),
        "hardware": { "cpu": device::list().cpu.name, "cores": readers },
        "reader": plan.slide.reader.as_str(),
        "tiles": plan.positions.len(),
        "of_reading": median,
        "of_reading_middle_half": [lower, upper],
        "run_tiles_per_sec": rates,
        "reading_tiles_per_sec": bare,
        "stages": stages,
    });
    println!("{}", serde_json::to_string_pretty(&result).unwrap());
}

/// Tiles per second that readers on all cores read while nothing else is done.
fn bare_rate(plan: &SlidePlan, readers: usize) -> f64 {
    let options = ReadOptions { tile_size: plan.plane.tile_size, icc: false };
    let readers = TileReader::several(&plan.slide, &plan.choice, options, &plan.positions, readers).unwrap();
    let (start, next) = (Instant::now(), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for mut reader in readers {
            let next = &next;
            scope.spawn(move || {
                let mut pixels = Vec::new();
                while let Some(tile) = plan.positions.get(next.fetch_add(1, Ordering::Relaxed)) {
                    reader.read(*tile, &mut pixels).unwrap();
                }
            });
        }
    });
    plan.positions.len() as f64 / start.elapsed().as_secs_f64()
}

/// What a run took whose tiles are inferred in no time.
fn run(slide: &Path, card: &ModelCard, tiling: &TilingConfig, readers: usize) -> TimingRecord {
    let config = RunConfig {
        tiling: tiling.clone(),
        threshold: 0.5,
        emit: vec![Emit::Csv],
        on_tile_error: OnFailure::Fail,
        on_nonfinite: OnFailure::Fail,
        icc: false,
    };
    let session = AtOnce { classes: card.classes.len() };
    let model = ModelRecord { name: "at once".to_owned(), ..ModelRecord::default() };
    let execution = ExecutionRecord { batch_size: 1, readers, ..ExecutionRecord::default() };
    let mut engine = Engine::over_sessions(card.clone(), config, vec![Box::new(session)], model, execution).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let out = OutputFolder::lock(folder.path()).unwrap();
    let slides = inputs::slides(&[slide.to_owned()]).unwrap();
    let options = CohortOptions::default();
    let summary = cohort::run(&mut engine, &slides, &out, options, &Cancel::default(), &mut |_| {}).unwrap();
    let (_, record) = summary.slides.into_iter().next().unwrap();
    assert_eq!(record.error, None);
    record.timing.unwrap()
}
