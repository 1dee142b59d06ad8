//! Each stage of a run alone, on all cores: the core-seconds that a tile costs while no other stage runs.
//!
//! `cargo bench --bench stages -- SLIDE MODEL [TILES]` prints JSON: the samples of `read`, `infer`, `stitch` and
//! `write` in core-seconds per tile. One thread per core does the same stage at the same time, because cores share
//! caches, memory and often execution units. The rate that `run` can reach at best is cores / Σ;
//! `benches/end_to_end.py` puts the two side by side.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a benchmark fails by panicking and prints its result")]

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Barrier;
use std::time::Instant;

use ndarray::Axis;
use serde_json::json;
use slidestream::engine::config::{TilingConfig, TissueSource};
use slidestream::engine::plan::{self, SlidePlan};
use slidestream::inference::{
    BareModel, Device, ModelCard, Prediction, Provider, Session, SessionFactory, SessionOptions, Task,
};
use slidestream::output::{PyramidSpec, PyramidWriter, Reduce};
use slidestream::slide::{ReadOptions, Slide, TileReader};
use slidestream::stitch::{StitchSpec, Stitcher, Strip};

/// Tiles measured at a time; their results fit into memory.
const CHUNK: usize = 16;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let [slide, model, rest @ ..] = &arguments[..] else {
        // Without a slide (`cargo test --benches`) there is nothing to measure.
        println!("usage: cargo bench --bench stages -- SLIDE MODEL [TILES]");
        return;
    };
    let tiles: usize = rest.first().map_or(192, |count| count.parse().unwrap());
    let card = ModelCard::load(Path::new(model), &BareModel::default()).unwrap();
    let plan = plan_of(Path::new(slide), &card, tiles);
    let samples = measure_on_all_cores(&plan, &card);
    println!(
        "{}",
        json!({ "slide": slide, "model": card.name, "tiles": plan.positions.len(), "secs_per_tile": samples })
    );
}

fn plan_of(slide: &Path, card: &ModelCard, tiles: usize) -> SlidePlan {
    let tiling = TilingConfig {
        tile_size: card.tile_size,
        overlap: card.overlap,
        target_mpp: card.mpp,
        mpp_tolerance: 0.05,
        slide_mpp: None,
        region: None,
        max_tiles: None,
        tissue: TissueSource::Otsu,
        min_tissue: 0.1,
        coords: None,
    };
    let mut plan = plan::plan(Slide::open(slide).unwrap(), &tiling).unwrap();
    // Runs of neighbours, spread over the slide: a run reads neighbours one after the other, and so must this.
    let runs = plan.positions.chunks(CHUNK).collect::<Vec<_>>();
    let step = (runs.len() * CHUNK).div_ceil(tiles).max(1);
    plan.positions = runs.into_iter().step_by(step).flatten().copied().collect();
    plan
}

/// Runs [`measure`] once per core, in step, each on tiles of its own.
fn measure_on_all_cores(plan: &SlidePlan, card: &ModelCard) -> serde_json::Value {
    let cores = std::thread::available_parallelism().unwrap().get();
    let barrier = Barrier::new(cores);
    // The same number of chunks for each, or the last ones would wait for ever.
    let share = plan.positions.len() / CHUNK / cores * CHUNK;
    let samples: Vec<[Vec<f64>; 4]> = std::thread::scope(|scope| {
        let worker = |core: usize| {
            let mut plan = plan.clone();
            plan.positions = plan.positions[core * share..(core + 1) * share].to_vec();
            let barrier = &barrier;
            scope.spawn(move || measure(&plan, card, barrier))
        };
        let workers: Vec<_> = (0..cores).map(worker).collect();
        workers.into_iter().map(|worker| worker.join().unwrap()).collect()
    });
    let all = |stage: usize| samples.iter().flat_map(|of_core| of_core[stage].clone()).collect::<Vec<f64>>();
    json!({ "read": all(0), "infer": all(1), "stitch": all(2), "write": all(3) })
}

/// Samples of read, infer, stitch and write; the barrier keeps all cores in the same stage.
fn measure(plan: &SlidePlan, card: &ModelCard, barrier: &Barrier) -> [Vec<f64>; 4] {
    let options = ReadOptions { tile_size: card.tile_size, icc: false };
    let mut reader = TileReader::new(&plan.slide, &plan.choice, options).unwrap();
    let one = NonZeroUsize::new(1);
    let session = SessionOptions { device: Device::Cpu, provider: Provider::Cpu, intra_threads: one };
    let variant = card.default_variant().unwrap();
    let mut session = SessionFactory::new(card, variant, session).unwrap().open().unwrap();
    let cell = if card.task == Task::Segmentation { 1 } else { card.tile_size - card.overlap };
    let spec =
        StitchSpec { plane: plan.plane, cell, class_count: card.classes.len(), overlap: card.overlap, threshold: None };
    let mut stitcher = Stitcher::new(spec).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let mut maps = maps(folder.path(), &stitcher, card, plan);

    let mut pixels = vec![Vec::new(); CHUNK];
    let (mut read, mut infer, mut stitch, mut write) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for (index, positions) in plan.positions.chunks(CHUNK).enumerate() {
        let count = positions.len() as f64;
        barrier.wait();
        let start = Instant::now();
        for (position, pixels) in positions.iter().zip(&mut pixels) {
            reader.read(*position, pixels).unwrap();
        }
        let read_secs = start.elapsed().as_secs_f64() / count;

        barrier.wait();
        let start = Instant::now();
        let predictions: Vec<Prediction> =
            pixels[..positions.len()].iter().map(|tile| session.predict(&[tile]).unwrap()).collect();
        let infer_secs = start.elapsed().as_secs_f64() / count;

        let mut strips: Vec<Strip> = Vec::new();
        barrier.wait();
        let start = Instant::now();
        for (position, prediction) in positions.iter().zip(&predictions) {
            match prediction {
                Prediction::Map(map) => {
                    stitcher.place_map(*position, map.index_axis(Axis(0), 0), |strip| strips.push(strip));
                }
                Prediction::Classes(values) | Prediction::Features(values) => {
                    let values = values.row(0).to_vec();
                    stitcher.place_classes(*position, &values, |strip| strips.push(strip));
                }
            }
        }
        let stitch_secs = start.elapsed().as_secs_f64() / count;

        barrier.wait();
        let start = Instant::now();
        for strip in &strips {
            for (class, map) in maps.iter_mut().enumerate() {
                map.push_rows(if class < card.classes.len() { strip.probabilities_of(class) } else { &strip.classes })
                    .unwrap();
            }
        }
        let write_secs = start.elapsed().as_secs_f64() / count;
        strips.into_iter().for_each(|strip| stitcher.recycle(strip));
        // The first chunk warms caches up.
        if index > 0 {
            read.push(read_secs);
            infer.push(infer_secs);
            stitch.push(stitch_secs);
            write.push(write_secs);
        }
    }
    [read, infer, stitch, write]
}

/// One map per class and the class map, as a run writes them.
fn maps(folder: &Path, stitcher: &Stitcher, card: &ModelCard, plan: &SlidePlan) -> Vec<PyramidWriter> {
    let path = |index: usize| -> PathBuf { folder.join(format!("{index}.tif")) };
    let map = |index: usize| {
        let spec = PyramidSpec {
            width: u32::try_from(stitcher.width()).unwrap(),
            height: u32::try_from(stitcher.height()).unwrap(),
            tile_size: 512,
            pixel_size: plan.plane.pixel_size,
            origin_um: (0.0, 0.0),
            description: String::new(),
            reduce: if index < card.classes.len() { Reduce::Mean } else { Reduce::Mode },
            deflate_level: 2,
        };
        PyramidWriter::create(&path(index), &spec).unwrap()
    };
    (0..=card.classes.len()).map(map).collect()
}
