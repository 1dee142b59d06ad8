//! Sessions of ONNX Runtime: opens them, feeds tiles, reads and checks outputs.
//!
//! [`SessionFactory`] checks the model once and then opens sessions cheaply; sessions on the CPU share packed weights.
//! Invariants: a provider that doesn't load is an error; operators that carry the work don't run on the CPU behind a
//! GPU's back; no output is read whose type or shape wasn't checked.

mod graph_cache;
mod input;
mod output;

use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use ndarray::{Array2, Array4, ShapeError};
use ort::session::RunOptions;
use ort::session::builder::{GraphOptimizationLevel, PrepackedWeights, SessionBuilder};
use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

use self::graph_cache::GraphCache;
use self::input::Input;
use super::card::{ModelCard, Task, Variant};
use super::contract::{Contract, Layout};
use super::device::{self, Device, Provider};
use super::error::SessionError;
use super::pixels::TileResizer;
use super::placement::Placement;
use super::{Prediction, Session};
use crate::native;

/// Where and how sessions run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionOptions {
    /// The device, as [`device::resolve`] found it.
    pub device: Device,
    /// The provider, which runs on that device.
    pub provider: Provider,
    /// Threads within an operator on the CPU; `None` leaves it to ONNX Runtime: one per core.
    pub intra_threads: Option<NonZeroUsize>,
}

/// Opens sessions of one model on one device. Cloning shares everything: a stop reaches the sessions of all clones.
#[derive(Clone)]
pub struct SessionFactory {
    shared: Arc<Shared>,
}

struct Shared {
    card: ModelCard,
    variant: Variant,
    contract: Contract,
    options: SessionOptions,
    ignored_options: Vec<String>,
    packed_weights: PrepackedWeights,
    /// Whether all weights lie in the model's own file.
    is_whole: bool,
    /// Where the optimised graph is kept, if it is.
    graph_cache: Option<GraphCache>,
    /// Threads that prepare and read back the batches of a GPU. They do nothing else: it would wait while those that all
    /// others share are at long tasks, such as compressing maps. On the CPU `None`: these others do it.
    copying: Option<ThreadPool>,
    /// True if the first batch is profiled to learn where the operators run.
    wants_placement: bool,
    placement: OnceLock<Placement>,
    stop: StopHandle,
}

/// Ends the running and all later batches of a factory's sessions; may be kept and used by any thread.
#[derive(Clone)]
pub struct StopHandle {
    run_options: Arc<RunOptions>,
    is_stopped: Arc<AtomicBool>,
}

impl StopHandle {
    fn new() -> Result<Self, ort::Error> {
        Ok(Self { run_options: Arc::new(RunOptions::new()?), is_stopped: Arc::default() })
    }

    /// Makes running batches end with [`SessionError::Stopped`] after the operator that they are at, and later ones
    /// at once.
    pub fn stop(&self) {
        self.is_stopped.store(true, Ordering::SeqCst);
        // It fails only for a null pointer; the flag alone then stops between batches.
        self.run_options.terminate().ok();
    }

    fn is_stopped(&self) -> bool {
        self.is_stopped.load(Ordering::SeqCst)
    }
}

impl SessionFactory {
    /// Reads and checks the model of `variant`, a variant of `card`.
    ///
    /// Of the variant's options, those with a dot in their name (`session.…`, `optimization.…`) are ONNX Runtime's
    /// session settings and always apply. The others are the provider's and apply only on the provider that the
    /// variant names, or on any but `cpu` if it names none; see [`Self::ignored_options`].
    ///
    /// # Errors
    /// [`SessionError::Native`] if ONNX Runtime doesn't load, [`SessionError::Model`] if file, hash or card are wrong,
    /// [`SessionError::Mismatch`] if the provider isn't for the device.
    pub fn new(card: &ModelCard, variant: &Variant, options: SessionOptions) -> Result<Self, SessionError> {
        let SessionOptions { device, provider, .. } = options;
        if !provider.runs_on(device) {
            return Err(SessionError::Mismatch { provider, device });
        }
        native::onnx_runtime()?;
        let model = variant.load()?;
        let contract = card.check(&model, &variant.file)?;
        let is_whole = model.weight_files(&variant.file).is_ok_and(|files| files.is_empty());
        let is_gpu = matches!(device, Device::Cuda { .. });
        let copying = is_gpu.then(|| ThreadPoolBuilder::new().build()).transpose().map_err(SessionError::Threads)?;
        let stop = StopHandle::new().map_err(|source| open_error(variant, provider, source))?;
        let is_ignored = |key: &&String| !is_session_setting(key) && !takes_options(provider, variant);
        let shared = Shared {
            card: card.clone(),
            variant: variant.clone(),
            contract,
            options,
            ignored_options: variant.options.keys().filter(is_ignored).cloned().collect(),
            packed_weights: PrepackedWeights::new(),
            is_whole,
            graph_cache: None,
            copying,
            wants_placement: provider != Provider::Cpu,
            placement: OnceLock::new(),
            stop,
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// The same that keeps the optimised graph in a folder, and takes it from there if an earlier one has kept it; before the
    /// first session.
    ///
    /// # Errors
    /// [`SessionError::NoGraphCache`] on another provider than the CPU's, [`SessionError::GraphCache`] if the folder can't be
    /// made, or the model is too large or in several files.
    pub fn keeping_graph(mut self, folder: &Path) -> Result<Self, SessionError> {
        if let Some(shared) = Arc::get_mut(&mut self.shared) {
            if shared.options.provider != Provider::Cpu {
                return Err(SessionError::NoGraphCache(shared.options.provider));
            }
            shared.graph_cache = Some(GraphCache::of(folder, &shared.variant, shared.is_whole)?);
        }
        Ok(self)
    }

    /// The optimised graph that sessions are opened from, if an earlier run has kept it.
    #[must_use]
    pub fn kept_graph(&self) -> Option<&Path> {
        self.shared.graph_cache.as_ref()?.kept()
    }

    /// Opens a session.
    ///
    /// # Errors
    /// [`SessionError::Open`] or [`SessionError::OutOfMemory`] with ONNX Runtime's reason.
    pub fn open(&self) -> Result<OrtSession, SessionError> {
        OrtSession::open(Arc::clone(&self.shared))
    }

    /// Opens so many sessions; on the CPU at once, for each optimises the graph and packs the weights on a core of its own.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_all(&self, count: usize) -> Result<Vec<OrtSession>, SessionError> {
        match self.shared.options.provider {
            Provider::Cpu => (0..count).into_par_iter().map(|_| self.open()).collect(),
            _ => (0..count).map(|_| self.open()).collect(),
        }
    }

    /// How the model is fed and read.
    #[must_use]
    pub fn contract(&self) -> &Contract {
        &self.shared.contract
    }

    /// The batch size that is fixed in the graph; `None` if any will do. Sessions take any number of tiles: they cut
    /// or fill up batches themselves, so another number only wastes time.
    #[must_use]
    pub fn max_batch(&self) -> Option<usize> {
        self.shared.contract.fixed_batch
    }

    /// Where its sessions run.
    #[must_use]
    pub fn device(&self) -> Device {
        self.shared.options.device
    }

    /// Whether its sessions run on a GPU.
    #[must_use]
    pub fn runs_on_gpu(&self) -> bool {
        matches!(self.device(), Device::Cuda { .. })
    }

    /// Names of the variant's options that are for another provider and were left out.
    #[must_use]
    pub fn ignored_options(&self) -> &[String] {
        &self.shared.ignored_options
    }

    /// Where the operators run; known after the first batch of any session, and never on the CPU provider, where
    /// there is nothing to know.
    #[must_use]
    pub fn placement(&self) -> Option<&Placement> {
        self.shared.placement.get()
    }

    /// Ends the sessions' batches from elsewhere.
    #[must_use]
    pub fn stop_handle(&self) -> StopHandle {
        self.shared.stop.clone()
    }

    /// A batch size that suits the device with so many sessions on it: a constant on the CPU; on a GPU the largest power
    /// of two that fits, up to 256, for maps 32, judged by what a trial batch takes.
    ///
    /// # Errors
    /// [`SessionError`] if the trial fails for another reason than memory.
    pub fn auto_batch_size(&self, sessions: usize) -> Result<usize, SessionError> {
        let cap = if self.shared.card.task == Task::Segmentation { 32 } else { 256 };
        let size = match self.shared.options.device {
            Device::Cpu => CPU_BATCH,
            gpu @ Device::Cuda { .. } => self.trial(gpu, sessions, cap)?,
        };
        Ok(self.max_batch().unwrap_or(size))
    }

    fn trial(&self, gpu: Device, sessions: usize, cap: usize) -> Result<usize, SessionError> {
        const TRIAL: usize = 8;
        let side = self.shared.card.tile_size as usize;
        let tile = vec![128; side * side * 3];
        let mut session = self.open()?;
        // The first batch also loads kernels and weights, which don't grow with the batch.
        session.predict(&[&tile])?;
        let Some(free_after_one) = device::free_bytes(gpu) else { return Ok(TRIAL) };
        match session.predict(&[&tile[..]; TRIAL]) {
            Ok(_) => {}
            Err(error) if error.is_out_of_memory() => return Ok(1),
            Err(error) => return Err(error),
        }
        let free = device::free_bytes(gpu).unwrap_or(free_after_one);
        let per_tile = free_after_one.saturating_sub(free) / (TRIAL as u64 - 1);
        // The GPU is given f32 input, whatever the arena already had room for.
        let input_bytes = tile.len() as u64 * 4;
        Ok(fit_batch(per_tile.max(input_bytes), free_after_one / sessions.max(1) as u64, cap))
    }
}

/// On the CPU: batches of 2 to 16 were no faster than 1 (cells-unet, cells-vit, ViT-S and a UNet of base 32, on 2
/// cores), and 16 tiles of cells-unet took 1 GB. A small batch also stays in the caches, ends sooner, and lets a model
/// that quantises per batch see one tile at a time.
const CPU_BATCH: usize = 1;

/// Tiles of a batch from which preparing and reading them is shared among the cores: a GPU waits for neither. Below it
/// the hand-over costs more than it gains.
const SHARED_WORK: usize = 8;

/// Does work on threads of its own, if there are any.
fn on<R: Send>(threads: Option<&ThreadPool>, work: impl FnOnce() -> R + Send) -> R {
    match threads {
        Some(threads) => threads.install(work),
        None => work(),
    }
}

/// The largest power of two up to `cap` whose tiles fit into half of the free memory: the arena may double when it
/// grows.
fn fit_batch(bytes_per_tile: u64, free_bytes: u64, cap: usize) -> usize {
    let fits = free_bytes / 2 / bytes_per_tile.max(1);
    let fits = usize::try_from(fits).unwrap_or(usize::MAX).clamp(1, cap);
    1 << fits.ilog2()
}

/// How many images a batch of `tiles` is run as. A GPU's libraries plan their kernels anew for every size, which takes
/// seconds for a net of convolutions, where the images that fill up a slide's last batch take milliseconds.
fn filled_up(device: Device, tiles: usize, largest_batch: usize) -> usize {
    match device {
        Device::Cpu => tiles,
        Device::Cuda { .. } => tiles.max(largest_batch),
    }
}

/// Session settings have a dotted name, provider options don't.
fn is_session_setting(key: &str) -> bool {
    key.contains('.')
}

fn takes_options(provider: Provider, variant: &Variant) -> bool {
    match variant.provider {
        Some(named) => named == provider,
        None => provider != Provider::Cpu,
    }
}

fn open_error(variant: &Variant, provider: Provider, source: ort::Error) -> SessionError {
    if is_out_of_memory(source.message()) {
        return SessionError::OutOfMemory { path: variant.file.clone(), batch: 0, source: Some(source) };
    }
    SessionError::Open { path: variant.file.clone(), provider, source }
}

/// What ONNX Runtime, CUDA, cuDNN and the C++ library say when memory runs out.
fn is_out_of_memory(message: &str) -> bool {
    const SIGNS: [&str; 10] = [
        "failed to allocate memory",
        "smaller than requested bytes",
        "out of memory",
        "cudaerrormemoryallocation",
        "alloc_failed",
        "allocation_failed",
        "resource allocation failed",
        "bad_alloc",
        "bad allocation",
        "outofmemory",
    ];
    let message = message.to_lowercase();
    SIGNS.iter().any(|sign| message.contains(sign))
}

/// A model opened in ONNX Runtime.
pub struct OrtSession {
    session: ort::session::Session,
    shared: Arc<Shared>,
    input: Input,
    resizer: Option<TileResizer>,
    /// Holds the profile until the first batch is done.
    profile: Option<tempfile::TempDir>,
    /// Tiles of the largest batch so far.
    largest_batch: usize,
}

impl OrtSession {
    fn open(shared: Arc<Shared>) -> Result<Self, SessionError> {
        let environment = native::onnx_environment()?;
        let profile = (shared.wants_placement && shared.placement.get().is_none())
            .then(tempfile::tempdir)
            .transpose()
            .map_err(|source| SessionError::Placement { path: std::env::temp_dir(), source })?;
        let session = build(environment, &shared, profile.as_ref().map(tempfile::TempDir::path))?;
        let card = &shared.card;
        let input = Input::new(card, &shared.contract, input::page_locked(&session, shared.options.device));
        let resizer = card.resize.map(|side| TileResizer::new(card.tile_size, side));
        Ok(Self { session, input, resizer, profile, largest_batch: 0, shared })
    }

    /// Runs one batch that the graph can take, and appends the scores of `tiles`, activated and pooled, to `scores`.
    /// Returns the dimensions after the batch.
    fn run(&mut self, tiles: &[&[u8]], scores: &mut Vec<f32>) -> Result<[usize; 3], SessionError> {
        let Shared { card, contract, stop, options, copying, .. } = &*self.shared;
        self.largest_batch = self.largest_batch.max(tiles.len());
        let batch = contract.fixed_batch.unwrap_or(filled_up(options.device, tiles.len(), self.largest_batch));
        let side = contract.side;
        let shape = match contract.layout {
            Layout::Nchw => [batch, 3, side, side],
            Layout::Nhwc => [batch, side, side, 3],
        };
        let run_error = |source: ort::Error| {
            let path = self.shared.variant.file.clone();
            match (stop.is_stopped(), is_out_of_memory(source.message())) {
                (true, _) => SessionError::Stopped,
                (_, true) => SessionError::OutOfMemory { path, batch, source: Some(source) },
                _ => SessionError::Run { path, batch, source },
            }
        };
        let (input, resizer) = (&mut self.input, self.resizer.as_mut());
        on(copying.as_ref(), || input.fill(tiles, batch, contract.layout, resizer)).map_err(run_error)?;
        let input = self.input.view(shape).map_err(run_error)?;
        let outputs = self.session.run_with_options(ort::inputs![input], &*stop.run_options).map_err(run_error)?;
        let value = outputs.get(&contract.output);
        let read =
            value.and_then(|value| on(copying.as_ref(), || output::append(card, batch, tiles.len(), value, scores)));
        read.ok_or_else(|| SessionError::Output {
            path: self.shared.variant.file.clone(),
            output: contract.output.clone(),
            got: value.map_or_else(|| "missing".to_owned(), output::describe),
            expected: output::expected(card, batch),
        })
    }

    /// That the model gives another number of features for a second part of the same batch.
    pub(super) fn changing_shape(&self, error: &ShapeError) -> SessionError {
        SessionError::Output {
            path: self.shared.variant.file.clone(),
            output: self.shared.contract.output.clone(),
            got: format!("of changing shape ({error})"),
            expected: "one shape".to_owned(),
        }
    }

    /// After the first batch: reads where its operators ran, and goes on without a profile. After any: refuses to go on if
    /// heavy ones run on the CPU.
    fn check_placement(&mut self) -> Result<(), SessionError> {
        let Shared { variant, options: SessionOptions { provider, .. }, placement, .. } = &*self.shared;
        if let Some(folder) = self.profile.take() {
            let error = |source| SessionError::Placement { path: folder.path().to_owned(), source };
            let file = self.session.end_profiling().map_err(|source| error(std::io::Error::other(source)))?;
            placement.set(Placement::read(Path::new(&file)).map_err(error)?).ok();
        }
        match placement.get().and_then(|placement| placement.heavy_on_cpu(*provider)) {
            Some(nodes) => Err(SessionError::HeavyOnCpu { path: variant.file.clone(), provider: *provider, nodes }),
            None => Ok(()),
        }
    }
}

impl Session for OrtSession {
    fn predict(&mut self, tiles: &[&[u8]]) -> Result<Prediction, SessionError> {
        let side = self.shared.card.tile_size as usize;
        let expected = side * side * 3;
        if tiles.is_empty() {
            return Err(SessionError::EmptyBatch);
        }
        if let Some(index) = tiles.iter().position(|tile| tile.len() != expected) {
            return Err(SessionError::TileBytes { index, got: tiles[index].len(), expected });
        }
        let mut scores = Vec::new();
        let mut dims = [0; 3];
        for tiles in tiles.chunks(self.shared.contract.fixed_batch.unwrap_or(tiles.len())) {
            if self.shared.stop.is_stopped() {
                return Err(SessionError::Stopped);
            }
            let ran = self.run(tiles, &mut scores);
            if matches!(ran, Err(SessionError::OutOfMemory { .. })) {
                self.largest_batch = 0;
            }
            dims = ran?;
            self.check_placement()?;
        }
        let [channels, height, width] = dims;
        let rows = |scores| Array2::from_shape_vec((tiles.len(), channels), scores);
        let prediction = match self.shared.card.task {
            Task::Classification => rows(scores).map(Prediction::Classes),
            Task::Features => rows(scores).map(Prediction::Features),
            Task::Segmentation => {
                Array4::from_shape_vec((tiles.len(), channels, height, width), scores).map(Prediction::Map)
            }
        };
        prediction.map_err(|error| self.changing_shape(&error))
    }
}

/// Opens a session from the model, or from its optimised graph where that is kept.
fn build(
    environment: &ort::environment::Environment,
    shared: &Shared,
    profile: Option<&Path>,
) -> Result<ort::session::Session, SessionError> {
    let (variant, provider) = (&shared.variant, shared.options.provider);
    let failed = move |source| open_error(variant, provider, source);
    let mut builder = builder(environment, shared, profile).map_err(failed)?;
    let cache = shared.graph_cache.as_ref();
    if let Some(kept) = cache.and_then(GraphCache::kept) {
        let opened = builder.with_optimization_level(GraphOptimizationLevel::Disable).map_err(ort::Error::from);
        let opened = opened.and_then(|mut builder| builder.commit_from_file(kept));
        return opened.map_err(|source| SessionError::KeptGraph { path: kept.to_owned(), source });
    }
    let begun = cache.map_or(Ok(None), GraphCache::begin)?;
    if let Some(temporary) = &begun {
        builder = builder.with_optimized_model_path(temporary).map_err(|error| failed(error.into()))?;
    }
    let session = builder.commit_from_file(&variant.file).map_err(failed)?;
    if let Some((cache, temporary)) = cache.zip(begun) {
        cache.keep(temporary)?;
    }
    Ok(session)
}

fn builder(
    environment: &ort::environment::Environment,
    shared: &Shared,
    profile: Option<&Path>,
) -> Result<SessionBuilder, ort::Error> {
    let SessionOptions { device, provider, intra_threads } = shared.options;
    let settings = shared.variant.options.iter().map(|(key, value)| (key.as_str(), value.as_str()));
    let (settings, mut provider_options): (Vec<_>, Vec<_>) = settings.partition(|(key, _)| is_session_setting(key));
    if !takes_options(provider, &shared.variant) {
        provider_options.clear();
    }
    let mut providers = vec![device::dispatch(provider, device, &provider_options)];
    if provider == Provider::TensorRt {
        // It takes the parts of the graph that it knows; the rest must not fall through to the CPU.
        providers.push(device::dispatch(Provider::Cuda, device, &[]));
    }
    // Decoding, batching and writing share the cores: a thread that spins while it waits takes them away.
    let mut builder = ort::session::Session::builder(environment)?
        .with_execution_providers(providers)?
        .with_intra_op_spinning(false)?
        .with_inter_op_spinning(false)?;
    if let Some(threads) = intra_threads {
        builder = builder.with_intra_threads(threads.get())?;
    }
    if provider == Provider::Cpu {
        builder = builder.with_prepacked_weights(&shared.packed_weights)?;
    }
    if let Some(folder) = profile {
        builder = builder.with_profiling(folder.join("profile"))?;
    }
    for (key, value) in settings {
        builder = builder.with_config_entry(key, value)?;
    }
    Ok(builder)
}

#[cfg(test)]
mod tests;
