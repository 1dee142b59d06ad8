//! A tile at a time, as a microscope's camera gives them: the model is loaded and warm, each call is one tile.
//!
//! `cargo run --release --example predict_tile` after `native/setup.sh`.

#![expect(clippy::print_stdout, reason = "an example shows its result")]

use std::error::Error;
use std::path::Path;
use std::time::Instant;

use slidestream::inference::{BareModel, ModelCard, Predictor, PredictorOptions};
use slidestream::slide::synthetic::{SyntheticSlide, Tissue};

fn main() -> Result<(), Box<dyn Error>> {
    let card = ModelCard::load(Path::new("models/cells-vit"), &BareModel::default())?;
    let names: Vec<String> = card.classes.iter().map(|class| class.name.clone()).collect();
    let side = card.tile_size;
    let mut predictor = Predictor::open(card, &PredictorOptions::default())?;

    let tissue = SyntheticSlide { tissue: Tissue::Everywhere, ..SyntheticSlide::new(4 * side, side, 1) };
    for column in 0..4 {
        // RGB, row by row, `side` × `side` × 3 bytes.
        let tile = tissue.pixels(column * side, 0, side, side);
        let start = Instant::now();
        let probabilities = predictor.predict_tile(&tile)?;
        let milliseconds = start.elapsed().as_secs_f64() * 1e3;
        let told: Vec<String> = names.iter().zip(&probabilities).map(|(name, p)| format!("{name} {p:.3}")).collect();
        println!("{} in {milliseconds:.1} ms", told.join(", "));
    }
    Ok(())
}
