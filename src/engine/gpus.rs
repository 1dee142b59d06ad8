//! GPUs while work goes on: how busy they are, what memory is in use and what power they draw.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::inference::Device;
use crate::inference::device::{GpuInfo, GpuMonitor};

/// How often a GPU is asked: the driver answers within a fraction of a millisecond.
const SAMPLE: Duration = Duration::from_millis(100);

/// What was seen of GPUs while something was done.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Seen {
    /// Most memory in use over all of them, above what was in use before.
    pub(crate) peak_bytes: Option<u64>,
    /// Busy shares of each device, 0–1, in the order of time.
    busy: BTreeMap<String, Vec<f64>>,
    /// Watts over all of them at each moment.
    watts: Vec<f64>,
}

impl Seen {
    /// Each device's mean share over the later half, when the model is loaded and warm.
    pub(crate) fn busy_by_device(&self) -> BTreeMap<String, f64> {
        let mean = |(device, shares): (&String, &Vec<f64>)| Some((device.clone(), mean_of_later_half(shares)?));
        self.busy.iter().filter_map(mean).collect()
    }

    /// The mean of that over the devices.
    pub(crate) fn mean_busy(&self) -> Option<f64> {
        let by_device = self.busy_by_device();
        (!by_device.is_empty()).then(|| by_device.values().sum::<f64>() / by_device.len() as f64)
    }

    /// Mean power over the later half, in watts.
    pub(crate) fn mean_watts(&self) -> Option<f64> {
        mean_of_later_half(&self.watts)
    }
}

fn mean_of_later_half(values: &[f64]) -> Option<f64> {
    let late = &values[values.len() / 2..];
    (!late.is_empty()).then(|| late.iter().sum::<f64>() / late.len() as f64)
}

/// Memory that is in use on the GPUs among `devices`; 0 where there are none.
pub(crate) fn used_device_bytes(devices: &[Device]) -> u64 {
    monitor(devices).map_or(0, |monitor| used_bytes(&monitor.look()))
}

/// Does `work` while the GPUs among `devices` are watched; memory that is in use before counts as others'.
pub(crate) fn watched<T>(devices: &[Device], work: impl FnOnce() -> T) -> (T, Seen) {
    watched_since(devices, used_device_bytes(devices), work)
}

/// [`watched`], where `idle_bytes` were in use before anything was loaded.
pub(crate) fn watched_since<T>(devices: &[Device], idle_bytes: u64, work: impl FnOnce() -> T) -> (T, Seen) {
    watched_by(monitor(devices).as_ref(), idle_bytes, work)
}

/// [`watched_since`] by a monitor that is open already; without one nothing is seen.
pub(crate) fn watched_by<T>(monitor: Option<&GpuMonitor>, idle_bytes: u64, work: impl FnOnce() -> T) -> (T, Seen) {
    let Some(monitor) = monitor else { return (work(), Seen::default()) };
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let watch = scope.spawn(|| watch(monitor, &done));
        // The watch must end too if the work panics.
        let result = catch_unwind(AssertUnwindSafe(work));
        done.store(true, Ordering::Release);
        watch.thread().unpark();
        let mut seen = watch.join().unwrap_or_default();
        seen.peak_bytes = seen.peak_bytes.map(|peak| peak.saturating_sub(idle_bytes));
        (result.unwrap_or_else(|panic| resume_unwind(panic)), seen)
    })
}

fn watch(monitor: &GpuMonitor, done: &AtomicBool) -> Seen {
    let mut seen = Seen::default();
    while !done.load(Ordering::Acquire) {
        let gpus = monitor.look();
        if gpus.is_empty() {
            break;
        }
        seen.peak_bytes = seen.peak_bytes.max(Some(used_bytes(&gpus)));
        for gpu in &gpus {
            let device = Device::Cuda { index: gpu.index }.to_string();
            seen.busy.entry(device).or_default().extend(gpu.busy_percent.map(|busy| f64::from(busy) / 100.0));
        }
        let watts: Option<f64> =
            gpus.iter().map(|gpu| gpu.milliwatts.map(|milliwatts| f64::from(milliwatts) / 1e3)).sum();
        seen.watts.extend(watts);
        std::thread::park_timeout(SAMPLE);
    }
    seen
}

/// For the GPUs among `devices`; `None` if there is none.
pub(crate) fn monitor(devices: &[Device]) -> Option<GpuMonitor> {
    let index = |device: &Device| match device {
        Device::Cuda { index } => Some(*index),
        Device::Cpu => None,
    };
    GpuMonitor::open(&devices.iter().filter_map(index).collect::<Vec<_>>())
}

fn used_bytes(gpus: &[GpuInfo]) -> u64 {
    gpus.iter().map(|gpu| gpu.memory_total_bytes.saturating_sub(gpu.memory_free_bytes)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_later_half_counts() {
        let busy = [("cuda:0", vec![0.0, 0.2, 0.8, 1.0]), ("cuda:1", vec![1.0, 0.5]), ("cuda:2", vec![])];
        let busy = busy.map(|(device, shares)| (device.to_owned(), shares)).into();
        let seen = Seen { peak_bytes: None, busy, watts: Vec::new() };
        assert_eq!(seen.busy_by_device(), [("cuda:0".to_owned(), 0.9), ("cuda:1".to_owned(), 0.5)].into());
        assert_eq!((seen.mean_busy(), seen.mean_watts()), (Some(0.7), None));
        let failed = std::panic::catch_unwind(|| watched(&[Device::Cpu], || panic!("of the work")));
        assert!(failed.is_err());
        let (result, seen) = watched(&[Device::Cpu], || 7);
        assert_eq!((result, seen), (7, Seen::default()));
    }
}
