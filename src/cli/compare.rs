//! `slidestream compare`: variants side by side, from the original to everything together.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use slidestream::engine::cohort;
use slidestream::experiment::compare::{self, Alone, CompareRequest, Gates, MostFlips};
use slidestream::inference::{DeviceRequest, ModelCard, ProviderRequest};
use slidestream::native;
use slidestream::output::{try_folder, write_atomic};
use slidestream::report::compare::{
    COMPARE_SCHEMA, CompareRecord, Findings, GateRecord, LadderRow, RateRecord, conclusions, to_csv,
};
use slidestream::report::{compare_html, to_json};

use super::options::BareModelOptions;
use super::{Failure, Outcome, own_process, prepare, say, show, table};

/// Writes compare.json, compare.csv and compare.html; exit code 4 if a gate fails
#[derive(clap::Args, Debug)]
pub(super) struct Args {
    /// A model folder or card with its variants, or .onnx files of which the first is the original
    #[arg(long, short, required = true, num_args = 1.., value_name = "DIR|CARD|MODEL.onnx")]
    model: Vec<PathBuf>,
    /// Variants to compare with the original [default: all that suit the device]
    #[arg(long, value_name = "A,B,…", value_delimiter = ',')]
    variants: Vec<String>,
    /// Slide to take tiles from and to run over; without it only the model alone is timed
    #[arg(long, value_name = "SLIDE")]
    slide: Option<PathBuf>,
    /// Labelled images: a folder per class, or a CSV with the columns path,label or path,mask and perhaps group
    #[arg(long, value_name = "DIR|CSV")]
    data: Option<PathBuf>,
    /// auto, cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    device: DeviceRequest,
    /// auto, cpu, openvino, cuda or tensorrt
    #[arg(long, value_name = "NAME", default_value = "auto")]
    provider: ProviderRequest,
    /// Tiles per batch of every step but the original [default: by the device]
    #[arg(long, value_name = "N")]
    batch_size: Option<std::num::NonZeroUsize>,
    /// Tiles on which outputs are compared
    #[arg(long, value_name = "N", default_value = "128", value_parser = clap::value_parser!(u32).range(1..=65_536))]
    tiles: u32,
    /// How long the model alone, and the steps end to end, are each measured at most
    #[arg(long, value_name = "S", default_value = "90")]
    seconds: f64,
    /// Where the files go [default: MODEL-compare beside the model]
    #[arg(long, short, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Gate: least mean cosine between a variant's raw outputs and the original's
    #[arg(long, value_name = "F", help_heading = "Gates")]
    min_cosine: Option<f64>,
    /// Gate: most tiles (3) or share of tiles (0.01) that change sides at p = 0.5
    #[arg(long, value_name = "N|F", help_heading = "Gates")]
    max_flips: Option<MostFlips>,
    /// Gate: most balanced accuracy, or mean Dice, that may be lost, at the far end of its 95 % interval; needs --data
    #[arg(long, value_name = "F", help_heading = "Gates", requires = "data")]
    max_metric_loss: Option<f64>,
    /// Say nothing but errors and results
    #[arg(long)]
    quiet: bool,
    /// Do one step and print what it took; the program calls itself so
    #[arg(long, hide = true)]
    alone: Option<Alone>,
    #[command(flatten)]
    bare: BareModelOptions,
}

pub(super) fn execute(args: &Args) -> Result<Outcome, Failure> {
    let started = cohort::now();
    let request = request(args)?;
    native::onnx_runtime()?;
    if request.slide.is_some() {
        native::openslide()?;
    }
    if let Some(step) = &args.alone {
        show(&String::from_utf8_lossy(&to_json(&compare::alone(&request, step)?)));
        return Ok(Outcome::Done);
    }
    let mut talk = |line: &str| {
        if !args.quiet {
            say(line);
        }
    };
    let out = args.out.clone().unwrap_or_else(|| prepare::beside(&args.model[0], "compare"));
    try_folder(&out)?;
    let found = compare::compare(&request, &mut |step| own_process::again("--alone", step.to_string()), &mut talk)?;
    let record = record(found, started);
    let written = write(&record, &out);
    show(&summary(&record, written.as_ref().map_or(&[], Vec::as_slice)));
    // Only now: what was found is not lost with a disk that is full.
    written?;
    Ok(if record.found.gates.iter().all(|gate| gate.passed) { Outcome::Done } else { Outcome::GateFailed })
}

/// Writes the files, which are returned.
fn write(record: &CompareRecord, out: &Path) -> Result<Vec<PathBuf>, Failure> {
    let [page, csv, json] = ["compare.html", "compare.csv", "compare.json"].map(|name| out.join(name));
    let table = to_csv(record).map_err(|error| Failure { message: error.to_string(), hint: None, code: 1 })?;
    write_atomic(&csv, &table)?;
    write_atomic(&page, compare_html(record).as_bytes())?;
    write_atomic(&json, &to_json(record))?;
    Ok(vec![page, csv, json])
}

fn request(args: &Args) -> Result<CompareRequest, Failure> {
    for (flag, value) in [("min-cosine", args.min_cosine), ("max-metric-loss", args.max_metric_loss)] {
        if let Some(value) = value.filter(|value| !(0.0..=1.0).contains(value)) {
            return Err(Failure::usage(format!("--{flag} {value}: must be between 0 and 1")));
        }
    }
    let seconds = Duration::try_from_secs_f64(args.seconds).ok().filter(|seconds| !seconds.is_zero());
    let seconds = seconds.ok_or_else(|| Failure::usage(format!("--seconds {}: must be above 0", args.seconds)))?;
    let bare = args.bare.model()?;
    Ok(CompareRequest {
        models: args.model.iter().map(|path| ModelCard::load(path, &bare)).collect::<Result<_, _>>()?,
        variants: args.variants.clone(),
        slide: args.slide.clone(),
        labels: args.data.clone(),
        devices: args.device.clone(),
        provider: args.provider,
        batch_size: args.batch_size,
        tiles: args.tiles as usize,
        seconds,
        gates: Gates { min_cosine: args.min_cosine, max_flips: args.max_flips, max_metric_loss: args.max_metric_loss },
    })
}

fn record(found: Findings, started: String) -> CompareRecord {
    let mut record = CompareRecord {
        schema: COMPARE_SCHEMA.to_owned(),
        account: prepare::account(started),
        found,
        conclusions: Vec::new(),
    };
    record.conclusions = conclusions(&record);
    record
}

fn summary(record: &CompareRecord, written: &[PathBuf]) -> String {
    let heads = ["", "step", "variant", "batch", "model alone", "", "end to end", "", "memory"];
    let rows: Vec<Vec<String>> =
        record.found.ladder.iter().enumerate().map(|(index, row)| cells(index, row).to_vec()).collect();
    let mut text = table(&heads, &rows);
    text.push('\n');
    for sentence in &record.conclusions {
        writeln!(text, "{sentence}").ok();
    }
    for gate in &record.found.gates {
        let GateRecord { variant, name, reason, passed, .. } = gate;
        writeln!(text, "gate {}: {variant}: {name}: {reason}", if *passed { "passed" } else { "failed" }).ok();
    }
    for file in written {
        writeln!(text, "{}", file.display()).ok();
    }
    text
}

fn cells(index: usize, row: &LadderRow) -> [String; 9] {
    let time = |rate: Option<&RateRecord>| {
        rate.map_or_else(|| "–".to_owned(), |rate| format!("{:.2} ms", rate.ms_per_tile.median))
    };
    let gain = |rate: Option<&RateRecord>| {
        let gain = rate.and_then(|rate| rate.speedup);
        gain.map_or_else(String::new, |gain| format!("{:.2}× [{:.2}, {:.2}]", gain.value, gain.low, gain.high))
    };
    let memory = row.peak_host_bytes.map_or_else(|| "–".to_owned(), |bytes| format!("{:.0} MB", bytes as f64 / 1e6));
    let (alone, whole) = (row.model_only.as_ref(), row.end_to_end.as_ref());
    let number = (index + 1).to_string();
    let (name, variant, batch) = (row.name.clone(), row.variant.clone(), row.batch.to_string());
    [number, name, variant, batch, time(alone), gain(alone), time(whole), gain(whole), memory]
}
