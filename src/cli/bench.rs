//! `slidestream bench`: vision transformers of many sizes, or what LoRA costs by rank.

use std::fmt::Write as _;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::Duration;

use slidestream::engine::{LoadRequest, cohort};
use slidestream::experiment::ExperimentError;
use slidestream::experiment::bench::{lora, vit};
use slidestream::experiment::optimize::Precision;
use slidestream::inference::{DeviceRequest, ModelCard, ProviderRequest, device};
use slidestream::native;
use slidestream::onnx::vit::{Pool, VitConfig};
use slidestream::output::{try_folder, write_atomic};
use slidestream::report::bench::{
    BENCH_SCHEMA, Bench, BenchEntry, BenchRecord, Rate, Rated, changes, insights, regressions, to_csv,
};
use slidestream::report::{SimulateRecord, Simulation, bench_html, count, to_json};

use super::options::{BareModelOptions, batch_size, workers};
use super::report::{other_machine, read};
use super::{Failure, Outcome, own_process, prepare, say, show, simulate, table, temporary_folder};

/// Exit code 4 if a rate fell below the baseline's
#[derive(clap::Args, Debug)]
pub(super) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand, Debug)]
enum What {
    /// A model alone, with LoRA beside its weights and with LoRA merged, by rank, in turns
    Lora(Box<LoraArgs>),
    /// Vision transformers of many sizes: every combination of the lists
    Vit(Box<VitArgs>),
}

#[derive(clap::Args, Debug)]
struct LoraArgs {
    /// A model folder, a card, or an .onnx file
    #[arg(long, short, value_name = "DIR|CARD|MODEL.onnx", required_unless_present = "vit", conflicts_with = "vit")]
    model: Option<PathBuf>,
    /// A vision transformer of random weights: a name such as vit_base_patch16_224, or image=224,patch=14,dim=768,…
    #[arg(long, value_name = "NAME|KEY=VALUE,…")]
    vit: Option<VitConfig>,
    /// Variant of the card
    #[arg(long, value_name = "NAME", requires = "model")]
    variant: Option<String>,
    /// Ranks of the adapters
    #[arg(long, value_name = "R,…", value_delimiter = ',', default_value = "4,8,16,32,64")]
    ranks: Vec<NonZeroUsize>,
    /// Updates are scaled by this over the rank
    #[arg(long, value_name = "X", default_value = "16")]
    alpha: f32,
    /// Linear layers that have an adapter, by the end of their names
    #[arg(long, value_name = "NAME,…", value_delimiter = ',', default_value = "qkv,proj")]
    targets: Vec<String>,
    /// Tiles per batch [default: by the device]
    #[arg(long, value_name = "N", value_parser = batch_size)]
    batch_size: Option<NonZeroUsize>,
    /// Tell what a file takes of memory; the program calls itself so
    #[arg(long, hide = true)]
    alone: Option<PathBuf>,
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    bare: BareModelOptions,
}

#[derive(clap::Args, Debug)]
struct VitArgs {
    /// Names such as vit_tiny_patch16_224,vit_base_patch16_224, or one description; instead of the lists of sizes
    #[arg(long, value_name = "NAME,…|KEY=VALUE,…", conflicts_with_all = ["image", "patch", "dim", "depth", "heads", "mlp", "pool"])]
    vit: Vec<String>,
    /// Widths of the image
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_value = "224", help_heading = "Sizes")]
    image: Vec<usize>,
    /// Widths of a patch
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_value = "16", help_heading = "Sizes")]
    patch: Vec<usize>,
    /// Channels of a token
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_value = "768", help_heading = "Sizes")]
    dim: Vec<usize>,
    /// Blocks
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_value = "12", help_heading = "Sizes")]
    depth: Vec<usize>,
    /// Attention heads
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_value = "12", help_heading = "Sizes")]
    heads: Vec<usize>,
    /// Channels inside the MLP by those of a token
    #[arg(long, value_name = "X,…", value_delimiter = ',', default_value = "4", help_heading = "Sizes")]
    mlp: Vec<f64>,
    /// What becomes of the tokens: cls, avg
    #[arg(long, value_name = "NAME,…", value_delimiter = ',', default_value = "cls", help_heading = "Sizes")]
    pool: Vec<Pool>,
    /// fp32, fp16, int8, each as `optimize` makes it [default: as it is built]
    #[arg(long, value_name = "NAME,…", value_delimiter = ',')]
    precision: Vec<Precision>,
    /// Tiles per batch of each session [default: by the device]
    #[arg(long, value_name = "N,…", value_delimiter = ',', value_parser = batch_size)]
    batch_sizes: Vec<NonZeroUsize>,
    #[command(flatten)]
    common: Common,
}

/// What both have.
#[derive(clap::Args, Debug)]
struct Common {
    /// auto, cpu, cuda, cuda:N or a list such as cuda:0,cuda:1, whose devices share the work; `vit` measures on each if it is
    /// given several times
    #[arg(long = "device", value_name = "DEVICE", default_value = "auto")]
    devices: Vec<DeviceRequest>,
    /// auto, cpu, openvino, cuda or tensorrt
    #[arg(long, value_name = "NAME", default_value = "auto")]
    provider: ProviderRequest,
    /// Sessions over all devices [default: one per core, two on each GPU; one with OpenVINO or TensorRT]
    #[arg(long, value_name = "N", value_parser = workers)]
    sessions: Option<NonZeroUsize>,
    /// Most seconds to measure, of `vit` each entry, once there were the fewest rounds
    #[arg(long, value_name = "N", default_value = "60")]
    seconds: u64,
    /// Where bench.json, bench.csv and bench.html go [default: nowhere]
    #[arg(long, short, value_name = "DIR")]
    out: Option<PathBuf>,
    /// An earlier bench.json of the same entries that none may be slower than
    #[arg(long, value_name = "FILE", help_heading = "Gate")]
    baseline: Option<PathBuf>,
    /// Share of a rate that may be lost
    #[arg(long, value_name = "F", default_value = "0.05", requires = "baseline", help_heading = "Gate")]
    max_regression: f64,
    /// Print the record as JSON instead of the summary
    #[arg(long)]
    json: bool,
    /// Say nothing but errors and results
    #[arg(long)]
    quiet: bool,
}

pub(super) fn execute(args: &Args) -> Result<Outcome, Failure> {
    native::onnx_runtime()?;
    match &args.what {
        What::Lora(args) => bench_lora(args),
        What::Vit(args) => bench_vit(args),
    }
}

fn bench_lora(args: &LoraArgs) -> Result<Outcome, Failure> {
    if args.common.devices.len() > 1 {
        return Err(Failure::usage("--device: bench lora compares on one device, or on a list that shares the work"));
    }
    let mut load = args.common.load(args.batch_size);
    load.variant.clone_from(&args.variant);
    if let Some(file) = &args.alone {
        let card = args.card(file)?;
        show(&String::from_utf8_lossy(&to_json(&lora::alone(&card, file, &load)?)));
        return Ok(Outcome::Done);
    }
    if !args.alpha.is_finite() || args.alpha <= 0.0 {
        return Err(Failure::usage(format!("--alpha {}: must be above 0", args.alpha)));
    }
    let started = cohort::now();
    let folder = temporary_folder()?;
    let mut talk = args.common.talk();
    let card = match &args.vit {
        Some(config) => simulate::built(config, folder.path(), args.bare.of_vit()?, &mut talk)?,
        None => args.card(Path::new(""))?,
    };
    let mut ranks: Vec<usize> = args.ranks.iter().map(|rank| rank.get()).collect();
    ranks.sort_unstable();
    ranks.dedup();
    let request = lora::LoraRequest {
        load,
        ranks,
        alpha: args.alpha,
        targets: unique(&args.targets),
        most_time: Duration::from_secs(args.common.seconds),
        folder: folder.path().to_owned(),
    };
    let names = lora::names(&request);
    let gate = args
        .common
        .gate(|rate| names.contains(&rate.name) && rate.setting("model").is_none_or(|model| model == card.name))?;
    let found = lora::bench(&card, &request, &mut |file| own_process::again("--alone", file), &mut talk)?;
    args.common.finish(found, started, gate.as_ref())
}

impl LoraArgs {
    /// The model's card; of a transformer that is described, the card that its file has.
    fn card(&self, file: &Path) -> Result<ModelCard, Failure> {
        match (&self.model, &self.vit) {
            (Some(path), _) => Ok(ModelCard::load(path, &self.bare.model()?)?),
            (None, Some(config)) => simulate::card_of(config, file, self.bare.of_vit()?),
            (None, None) => Err(Failure::usage("name a --model or describe a --vit")),
        }
    }
}

fn bench_vit(args: &VitArgs) -> Result<Outcome, Failure> {
    let started = cohort::now();
    let (models, skipped) = models(args)?;
    let request = vit::VitRequest {
        models,
        precisions: unique(&args.precision).into_iter().map(|precision| word_of(precision).to_owned()).collect(),
        batch_sizes: unique(&args.batch_sizes),
        places: args.common.places()?,
        skipped,
    };
    let gate = args.common.gate(|rate| {
        let batch_size = rate.setting("batch size").and_then(|size| size.parse().ok());
        vit::names(&request, batch_size).contains(&rate.name)
    })?;
    let mut talk = args.common.talk();
    let found = vit::bench(&request, &mut |case| args.common.simulated(case), &mut talk)?;
    args.common.finish(found, started, gate.as_ref())
}

type Models = (Vec<(String, VitConfig)>, Vec<slidestream::report::compare::LeftOutRecord>);

/// The transformers with their names, and the combinations that can't be.
fn models(args: &VitArgs) -> Result<Models, Failure> {
    let parse = |text: &str| {
        let config: VitConfig = text.parse().map_err(ExperimentError::from)?;
        Ok::<_, Failure>((vit::name_of(&config), config))
    };
    if !args.vit.is_empty() {
        // A description has commas of its own.
        let names = args.vit.iter().flat_map(|text| match text.contains('=') {
            true => vec![text.as_str()],
            false => text.split(',').map(str::trim).collect(),
        });
        return Ok((unique(&names.map(parse).collect::<Result<Vec<_>, _>>()?), Vec::new()));
    }
    let axes = vit::Axes {
        images: unique(&args.image),
        patches: unique(&args.patch),
        dims: unique(&args.dim),
        depths: unique(&args.depth),
        heads: unique(&args.heads),
        mlp_ratios: unique(&args.mlp),
        pools: unique(&args.pool),
    };
    let (configs, skipped) = vit::combinations(&axes).map_err(ExperimentError::from)?;
    if configs.is_empty() {
        let why: Vec<String> = skipped.into_iter().map(|left| left.why).collect();
        return Err(Failure::usage(format!("there is no such ViT: {}", why.join("; "))));
    }
    Ok((configs.into_iter().map(|config| (vit::name_of(&config), config)).collect(), skipped))
}

/// Each value once, in the order in which they were given.
fn unique<T: Clone + PartialEq>(values: &[T]) -> Vec<T> {
    let is_first = |(index, value): &(usize, &T)| !values[..*index].contains(value);
    values.iter().enumerate().filter(is_first).map(|(_, value)| value.clone()).collect()
}

fn word_of(precision: Precision) -> &'static str {
    match precision {
        Precision::Fp32 => "fp32",
        Precision::Fp16 => "fp16",
        Precision::Int8 => "int8",
    }
}

impl Common {
    /// On the first place of `vit`, the only one of `lora`.
    fn load(&self, batch_size: Option<NonZeroUsize>) -> LoadRequest {
        LoadRequest {
            variant: None,
            devices: self.devices.first().cloned().unwrap_or(DeviceRequest::Auto),
            provider: self.provider,
            batch_size,
            readers: None,
            sessions: self.sessions,
            graph_cache: None,
        }
    }

    fn talk(&self) -> impl FnMut(&str) + use<> {
        let is_quiet = self.quiet;
        move |line: &str| {
            if !is_quiet {
                say(line);
            }
        }
    }

    /// The rates that none may fall below, which must all be measured; before any is, and once the folder of the results was
    /// tried.
    fn gate(&self, is_measured: impl Fn(&Rate) -> bool) -> Result<Option<Rated>, Failure> {
        if !(0.0..1.0).contains(&self.max_regression) {
            return Err(Failure::usage(format!("--max-regression {}: must be from 0 to below 1", self.max_regression)));
        }
        let path = |path: &Path| path.canonicalize().ok();
        let is_replaced =
            |(file, out): (&PathBuf, &PathBuf)| path(file).is_some() && path(file) == path(&out.join("bench.json"));
        if self.baseline.as_ref().zip(self.out.as_ref()).is_some_and(is_replaced) {
            return Err(Failure::usage("--baseline: --out would replace it; keep it elsewhere"));
        }
        if let Some(out) = &self.out {
            try_folder(out)?;
        }
        let Some(file) = &self.baseline else { return Ok(None) };
        let baseline = read(file)?;
        if let Some(rate) = baseline.rates.iter().find(|rate| !is_measured(rate)) {
            let of = rate.setting("model").map_or_else(String::new, |model| format!(" of {model}"));
            return Err(Failure {
                hint: Some("name a bench.json of the same models and settings, or leave out no entry of it".to_owned()),
                ..Failure::usage(format!(
                    "--baseline {}: has {:?}{of}, which this command does not measure",
                    file.display(),
                    rate.name
                ))
            });
        }
        Ok(Some(baseline))
    }

    /// Where to measure.
    fn places(&self) -> Result<Vec<vit::Place>, Failure> {
        let place = |devices: &DeviceRequest| {
            let load = LoadRequest { devices: devices.clone(), ..self.load(None) };
            let found = device::resolve(&load.devices, load.provider, None)?;
            let device = (self.devices.len() > 1).then(|| device::in_words(&found.devices));
            Ok(vit::Place { device, replicas: load.on_one()?.map(|(_, replicas)| replicas) })
        };
        let places: Vec<vit::Place> = self.devices.iter().map(place).collect::<Result<_, Failure>>()?;
        match places.iter().enumerate().find(|(index, place)| places[..*index].contains(place)) {
            Some((_, vit::Place { device: Some(device), .. })) => {
                Err(Failure::usage(format!("--device names {device} twice")))
            }
            _ => Ok(places),
        }
    }

    /// What `simulate` finds out in a process of its own.
    fn simulated(&self, case: &vit::Case) -> Result<Simulation, String> {
        let mut load = self.load(None);
        if let Some(device) = &case.device {
            load.devices = device.parse()?;
        }
        if let (true, Some((one, _))) = (case.is_of_one, load.on_one().map_err(|error| error.to_string())?) {
            load = one;
        }
        let found = device::resolve(&load.devices, load.provider, None).map_err(|error| error.to_string())?;
        let mut args = vec!["simulate".to_owned(), "--json".to_owned(), "--quiet".to_owned()];
        let mut add = |flag: &str, value: Option<String>| {
            args.extend(value.into_iter().flat_map(|value| [flag.to_owned(), value]));
        };
        add("--seconds", Some(self.seconds.to_string()));
        add("--vit", Some(case.config.to_string()));
        add("--device", Some(device::in_words(&found.devices)));
        add("--provider", Some(found.provider.to_string()));
        add("--sessions", load.sessions.map(|sessions| sessions.to_string()));
        add("--optimize", case.precision.clone());
        add("--batch-sizes", case.batch_size.map(|batch_size| batch_size.to_string()));
        Ok(own_process::other::<SimulateRecord>(args)?.found)
    }

    /// Writes the files, prints the result, and holds it against the baseline.
    fn finish(&self, found: Bench, started: String, gate: Option<&Rated>) -> Result<Outcome, Failure> {
        let record = BenchRecord {
            schema: BENCH_SCHEMA.to_owned(),
            account: prepare::account(started),
            insights: insights(&found),
            found,
        };
        let written = self.out.as_ref().map_or(Ok(Vec::new()), |out| write(&record, out));
        if self.json {
            show(&String::from_utf8_lossy(&to_json(&record)));
        } else {
            show(&summary(&record, written.as_ref().map_or(&[], Vec::as_slice)));
        }
        // Only now: what was found is not lost with a disk that is full.
        written?;
        let Some(gate) = gate else { return Ok(Outcome::Done) };
        let now = Rated::from(&record);
        other_machine(gate, &now).into_iter().for_each(|warning| say(&warning));
        let failed = regressions(&changes(gate, &now), self.max_regression);
        failed.iter().for_each(|reason| say(&format!("regression: {reason}")));
        Ok(if failed.is_empty() { Outcome::Done } else { Outcome::GateFailed })
    }
}

/// Writes the files, which are returned.
fn write(record: &BenchRecord, out: &Path) -> Result<Vec<PathBuf>, Failure> {
    let table = to_csv(record).map_err(|error| Failure { message: error.to_string(), hint: None, code: 1 })?;
    let files =
        [("bench.csv", table), ("bench.html", bench_html(record).into_bytes()), ("bench.json", to_json(record))];
    let write = |(name, bytes): (&str, Vec<u8>)| Ok(write_atomic(&out.join(name), &bytes).map(|_| out.join(name))?);
    files.into_iter().map(write).collect()
}

fn summary(record: &BenchRecord, written: &[PathBuf]) -> String {
    let heads = [
        "entry",
        "samples/s",
        "[95 %]",
        "ms/sample",
        "ratio",
        "parameters",
        "share",
        "GFLOP",
        "start",
        "memory",
        "busy",
    ];
    let rows: Vec<Vec<String>> = record.found.entries.iter().map(|entry| cells(entry).to_vec()).collect();
    let mut text = format!("{}\n\n{}\n", record.found.subject, table(&heads, &rows));
    for left in &record.found.skipped {
        writeln!(text, "left out: {}: {}", left.name, left.why).ok();
    }
    for sentence in &record.insights {
        writeln!(text, "{sentence}").ok();
    }
    for file in written {
        writeln!(text, "{}", file.display()).ok();
    }
    text
}

fn cells(entry: &BenchEntry) -> [String; 11] {
    let rate = &entry.samples_per_sec;
    let ratio = entry
        .ratio
        .map_or_else(String::new, |ratio| format!("{:.2}× [{:.2}, {:.2}]", ratio.value, ratio.low, ratio.high));
    let unmerged = entry.lora.filter(|lora| !lora.is_merged);
    [
        entry.name.clone(),
        format!("{:.1}", rate.value),
        format!("[{:.1}, {:.1}]", rate.low, rate.high),
        format!("{:.3}", entry.ms_per_sample),
        ratio,
        count(entry.parameters),
        unmerged.map_or_else(String::new, |lora| format!("{:.2} %", 100.0 * lora.share_of_parameters)),
        format!("{:.2}", entry.flops as f64 / 1e9),
        entry.start_secs.map_or_else(String::new, |secs| format!("{secs:.2} s")),
        entry.peak_bytes().map_or_else(String::new, |bytes| format!("{:.0} MiB", bytes as f64 / f64::from(1 << 20))),
        entry.busy_in_words(),
    ]
}
