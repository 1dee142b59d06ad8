//! What one step takes in a process of its own: peak memory and how busy the device is.

use std::fmt;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use sysinfo::{Pid, ProcessRefreshKind, ProcessesToUpdate, System};

use super::CompareRequest;
use super::course::Course;
use super::ladder::{Setting, Way};
use super::speed::{self, Runner};
use super::subjects::{self, Subject};
use crate::engine::config::Emit;
use crate::experiment::ExperimentError;
use crate::experiment::optimize::file_error;
use crate::inference::{Device, device};
use crate::report::compare::ResourcesRecord;

/// How often a GPU is asked.
const SAMPLE: Duration = Duration::from_millis(50);

/// A step that is to be measured alone; as text `way,batch,tiles,subject`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Alone {
    pub(super) way: Way,
    pub(super) batch: usize,
    /// Tiles of a round.
    pub(super) tiles: usize,
    /// Its name.
    pub(super) subject: String,
}

impl fmt::Display for Alone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let way = match self.way {
            Way::InMemory => "memory",
            Way::InTurn => "turn",
            Way::Overlapped => "overlapped",
        };
        write!(f, "{way},{},{},{}", self.batch, self.tiles, self.subject)
    }
}

impl FromStr for Alone {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is no step");
        let mut parts = text.splitn(4, ',');
        let way = match parts.next() {
            Some("memory") => Way::InMemory,
            Some("turn") => Way::InTurn,
            Some("overlapped") => Way::Overlapped,
            _ => return Err(wrong()),
        };
        let mut number = || parts.next()?.parse().ok().filter(|number: &usize| *number > 0);
        let (batch, tiles) = number().zip(number()).ok_or_else(wrong)?;
        let subject = parts.next().ok_or_else(wrong)?.to_owned();
        Ok(Self { way, batch, tiles, subject })
    }
}

/// Does one step in this process, which must have done nothing else, and says what it took.
///
/// # Errors
/// [`ExperimentError`] if the step can't be done.
pub fn alone(request: &CompareRequest, step: &Alone) -> Result<ResourcesRecord, ExperimentError> {
    let (subjects, _) = subjects::subjects(request)?;
    let Some(index) = subjects.iter().position(|subject| subject.name == step.subject) else {
        return Ok(ResourcesRecord::default());
    };
    let subject = &subjects[index];
    let used_before = used_bytes(subject.device);
    let done = AtomicBool::new(false);
    let (taken, seen) = std::thread::scope(|scope| {
        let watch = scope.spawn(|| watch(subject.device, &done));
        let taken = take(request, subject, Setting { subject: index, batch: step.batch, way: step.way }, step.tiles);
        done.store(true, Ordering::Release);
        (taken, watch.join().unwrap_or_default())
    });
    let (cpu_secs, seconds) = taken?;
    let cores = std::thread::available_parallelism().map_or(1.0, |cores| cores.get() as f64);
    let device_utilisation = match subject.device {
        Device::Cpu => cpu_secs.map(|busy| (busy / (seconds * cores)).clamp(0.0, 1.0)),
        Device::Cuda { .. } => seen.mean_busy(),
    };
    Ok(ResourcesRecord {
        peak_host_bytes: peak_host_bytes(),
        peak_device_bytes: seen.peak_bytes.zip(used_before).map(|(peak, before)| peak.saturating_sub(before)),
        device_utilisation,
    })
}

/// Two rounds, of which the second is timed: processor seconds and seconds.
fn take(
    request: &CompareRequest,
    subject: &Subject,
    setting: Setting,
    tiles: usize,
) -> Result<(Option<f64>, f64), ExperimentError> {
    let timed = |round: &mut dyn FnMut() -> Result<(), ExperimentError>| {
        round()?;
        let (cpu, start) = (cpu_secs(), Instant::now());
        round()?;
        let seconds = start.elapsed().as_secs_f64();
        Ok((cpu_secs().zip(cpu).map(|(after, before)| after - before), seconds))
    };
    match (&request.slide, setting.way) {
        (Some(path), Way::InTurn | Way::Overlapped) => {
            let course = Course::new(path, &subject.card, tiles)?;
            let out = tempfile::tempdir().map_err(|source| file_error(&std::env::temp_dir(), "written", source))?;
            let mut runner = Runner::open(subject, setting, course.config(Emit::Csv), request)?;
            timed(&mut || runner.round(&course, &out))
        }
        _ => {
            let set = crate::experiment::tiles::TileSet::synthetic(subject.card.tile_size, tiles.min(64), super::SEED);
            let (slices, batches) = (set.slices(), tiles.div_ceil(setting.batch));
            let mut session = subject.open()?;
            timed(&mut || Ok(speed::predict(&mut session, &slices, setting.batch, batches)?))
        }
    }
}

/// What was seen of a GPU.
#[derive(Default)]
struct Seen {
    peak_bytes: Option<u64>,
    busy: Vec<f64>,
}

impl Seen {
    /// Mean over the later half, when the model is loaded and warm.
    fn mean_busy(&self) -> Option<f64> {
        let late = &self.busy[self.busy.len() / 2..];
        (!late.is_empty()).then(|| late.iter().sum::<f64>() / late.len() as f64)
    }
}

fn watch(device: Device, done: &AtomicBool) -> Seen {
    let mut seen = Seen::default();
    while device != Device::Cpu && !done.load(Ordering::Acquire) {
        if let Some(gpu) = gpu(device) {
            let used = gpu.memory_total_bytes.saturating_sub(gpu.memory_free_bytes);
            seen.peak_bytes = seen.peak_bytes.max(Some(used));
            seen.busy.extend(gpu.busy_percent.map(|percent| f64::from(percent) / 100.0));
        }
        std::thread::sleep(SAMPLE);
    }
    seen
}

fn gpu(device: Device) -> Option<device::GpuInfo> {
    let Device::Cuda { index } = device else { return None };
    device::list().gpus.into_iter().find(|gpu| gpu.index == index)
}

fn used_bytes(device: Device) -> Option<u64> {
    gpu(device).map(|gpu| gpu.memory_total_bytes.saturating_sub(gpu.memory_free_bytes))
}

/// Processor time of this process so far, over all threads.
fn cpu_secs() -> Option<f64> {
    let own = Pid::from_u32(std::process::id());
    let mut system = System::new().ok()?;
    system.refresh_processes_specifics(ProcessesToUpdate::Some(&[own]), true, ProcessRefreshKind::nothing().with_cpu());
    system.process(own).map(|process| process.accumulated_cpu_time() as f64 / 1e3)
}

/// Largest resident memory of this process so far; only Linux tells.
fn peak_host_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_told_to_another_process() {
        let step = Alone { way: Way::Overlapped, batch: 8, tiles: 100, subject: "a, b/fp32".to_owned() };
        assert_eq!(step.to_string().parse(), Ok(step));
        for wrong in ["", "memory", "memory,0,1,a", "memory,1,1", "fly,1,1,a"] {
            assert!(wrong.parse::<Alone>().is_err(), "{wrong:?}");
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn the_system_tells_memory_and_time() {
        assert!(peak_host_bytes().unwrap() > 1 << 20);
        assert!(cpu_secs().is_some());
    }
}
