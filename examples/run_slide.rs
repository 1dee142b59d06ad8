//! The library in a few lines: the committed cell classifier over a synthetic slide.
//!
//! `cargo run --release --example run_slide` after `native/setup.sh`.

#![expect(clippy::print_stdout, reason = "an example shows its result")]

use std::error::Error;
use std::path::Path;

use slidestream::engine::cohort::{self, CohortOptions, Event, OutputFolder};
use slidestream::engine::config::{Emit, OnFailure, RunConfig, TilingConfig};
use slidestream::engine::{Engine, LoadRequest, inputs};
use slidestream::inference::{BareModel, DeviceRequest, ModelCard, ProviderRequest};
use slidestream::pipeline::Cancel;
use slidestream::slide::synthetic::{SvsOptions, SyntheticSlide};

fn main() -> Result<(), Box<dyn Error>> {
    let folder = std::env::temp_dir().join("slidestream-example");
    std::fs::create_dir_all(&folder)?;
    let path = folder.join("synthetic.svs");
    SyntheticSlide::new(3000, 2000, 1).write(&path, &SvsOptions::default())?;

    let card = ModelCard::load(Path::new("models/cells-vit"), &BareModel::default())?;
    let config = RunConfig {
        tiling: TilingConfig::of(&card),
        threshold: 0.5,
        emit: vec![Emit::Csv, Emit::Png],
        on_tile_error: OnFailure::Fail,
        on_nonfinite: OnFailure::Fail,
        icc: false,
    };
    let request = LoadRequest {
        variant: None,
        devices: DeviceRequest::Auto,
        provider: ProviderRequest::Auto,
        batch_size: None,
        readers: None,
        sessions: None,
        graph_cache: None,
    };
    let mut engine = Engine::load(card, &request, config)?;
    let out = OutputFolder::lock(&folder.join("out"))?;
    let slides = inputs::slides(&[path])?;
    let summary =
        cohort::run(&mut engine, &slides, &out, CohortOptions::default(), &Cancel::default(), &mut |event| {
            if let Event::SlidePlanned { id, plan, .. } = event {
                println!("{id}: {} of {} tiles have tissue", plan.positions.len(), plan.grid_tiles);
            }
        })?;
    for (status, record) in &summary.slides {
        println!("{}: {}, {:?}", record.id, status.as_str(), record.class_shares);
    }
    println!("results in {}", out.path().display());
    Ok(())
}
