//! NVIDIA GPUs as their driver tells of them: which there are, and how they are while work goes on.

use nvml_wrapper::Nvml;
use nvml_wrapper::error::NvmlError;

/// An NVIDIA GPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GpuInfo {
    /// Its CUDA index.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its memory in bytes.
    pub memory_total_bytes: u64,
    /// Free memory in bytes when it was asked.
    pub memory_free_bytes: u64,
    /// Per cent of the moment before in which a kernel ran, if the driver tells.
    pub busy_percent: Option<u32>,
    /// Power that it draws in mW, if the driver tells.
    pub milliwatts: Option<u32>,
}

/// The GPUs that CUDA will see, in its order.
#[derive(Debug, Default)]
pub(super) struct Gpus {
    pub(super) visible: Vec<GpuInfo>,
    /// The driver's reason, if it can't be asked.
    pub(super) error: Option<String>,
}

impl Gpus {
    /// Asks the driver.
    pub(super) fn find() -> Self {
        match Nvml::init().and_then(|nvml| listed(&nvml)) {
            Ok(all) => Self { visible: all.into_iter().map(|(_, gpu)| gpu).collect(), error: None },
            Err(error) => Self { visible: Vec::new(), error: Some(error.to_string()) },
        }
    }

    /// Why there is none.
    pub(super) fn why_none(&self) -> String {
        match &self.error {
            Some(error) => format!("no NVIDIA driver: {error}"),
            None => "no NVIDIA GPU is visible".to_owned(),
        }
    }
}

/// Looks at GPUs again and again: the driver's library stays open, because opening it holds up work on them.
pub struct GpuMonitor {
    nvml: Nvml,
    /// UUID and CUDA index.
    watched: Vec<(String, u32)>,
}

impl GpuMonitor {
    /// Opens the driver for the GPUs of these CUDA indices; `None` if it can't be asked, or sees none of them.
    #[must_use]
    pub fn open(indices: &[u32]) -> Option<Self> {
        if indices.is_empty() {
            return None;
        }
        let nvml = Nvml::init().ok()?;
        let all = listed(&nvml).ok()?.into_iter();
        let watched: Vec<(String, u32)> =
            all.map(|(uuid, gpu)| (uuid, gpu.index)).filter(|(_, index)| indices.contains(index)).collect();
        (!watched.is_empty()).then_some(Self { nvml, watched })
    }

    /// How they are now; without those of which the driver does not tell any more.
    #[must_use]
    pub fn look(&self) -> Vec<GpuInfo> {
        let look = |(uuid, index): &(String, u32)| {
            let gpu = info(&self.nvml.device_by_uuid(uuid.as_str()).ok()?).ok()?;
            Some(GpuInfo { index: *index, ..gpu })
        };
        self.watched.iter().filter_map(look).collect()
    }
}

/// UUID and state of those that CUDA will see, in its order.
fn listed(nvml: &Nvml) -> Result<Vec<(String, GpuInfo)>, NvmlError> {
    let gpu = |index| {
        let device = nvml.device_by_index(index)?;
        Ok((device.uuid()?, GpuInfo { index, ..info(&device)? }))
    };
    let all = (0..nvml.device_count()?).map(gpu).collect::<Result<_, NvmlError>>()?;
    Ok(visible(all, std::env::var("CUDA_VISIBLE_DEVICES").ok().as_deref()))
}

fn info(device: &nvml_wrapper::Device<'_>) -> Result<GpuInfo, NvmlError> {
    let memory = device.memory_info()?;
    Ok(GpuInfo {
        index: device.index()?,
        name: device.name()?,
        memory_total_bytes: memory.total,
        memory_free_bytes: memory.free,
        busy_percent: device.utilization_rates().ok().map(|rates| rates.gpu),
        milliwatts: device.power_usage().ok(),
    })
}

/// What `CUDA_VISIBLE_DEVICES` leaves of the driver's list, in its order and numbered anew: CUDA's own rule, by which
/// the list ends at the first entry that names no GPU.
fn visible(all: Vec<(String, GpuInfo)>, setting: Option<&str>) -> Vec<(String, GpuInfo)> {
    let Some(setting) = setting else { return all };
    let find = |entry: &str| {
        let entry = entry.trim();
        let is_meant = |(uuid, gpu): &&(String, GpuInfo)| match entry.parse::<u32>() {
            Ok(index) => gpu.index == index,
            Err(_) => !entry.is_empty() && uuid.starts_with(entry),
        };
        all.iter().find(is_meant).cloned()
    };
    let renumbered = |((uuid, gpu), index)| (uuid, GpuInfo { index, ..gpu });
    setting.split(',').map_while(find).zip(0..).map(renumbered).collect()
}

/// A GPU for tests.
#[cfg(test)]
pub(super) fn example(index: u32, name: &str) -> GpuInfo {
    GpuInfo {
        index,
        name: name.to_owned(),
        memory_total_bytes: 2,
        memory_free_bytes: 1,
        busy_percent: None,
        milliwatts: None,
    }
}

#[cfg(test)]
mod tests {
    use super::example as gpu;
    use super::*;

    #[test]
    fn visible_gpus_follow_cudas_own_rule() {
        let all = || vec![("GPU-aa".to_owned(), gpu(0, "a")), ("GPU-bb".to_owned(), gpu(1, "b"))];
        let names = |setting| visible(all(), setting).iter().map(|(_, gpu)| gpu.name.clone()).collect::<String>();
        let cases = [
            (None, "ab"),
            (Some(""), ""),
            (Some("1,0"), "ba"),
            (Some("GPU-b"), "b"),
            (Some("1,7,0"), "b"),
            (Some("-1"), ""),
        ];
        for (setting, expected) in cases {
            assert_eq!(names(setting), expected, "{setting:?}");
        }
        assert_eq!(visible(all(), Some("1"))[0].1.index, 0);
    }

    #[test]
    fn what_is_not_there_is_not_watched() {
        assert!(GpuMonitor::open(&[]).is_none());
        assert!(GpuMonitor::open(&[u32::MAX]).is_none());
    }
}
