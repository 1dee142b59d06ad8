//! From options to a loaded engine, and the account of the machine that it runs on.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use slidestream::engine::config::{Emit, RunConfig};
use slidestream::engine::inputs::SlideInput;
use slidestream::engine::{Engine, LoadRequest, cohort};
use slidestream::geometry::Overlap;
use slidestream::inference::{DeviceRequest, ModelCard, ProviderRequest, Task, device};
use slidestream::native;
use slidestream::report::{AccountRecord, HardwareRecord, LibraryRecord, RUN_SCHEMA, RunRecord, Status};
use sysinfo::{MemoryRefreshKind, RefreshKind, System};

use super::Failure;
use super::options::{RunOptions, TilingDefaults, parse};

/// What a run does with each slide, by the options and the model's card.
pub(super) fn config(card: &ModelCard, options: &RunOptions) -> Result<RunConfig, Failure> {
    let tiling = options.tiling.config(&TilingDefaults {
        tile_size: card.tile_size,
        target_mpp: Some(card.mpp),
        overlap: Overlap::Pixels(card.overlap),
    })?;
    let (on_tile_error, on_nonfinite) = options.policies()?;
    Ok(RunConfig {
        tiling,
        threshold: options.threshold()?,
        emit: options.emit(applicable(card.task))?,
        on_tile_error,
        on_nonfinite,
        icc: options.icc(),
    })
}

/// Loads the model at `path` as the options say.
pub(super) fn engine(path: &Path, options: &RunOptions) -> Result<Engine, Failure> {
    native::openslide()?;
    let card = ModelCard::load(path, &options.bare.model(options.tiling.target_mpp()?)?)?;
    let config = config(&card, options)?;
    let request = LoadRequest {
        variant: options.variant().map(str::to_owned),
        devices: parse("device", &options.device)?.unwrap_or(DeviceRequest::Auto),
        provider: parse("provider", &options.provider)?.unwrap_or(ProviderRequest::Auto),
        batch_size: options.batch_size()?,
        readers: options.readers()?,
        sessions: options.sessions()?,
        graph_cache: options.graph_cache(),
    };
    Ok(Engine::load(card, &request, config)?)
}

/// The account of a run that begins now.
pub(super) fn run_record(engine: &Engine, slides: &[SlideInput]) -> RunRecord {
    RunRecord {
        schema: RUN_SCHEMA.to_owned(),
        status: Status::Running,
        started: cohort::now(),
        finished: None,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        command: command(),
        libraries: libraries(),
        hardware: hardware(),
        model: engine.model().clone(),
        execution: engine.execution(),
        settings: engine.shaping_settings(),
        slides: BTreeMap::from([("asked for".to_owned(), slides.len() as u64)]),
    }
}

/// The outputs that a task has.
fn applicable(task: Task) -> &'static [Emit] {
    match task {
        Task::Classification | Task::Segmentation => &[Emit::Csv, Emit::GeoJson, Emit::Tiff, Emit::Png],
        Task::Features => &[Emit::Csv, Emit::GeoJson, Emit::Png, Emit::H5],
    }
}

/// The account of a command that began at `started` and ends now.
pub(super) fn account(started: String) -> AccountRecord {
    AccountRecord {
        started,
        finished: cohort::now(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        command: command(),
        libraries: libraries(),
        hardware: hardware(),
    }
}

/// The command line, as it was typed.
pub(super) fn command() -> Vec<String> {
    std::env::args_os().map(|argument| argument.to_string_lossy().into_owned()).collect()
}

/// `<model>-<suffix>` beside the model's folder or file.
pub(super) fn beside(model: &Path, suffix: &str) -> PathBuf {
    let is_inside = model.is_file() && model.extension().is_some_and(|extension| extension != "onnx");
    // `.` has no name of its own.
    let model = &std::path::absolute(model).unwrap_or_else(|_| model.to_owned());
    let model = if is_inside { model.parent().unwrap_or(model) } else { model };
    let stem = if model.is_dir() { model.file_name() } else { model.file_stem() };
    let mut name = stem.unwrap_or_default().to_owned();
    name.push("-");
    name.push(suffix);
    model.with_file_name(name)
}

pub(super) fn libraries() -> BTreeMap<String, LibraryRecord> {
    let record = |loaded: &native::Loaded| LibraryRecord {
        version: loaded.version.clone(),
        path: loaded.path.display().to_string(),
        origin: loaded.origin.to_string(),
    };
    let loaded = [("onnxruntime", native::onnx_runtime()), ("openslide", native::openslide())];
    loaded.into_iter().filter_map(|(name, library)| Some((name.to_owned(), record(library.ok()?)))).collect()
}

pub(super) fn hardware() -> HardwareRecord {
    let devices = device::list();
    let kinds = RefreshKind::nothing().with_memory(MemoryRefreshKind::nothing().with_ram());
    HardwareRecord {
        cpu: devices.cpu.name,
        cores: devices.cpu.threads,
        memory_bytes: System::new_with_specifics(kinds).map_or(0, |system| system.total_memory()),
        gpus: devices.gpus.into_iter().map(|gpu| gpu.name).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_lie_beside_the_model_under_its_whole_name() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::fs::create_dir_all(at("net.v2")).unwrap();
        std::fs::write(at("net.v2/card.toml"), "").unwrap();
        std::fs::write(at("x.onnx"), "").unwrap();
        for (model, expected) in
            [("net.v2", "net.v2-evaluate"), ("net.v2/card.toml", "net.v2-evaluate"), ("x.onnx", "x-evaluate")]
        {
            assert_eq!(beside(&at(model), "evaluate"), at(expected));
        }
        let here = std::env::current_dir().unwrap();
        let name = format!("{}-evaluate", here.file_name().unwrap().display());
        assert_eq!(beside(Path::new("."), "evaluate"), here.with_file_name(name));
    }
}
