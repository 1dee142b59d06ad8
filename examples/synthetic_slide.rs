//! Writes a synthetic slide of any size, to try the program on without a patient's tissue.
//!
//! `cargo run --release --example synthetic_slide -- 20000 16000 synthetic.svs`

#![expect(clippy::print_stdout, reason = "an example shows its result")]

use std::error::Error;
use std::path::PathBuf;

use slidestream::slide::synthetic::{SvsOptions, SyntheticSlide};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [width, height, path] = &arguments[..] else {
        return Err("give WIDTH HEIGHT FILE.svs".into());
    };
    let slide = SyntheticSlide::new(width.parse()?, height.parse()?, 1);
    let path = PathBuf::from(path);
    slide.write(&path, &SvsOptions::default())?;
    println!("{} × {} px at {} µm/px in {}", slide.width, slide.height, slide.mpp, path.display());
    Ok(())
}
