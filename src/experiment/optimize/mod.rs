//! Makes faster variants of a model, and proves each before it enters the card.
//!
//! `recipe` says which passes make which graph, `int8` how a quantised one is found, `trial` measures a candidate
//! against the original: it must load, run any batch, give numbers, agree, and be no slower to be recommended.

mod int8;
mod recipe;
mod trial;

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use self::trial::{Trial, Verdict};
use super::ExperimentError;
use super::probe::Probe;
use super::tiles::TileSet;
use crate::inference::{BareModel, ModelCard, Provider, Variant};
use crate::onnx::lora::{self, Adapter};
use crate::onnx::passes::fp16::{Fp16Options, to_fp16};
use crate::onnx::passes::image_input::{Normalization, take_pixels};
use crate::onnx::passes::{Outcome, PassReport};
use crate::onnx::{Model, Rewriter};
use crate::output::{AtomicFile, write_atomic};
use crate::report::{NodeRecord, PassRecord, VariantRecord};

/// What is written beside the models.
const OWN_FILES: [&str; 2] = ["card.toml", "optimize.json"];

/// What variants are made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// The kernels of ONNX Runtime's CPU provider.
    Cpu,
    /// Intel's OpenVINO on the CPU.
    OpenVino,
    /// The kernels of its CUDA provider.
    Cuda,
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cpu => "cpu",
            Self::OpenVino => "openvino",
            Self::Cuda => "cuda",
        })
    }
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = [Self::Cpu, Self::OpenVino, Self::Cuda].into_iter().find(|target| target.to_string() == text);
        known.ok_or_else(|| format!("{text:?} is none of cpu, openvino, cuda"))
    }
}

/// How a variant computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Precision {
    /// 32-bit floats.
    Fp32,
    /// 16-bit floats.
    Fp16,
    /// 8-bit integers.
    Int8,
}

impl FromStr for Precision {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "fp32" => Ok(Self::Fp32),
            "fp16" => Ok(Self::Fp16),
            "int8" => Ok(Self::Int8),
            _ => Err(format!("{text:?} is none of fp32, fp16, int8")),
        }
    }
}

/// What is to be made.
#[derive(Clone, Debug)]
pub struct OptimizeRequest {
    /// For which kernels.
    pub target: Target,
    /// At which precisions, each once.
    pub precisions: Vec<Precision>,
    /// The tiles that variants are compared with the original on.
    pub tiles: TileSet,
    /// The tiles that tell INT8 which values occur.
    pub calibration: Option<TileSet>,
    /// An adapter that becomes part of the model.
    pub lora: Option<PathBuf>,
    /// Whether variants take bytes, and normalise by themselves.
    pub takes_bytes: bool,
    /// Whether FP16 variants keep 32-bit inputs and outputs.
    pub keeps_io: bool,
    /// The least mean cosine between the raw outputs of an INT8 variant and the original's.
    pub min_cosine: f64,
    /// Whether INT8 weights are left 7 bits, for CPUs without VNNI.
    pub reduce_range: bool,
    /// How long the speed of the candidates of one precision may be measured.
    pub most_time: Duration,
    /// The folder of the model that is made.
    pub out: PathBuf,
}

/// What was made.
#[derive(Clone, Debug)]
pub struct Optimized {
    /// The card of the new folder.
    pub card: ModelCard,
    /// Every candidate, those that were dropped too.
    pub variants: Vec<VariantRecord>,
}

/// A graph on its way to be a variant.
struct Candidate {
    name: &'static str,
    model: Model,
    passes: Vec<PassReport>,
    provider: Provider,
    options: BTreeMap<String, String>,
    /// What its user should know beside what is measured.
    note: String,
}

/// Makes the variants and writes the folder; `say` is told what is being done.
///
/// # Errors
/// [`ExperimentError`] if the model can't be read, rewritten or run, or something asked for can't be made.
pub fn optimize(
    card: &ModelCard,
    request: &OptimizeRequest,
    say: &mut dyn FnMut(&str),
) -> Result<Optimized, ExperimentError> {
    refuse(request)?;
    let source = card.default_variant()?;
    not_its_own(source, &request.out)?;
    let mut model = source.load()?;
    model.embed_weights(&source.file)?;
    let contract = card.check(&model, &source.file)?;
    let probe = Probe { card, contract: &contract, tiles: &request.tiles };
    std::fs::create_dir_all(&request.out).map_err(|source| file_error(&request.out, "written", source))?;
    let mut made = existing(card, source, request)?;

    let adapter = request.lora.as_deref().map(Adapter::load).transpose()?;
    let unmerged = adapter.as_ref().map(|adapter| beside(&model, adapter)).transpose()?;
    let (model, merged) = match &adapter {
        Some(adapter) => merge(model, adapter)?,
        None => (model, None),
    };
    // With an adapter, what it makes of the model is the original that variants are held against.
    let original = place(&request.out, "fp32", source, merged.is_some().then_some(&model))?;
    made.variants.insert("fp32".to_owned(), original.clone());
    let trial = Trial::new(&made, &original, request)?;

    let mut rewriter = Rewriter::new(model)?;
    let mut passes: Vec<PassReport> = merged.into_iter().collect();
    say("folding constants and norms");
    passes.extend(recipe::clean(&mut rewriter, &probe)?);
    let graphs = Graphs { clean: rewriter, passes, probe: &probe, request };

    let mut variants = Vec::new();
    let mut enter_best = |candidates: Vec<Candidate>, say: &mut dyn FnMut(&str)| {
        let tried = trial.judge(candidates, say)?;
        let best = best_of(&tried);
        for (index, verdict) in tried.into_iter().enumerate() {
            variants.push(enter(&mut made, verdict, Some(index) == best, request)?);
        }
        Ok::<(), ExperimentError>(())
    };
    if let Some(unmerged) = unmerged {
        enter_best(vec![unmerged], say)?;
    }
    let mut enter_all = || {
        for precision in &request.precisions {
            let candidates = match (precision, request.target) {
                (Precision::Fp32, Target::Cpu) => graphs.for_cpu()?,
                (Precision::Fp32, Target::OpenVino) => vec![graphs.for_openvino()?],
                (Precision::Fp32, Target::Cuda) => vec![graphs.for_cuda("fp32-cuda")?],
                (Precision::Fp16, _) => vec![graphs.fp16()?],
                (Precision::Int8, _) => {
                    say("calibrating");
                    int8::candidates(&graphs, &trial, say)?
                }
            };
            enter_best(candidates, say)?;
        }
        Ok::<(), ExperimentError>(())
    };
    let outcome = enter_all();
    // Also after a precision that can't be made: what was made before it is good.
    write_card(&mut made, &request.out)?;
    outcome?;
    Ok(Optimized { card: made, variants })
}

/// The folder of the model itself is never written to.
fn not_its_own(source: &Variant, out: &Path) -> Result<(), ExperimentError> {
    let folder = source.file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let is_same =
        std::fs::canonicalize(out).ok().is_some_and(|out| std::fs::canonicalize(folder).is_ok_and(|own| own == out));
    if is_same {
        let what = "is the folder of the model itself, which is never changed";
        return Err(ExperimentError::InTheWay { path: out.to_owned(), what });
    }
    Ok(())
}

/// Of several candidates with one name only one can enter the card: among those that passed, and are nearly as fast as
/// the fastest of them, the one that agrees most.
fn best_of(tried: &[Verdict]) -> Option<usize> {
    /// Less than what one machine differs from the next.
    const NEARLY: f64 = 0.95;
    let sound = || tried.iter().enumerate().filter(|(_, verdict)| verdict.is_sound);
    let fastest = sound().map(|(_, verdict)| verdict.speed()).fold(0.0, f64::max);
    let fast = sound().filter(|(_, verdict)| verdict.speed() >= NEARLY * fastest);
    let agreement = |verdict: &Verdict| verdict.record.agreement.mean_cosine;
    fast.max_by(|a, b| agreement(a.1).total_cmp(&agreement(b.1))).map(|(index, _)| index)
}

/// What makes no sense is refused before any work.
fn refuse(request: &OptimizeRequest) -> Result<(), ExperimentError> {
    let has_int8 = request.precisions.contains(&Precision::Int8);
    if has_int8 && request.target == Target::Cuda {
        let why = "ONNX Runtime's CUDA provider has no kernels for quantised operators";
        return Err(ExperimentError::Refused { what: "INT8", device: "CUDA", why });
    }
    if request.precisions.contains(&Precision::Fp16) && request.target == Target::OpenVino {
        let why = "it chooses its precision by itself, bf16 where the processor has it";
        return Err(ExperimentError::Refused { what: "FP16", device: "OpenVINO", why });
    }
    if has_int8 && request.calibration.is_none() {
        return Err(ExperimentError::NoCalibration);
    }
    Ok(())
}

/// The rewritten graphs that variants are made from.
struct Graphs<'a> {
    clean: Rewriter,
    passes: Vec<PassReport>,
    probe: &'a Probe<'a>,
    request: &'a OptimizeRequest,
}

impl Graphs<'_> {
    /// What may be faster on a CPU; only what measures faster is recommended.
    fn for_cpu(&self) -> Result<Vec<Candidate>, ExperimentError> {
        let mut candidates = vec![self.candidate("fp32-rewritten", self.clean.clone(), Vec::new(), "cleaned")?];
        let mut convolutions = self.clean.clone();
        let passes = recipe::up_convolutions(&mut convolutions)?;
        if passes.iter().any(|pass| pass.applied() > 0) {
            candidates.push(self.candidate(
                "fp32-rewritten",
                convolutions,
                passes,
                "cleaned, up-convolutions rewritten",
            )?);
        }
        let mut transformer = self.clean.clone();
        let passes = recipe::transformer(&mut transformer, self.probe)?;
        if passes.iter().any(|pass| pass.applied() > 0) {
            candidates.push(self.candidate("fp32-rewritten", transformer, passes, "cleaned, transformer fused")?);
        }
        Ok(candidates)
    }

    /// OpenVINO fuses by itself, and knows standard operators alone.
    fn for_openvino(&self) -> Result<Candidate, ExperimentError> {
        let candidate = self.candidate("fp32-openvino", self.clean.clone(), Vec::new(), "cleaned")?;
        Ok(Candidate { provider: Provider::OpenVino, ..candidate })
    }

    /// What CUDA's kernels are fastest with.
    fn for_cuda(&self, name: &'static str) -> Result<Candidate, ExperimentError> {
        let mut rewriter = self.clean.clone();
        let mut passes = recipe::transformer(&mut rewriter, self.probe)?;
        passes.extend(recipe::up_convolutions(&mut rewriter)?);
        passes.extend(recipe::split_concats(&mut rewriter)?);
        let has_convolutions = rewriter.ids_of("Conv").len() > 1;
        let mut candidate = self.candidate(name, rewriter, passes, "fused for CUDA")?;
        candidate.provider = Provider::Cuda;
        if has_convolutions {
            // Bias and rectifier in the convolution's kernel, and the layout that tensor cores want.
            candidate.options = ["fuse_conv_bias", "prefer_nhwc"].map(|key| (key.to_owned(), "1".to_owned())).into();
        }
        Ok(candidate)
    }

    fn fp16(&self) -> Result<Candidate, ExperimentError> {
        let options = Fp16Options { keep_io: self.request.keeps_io, ..Fp16Options::default() };
        let mut candidate = match self.request.target {
            Target::Cuda => self.for_cuda("fp16")?,
            Target::Cpu | Target::OpenVino => self.candidate(
                "fp16",
                self.clean.clone(),
                Vec::new(),
                "saves disk only: ONNX Runtime computes it in 32 bits on a CPU",
            )?,
        };
        let mut rewriter = Rewriter::new(candidate.model)?;
        candidate.passes.push(to_fp16(&mut rewriter, &options)?);
        candidate.model = rewriter.finish()?;
        Ok(candidate)
    }

    fn candidate(
        &self,
        name: &'static str,
        mut rewriter: Rewriter,
        passes: Vec<PassReport>,
        note: &str,
    ) -> Result<Candidate, ExperimentError> {
        let mut passes: Vec<PassReport> = self.passes.iter().cloned().chain(passes).collect();
        if self.request.takes_bytes {
            let normalization = Normalization { mean: self.probe.card.mean, std: self.probe.card.std };
            passes.push(take_pixels(&mut rewriter, &self.probe.contract.input, &normalization)?);
        }
        let (provider, options) = (Provider::Cpu, BTreeMap::new());
        Ok(Candidate { name, model: rewriter.finish()?, passes, provider, options, note: note.to_owned() })
    }
}

/// The model with the adapter beside its weights: slower, and what merging is proven against.
fn beside(model: &Model, adapter: &Adapter) -> Result<Candidate, ExperimentError> {
    let mut rewriter = Rewriter::new(model.clone())?;
    let passes = vec![lora::attach(&mut rewriter, adapter)?];
    let note = "the adapter beside the weights, for benchmarks".to_owned();
    let (provider, options) = (Provider::Cpu, BTreeMap::new());
    Ok(Candidate { name: "lora-unmerged", model: rewriter.finish()?, passes, provider, options, note })
}

/// The model with the adapter in its weights, and what was merged.
fn merge(model: Model, adapter: &Adapter) -> Result<(Model, Option<PassReport>), ExperimentError> {
    let mut rewriter = Rewriter::new(model)?;
    let report = lora::merge(&mut rewriter, adapter)?;
    Ok((rewriter.finish()?, Some(report)))
}

/// The card that the folder has, if it is of the same weights and says the same of them; else this card without
/// variants.
fn existing(card: &ModelCard, source: &Variant, request: &OptimizeRequest) -> Result<ModelCard, ExperimentError> {
    let out = &request.out;
    let path = out.join("card.toml");
    if !path.exists() {
        return Ok(ModelCard { path, variants: BTreeMap::new(), ..card.clone() });
    }
    let found = ModelCard::load(&path, &BareModel::default())?;
    let plain = |card: &ModelCard| {
        let (path, variants) = (PathBuf::new(), BTreeMap::new());
        ModelCard { path, variants, description: String::new(), metrics: Default::default(), ..card.clone() }
    };
    let is_of_same_weights = found.variants.get("fp32").is_some_and(|original| original.sha256 == source.sha256);
    if plain(&found) != plain(card) || !is_of_same_weights || request.lora.is_some() {
        return Err(ExperimentError::Occupied { path: out.to_owned(), found: found.name });
    }
    Ok(found)
}

/// Puts the original into the folder: its files as they are, or the model that an adapter made of it.
fn place(out: &Path, name: &str, source: &Variant, merged: Option<&Model>) -> Result<Variant, ExperimentError> {
    let file = out.join(source.file.file_name().unwrap_or_default());
    if let Some(model) = merged {
        model.clone().save_with_weights(&file)?;
        return Ok(Variant::of_file(name, &file)?);
    }
    let model = Model::load(&source.file)?;
    let folder = source.file.parent().unwrap_or(Path::new(""));
    for from in model.weight_files(&source.file)?.into_iter().chain([source.file.clone()]) {
        let to = out.join(from.strip_prefix(folder).unwrap_or(&from));
        if OWN_FILES.iter().any(|own| to == out.join(own)) {
            let what = "has the name of a file that is written beside it";
            return Err(ExperimentError::InTheWay { path: from, what });
        }
        copy(&from, &to)?;
    }
    Ok(Variant { name: name.to_owned(), file, ..source.clone() })
}

/// Copies a file under a temporary name first.
fn copy(from: &Path, to: &Path) -> Result<(), ExperimentError> {
    let mut source = File::open(from).map_err(|source| file_error(from, "read", source))?;
    let mut file = AtomicFile::create(to)?;
    std::io::copy(&mut source, &mut file).map_err(|source| file_error(to, "written", source))?;
    file.commit()?;
    Ok(())
}

/// Gives the chosen candidate its file and its place in the card; the others leave only their record.
fn enter(
    made: &mut ModelCard,
    verdict: Verdict,
    is_taken: bool,
    request: &OptimizeRequest,
) -> Result<VariantRecord, ExperimentError> {
    let Verdict { mut record, model, variant, .. } = verdict;
    if !is_taken {
        if record.is_recommended {
            record.note.push_str("; another candidate is better");
            record.is_recommended = false;
        }
        return Ok(record);
    }
    let file = free_name(made, &record.name, &request.out)?;
    model.save_with_weights(&file)?;
    let Variant { sha256, .. } = Variant::of_file(&record.name, &file)?;
    let weights = Model::load(&file)?.weight_files(&file)?;
    let bytes = weights.iter().chain([&file]).filter_map(|file| std::fs::metadata(file).ok());
    record.bytes = bytes.map(|metadata| metadata.len()).sum();
    record.sha256.clone_from(&sha256);
    record.file = file.file_name().map(|name| name.to_string_lossy().into_owned());
    let note = Some(record.note.clone());
    made.variants.insert(record.name.clone(), Variant { file, sha256, note, ..variant });
    Ok(record)
}

/// A file for a variant that is neither the original nor one of its weights.
fn free_name(made: &ModelCard, variant: &str, out: &Path) -> Result<PathBuf, ExperimentError> {
    let original = &made.default_variant()?.file;
    let mut taken = Model::load(original)?.weight_files(original)?;
    taken.push(original.clone());
    let is_free = |file: &PathBuf| !taken.contains(file) && !taken.contains(&file.with_extension("onnx.data"));
    let named = |end: &str| out.join(format!("{}-{variant}{end}.onnx", made.name));
    let numbered = (2..).map(|number| named(&format!("-{number}")));
    Ok(std::iter::once(named("")).chain(numbered).find(is_free).unwrap_or_else(|| named("")))
}

fn write_card(card: &mut ModelCard, out: &Path) -> Result<(), ExperimentError> {
    card.path = out.join("card.toml");
    let text = card.to_toml()?;
    write_atomic(&card.path, text.as_bytes())?;
    Ok(())
}

pub(super) fn file_error(path: &Path, doing: &'static str, source: std::io::Error) -> ExperimentError {
    ExperimentError::File { path: path.to_owned(), doing, source }
}

/// A pass's report as it is written down.
fn record(report: &PassReport) -> PassRecord {
    let node = |finding: &crate::onnx::passes::Finding| {
        let (is_applied, what) = match &finding.outcome {
            Outcome::Applied(what) => (true, what.clone()),
            Outcome::Kept(why) => (false, why.clone()),
        };
        NodeRecord { node: finding.node.clone(), op: finding.op.clone(), is_applied, what }
    };
    PassRecord {
        pass: report.pass.to_owned(),
        applied: report.applied(),
        nodes: report.findings.iter().map(node).collect(),
    }
}
