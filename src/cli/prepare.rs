//! From options to a loaded engine: the model's card, the device, the sessions, and the account of all of it.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::path::Path;

use slidestream::engine::config::{Emit, RunConfig};
use slidestream::engine::inputs::SlideInput;
use slidestream::engine::{Engine, cohort};
use slidestream::geometry::Overlap;
use slidestream::inference::{
    Device, DeviceRequest, ModelCard, Provider, ProviderRequest, Session, SessionFactory, SessionOptions, Task, device,
};
use slidestream::native;
use slidestream::report::{
    ExecutionRecord, HardwareRecord, LibraryRecord, ModelRecord, RUN_SCHEMA, RunRecord, Status,
};

use super::Failure;
use super::options::{RunOptions, TilingDefaults, parse};

/// Sessions on one GPU: while one copies and normalises, the other computes.
const SESSIONS_PER_GPU: usize = 2;

/// Everything that a run needs, loaded and checked.
pub(super) struct Prepared {
    pub(super) engine: Engine,
    pub(super) model: ModelRecord,
    pub(super) execution: ExecutionRecord,
    /// One per device.
    pub(super) factories: Vec<SessionFactory>,
}

impl Prepared {
    /// Loads the model at `path` as the options say.
    pub(super) fn new(path: &Path, options: &RunOptions) -> Result<Self, Failure> {
        native::openslide()?;
        let card = ModelCard::load(path, &options.bare_model()?)?;
        let variant = match options.variant() {
            Some(name) => card.variant(name)?,
            None => card.default_variant()?,
        };
        let tiling = options.tiling.config(&TilingDefaults {
            tile_size: card.tile_size,
            target_mpp: Some(card.mpp),
            overlap: Overlap::Pixels(card.overlap),
        })?;
        let emit = options.emit(applicable(card.task))?;
        let devices = parse::<DeviceRequest>("device", &options.device)?.unwrap_or(DeviceRequest::Auto);
        let provider = parse::<ProviderRequest>("provider", &options.provider)?.unwrap_or(ProviderRequest::Auto);
        let resolved = device::resolve(&devices, provider, variant.provider)?;

        let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        let on_cpu = resolved.provider == Provider::Cpu;
        let own_threads = matches!(resolved.provider, Provider::OpenVino);
        let sessions_per_device = match parse::<NonZeroUsize>("sessions", &options.sessions)? {
            Some(sessions) => sessions.get().div_ceil(resolved.devices.len()),
            None if on_cpu => cores,
            None if own_threads => 1,
            None => SESSIONS_PER_GPU,
        };
        // One thread a session: sessions side by side need no synchronisation inside an operator, and results do not
        // depend on their number.
        let intra_threads = if own_threads { None } else { Some(NonZeroUsize::MIN) };
        let factories: Vec<SessionFactory> = resolved
            .devices
            .iter()
            .map(|device| {
                let session = SessionOptions { device: *device, provider: resolved.provider, intra_threads };
                SessionFactory::new(&card, variant, session)
            })
            .collect::<Result<_, _>>()?;
        let mut sessions: Vec<Box<dyn Session>> = Vec::new();
        for factory in &factories {
            for _ in 0..sessions_per_device {
                sessions.push(Box::new(factory.open()?));
            }
        }
        let batch_size = match options.batch_size()? {
            Some(size) => size,
            None => {
                let sizes = factories.iter().map(SessionFactory::auto_batch_size).collect::<Result<Vec<_>, _>>()?;
                NonZeroUsize::new(sizes.into_iter().min().unwrap_or(1)).unwrap_or(NonZeroUsize::MIN)
            }
        };
        let readers = parse("readers", &options.readers)?.or(NonZeroUsize::new(cores)).unwrap_or(NonZeroUsize::MIN);
        let (on_tile_error, on_nonfinite) = options.policies()?;
        let config = RunConfig {
            tiling,
            threshold: options.threshold()?,
            emit,
            on_tile_error,
            on_nonfinite,
            icc: options.icc(),
            readers,
            batch_size,
        };
        let model = ModelRecord {
            name: card.name.clone(),
            variant: variant.name.clone(),
            file: variant.file.display().to_string(),
            sha256: variant.sha256.clone(),
            task: card.task.to_string(),
            classes: card.classes.iter().map(|class| class.name.clone()).collect(),
        };
        let execution = ExecutionRecord {
            device: resolved.devices.iter().map(Device::to_string).collect::<Vec<_>>().join(","),
            provider: resolved.provider.to_string(),
            reason: resolved.reason,
            placement: BTreeMap::new(),
            batch_size: batch_size.get(),
            readers: readers.get(),
            sessions: sessions.len(),
            threads_per_session: intra_threads.map_or(cores, NonZeroUsize::get),
        };
        Ok(Self { engine: Engine { card, config, sessions }, model, execution, factories })
    }

    /// The account of a run that begins now.
    pub(super) fn run_record(&self, slides: &[SlideInput]) -> RunRecord {
        RunRecord {
            schema: RUN_SCHEMA.to_owned(),
            status: Status::Running,
            started: cohort::now(),
            finished: None,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            command: std::env::args_os().map(|argument| argument.to_string_lossy().into_owned()).collect(),
            libraries: libraries(),
            hardware: hardware(),
            model: self.model.clone(),
            execution: self.execution.clone(),
            settings: self.engine.config.shaping_settings(&cohort::digests(&self.engine.config)),
            slides: BTreeMap::from([("asked for".to_owned(), slides.len() as u64)]),
        }
    }

    /// Where the graph's nodes ran; known once a batch was inferred on a GPU.
    pub(super) fn placement(&self) -> BTreeMap<String, BTreeMap<String, u64>> {
        let mut all: BTreeMap<String, BTreeMap<String, u64>> = BTreeMap::new();
        for placement in self.factories.iter().filter_map(SessionFactory::placement) {
            for (provider, operators) in &placement.nodes {
                for (operator, count) in operators {
                    *all.entry(provider.clone()).or_default().entry(operator.clone()).or_default() += *count as u64;
                }
            }
        }
        all
    }
}

/// The outputs that a task has.
fn applicable(task: Task) -> &'static [Emit] {
    match task {
        Task::Classification | Task::Segmentation => &[Emit::Csv, Emit::GeoJson, Emit::Tiff, Emit::Png],
        Task::Features => &[Emit::Csv, Emit::GeoJson, Emit::Png, Emit::H5],
    }
}

fn libraries() -> BTreeMap<String, LibraryRecord> {
    let record = |loaded: &native::Loaded| LibraryRecord {
        version: loaded.version.clone(),
        path: loaded.path.display().to_string(),
        origin: loaded.origin.to_string(),
    };
    let loaded = [("onnxruntime", native::onnx_runtime()), ("openslide", native::openslide())];
    loaded.into_iter().filter_map(|(name, library)| Some((name.to_owned(), record(library.ok()?)))).collect()
}

fn hardware() -> HardwareRecord {
    let devices = device::list();
    let system = sysinfo::System::new_with_specifics(
        sysinfo::RefreshKind::nothing().with_memory(sysinfo::MemoryRefreshKind::nothing().with_ram()),
    );
    HardwareRecord {
        cpu: devices.cpu.name,
        cores: devices.cpu.threads,
        memory_bytes: system.map_or(0, |system| system.total_memory()),
        gpus: devices.gpus.into_iter().map(|gpu| gpu.name).collect(),
    }
}
