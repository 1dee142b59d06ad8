//! `slidestream optimize`: faster variants of a model, each proven against the original.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use slidestream::engine::cohort;
use slidestream::experiment::optimize::{self, OptimizeRequest, Precision, Target};
use slidestream::experiment::tiles::TileSet;
use slidestream::inference::{ModelCard, device};
use slidestream::native;
use slidestream::output;
use slidestream::report::{self, OPTIMIZE_SCHEMA, OptimizeRecord, SpeedRecord, VariantRecord};

use super::options::BareModelOptions;
use super::{Failure, Outcome, columns, prepare, say, show};

/// Writes a model folder: the original, its variants, a card that lists them, and optimize.json
#[derive(clap::Args, Debug)]
pub(super) struct Args {
    /// A model folder, a card, or an .onnx file
    #[arg(value_name = "DIR|CARD|MODEL.onnx")]
    model: PathBuf,
    /// What the variants are for: cpu, openvino or cuda
    #[arg(long = "for", value_name = "DEVICE", default_value = "cpu")]
    target: Target,
    /// Precisions: fp32,fp16,int8 [default: fp32,int8 for the CPU if there is something to calibrate on; fp32,fp16 for CUDA]
    #[arg(long = "to", value_name = "LIST", value_delimiter = ',')]
    precisions: Vec<Precision>,
    /// Slides, or folders of slides or images, that tell INT8 which values occur
    #[arg(long, value_name = "SLIDE|DIR", num_args = 1..)]
    calibrate: Vec<PathBuf>,
    /// Tiles to calibrate on; as many others are compared
    #[arg(long, value_name = "N", default_value = "64", value_parser = clap::value_parser!(u32).range(1..=4096))]
    tiles: u32,
    /// Draws the tiles
    #[arg(long, value_name = "N", default_value = "1")]
    seed: u64,
    /// A LoRA adapter as PEFT saves it, to be merged into the weights
    #[arg(long, value_name = "DIR")]
    lora: Option<PathBuf>,
    /// Let variants take bytes, channels last, and normalise by themselves
    #[arg(long)]
    bytes: bool,
    /// Let FP16 variants take and give 16-bit floats
    #[arg(long)]
    half_io: bool,
    /// Least mean cosine between the raw outputs of INT8 and the original
    #[arg(long, value_name = "F", default_value = "0.999")]
    min_cosine: f64,
    /// Most seconds to measure the speed at each precision
    #[arg(long, value_name = "N", default_value = "30")]
    seconds: u64,
    /// Where the folder goes [default: MODEL-optimized beside the model]
    #[arg(long, short, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Tell for every node what each pass did, or why not
    #[arg(long)]
    explain: bool,
    /// Say nothing but errors and results
    #[arg(long)]
    quiet: bool,
    #[command(flatten)]
    bare: BareModelOptions,
}

pub(super) fn execute(args: &Args) -> Result<Outcome, Failure> {
    let started = cohort::now();
    if !(0.0..=1.0).contains(&args.min_cosine) {
        return Err(Failure::usage(format!("--min-cosine {}: must be between 0 and 1", args.min_cosine)));
    }
    native::onnx_runtime()?;
    let card = ModelCard::load(&args.model, &args.bare.model()?)?;
    let request = request(args, &card)?;
    let mut talk = |line: &str| {
        if !args.quiet {
            say(line);
        }
    };
    let made = optimize::optimize(&card, &request, &mut talk)?;
    let source = card.default_variant()?;
    let record = OptimizeRecord {
        schema: OPTIMIZE_SCHEMA.to_owned(),
        started,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        command: prepare::command(),
        libraries: prepare::libraries(),
        hardware: prepare::hardware(),
        source: args.model.display().to_string(),
        sha256: source.sha256.clone(),
        made_for: args.target.to_string(),
        tiles: request.tiles.source.clone(),
        calibration: request.calibration.as_ref().map(|tiles| tiles.source.clone()),
        variants: made.variants,
    };
    let written = output::write_atomic(&request.out.join("optimize.json"), &report::to_json(&record));
    if args.explain {
        show(&explanation(&record.variants));
    }
    show(&summary(&record.variants, &request.out));
    // Only now: what was found is not lost with a disk that is full.
    written?;
    Ok(Outcome::Done)
}

fn request(args: &Args, card: &ModelCard) -> Result<OptimizeRequest, Failure> {
    let mut precisions = match (&args.precisions[..], args.target, args.calibrate.is_empty()) {
        ([], Target::Cpu | Target::OpenVino, true) => vec![Precision::Fp32],
        ([], Target::Cpu | Target::OpenVino, false) => vec![Precision::Fp32, Precision::Int8],
        ([], Target::Cuda, _) => vec![Precision::Fp32, Precision::Fp16],
        (asked, ..) => asked.to_vec(),
    };
    precisions.sort_unstable();
    precisions.dedup();
    let out = args.out.clone().unwrap_or_else(|| prepare::beside(&args.model, "optimized"));
    output::try_folder(&out)?;
    let count = args.tiles as usize;
    let (tiles, calibration) = if args.calibrate.is_empty() {
        (TileSet::synthetic(card.tile_size, count, args.seed), None)
    } else {
        native::openslide()?;
        let read = |seed| TileSet::read(&args.calibrate, card, count, seed);
        // Compared on other tiles than those that were calibrated on.
        (read(args.seed.wrapping_add(1))?, Some(read(args.seed)?))
    };
    Ok(OptimizeRequest {
        target: args.target,
        precisions,
        tiles,
        calibration,
        lora: args.lora.clone(),
        takes_bytes: args.bytes,
        keeps_io: !args.half_io,
        min_cosine: args.min_cosine,
        reduce_range: !device::list().cpu.features.iter().any(|feature| feature.contains("vnni")),
        most_time: Duration::from_secs(args.seconds),
        out,
    })
}

fn explanation(variants: &[VariantRecord]) -> String {
    let mut text = String::new();
    for variant in variants {
        writeln!(text, "{}: {}", variant.name, variant.note).ok();
        for pass in &variant.passes {
            writeln!(text, "  {}: applied to {} of {} nodes", pass.pass, pass.applied, pass.nodes.len()).ok();
            for node in &pass.nodes {
                let kept = if node.is_applied { "" } else { "kept, " };
                writeln!(text, "    {} {}: {kept}{}", node.op, node.node, node.what).ok();
            }
        }
    }
    text
}

fn verdict(variant: &VariantRecord) -> &'static str {
    match (variant.is_recommended, &variant.file, &variant.speed) {
        (true, ..) => "recommended",
        (false, Some(_), None) => "made, its speed not measured here",
        _ => "not recommended",
    }
}

fn summary(variants: &[VariantRecord], out: &Path) -> String {
    let mut text = String::new();
    for variant in variants {
        let agreement = &variant.agreement;
        let mut close = format!("cosine {:.5} mean, {:.5} least", agreement.mean_cosine, agreement.min_cosine);
        if let Some(difference) = agreement.max_abs_difference {
            write!(close, "; max |Δ| {difference:.1e}").ok();
        }
        if let Some(top1) = agreement.top1_agreement {
            write!(close, "; same class {:.2} %", 100.0 * top1).ok();
        }
        let speed = variant.speed.as_ref().map_or_else(
            || "not measured".to_owned(),
            |speed| {
                let SpeedRecord { ratio, low, high, ms_per_tile, .. } = speed;
                format!("{ratio:.2} times the original [{low:.2}, {high:.2}], {ms_per_tile:.2} ms per tile")
            },
        );
        let file = match &variant.file {
            Some(file) => format!("{file}, {:.1} MB", variant.bytes as f64 / 1e6),
            None => "not written".to_owned(),
        };
        writeln!(text, "{}", variant.name).ok();
        text.push_str(&columns([
            ("  file", file),
            ("  agreement", format!("{close} ({} tiles)", agreement.tiles)),
            ("  speed", speed),
            ("  verdict", verdict(variant).to_owned()),
            ("  note", variant.note.clone()),
        ]));
    }
    writeln!(text, "model folder {}", out.display()).ok();
    text
}
