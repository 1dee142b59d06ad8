//! Each stage of a run alone: the core-seconds that a tile costs while no other stage runs.
//!
//! `cargo bench --bench stages -- SLIDE MODEL X,Y,W,H` prints JSON: the core-seconds per tile of `read`, `infer`, `stitch`
//! and `write` over all tissue tiles of the region. Reading and inference run on all cores at once, because cores share
//! caches, memory and often execution units; stitching and writing on one thread. The rate that `run` can reach at best
//! is cores / Σ; `benches/end_to_end.py` puts the two side by side. Results of all tiles are held: keep the region small.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a benchmark fails by panicking and prints its result")]

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Barrier;
use std::time::{Duration, Instant};

use ndarray::Axis;
use serde_json::json;
use slidestream::engine::config::TilingConfig;
use slidestream::engine::plan::{self, SlidePlan};
use slidestream::geometry::{Level0Rect, TilePosition};
use slidestream::inference::{
    BareModel, Device, ModelCard, Prediction, Provider, Session, SessionFactory, SessionOptions, Task,
};
use slidestream::output::{PyramidSpec, PyramidWriter, Reduce};
use slidestream::slide::{ReadOptions, Slide, TileReader};
use slidestream::stitch::{OverviewBuilder, StitchSpec, Stitcher, Strip};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let [slide, model, region] = &arguments[..] else {
        // Without a slide (`cargo test --benches`) there is nothing to measure.
        println!("usage: cargo bench --bench stages -- SLIDE MODEL X,Y,W,H");
        return;
    };
    let card = ModelCard::load(Path::new(model), &BareModel::default()).unwrap();
    let numbers: Vec<i64> = region.split(',').map(|number| number.parse().unwrap()).collect();
    let region = Level0Rect { x: numbers[0], y: numbers[1], width: numbers[2], height: numbers[3] };
    let plan = plan_of(Path::new(slide), &card, region);
    let (read, infer, predictions) = read_and_infer(&plan, &card);
    let (stitch, write) = stitch_and_write(&plan, &card, &predictions);
    let samples = json!({ "read": read, "infer": infer, "stitch": stitch, "write": write });
    println!("{}", json!({ "model": card.name, "tiles": plan.positions.len(), "secs_per_tile": samples }));
}

fn plan_of(slide: &Path, card: &ModelCard, region: Level0Rect) -> SlidePlan {
    let tiling = TilingConfig { region: Some(region), ..TilingConfig::of(card) };
    plan::plan(Slide::open(slide, None).unwrap(), &tiling).unwrap()
}

/// Core-seconds per tile of both stages, on all cores in step, and the predictions in the plan's order.
fn read_and_infer(plan: &SlidePlan, card: &ModelCard) -> (f64, f64, Vec<Prediction>) {
    let cores = std::thread::available_parallelism().unwrap().get();
    let barrier = Barrier::new(cores);
    let share = plan.positions.len().div_ceil(cores);
    let parts: Vec<(f64, f64, Vec<Prediction>)> = std::thread::scope(|scope| {
        let workers: Vec<_> = plan
            .positions
            .chunks(share)
            .map(|positions| scope.spawn(|| read_and_infer_part(plan, card, positions, &barrier)))
            .collect();
        workers.into_iter().map(|worker| worker.join().unwrap()).collect()
    });
    let tiles = plan.positions.len() as f64;
    let read = parts.iter().map(|part| part.0).sum::<f64>() / tiles;
    let infer = parts.iter().map(|part| part.1).sum::<f64>() / tiles;
    (read, infer, parts.into_iter().flat_map(|part| part.2).collect())
}

fn read_and_infer_part(
    plan: &SlidePlan,
    card: &ModelCard,
    positions: &[TilePosition],
    barrier: &Barrier,
) -> (f64, f64, Vec<Prediction>) {
    let options = ReadOptions { tile_size: card.tile_size, icc: false };
    let mut reader = TileReader::new(&plan.slide, &plan.choice, options, positions).unwrap();
    let one = NonZeroUsize::new(1);
    let session = SessionOptions { device: Device::Cpu, provider: Provider::Cpu, intra_threads: one };
    let variant = card.default_variant().unwrap();
    let mut session = SessionFactory::new(card, variant, session).unwrap().open().unwrap();
    let mut warm = Vec::new();
    reader.read(positions[0], &mut warm).unwrap();
    session.predict(&[&warm]).unwrap();

    barrier.wait();
    let start = Instant::now();
    let mut tiles = vec![Vec::new(); positions.len()];
    for (position, pixels) in positions.iter().zip(&mut tiles) {
        reader.read(*position, pixels).unwrap();
    }
    let read = start.elapsed().as_secs_f64();
    barrier.wait();
    let start = Instant::now();
    let predictions = tiles.iter().map(|tile| session.predict(&[tile]).unwrap()).collect();
    (read, start.elapsed().as_secs_f64(), predictions)
}

/// Core-seconds per tile of both stages, on one thread.
fn stitch_and_write(plan: &SlidePlan, card: &ModelCard, predictions: &[Prediction]) -> (f64, f64) {
    let cell = if card.task == Task::Segmentation { 1 } else { card.tile_size - card.overlap };
    let class_count = card.classes.len();
    let spec = StitchSpec { plane: plan.plane, cell, class_count, overlap: card.overlap, threshold: None };
    let mut stitcher = Stitcher::new(spec).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let mut maps = maps(folder.path(), &stitcher, card, plan);
    let mut overview = OverviewBuilder::new(&spec, 4096).unwrap();
    let (mut total, mut write) = (Duration::ZERO, Duration::ZERO);
    let mut used: Vec<Strip> = Vec::new();
    let mut emit = |strip: Strip, used: &mut Vec<Strip>| {
        let start = Instant::now();
        for (class, map) in maps.iter_mut().enumerate() {
            let rows = if class < class_count { strip.probabilities_of(class) } else { &strip.classes };
            map.push_rows(rows).unwrap();
        }
        overview.add(&strip);
        write += start.elapsed();
        used.push(strip);
    };
    for (position, prediction) in plan.positions.iter().zip(predictions) {
        let start = Instant::now();
        match prediction {
            Prediction::Map(map) => {
                let map = map.index_axis(Axis(0), 0);
                stitcher.place_maps(&[(*position, map)], |strip| emit(strip, &mut used));
            }
            Prediction::Classes(values) | Prediction::Features(values) => {
                let values = values.row(0).to_vec();
                stitcher.place_classes(*position, &values, |strip| emit(strip, &mut used));
            }
        }
        total += start.elapsed();
        used.drain(..).for_each(|strip| stitcher.recycle(strip));
    }
    let start = Instant::now();
    stitcher.finish(|strip| emit(strip, &mut used));
    total += start.elapsed();
    let tiles = predictions.len() as f64;
    ((total - write).as_secs_f64() / tiles, write.as_secs_f64() / tiles)
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
