//! `slidestream simulate`: how fast a model runs without slides, and how long a slide takes.

use std::fmt::Write as _;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use slidestream::engine::{LoadRequest, cohort};
use slidestream::experiment::ExperimentError;
use slidestream::experiment::bench::vit::name_of;
use slidestream::experiment::optimize::{self, OptimizeRequest, Precision, Target};
use slidestream::experiment::simulate::{self, SimulateRequest, SlideQuestion, SlideSize};
use slidestream::experiment::tiles::TileSet;
use slidestream::geometry::{Mpp, Overlap};
use slidestream::inference::{
    Activation, BareModel, Device, DeviceRequest, ModelCard, Pool, Provider, ProviderRequest, Task, device,
};
use slidestream::native;
use slidestream::onnx::vit::{self, VitConfig};
use slidestream::report::{
    EstimateRecord, PointRecord, SIMULATE_SCHEMA, SimulateRecord, Simulation, count, duration, significant, to_json,
};

use super::options::{BareModelOptions, batch_size, workers};
use super::{Failure, Outcome, columns, prepare, say, show, temporary_folder};

/// Draws the weights of a ViT that is described on the command line.
const SEED: u64 = 1;
/// Tiles on which an optimised variant is compared with the original, and calibrated.
const OPTIMIZE_TILES: usize = 4;

/// A model without slides: throughput, cost, and the time of a slide
#[derive(clap::Args, Debug)]
pub(super) struct Args {
    /// A model folder, a card, or an .onnx file
    #[arg(long, short, value_name = "DIR|CARD|MODEL.onnx", required_unless_present = "vit", conflicts_with = "vit")]
    model: Option<PathBuf>,
    /// A vision transformer of random weights: a name such as vit_base or vit_small_patch16_384, or image=224,patch=14,…
    #[arg(long, value_name = "NAME|KEY=VALUE,…")]
    vit: Option<VitConfig>,
    /// Variant of the card
    #[arg(long, value_name = "NAME", conflicts_with = "optimize")]
    variant: Option<String>,
    /// Optimise the model first, and take its fp32, fp16 or int8 variant
    #[arg(long, value_name = "PRECISION")]
    optimize: Option<Precision>,
    /// auto, cpu, cuda, cuda:N or a list such as cuda:0,cuda:1
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    device: DeviceRequest,
    /// auto, cpu, openvino, cuda or tensorrt
    #[arg(long, value_name = "NAME", default_value = "auto")]
    provider: ProviderRequest,
    /// Threads that read tiles, for the estimate of a --slide [default: one per core]
    #[arg(long, value_name = "N", value_parser = workers, requires = "slide")]
    readers: Option<NonZeroUsize>,
    /// Sessions over all devices [default: one per core, two on each GPU; one with OpenVINO or TensorRT]
    #[arg(long, value_name = "N", value_parser = workers)]
    sessions: Option<NonZeroUsize>,
    /// Tiles per batch, each tried [default: by the device]
    #[arg(long, value_name = "N,…", value_delimiter = ',', value_parser = batch_size)]
    batch_sizes: Vec<NonZeroUsize>,
    /// Most seconds to measure each batch size, once it had its fewest rounds
    #[arg(long, value_name = "N", default_value = "10")]
    seconds: u64,
    /// Power of the machine in watts while it infers, for the energy [default: what the GPU tells of itself alone]
    #[arg(long, value_name = "W", value_parser = watts)]
    watts: Option<f64>,
    /// Print the record as JSON instead of the summary
    #[arg(long)]
    json: bool,
    /// Say nothing but errors and results
    #[arg(long)]
    quiet: bool,
    #[command(flatten)]
    slide: SlideOptions,
    #[command(flatten)]
    bare: BareModelOptions,
}

/// The slide whose time is asked for.
#[derive(clap::Args, Debug)]
struct SlideOptions {
    /// A real slide: its size, its tissue, and how fast it is read here
    #[arg(long, value_name = "FILE", help_heading = "Slide")]
    slide: Option<PathBuf>,
    /// Level-0 pixels, such as 100000x80000
    #[arg(long, value_name = "WxH", help_heading = "Slide", conflicts_with = "slide")]
    slide_size: Option<Size>,
    /// A typical slide: biopsy (40,000 × 20,000 px, 15 % tissue) or resection (120,000 × 90,000 px, 45 %), both of
    /// 0.25 µm/px, or prostatectomy (a whole mount of 190,000 tiles)
    #[arg(long, value_name = "NAME", help_heading = "Slide", conflicts_with_all = ["slide", "slide_size"])]
    profile: Option<Profile>,
    /// Resolution at level 0 in µm/px [default: that of the --slide or --profile; of a --slide-size the model's]
    #[arg(long, value_name = "X", help_heading = "Slide")]
    slide_mpp: Option<Mpp>,
    /// What neighbouring tiles share: 64px or 25% [default: the model's]
    #[arg(long, value_name = "LENGTH", help_heading = "Slide", allow_hyphen_values = true)]
    overlap: Option<Overlap>,
    /// Share of the tiles that have tissue [default: that of the --profile; of a --slide-size 1]
    #[arg(long, value_name = "F", help_heading = "Slide", conflicts_with = "slide", value_parser = share)]
    tissue_fraction: Option<f64>,
}

fn watts(text: &str) -> Result<f64, String> {
    let watts = text.parse().ok().filter(|watts: &f64| watts.is_finite() && *watts > 0.0);
    watts.ok_or_else(|| "must be a number above 0".to_owned())
}

fn share(text: &str) -> Result<f64, String> {
    let share = text.parse().ok().filter(|share: &f64| *share > 0.0 && *share <= 1.0);
    share.ok_or_else(|| "must be a number above 0 and at most 1".to_owned())
}

/// Width and height in pixels.
#[derive(Clone, Copy, Debug)]
struct Size(u64, u64);

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let sides = text.split_once(['x', '×']);
        let side = |text: &str| text.trim().parse().ok().filter(|side| *side > 0);
        sides
            .and_then(|(width, height)| Some(Self(side(width)?, side(height)?)))
            .ok_or_else(|| format!("{text:?} is no size in pixels such as 100000x80000"))
    }
}

/// A kind of slide.
#[derive(Clone, Copy, Debug)]
enum Profile {
    Biopsy,
    Resection,
    Prostatectomy,
}

impl FromStr for Profile {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "biopsy" => Ok(Self::Biopsy),
            "resection" => Ok(Self::Resection),
            "prostatectomy" => Ok(Self::Prostatectomy),
            _ => Err(format!("{text:?} is none of biopsy, resection, prostatectomy")),
        }
    }
}

pub(super) fn execute(args: &Args) -> Result<Outcome, Failure> {
    let started = cohort::now();
    native::onnx_runtime()?;
    if args.slide.slide.is_some() {
        native::openslide()?;
    }
    let mut talk = |line: &str| {
        if !args.quiet {
            say(line);
        }
    };
    // Of a model that is made for this simulation alone.
    let folder = temporary_folder()?;
    let card = match (&args.model, &args.vit) {
        (Some(path), _) => ModelCard::load(path, &args.bare.model()?)?,
        (None, Some(config)) => built(config, folder.path(), args.bare.of_vit()?, &mut talk)?,
        (None, None) => return Err(Failure::usage("name a --model or describe a --vit")),
    };
    let question = args.slide.question(&card)?;
    let slide = question.map(|question| question.count(&card)).transpose()?;
    let (card, variant) = match args.optimize {
        Some(precision) => optimized(&card, precision, args, &folder.path().join("optimized"), &mut talk)?,
        None => (card, args.variant.clone()),
    };
    let load = LoadRequest {
        variant,
        devices: args.device.clone(),
        provider: args.provider,
        batch_size: None,
        readers: args.readers,
        sessions: args.sessions,
        graph_cache: None,
    };
    let request = SimulateRequest {
        load,
        batch_sizes: args.batch_sizes.clone(),
        most_time: Duration::from_secs(args.seconds),
        vit: args.vit.clone(),
        slide,
        watts: args.watts,
    };
    let found = simulate::simulate(card, &request, &mut talk)?;
    if args.json {
        let record = SimulateRecord { schema: SIMULATE_SCHEMA.to_owned(), account: prepare::account(started), found };
        show(&String::from_utf8_lossy(&to_json(&record)));
    } else {
        show(&summary(&found));
    }
    Ok(Outcome::Done)
}

impl SlideOptions {
    fn question(&self, card: &ModelCard) -> Result<Option<SlideQuestion>, Failure> {
        let overlap = self.overlap.unwrap_or(Overlap::Pixels(card.overlap));
        let tile = card.tile_size;
        if overlap.in_pixels(tile) >= tile {
            return Err(Failure::usage(format!(
                "--overlap {overlap} leaves no step between tiles of {tile} px: it must be below the tile"
            )));
        }
        let is_described = self.overlap.is_some() || self.slide_mpp.is_some() || self.tissue_fraction.is_some();
        let of_size = |name: &str, (width, height), mpp: Option<Mpp>, tissue_fraction| {
            let mpp = self.slide_mpp.or(mpp);
            let tissue_fraction = self.tissue_fraction.unwrap_or(tissue_fraction);
            SlideQuestion::Size(SlideSize { name: name.to_owned(), width, height, mpp, overlap, tissue_fraction })
        };
        let scanned = Mpp::new(0.25).ok();
        Ok(match (&self.slide, self.slide_size, self.profile) {
            (Some(path), ..) => Some(SlideQuestion::File { path: path.clone(), mpp: self.slide_mpp, overlap }),
            (None, Some(Size(width, height)), _) => Some(of_size("of a given size", (width, height), None, 1.0)),
            (None, None, Some(Profile::Biopsy)) => Some(of_size("biopsy", (40_000, 20_000), scanned, 0.15)),
            (None, None, Some(Profile::Resection)) => Some(of_size("resection", (120_000, 90_000), scanned, 0.45)),
            (None, None, Some(Profile::Prostatectomy)) if is_described => {
                return Err(Failure::usage(
                    "prostatectomy is a number of tiles: it has no --overlap, --slide-mpp or --tissue-fraction",
                ));
            }
            (None, None, Some(Profile::Prostatectomy)) => {
                Some(SlideQuestion::Tiles { name: "whole-mount prostatectomy".to_owned(), tiles: 190_000 })
            }
            (None, None, None) if is_described => {
                return Err(Failure::usage(
                    "--overlap, --slide-mpp, --tissue-fraction are a slide's: give --slide, --slide-size or --profile",
                ));
            }
            (None, None, None) => None,
        })
    }
}

/// The card of a ViT whose model is built into `folder`.
pub(super) fn built(
    config: &VitConfig,
    folder: &Path,
    mpp: Option<Mpp>,
    say: &mut dyn FnMut(&str),
) -> Result<ModelCard, Failure> {
    say("building the model");
    let file = folder.join("vit.onnx");
    vit::build(config, SEED).map_err(ExperimentError::from)?.save_with_weights(&file)?;
    Ok(ModelCard { name: name_of(config), ..card_of(config, &file, mpp)? })
}

/// The card of a model file that has the inputs and outputs of a ViT, which sees slides at 0.5 µm/px unless told
/// otherwise.
pub(super) fn card_of(config: &VitConfig, file: &Path, mpp: Option<Mpp>) -> Result<ModelCard, Failure> {
    let has_head = config.classes > 0;
    let bare = BareModel {
        task: Some(if has_head { Task::Classification } else { Task::Features }),
        tile_size: u32::try_from(config.image).ok(),
        target_mpp: mpp.or(Mpp::new(0.5).ok()),
        class_names: has_head.then(|| (0..config.classes).map(|class| format!("class {class}")).collect()),
        mean: Some([0.5; 3]),
        std: Some([0.5; 3]),
        activation: Some(match config.classes {
            0 => Activation::None,
            1 => Activation::Sigmoid,
            _ => Activation::Softmax,
        }),
        pool: None::<Pool>,
        ..BareModel::default()
    };
    Ok(ModelCard::load(file, &bare)?)
}

/// The card with the variant that `optimize` makes of a model at a precision, and the variant's name.
fn optimized(
    card: &ModelCard,
    precision: Precision,
    args: &Args,
    out: &Path,
    say: &mut dyn FnMut(&str),
) -> Result<(ModelCard, Option<String>), Failure> {
    let resolved = device::resolve(&args.device, args.provider, None)?;
    let target = match (resolved.devices.first(), resolved.provider) {
        (Some(Device::Cuda { .. }), _) => Target::Cuda,
        (_, Provider::OpenVino) => Target::OpenVino,
        _ => Target::Cpu,
    };
    let tiles = |seed| TileSet::synthetic(card.tile_size, OPTIMIZE_TILES, seed);
    let request = OptimizeRequest {
        target,
        precisions: vec![precision],
        tiles: tiles(1),
        calibration: Some(tiles(2)),
        lora: None,
        // A quarter of the bytes to the GPU, and no normalising on the way.
        takes_bytes: target == Target::Cuda,
        keeps_io: true,
        min_cosine: 0.0,
        reduce_range: !device::list().cpu.features.iter().any(|feature| feature.contains("vnni")),
        most_time: Duration::ZERO,
        out: out.to_owned(),
    };
    let made = optimize::optimize(card, &request, say)?;
    let mut written = made.variants.iter().filter(|variant| variant.file.is_some()).map(|variant| variant.name.clone());
    let name = written.next_back().ok_or_else(|| Failure {
        message: "the model has no such variant that computes what the original does".to_owned(),
        hint: Some("`slidestream optimize --explain` tells what was tried".to_owned()),
        code: 1,
    })?;
    Ok((made.card, Some(name)))
}

fn summary(found: &Simulation) -> String {
    let size = &found.size;
    let mebibytes = mebibytes_of(size.parameter_bytes);
    let mut cost = format!("{} GFLOP per tile by the graph", giga(size.flops as f64));
    if let Some(formula) = &size.formula {
        let (without, with) = (giga(formula.flops as f64), giga(formula.flops_with_class_token as f64));
        write!(cost, "; by formula {without} (patches), {with} (with the class token)").ok();
    }
    if !size.uncounted.is_empty() {
        write!(cost, "; not counted: {}", size.uncounted.keys().cloned().collect::<Vec<_>>().join(", ")).ok();
    }
    let mut rows = vec![
        ("model", format!("{}, {}", found.model.name, found.model.variant)),
        ("parameters", format!("{} in {mebibytes:.1} MiB", count(size.parameters))),
        ("cost", cost),
        (
            "device",
            format!("{}, {}, {} sessions", found.execution.device, found.execution.provider, found.execution.sessions),
        ),
        ("start", format!("{:.2} s to load, {:.2} s for the first batch", found.load_secs, found.first_batch_secs)),
    ];
    if let Some(ceiling) = found.ceiling_flops_per_sec {
        rows.push(("ceiling", format!("{:.2} TFLOP/s, measured by products of matrices", ceiling / 1e12)));
    }
    if let Some(bytes) = found.peak_host_bytes {
        rows.push(("memory", format!("{:.0} MiB of the host at the peak", mebibytes_of(bytes))));
    }
    rows.extend(found.warnings.iter().map(|warning| ("warning", warning.clone())));
    let mut text = columns(rows);
    let device_memory = found.points.iter().any(|point| point.peak_device_bytes.is_some());
    let memory = if device_memory { "  GPU MiB" } else { "" };
    writeln!(
        text,
        "\nbatch   tiles/s  [95 %]                 ms/tile p50     p90     p99   TFLOP/s  of ceiling{memory}"
    )
    .ok();
    for (index, point) in found.points.iter().enumerate() {
        let mark = if index == found.best && found.points.len() > 1 { "  best" } else { "" };
        writeln!(text, "{}{mark}", row(point)).ok();
    }
    for (device, busy) in found.points.get(found.best).iter().flat_map(|point| &point.utilisation_by_device) {
        writeln!(text, "{device} was at work {:.0} % of the time at the best", 100.0 * busy).ok();
    }
    if found.execution.sessions > 1 {
        writeln!(text, "ms/tile are those of one of {} sessions, which run side by side", found.execution.sessions)
            .ok();
    }
    if let Some(slide) = &found.slide {
        text.push('\n');
        text.push_str(&estimate(slide));
    }
    text
}

fn row(point: &PointRecord) -> String {
    let rate = &point.tiles_per_sec;
    let interval = format!("[{:.1}, {:.1}]", rate.low, rate.high);
    let per_tile = point.ms_per_tile.map_or([f64::NAN; 3], |ms| [ms.p50, ms.p90, ms.p99]);
    let memory = point.peak_device_bytes.map_or_else(String::new, |bytes| format!("  {:7.0}", mebibytes_of(bytes)));
    let share = point.share_of_ceiling.map_or_else(|| "–".to_owned(), |share| format!("{:.0} %", 100.0 * share));
    let unstable = if point.is_stable { "" } else { "  not settled" };
    format!(
        "{:5} {:9.1}  {interval:20}  {:10.3} {:7.3} {:7.3} {:9.3}  {share:>10}{memory}{unstable}",
        point.batch_size,
        rate.value,
        per_tile[0],
        per_tile[1],
        per_tile[2],
        point.flops_per_sec / 1e12,
    )
}

fn estimate(slide: &EstimateRecord) -> String {
    let mut name = slide.name.clone();
    match (slide.width, slide.height, slide.mpp, slide.overlap) {
        (Some(width), Some(height), Some(mpp), Some(overlap)) => {
            let (width, height) = (count(width), count(height));
            write!(name, ", {width} × {height} px of {mpp} µm/px at level 0, tiles share {overlap} px").ok();
        }
        _ => name.push_str(", known by its number of tiles alone"),
    }
    let mut tiles = format!("{} to infer", count(slide.tiles));
    if let (Some(grid), Some(tissue)) = (slide.grid_tiles, slide.tissue_fraction) {
        write!(tiles, " of {} in the grid: {:.1} % have tissue", count(grid), 100.0 * tissue).ok();
    }
    let mut rows = vec![("slide", name), ("tiles", tiles)];
    if let Some(full) = slide.full_tiles {
        rows.push(("full_tiles", format!("{} lie wholly on the slide", count(full))));
    }
    if let Some(reading) = slide.reading_tiles_per_sec {
        rows.push((
            "reading",
            format!("{reading:.1} tiles/s beside {:.1} of inference", slide.inference_tiles_per_sec),
        ));
    }
    rows.push(("time", format!("{} at {:.1} tiles/s", duration(slide.seconds), slide.tiles_per_sec)));
    rows.push(("bound by", slide.bound_by.clone()));
    rows.push((
        "slides",
        format!("{} per hour, {} per day", significant(slide.slides_per_hour), significant(slide.slides_per_day)),
    ));
    if let (Some(energy), Some(watts)) = (slide.kwh_per_1000_slides, slide.watts) {
        let whose = if slide.watts_are_of_gpus { " of the GPUs alone, without CPU and host" } else { "" };
        rows.push(("energy", format!("{} kWh per 1,000 slides at {watts:.0} W{whose}", significant(energy))));
    }
    columns(rows)
}

fn mebibytes_of(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn giga(flops: f64) -> String {
    format!("{:.2}", flops / 1e9)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_said_whose_power_the_energy_is_of() {
        let own = EstimateRecord { watts: Some(500.0), kwh_per_1000_slides: Some(264.0), ..EstimateRecord::default() };
        let of_gpus = EstimateRecord { watts_are_of_gpus: true, ..own.clone() };
        assert!(estimate(&own).ends_with("264 kWh per 1,000 slides at 500 W\n"), "{}", estimate(&own));
        let text = estimate(&of_gpus);
        assert!(
            text.ends_with("264 kWh per 1,000 slides at 500 W of the GPUs alone, without CPU and host\n"),
            "{text}"
        );
    }
}
