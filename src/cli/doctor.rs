//! `slidestream doctor`: whether this machine has what it takes, one line each.

use std::path::PathBuf;

use slidestream::inference::{Provider, device};
use slidestream::native::{self, Loaded, NativeError};
use sysinfo::{Disks, MemoryRefreshKind, RefreshKind, System};

use super::{Failure, Outcome, show};

/// Space below which a run over a cohort is likely to fill the disk.
const LITTLE_SPACE_BYTES: u64 = 2_000_000_000;
/// Formats that OpenSlide 4 reads; version 3 lacks DICOM.
const FORMATS: &str =
    "Aperio, DICOM, generic tiled TIFF, Hamamatsu, Leica, MIRAX, Philips, Sakura, Trestle, Ventana, Zeiss";

/// Shows native libraries, providers, devices, memory and disk; exit code 1 if `run` can't work here
#[derive(clap::Args, Debug)]
pub(super) struct Args {
    /// The folder whose disk is looked at
    #[arg(long, value_name = "DIR", default_value = ".")]
    out: PathBuf,
}

/// How one thing is.
enum State {
    Ok,
    /// Not there, and not needed for the main job.
    Missing,
    /// Not there, and nothing works without it.
    Broken,
}

struct Check {
    state: State,
    what: String,
    finding: String,
    hint: Option<String>,
}

pub(super) fn execute(args: &Args) -> Result<Outcome, Failure> {
    let mut checks = vec![library("OpenSlide", native::openslide()), library("ONNX Runtime", native::onnx_runtime())];
    checks.extend(providers());
    checks.extend(devices());
    checks.push(memory());
    checks.push(disk(&args.out));
    let formats = match native::openslide() {
        Ok(openslide) if openslide.version.starts_with('3') => FORMATS.replace("DICOM, ", ""),
        _ => FORMATS.to_owned(),
    };
    checks.push(Check { state: State::Ok, what: "slide formats".to_owned(), finding: formats, hint: None });
    let mut text = String::new();
    for check in &checks {
        let state = match check.state {
            State::Ok => "ok     ",
            State::Missing => "missing",
            State::Broken => "BROKEN ",
        };
        let hint = check.hint.as_ref().map(|hint| format!(" (help: {hint})")).unwrap_or_default();
        text.push_str(&format!("{state}  {:20}  {}{hint}\n", check.what, check.finding));
    }
    show(&text);
    let is_broken = checks.iter().any(|check| matches!(check.state, State::Broken));
    Ok(if is_broken { Outcome::Failed } else { Outcome::Done })
}

fn library(what: &str, loaded: Result<&Loaded, NativeError>) -> Check {
    let what = what.to_owned();
    match loaded {
        Ok(loaded) => {
            let finding = format!("{} from {}, {}", loaded.version, loaded.path.display(), loaded.origin);
            Check { state: State::Ok, what, finding, hint: None }
        }
        Err(error) => Check { state: State::Broken, what, finding: error.to_string(), hint: Some(error.hint()) },
    }
}

fn providers() -> Vec<Check> {
    let statuses = match device::probe_providers() {
        Ok(statuses) => statuses,
        // The missing library has a line of its own.
        Err(_) => return Vec::new(),
    };
    let check = |status: device::ProviderStatus| {
        let what = format!("provider {}", status.provider);
        match status.why_not {
            None => Check { state: State::Ok, what, finding: "opens sessions".to_owned(), hint: None },
            Some(reason) => {
                let state = if status.provider == Provider::Cpu { State::Broken } else { State::Missing };
                let reason = reason.lines().next().unwrap_or_default().to_owned();
                let hint = "set ORT_DYLIB_PATH to an ONNX Runtime that has it".to_owned();
                Check { state, what, finding: reason, hint: Some(hint) }
            }
        }
    };
    statuses.into_iter().map(check).collect()
}

fn devices() -> Vec<Check> {
    let devices = device::list();
    let cpu = &devices.cpu;
    let finding = format!("{}, {} threads, {}", cpu.name, cpu.threads, cpu.features.join(" "));
    let mut checks = vec![Check { state: State::Ok, what: "device cpu".to_owned(), finding, hint: None }];
    for gpu in &devices.gpus {
        let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
        let (free, total) = (gib(gpu.memory_free_bytes), gib(gpu.memory_total_bytes));
        let finding = format!("{}, {free:.1} of {total:.1} GiB free", gpu.name);
        checks.push(Check { state: State::Ok, what: format!("device cuda:{}", gpu.index), finding, hint: None });
    }
    if let Some(reason) = devices.why_no_gpus {
        let hint = Some("a GPU needs NVIDIA's driver; the CPU does the work without one".to_owned());
        checks.push(Check { state: State::Missing, what: "device cuda".to_owned(), finding: reason, hint });
    }
    checks
}

fn memory() -> Check {
    let kinds = RefreshKind::nothing().with_memory(MemoryRefreshKind::nothing().with_ram());
    let what = "memory".to_owned();
    let Ok(system) = System::new_with_specifics(kinds) else {
        return Check { state: State::Missing, what, finding: "the system does not tell".to_owned(), hint: None };
    };
    let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
    let finding = format!("{:.1} of {:.1} GiB available", gib(system.available_memory()), gib(system.total_memory()));
    Check { state: State::Ok, what, finding, hint: None }
}

/// The space where results would go; written to, so that a folder without permission is told.
fn disk(out: &std::path::Path) -> Check {
    let what = "disk".to_owned();
    let folder = out.canonicalize();
    let is_writable = folder.as_ref().is_ok_and(|folder| tempfile::tempfile_in(folder).is_ok());
    if !is_writable {
        let finding = format!("{} can't be written", out.display());
        let hint = Some("choose another folder by --out".to_owned());
        return Check { state: State::Broken, what, finding, hint };
    }
    let folder = folder.unwrap_or_else(|_| out.to_owned());
    let disks = Disks::new_with_refreshed_list().ok();
    let holding = disks.iter().flat_map(|disks| disks.iter()).filter(|disk| folder.starts_with(disk.mount_point()));
    let Some(disk) = holding.max_by_key(|disk| disk.mount_point().as_os_str().len()) else {
        return Check { state: State::Ok, what, finding: "writable, free space unknown".to_owned(), hint: None };
    };
    let free = disk.available_space();
    let finding = format!("{:.1} GB free at {}", free as f64 / 1e9, folder.display());
    if free < LITTLE_SPACE_BYTES {
        let hint = Some("free some: maps of one large slide take about 1 GB".to_owned());
        return Check { state: State::Missing, what, finding, hint };
    }
    Check { state: State::Ok, what, finding, hint: None }
}
