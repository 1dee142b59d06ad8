//! The options of `run` and `tiles`: typed once as flags, once more as the keys of a TOML file, merged and parsed here;
//! and those that other commands share.
//!
//! Precedence: flag > file > model card > default. A flag `--target-mpp` is the key `target_mpp` in the file and the
//! name in every record and message.

use std::fmt::Display;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use bytesize::ByteSize;
use clap::Args;
use serde::{Deserialize, Deserializer, Serialize};

use super::Failure;
use super::progress::Style;
use slidestream::engine::cohort::CohortOptions;
use slidestream::engine::config::{Emit, OnFailure, TilingConfig, TissueSource};
use slidestream::geometry::{Level0Rect, Mpp, Overlap};
use slidestream::inference::{BareModel, DeviceRequest, ModelCard, PredictorOptions, ProviderRequest};
use slidestream::slide::Reader;

/// The value of an option as text; in a TOML file it may also be a number or a truth value.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Text(String);

impl FromStr for Text {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(Self(text.to_owned()))
    }
}

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match toml::Value::deserialize(deserializer)? {
            toml::Value::String(text) => Ok(Self(text)),
            toml::Value::Integer(number) => Ok(Self(number.to_string())),
            toml::Value::Float(number) => Ok(Self(number.to_string())),
            toml::Value::Boolean(value) => Ok(Self(value.to_string())),
            other => Err(serde::de::Error::custom(format!("a {} is no value here", other.type_str()))),
        }
    }
}

/// How slides are cut into tiles.
#[derive(Args, Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct TilingOptions {
    /// Resolution that the model sees, in µm/px
    #[arg(long, value_name = "X", help_heading = "Tiles")]
    target_mpp: Option<Text>,
    /// Who decodes the slides: native (tiled TIFF, several times as fast), openslide, or auto: native where its pixels agree with OpenSlide's [default: auto]
    #[arg(long, value_name = "NAME", help_heading = "Tiles")]
    reader: Option<Text>,
    /// Resolution of the slides at level 0, instead of their metadata
    #[arg(long, value_name = "X", help_heading = "Tiles")]
    slide_mpp: Option<Text>,
    /// Resolutions by slide: a CSV with the columns slide,mpp
    #[arg(long, value_name = "FILE", help_heading = "Tiles")]
    mpp_csv: Option<Text>,
    /// Relative difference up to which a level is read as it is [default: 0.05]
    #[arg(long, value_name = "F", help_heading = "Tiles")]
    mpp_tolerance: Option<Text>,
    /// What neighbouring tiles share: 64px or 25%
    #[arg(long, value_name = "LENGTH", help_heading = "Tiles", allow_hyphen_values = true)]
    overlap: Option<Text>,
    /// The part of the slide to cover, in level-0 pixels
    #[arg(long, value_name = "X,Y,W,H", help_heading = "Tiles")]
    region: Option<Text>,
    /// Take only so many tissue tiles, evenly sampled
    #[arg(long, value_name = "N", help_heading = "Tiles")]
    max_tiles: Option<Text>,
    /// otsu, none, a mask image or GeoJSON polygons in level-0 pixels [default: otsu]
    #[arg(long, value_name = "SOURCE", help_heading = "Tiles")]
    tissue: Option<Text>,
    /// Share of a tile that must be tissue [default: 0.1]
    #[arg(long, value_name = "F", help_heading = "Tiles")]
    min_tissue: Option<Text>,
    /// Infer exactly on the tiles of this file (CSV, or HDF5 of this program, CLAM or TRIDENT)
    #[arg(long, value_name = "FILE", help_heading = "Tiles")]
    coords: Option<Text>,
}

/// What is said of a model that has no card.
#[derive(Args, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct BareOptions {
    /// classification, segmentation or features
    #[arg(long, value_name = "TASK", help_heading = "For a bare .onnx model")]
    task: Option<Text>,
    /// Side of a tile in pixels
    #[arg(long, value_name = "N", help_heading = "For a bare .onnx model")]
    tile_size: Option<Text>,
    /// Class names in the order of the outputs
    #[arg(long, value_name = "A,B,…", help_heading = "For a bare .onnx model")]
    class_names: Option<Text>,
    /// Mean of RGB/255
    #[arg(long, value_name = "R,G,B", help_heading = "For a bare .onnx model")]
    mean: Option<Text>,
    /// Standard deviation of RGB/255
    #[arg(long, value_name = "R,G,B", help_heading = "For a bare .onnx model")]
    std: Option<Text>,
    /// softmax, sigmoid or none
    #[arg(long, value_name = "NAME", help_heading = "For a bare .onnx model")]
    activation: Option<Text>,
    /// Which tokens make the features: cls, mean or cls+mean
    #[arg(long, value_name = "NAME", help_heading = "For a bare .onnx model")]
    pool: Option<Text>,
}

/// What is said of a model that has no card, where nothing else tells at which resolution it sees slides.
#[derive(Args, Clone, Debug)]
pub(crate) struct BareModelOptions {
    /// Resolution that the model sees, in µm/px
    #[arg(long, value_name = "X", help_heading = "For a bare .onnx model")]
    target_mpp: Option<Mpp>,
    #[command(flatten)]
    rest: BareOptions,
}

impl BareModelOptions {
    /// The model that a bare `.onnx` file is.
    pub(super) fn model(&self) -> Result<BareModel, Failure> {
        self.rest.model(self.target_mpp)
    }

    /// The resolution that a described ViT sees; everything else follows from its description.
    pub(super) fn of_vit(&self) -> Result<Option<Mpp>, Failure> {
        if self.rest == BareOptions::default() {
            return Ok(self.target_mpp);
        }
        Err(Failure::usage("of the options for a bare .onnx model, --vit takes --target-mpp alone"))
    }
}

/// More tiles in a batch are a slip of the finger.
const MOST_TILES: usize = 65_536;
/// So are more sessions or readers for each core, where there are more than a few cores.
const MOST_WORKERS_PER_CORE: usize = 4;
const FEW_CORES: usize = 16;

/// Parses tiles per batch.
pub(crate) fn batch_size(text: &str) -> Result<NonZeroUsize, String> {
    up_to(text, MOST_TILES)
}

/// Parses a number of sessions or readers.
pub(crate) fn workers(text: &str) -> Result<NonZeroUsize, String> {
    let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    up_to(text, MOST_WORKERS_PER_CORE * cores.max(FEW_CORES))
}

fn up_to(text: &str, most: usize) -> Result<NonZeroUsize, String> {
    let number = text.trim().parse().ok().filter(|number: &NonZeroUsize| number.get() <= most);
    number.ok_or_else(|| format!("must be a whole number from 1 to {most}"))
}

/// A model that predicts what is at hand, and where it does.
#[derive(Args, Clone, Debug)]
pub(crate) struct PredictorArgs {
    /// A model folder, a card, or an .onnx file
    #[arg(long, short, value_name = "DIR|CARD|MODEL.onnx")]
    pub(super) model: PathBuf,
    /// Model variant: fp32 and what the card lists
    #[arg(long, value_name = "NAME")]
    variant: Option<String>,
    /// auto, cpu, cuda, cuda:N or a list such as cuda:0,cuda:1, whose devices share every batch
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    device: DeviceRequest,
    /// auto, cpu, openvino, cuda or tensorrt
    #[arg(long, value_name = "NAME", default_value = "auto")]
    provider: ProviderRequest,
    /// Sessions over all devices [default: one on each]
    #[arg(long, value_name = "N", value_parser = workers)]
    sessions: Option<NonZeroUsize>,
    #[command(flatten)]
    bare: BareModelOptions,
}

impl PredictorArgs {
    /// The model's card.
    pub(super) fn card(&self) -> Result<ModelCard, Failure> {
        Ok(ModelCard::load(&self.model, &self.bare.model()?)?)
    }

    /// Where and how it runs.
    pub(super) fn options(&self, batch_size: Option<NonZeroUsize>) -> PredictorOptions {
        let (variant, devices, provider) = (self.variant.clone(), self.device.clone(), self.provider);
        PredictorOptions { variant, devices, provider, batch_size, sessions: self.sessions }
    }
}

/// What a run does with slides.
#[derive(Args, Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct RunOptions {
    /// Model variant: fp32 and what the card lists
    #[arg(long, value_name = "NAME", help_heading = "Model")]
    variant: Option<Text>,
    /// auto, cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", help_heading = "Model")]
    pub(super) device: Option<Text>,
    /// auto, cpu, openvino, cuda or tensorrt
    #[arg(long, value_name = "NAME", help_heading = "Model")]
    pub(super) provider: Option<Text>,
    /// Tiles per batch, or auto
    #[arg(long, value_name = "N", help_heading = "Model")]
    batch_size: Option<Text>,
    /// Threads that read tiles
    #[arg(long, value_name = "N", help_heading = "Model")]
    pub(super) readers: Option<Text>,
    /// Sessions that infer side by side [default: one per core, two on each GPU; one with OpenVINO or TensorRT]
    #[arg(long, value_name = "N", help_heading = "Model")]
    pub(super) sessions: Option<Text>,

    /// Memory of the host that a run may take, such as 2GiB or 800MB: what can be lowered without changing results is, else the slide fails
    #[arg(long, value_name = "SIZE", help_heading = "Model")]
    memory_limit: Option<Text>,
    /// Folder in which graphs that ONNX Runtime has optimised are kept, so that a large model opens faster the next time (CPU only)
    #[arg(long, value_name = "DIR", help_heading = "Model")]
    graph_cache: Option<Text>,

    #[command(flatten)]
    #[serde(flatten)]
    pub(crate) tiling: TilingOptions,

    /// Probability from which a place belongs to a class's region [default: 0.5]
    #[arg(long, value_name = "P", help_heading = "Results")]
    threshold: Option<Text>,
    /// Kinds of output: csv,geojson,tiff,png,h5 [default: all that the task has]
    #[arg(long, value_name = "KINDS", help_heading = "Results")]
    emit: Option<Text>,
    /// What an unreadable tile does: fail or skip [default: fail]
    #[arg(long, value_name = "POLICY", help_heading = "Results")]
    on_tile_error: Option<Text>,
    /// What a NaN or infinite output does: fail or skip [default: fail]
    #[arg(long, value_name = "POLICY", help_heading = "Results")]
    on_nonfinite: Option<Text>,
    /// Apply the slides' ICC profiles
    #[arg(long, num_args = 0, default_missing_value = "true", help_heading = "Results")]
    icc: Option<bool>,
    /// Stop at the first slide that fails
    #[arg(long, num_args = 0, default_missing_value = "true", help_heading = "Results")]
    fail_fast: Option<bool>,
    /// Write what every worker did when to OUT/traces/ID.json, for Perfetto or chrome://tracing; not of slides that are done
    #[arg(long, num_args = 0, default_missing_value = "true", help_heading = "Results")]
    profile: Option<bool>,
    /// Redo slides that are done
    #[arg(long, num_args = 0, default_missing_value = "true", help_heading = "Results")]
    force: Option<bool>,

    /// Show what would be done, and write nothing
    #[arg(long, num_args = 0, default_missing_value = "true")]
    dry_run: Option<bool>,
    /// Say nothing but errors
    #[arg(long, num_args = 0, default_missing_value = "true")]
    quiet: Option<bool>,
    /// Progress as JSON lines on stderr
    #[arg(long, num_args = 0, default_missing_value = "true", conflicts_with = "quiet")]
    log_json: Option<bool>,

    #[command(flatten)]
    #[serde(flatten)]
    pub(super) bare: BareOptions,
}

impl RunOptions {
    /// These options, with what is unset taken from a TOML file.
    pub(crate) fn or_file(&self, path: &Path) -> Result<Self, Failure> {
        let problem = |reason: String| Failure::usage(format!("{}: {reason}", path.display()));
        let text = std::fs::read_to_string(path).map_err(|error| problem(error.to_string()))?;
        let read: Self = toml::from_str(&text).map_err(|error| problem(error.to_string()))?;
        let table = |options: &Self| toml::Table::try_from(options).map_err(|error| problem(error.to_string()));
        let known = table(&read)?;
        let keys: toml::Table = toml::from_str(&text).map_err(|error| problem(error.to_string()))?;
        if let Some(unknown) = keys.keys().find(|key| !known.contains_key(*key)) {
            return Err(problem(format!("unknown key {unknown:?}: the keys are the names of the flags of run")));
        }
        let mut merged = known;
        merged.extend(table(self)?);
        merged.try_into().map_err(|error: toml::de::Error| problem(error.to_string()))
    }
}

/// What the model card says where no option does.
pub(crate) struct TilingDefaults {
    pub(crate) tile_size: u32,
    pub(crate) target_mpp: Option<Mpp>,
    pub(crate) overlap: Overlap,
}

impl TilingOptions {
    /// The resolution that the model sees, if it was given.
    pub(crate) fn target_mpp(&self) -> Result<Option<Mpp>, Failure> {
        parse("target_mpp", &self.target_mpp)
    }

    /// Who decodes the slides; `None` chooses the fastest that is right.
    pub(crate) fn reader(&self) -> Result<Option<Reader>, Failure> {
        match &self.reader {
            Some(text) if text.0 == "auto" => Ok(None),
            reader => parse("reader", reader),
        }
    }

    /// Where resolutions by slide are listed.
    pub(crate) fn mpp_csv(&self) -> Result<Option<PathBuf>, Failure> {
        parse("mpp_csv", &self.mpp_csv)
    }

    /// The resolution of the slides, if it was given.
    pub(crate) fn slide_mpp(&self) -> Result<Option<Mpp>, Failure> {
        parse("slide_mpp", &self.slide_mpp)
    }

    /// How slides are cut, with the card's values where nothing was set.
    pub(crate) fn config(&self, card: &TilingDefaults) -> Result<TilingConfig, Failure> {
        let tile_size = card.tile_size;
        let target_mpp = parse("target_mpp", &self.target_mpp)?
            .or(card.target_mpp)
            .ok_or_else(|| Failure::usage("the resolution that the model needs is not known: set --target-mpp"))?;
        let overlap = parse::<Overlap>("overlap", &self.overlap)?.unwrap_or(card.overlap);
        let coords: Option<PathBuf> = parse("coords", &self.coords)?;
        let tiling = TilingConfig {
            tile_size,
            overlap: overlap.in_pixels(tile_size),
            target_mpp,
            mpp_tolerance: fraction("mpp_tolerance", &self.mpp_tolerance)?.unwrap_or(0.05),
            reader: self.reader()?,
            slide_mpp: parse("slide_mpp", &self.slide_mpp)?,
            region: self.region.as_ref().map(|text| region(&text.0)).transpose()?,
            max_tiles: parse("max_tiles", &self.max_tiles)?,
            tissue: self.tissue.as_ref().map_or(Ok(TissueSource::Otsu), |text| tissue(&text.0))?,
            min_tissue: fraction("min_tissue", &self.min_tissue)?.unwrap_or(0.1),
            coords,
        };
        if tiling.overlap >= tile_size {
            return Err(Failure::usage(format!("--overlap {overlap} leaves no step between tiles of {tile_size} px")));
        }
        // A coordinates file names the tiles themselves: what would choose tiles contradicts it.
        let choosing = [("region", self.region.is_some()), ("tissue", self.tissue.is_some())];
        if let Some((name, _)) = choosing.iter().find(|(_, set)| *set && tiling.coords.is_some()) {
            return Err(Failure::usage(format!("--coords names the tiles, so --{name} can't be set too")));
        }
        Ok(tiling)
    }
}

impl RunOptions {
    /// What is written: everything that the task has, or what was asked for.
    pub(crate) fn emit(&self, applicable: &[Emit]) -> Result<Vec<Emit>, Failure> {
        let Some(text) = &self.emit else { return Ok(applicable.to_vec()) };
        let mut kinds = Vec::new();
        for word in text.0.split(',').map(str::trim).filter(|word| !word.is_empty()) {
            let kind = Emit::ALL.into_iter().find(|kind| kind.as_str() == word);
            let kind = kind.ok_or_else(|| invalid("emit", word, "known are csv, geojson, tiff, png and h5"))?;
            if !applicable.contains(&kind) {
                return Err(invalid("emit", word, "this model's task has no such output"));
            }
            kinds.push(kind);
        }
        kinds.sort_unstable();
        kinds.dedup();
        if kinds.is_empty() {
            return Err(invalid("emit", &text.0, "name at least one kind of output"));
        }
        Ok(kinds)
    }
}

impl RunOptions {
    /// The variant, if one was named.
    pub(super) fn variant(&self) -> Option<&str> {
        self.variant.as_ref().map(|text| text.0.as_str())
    }

    /// Tiles per batch; `None` is left to the device.
    pub(super) fn batch_size(&self) -> Result<Option<NonZeroUsize>, Failure> {
        match &self.batch_size {
            Some(text) if text.0 == "auto" => Ok(None),
            Some(text) => batch_size(&text.0).map(Some).map_err(|error| invalid("batch_size", &text.0, error)),
            None => Ok(None),
        }
    }

    /// Where optimised graphs are kept, if they are.
    pub(super) fn graph_cache(&self) -> Option<PathBuf> {
        self.graph_cache.as_ref().map(|folder| PathBuf::from(&folder.0))
    }

    /// Threads that read tiles; `None` is left to the machine.
    pub(super) fn readers(&self) -> Result<Option<NonZeroUsize>, Failure> {
        some_workers("readers", &self.readers)
    }

    /// Sessions over all devices; `None` is left to the devices.
    pub(super) fn sessions(&self) -> Result<Option<NonZeroUsize>, Failure> {
        some_workers("sessions", &self.sessions)
    }

    /// Probability from which a place belongs to a region.
    pub(super) fn threshold(&self) -> Result<f64, Failure> {
        Ok(fraction("threshold", &self.threshold)?.unwrap_or(0.5))
    }

    /// What unreadable tiles, and outputs that are no numbers, do.
    pub(super) fn policies(&self) -> Result<(OnFailure, OnFailure), Failure> {
        Ok((policy("on_tile_error", &self.on_tile_error)?, policy("on_nonfinite", &self.on_nonfinite)?))
    }

    /// Whether ICC profiles are applied.
    pub(super) fn icc(&self) -> bool {
        self.icc.unwrap_or(false)
    }

    /// Whether only the plan is shown.
    pub(super) fn dry_run(&self) -> bool {
        self.dry_run.unwrap_or(false)
    }

    /// How progress is shown.
    pub(super) fn progress(&self) -> Style {
        match (self.quiet, self.log_json) {
            (Some(true), _) => Style::Quiet,
            (_, Some(true)) => Style::Json,
            _ => Style::People,
        }
    }

    /// How the cohort is run.
    pub(super) fn cohort(&self) -> Result<CohortOptions, Failure> {
        let is_set = |flag: Option<bool>| flag.unwrap_or(false);
        Ok(CohortOptions {
            force: is_set(self.force),
            fail_fast: is_set(self.fail_fast),
            profile: is_set(self.profile),
            memory_limit: self.memory_limit()?,
        })
    }

    /// Bytes of the host's memory that a run may take.
    fn memory_limit(&self) -> Result<Option<u64>, Failure> {
        let wrong = |text: &Text| invalid("memory_limit", &text.0, "give a size above 0 such as 2GiB, 800MiB or 2GB");
        let limit = self.memory_limit.as_ref().map(|text| (text, text.0.trim().parse::<ByteSize>()));
        limit
            .map(|(text, size)| size.ok().map(|size| size.0).filter(|size| *size > 0).ok_or_else(|| wrong(text)))
            .transpose()
    }
}

impl BareOptions {
    /// The model that a bare `.onnx` file is, made for `target_mpp`.
    pub(super) fn model(&self, target_mpp: Option<Mpp>) -> Result<BareModel, Failure> {
        Ok(BareModel {
            task: parse("task", &self.task)?,
            tile_size: parse("tile_size", &self.tile_size)?,
            target_mpp,
            class_names: self.class_names.as_ref().map(|text| text.0.split(',').map(|n| n.trim().to_owned()).collect()),
            mean: channels("mean", &self.mean)?,
            std: channels("std", &self.std)?,
            activation: parse("activation", &self.activation)?,
            pool: parse("pool", &self.pool)?,
            ..BareModel::default()
        })
    }
}

/// Parses one number for each of R, G and B.
fn channels(name: &str, value: &Option<Text>) -> Result<Option<[f32; 3]>, Failure> {
    let Some(text) = value else { return Ok(None) };
    let numbers: Result<Vec<f32>, _> = text.0.split(',').map(|number| number.trim().parse()).collect();
    let numbers = numbers.ok().and_then(|numbers| <[f32; 3]>::try_from(numbers).ok());
    numbers.map(Some).ok_or_else(|| invalid(name, &text.0, "give three numbers such as 0.5,0.5,0.5"))
}

/// Parses a set option; the message names the flag.
pub(crate) fn parse<T: FromStr<Err: Display>>(name: &str, value: &Option<Text>) -> Result<Option<T>, Failure> {
    value.as_ref().map(|text| text.0.parse().map_err(|error: T::Err| invalid(name, &text.0, error))).transpose()
}

fn some_workers(name: &str, value: &Option<Text>) -> Result<Option<NonZeroUsize>, Failure> {
    value.as_ref().map(|text| workers(&text.0).map_err(|error| invalid(name, &text.0, error))).transpose()
}

/// Parses a number of 0..=1.
fn fraction(name: &str, value: &Option<Text>) -> Result<Option<f64>, Failure> {
    match parse::<f64>(name, value)? {
        Some(number) if !(0.0..=1.0).contains(&number) => Err(invalid(name, number, "must be between 0 and 1")),
        number => Ok(number),
    }
}

/// Parses one of a few words.
fn policy(name: &str, value: &Option<Text>) -> Result<OnFailure, Failure> {
    match value.as_ref().map_or("fail", |text| text.0.as_str()) {
        "fail" => Ok(OnFailure::Fail),
        "skip" => Ok(OnFailure::Skip),
        other => Err(invalid(name, other, "known are fail and skip")),
    }
}

fn tissue(text: &str) -> Result<TissueSource, Failure> {
    let path = Path::new(text);
    let extension = path.extension().map(|extension| extension.to_string_lossy().to_ascii_lowercase());
    match (text, extension.as_deref()) {
        ("otsu", _) => Ok(TissueSource::Otsu),
        ("none", _) => Ok(TissueSource::None),
        (_, Some("png")) => Ok(TissueSource::Png(path.to_owned())),
        (_, Some("geojson" | "json")) => Ok(TissueSource::GeoJson(path.to_owned())),
        _ => Err(invalid("tissue", text, "give otsu, none, a .png or a .geojson file")),
    }
}

fn region(text: &str) -> Result<Level0Rect, Failure> {
    let wrong = || invalid("region", text, "give X,Y,W,H in level-0 pixels, the last two above 0");
    let numbers: Vec<i64> =
        text.split(',').map(|number| number.trim().parse()).collect::<Result<_, _>>().map_err(|_| wrong())?;
    match numbers[..] {
        [x, y, width, height] if width > 0 && height > 0 => Ok(Level0Rect { x, y, width, height }),
        _ => Err(wrong()),
    }
}

fn invalid(name: &str, value: impl Display, reason: impl Display) -> Failure {
    Failure::usage(format!("--{} {value}: {reason}", name.replace('_', "-")))
}
