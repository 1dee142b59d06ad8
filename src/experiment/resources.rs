//! What work takes beside time: memory, processor time, and how busy GPUs are and what power they draw.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use sysinfo::{Pid, ProcessRefreshKind, ProcessesToUpdate, System};

use crate::inference::{Device, device};

/// How often a GPU is asked.
const SAMPLE: Duration = Duration::from_millis(50);

/// What was seen of GPUs while something was done.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Seen {
    /// Most memory in use over all of them, above what was in use before.
    pub(super) peak_bytes: Option<u64>,
    /// Busy shares, 0–1, their mean over the devices at each moment.
    busy: Vec<f64>,
    /// Watts over all of them at each moment.
    watts: Vec<f64>,
}

impl Seen {
    /// Mean share over the later half, when the model is loaded and warm.
    pub(super) fn mean_busy(&self) -> Option<f64> {
        mean_of_later_half(&self.busy)
    }

    /// Mean power over the later half, in watts.
    pub(super) fn mean_watts(&self) -> Option<f64> {
        mean_of_later_half(&self.watts)
    }
}

fn mean_of_later_half(values: &[f64]) -> Option<f64> {
    let late = &values[values.len() / 2..];
    (!late.is_empty()).then(|| late.iter().sum::<f64>() / late.len() as f64)
}

/// Does `work` while the GPUs among `devices` are watched.
pub(super) fn watched<T>(devices: &[Device], work: impl FnOnce() -> T) -> (T, Seen) {
    let before = gpus(devices).map(|gpus| used_bytes(&gpus));
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let watch = scope.spawn(|| watch(devices, &done));
        let result = work();
        done.store(true, Ordering::Release);
        let mut seen = watch.join().unwrap_or_default();
        seen.peak_bytes = seen.peak_bytes.zip(before).map(|(peak, before)| peak.saturating_sub(before));
        (result, seen)
    })
}

fn watch(devices: &[Device], done: &AtomicBool) -> Seen {
    let mut seen = Seen::default();
    while !done.load(Ordering::Acquire) {
        let Some(gpus) = gpus(devices) else { break };
        seen.peak_bytes = seen.peak_bytes.max(Some(used_bytes(&gpus)));
        let busy: Vec<f64> =
            gpus.iter().filter_map(|gpu| gpu.busy_percent).map(|busy| f64::from(busy) / 100.0).collect();
        if !busy.is_empty() {
            seen.busy.push(busy.iter().sum::<f64>() / busy.len() as f64);
        }
        let watts: Option<f64> =
            gpus.iter().map(|gpu| gpu.milliwatts.map(|milliwatts| f64::from(milliwatts) / 1e3)).sum();
        seen.watts.extend(watts);
        std::thread::sleep(SAMPLE);
    }
    seen
}

/// The GPUs among `devices`; `None` if there is none.
fn gpus(devices: &[Device]) -> Option<Vec<device::GpuInfo>> {
    let is_meant = |gpu: &device::GpuInfo| devices.contains(&Device::Cuda { index: gpu.index });
    if devices.iter().all(|device| *device == Device::Cpu) {
        return None;
    }
    let gpus: Vec<device::GpuInfo> = device::list().gpus.into_iter().filter(is_meant).collect();
    (!gpus.is_empty()).then_some(gpus)
}

fn used_bytes(gpus: &[device::GpuInfo]) -> u64 {
    gpus.iter().map(|gpu| gpu.memory_total_bytes.saturating_sub(gpu.memory_free_bytes)).sum()
}

/// Processor time of this process so far in seconds, over all threads.
pub(super) fn cpu_secs() -> Option<f64> {
    let own = Pid::from_u32(std::process::id());
    let mut system = System::new().ok()?;
    system.refresh_processes_specifics(ProcessesToUpdate::Some(&[own]), true, ProcessRefreshKind::nothing().with_cpu());
    system.process(own).map(|process| process.accumulated_cpu_time() as f64 / 1e3)
}

/// Largest resident memory of this process so far; only Linux tells.
pub(super) fn peak_host_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(target_os = "linux")]
    #[test]
    fn the_system_tells_memory_and_time() {
        assert!(peak_host_bytes().unwrap() > 1 << 20);
        assert!(cpu_secs().is_some());
    }

    #[test]
    fn the_later_half_counts() {
        let seen = Seen { peak_bytes: None, busy: vec![0.0, 0.2, 0.8, 1.0], watts: Vec::new() };
        assert_eq!((seen.mean_busy(), seen.mean_watts()), (Some(0.9), None));
        let (result, seen) = watched(&[Device::Cpu], || 7);
        assert_eq!((result, seen), (7, Seen::default()));
    }
}
