//! Devices and execution providers: what there is, what was asked for, and what is taken.
//!
//! What is asked for by name is had or is an error. `auto` takes the best that really loads, and says why. A provider
//! counts as loading only when a session with it opened: ONNX Runtime lists providers whose libraries are missing.

use std::fmt;
use std::num::NonZeroUsize;
use std::str::FromStr;

use ort::ep;
use ort::session::Session;
use sysinfo::System;

use super::error::SessionError;
use super::gpu::Gpus;
pub use super::gpu::{GpuInfo, GpuMonitor};
use crate::native;
use crate::onnx::{ElementType, build::Graph};

/// A device that runs a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Device {
    /// The host's processor.
    Cpu,
    /// An NVIDIA GPU.
    Cuda {
        /// Its CUDA index, which counts only the GPUs that `CUDA_VISIBLE_DEVICES` leaves visible.
        index: u32,
    },
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda { index } => write!(f, "cuda:{index}"),
        }
    }
}

/// An execution provider of ONNX Runtime: a set of kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Provider {
    /// ONNX Runtime's own kernels on the CPU.
    Cpu,
    /// Intel's OpenVINO on the CPU; may compute in bf16 where the processor has it.
    OpenVino,
    /// CUDA and cuDNN.
    Cuda,
    /// TensorRT, which compiles the model for the GPU first (minutes).
    TensorRt,
}

impl Provider {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Cpu, Self::OpenVino, Self::Cuda, Self::TensorRt];

    /// True if it works on that device.
    #[must_use]
    pub fn runs_on(self, device: Device) -> bool {
        matches!(self, Self::Cuda | Self::TensorRt) == matches!(device, Device::Cuda { .. })
    }

    /// ONNX Runtime's own name for it, as in profiles.
    #[must_use]
    pub fn runtime_name(self) -> &'static str {
        match self {
            Self::Cpu => "CPUExecutionProvider",
            Self::OpenVino => "OpenVINOExecutionProvider",
            Self::Cuda => "CUDAExecutionProvider",
            Self::TensorRt => "TensorrtExecutionProvider",
        }
    }
}

impl fmt::Display for Provider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cpu => "cpu",
            Self::OpenVino => "openvino",
            Self::Cuda => "cuda",
            Self::TensorRt => "tensorrt",
        })
    }
}

impl FromStr for Provider {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = Self::ALL.into_iter().find(|provider| provider.to_string() == text);
        known.ok_or_else(|| format!("{text:?} is none of cpu, openvino, cuda, tensorrt"))
    }
}

/// The devices that were asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceRequest {
    /// The best that there is: one GPU if its provider loads, else the CPU.
    Auto,
    /// These, each once and in this order.
    Named(Vec<Device>),
    /// Every GPU that is visible.
    AllGpus,
}

impl FromStr for DeviceRequest {
    type Err = String;

    /// `auto`, `cpu`, `cuda` (the first GPU), `cuda:all`, `cuda:1`, or a list such as `cuda:0,cuda:1` or `cuda:0,1`.
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is none of auto, cpu, cuda, cuda:N, cuda:all, or a list such as cuda:0,1");
        match text {
            "auto" => return Ok(Self::Auto),
            "cpu" => return Ok(Self::Named(vec![Device::Cpu])),
            "cuda" => return Ok(Self::Named(vec![Device::Cuda { index: 0 }])),
            "cuda:all" => return Ok(Self::AllGpus),
            _ => {}
        }
        let mut devices = Vec::new();
        for (position, part) in text.split(',').enumerate() {
            let index = match part.trim().strip_prefix("cuda:") {
                Some(index) => index,
                None if position > 0 => part.trim(),
                None => return Err(wrong()),
            };
            let device = Device::Cuda { index: index.parse().map_err(|_| wrong())? };
            if devices.contains(&device) {
                return Err(format!("{text:?} names {device} twice"));
            }
            devices.push(device);
        }
        Ok(Self::Named(devices))
    }
}

/// The provider that was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProviderRequest {
    /// The best for the device and the variant that loads.
    Auto,
    /// This one.
    Named(Provider),
}

impl FromStr for ProviderRequest {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            _ => text
                .parse()
                .map(Self::Named)
                .map_err(|_| format!("{text:?} is none of auto, cpu, openvino, cuda, tensorrt")),
        }
    }
}

/// What is taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolved {
    /// One device or more, all of one kind.
    pub devices: Vec<Device>,
    /// The provider, which opened a session on each of them.
    pub provider: Provider,
    /// Why, in a sentence for the report.
    pub reason: String,
}

/// Finds what meets the requests. `preferred` is the provider that the variant is best on, if its card says so; only
/// `auto` minds it.
///
/// # Errors
/// [`SessionError`] if ONNX Runtime doesn't load, or what was asked for by name can't be had.
pub fn resolve(
    devices: &DeviceRequest,
    provider: ProviderRequest,
    preferred: Option<Provider>,
) -> Result<Resolved, SessionError> {
    native::onnx_runtime()?;
    resolve_with(devices, provider, preferred, &Gpus::find(), &mut probe)
}

/// [`resolve`] with the machine as arguments.
fn resolve_with(
    devices: &DeviceRequest,
    provider: ProviderRequest,
    preferred: Option<Provider>,
    gpus: &Gpus,
    probe: &mut dyn FnMut(Provider, Device) -> Result<(), String>,
) -> Result<Resolved, SessionError> {
    let asked = match devices {
        DeviceRequest::Named(devices) if devices.is_empty() => {
            return Err(SessionError::NoDevice { device: Device::Cpu, reason: "none was named".to_owned() });
        }
        DeviceRequest::Named(devices) => devices.clone(),
        DeviceRequest::AllGpus if gpus.visible.is_empty() => {
            return Err(SessionError::NoDevice { device: Device::Cuda { index: 0 }, reason: gpus.why_none() });
        }
        DeviceRequest::AllGpus => devices_of(gpus),
        DeviceRequest::Auto => return resolve_auto(provider, preferred, gpus, probe),
    };
    for &device in &asked {
        require(gpus, device)?;
    }
    let provider = match provider {
        ProviderRequest::Named(provider) => Ok((provider, "as asked for".to_owned())),
        ProviderRequest::Auto => best_on(asked[0], preferred, probe),
    };
    let (provider, reason) = provider.map_err(|(provider, reason)| SessionError::NoProvider { provider, reason })?;
    for &device in &asked {
        if !provider.runs_on(device) {
            return Err(SessionError::Mismatch { provider, device });
        }
        probe(provider, device).map_err(|reason| SessionError::NoProvider { provider, reason })?;
    }
    Ok(Resolved { devices: asked, provider, reason })
}

fn resolve_auto(
    provider: ProviderRequest,
    preferred: Option<Provider>,
    gpus: &Gpus,
    probe: &mut dyn FnMut(Provider, Device) -> Result<(), String>,
) -> Result<Resolved, SessionError> {
    let gpu = devices_of(gpus).first().copied();
    let on = |device, provider, reason| Ok(Resolved { devices: vec![device], provider, reason });
    if let ProviderRequest::Named(provider) = provider {
        let device = match (provider.runs_on(Device::Cpu), gpu) {
            (true, _) => Device::Cpu,
            (false, Some(gpu)) => gpu,
            (false, None) => return Err(SessionError::NoProvider { provider, reason: gpus.why_none() }),
        };
        probe(provider, device).map_err(|reason| SessionError::NoProvider { provider, reason })?;
        return on(device, provider, format!("provider {provider} as asked for"));
    }
    let why_not_gpu = match gpu {
        None => gpus.why_none(),
        Some(gpu) => match best_on(gpu, preferred, probe) {
            Ok((provider, reason)) => return on(gpu, provider, reason),
            Err((provider, reason)) => format!("{gpu} is there, but provider {provider} does not load: {reason}"),
        },
    };
    let (provider, reason) = best_on(Device::Cpu, preferred, probe)
        .map_err(|(provider, reason)| SessionError::NoProvider { provider, reason })?;
    on(Device::Cpu, provider, format!("{reason}; {why_not_gpu}"))
}

/// The best provider on `device` that loads, and why it is the best; else the plain one and why it doesn't load.
fn best_on(
    device: Device,
    preferred: Option<Provider>,
    probe: &mut dyn FnMut(Provider, Device) -> Result<(), String>,
) -> Result<(Provider, String), (Provider, String)> {
    // Not TensorRT or OpenVINO unasked: the one compiles for minutes, the other may compute in bf16.
    let plain = if device == Device::Cpu { Provider::Cpu } else { Provider::Cuda };
    let mut note = String::new();
    if let Some(preferred) = preferred.filter(|&provider| provider != plain && provider.runs_on(device)) {
        match probe(preferred, device) {
            Ok(()) => return Ok((preferred, "the variant is best on it".to_owned())),
            Err(why) => note = format!("; {preferred}, which the variant is best on, does not load: {why}"),
        }
    }
    match probe(plain, device) {
        Ok(()) => Ok((plain, format!("the best on {device} that keeps the variant's precision{note}"))),
        Err(why) => Err((plain, why)),
    }
}

/// What a provider answers when it is tried.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProviderStatus {
    /// The provider.
    pub provider: Provider,
    /// `None` if a session with it opened, else the reason.
    pub why_not: Option<String>,
}

/// Tries every provider on its first device.
///
/// # Errors
/// [`SessionError::Native`] if ONNX Runtime doesn't load.
pub fn probe_providers() -> Result<Vec<ProviderStatus>, SessionError> {
    native::onnx_runtime()?;
    let status = |provider: Provider| {
        let device = if provider.runs_on(Device::Cpu) { Device::Cpu } else { Device::Cuda { index: 0 } };
        ProviderStatus { provider, why_not: probe(provider, device).err() }
    };
    Ok(Provider::ALL.into_iter().map(status).collect())
}

/// Opens a session of one operator.
fn probe(provider: Provider, device: Device) -> Result<(), String> {
    let mut graph = Graph::new("probe");
    let input = graph.input("x", ElementType::F32, &[1.into()]);
    let sum = graph.node("Add", &[&input, &input], &[]);
    graph.output("y", &sum, ElementType::F32, &[1.into()]);
    let open = || -> Result<Session, ort::Error> {
        let environment = native::onnx_environment().map_err(ort::Error::wrap)?;
        let mut builder = Session::builder(environment)?.with_execution_providers([dispatch(provider, device, &[])])?;
        builder.commit_from_memory(&graph.clone().finish().to_bytes())
    };
    open().map(drop).map_err(|error| error.message().lines().next().unwrap_or("no reason given").to_owned())
}

/// The provider with its options, as a session takes it. Its failure is an error, never a silent step down to the CPU.
pub(super) fn dispatch(provider: Provider, device: Device, options: &[(&str, &str)]) -> ep::ExecutionProviderDispatch {
    use ep::ArbitrarilyConfigurableExecutionProvider as Options;
    fn with<E: Options>(provider: E, options: &[(&str, &str)]) -> E {
        options.iter().fold(provider, |provider, (key, value)| provider.with_arbitrary_config(key, value))
    }
    let index = match device {
        Device::Cpu => 0,
        Device::Cuda { index } => i32::try_from(index).unwrap_or(i32::MAX),
    };
    let dispatch = match provider {
        Provider::Cpu => ep::CPU::default().with_arena_allocator(true).build(),
        Provider::OpenVino => with(ep::OpenVINO::default().with_device_type("CPU"), options).build(),
        Provider::Cuda => {
            // As fast as the exhaustive search on two nets measured on an H100, without its search time.
            let cuda = ep::CUDA::default()
                .with_device_id(index)
                .with_conv_algorithm_search(ep::cuda::ConvAlgorithmSearch::Heuristic);
            with(cuda, options).build()
        }
        Provider::TensorRt => with(ep::TensorRT::default().with_device_id(index), options).build(),
    };
    dispatch.error_on_failure()
}

/// The host's processor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuInfo {
    /// Its brand.
    pub name: String,
    /// Cores, if the system tells.
    pub cores: Option<usize>,
    /// Threads that this process may use.
    pub threads: usize,
    /// Instruction sets that matter to inference, such as `avx2` and `avx512vnni`.
    pub features: Vec<&'static str>,
}

/// What there is to run on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Devices {
    /// The processor.
    pub cpu: CpuInfo,
    /// The GPUs, by CUDA index.
    pub gpus: Vec<GpuInfo>,
    /// Why there are no GPUs; `None` if there are.
    pub why_no_gpus: Option<String>,
}

/// How many of `sessions` each of so many devices has; `None` if no number was asked for.
///
/// # Errors
/// [`SessionError::Uneven`] if they can't be shared evenly.
pub fn sessions_per_device(sessions: Option<NonZeroUsize>, devices: usize) -> Result<Option<usize>, SessionError> {
    let share = |sessions: NonZeroUsize| match sessions.get().is_multiple_of(devices) {
        true => Ok(sessions.get() / devices),
        false => Err(SessionError::Uneven { sessions: sessions.get(), devices }),
    };
    sessions.map(share).transpose()
}

/// Devices as they are asked for: `cuda:0,cuda:1`.
#[must_use]
pub fn in_words(devices: &[Device]) -> String {
    devices.iter().map(Device::to_string).collect::<Vec<_>>().join(",")
}

/// Lists the devices. Needs neither ONNX Runtime nor CUDA: a GPU in the list may yet have no provider that loads.
#[must_use]
pub fn list() -> Devices {
    let gpus = Gpus::find();
    let why_no_gpus = gpus.visible.is_empty().then(|| gpus.why_none());
    Devices { cpu: cpu(), gpus: gpus.visible, why_no_gpus }
}

/// Free memory of a GPU in bytes; `None` for the CPU, or if the driver doesn't tell.
pub(super) fn free_bytes(device: Device) -> Option<u64> {
    let Device::Cuda { index } = device else { return None };
    Gpus::find().visible.into_iter().find(|gpu| gpu.index == index).map(|gpu| gpu.memory_free_bytes)
}

fn devices_of(gpus: &Gpus) -> Vec<Device> {
    gpus.visible.iter().map(|gpu| Device::Cuda { index: gpu.index }).collect()
}

fn require(gpus: &Gpus, device: Device) -> Result<(), SessionError> {
    if device == Device::Cpu || devices_of(gpus).contains(&device) {
        return Ok(());
    }
    let reason = match gpus.visible.len() {
        0 => gpus.why_none(),
        count => format!("{count} GPU(s) are visible, counted from 0"),
    };
    Err(SessionError::NoDevice { device, reason })
}

fn cpu() -> CpuInfo {
    let mut features = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        macro_rules! detect {
            ($($name:tt),*) => { $(if std::arch::is_x86_feature_detected!($name) { features.push($name); })* };
        }
        detect!("avx2", "fma", "f16c", "avxvnni", "avx512f", "avx512vnni", "avx512bf16");
    }
    #[cfg(target_arch = "aarch64")]
    features.push("neon");
    let name = System::new().ok().and_then(|mut system| {
        system.refresh_cpu_all();
        system.cpus().first().map(|cpu| cpu.brand().trim().to_owned())
    });
    CpuInfo {
        name: name.unwrap_or_default(),
        cores: System::physical_core_count().ok(),
        threads: std::thread::available_parallelism().map_or(1, usize::from),
        features,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inference::gpu::example as gpu;

    const GPU: Device = Device::Cuda { index: 0 };

    #[test]
    fn requests_are_read() {
        let cuda =
            |indices: &[u32]| DeviceRequest::Named(indices.iter().map(|&index| Device::Cuda { index }).collect());
        let cases = [
            ("auto", DeviceRequest::Auto),
            ("cpu", DeviceRequest::Named(vec![Device::Cpu])),
            ("cuda", cuda(&[0])),
            ("cuda:all", DeviceRequest::AllGpus),
            ("cuda:3", cuda(&[3])),
            ("cuda:1,cuda:0", cuda(&[1, 0])),
            ("cuda:0,2", cuda(&[0, 2])),
        ];
        for (text, expected) in cases {
            assert_eq!(text.parse(), Ok(expected), "{text}");
        }
        for text in ["", "gpu", "cuda:", "cuda:x", "0,1", "cuda:0,0", "cpu,cuda:0"] {
            assert!(text.parse::<DeviceRequest>().is_err(), "{text}");
        }
        assert_eq!("tensorrt".parse(), Ok(ProviderRequest::Named(Provider::TensorRt)));
        assert!("rocm".parse::<ProviderRequest>().unwrap_err().contains("auto"));
    }

    #[test]
    fn what_is_taken_is_what_loads() {
        use DeviceRequest::{AllGpus, Auto, Named};
        use Provider::{Cpu, Cuda, OpenVino, TensorRt};
        let any = ProviderRequest::Auto;
        let on_cpu = || Named(vec![Device::Cpu]);
        let on_gpu = || Named(vec![GPU]);
        type Case<'a> =
            (DeviceRequest, ProviderRequest, Option<Provider>, u32, &'a [Provider], Result<&'a str, &'a str>);
        let cases: &[Case] = &[
            (Auto, any, None, 0, &[Cpu], Ok("cpu cpu: the best on cpu")),
            (Auto, any, None, 1, &[Cpu, Cuda], Ok("cuda:0 cuda")),
            (
                Auto,
                any,
                None,
                1,
                &[Cpu],
                Ok("cpu cpu: the best on cpu that keeps the variant's precision; cuda:0 is there"),
            ),
            (Auto, any, None, 0, &[Cpu, OpenVino], Ok("cpu cpu")),
            (Auto, any, Some(OpenVino), 0, &[Cpu, OpenVino], Ok("cpu openvino: the variant is best on it")),
            (
                Auto,
                any,
                Some(OpenVino),
                0,
                &[Cpu],
                Ok("cpu cpu: the best on cpu that keeps the variant's precision; openvino"),
            ),
            (Auto, any, Some(OpenVino), 1, &[Cpu, OpenVino, Cuda], Ok("cuda:0 cuda")),
            (Auto, any, Some(TensorRt), 1, &[Cpu, TensorRt, Cuda], Ok("cuda:0 tensorrt")),
            (Auto, ProviderRequest::Named(OpenVino), None, 0, &[Cpu], Err("provider openvino can't be had")),
            (Auto, ProviderRequest::Named(Cuda), None, 0, &[Cpu], Err("provider cuda can't be had: no NVIDIA GPU")),
            (Auto, ProviderRequest::Named(Cpu), None, 1, &[Cpu, Cuda], Ok("cpu cpu")),
            (on_gpu(), any, None, 0, &[Cpu], Err("device cuda:0 can't be had: no NVIDIA GPU is visible")),
            (on_gpu(), any, None, 1, &[Cpu], Err("provider cuda can't be had")),
            (on_gpu(), ProviderRequest::Named(Cpu), None, 1, &[Cpu], Err("provider cpu does not run on device cuda:0")),
            (
                Named(vec![Device::Cuda { index: 4 }]),
                any,
                None,
                2,
                &[Cuda],
                Err("device cuda:4 can't be had: 2 GPU(s)"),
            ),
            (on_cpu(), any, None, 1, &[Cpu, Cuda], Ok("cpu cpu")),
            (AllGpus, any, None, 2, &[Cuda], Ok("cuda:0,cuda:1 cuda")),
            (AllGpus, any, None, 0, &[Cpu], Err("device cuda:0 can't be had")),
            (Named(Vec::new()), any, None, 1, &[Cpu], Err("device cpu can't be had: none was named")),
        ];
        for (devices, provider, preferred, gpu_count, loads, expected) in cases {
            let gpus = Gpus { visible: (0..*gpu_count).map(|index| gpu(index, "H100")).collect(), error: None };
            let mut probe = |provider: Provider, _: Device| {
                if loads.contains(&provider) { Ok(()) } else { Err("its library is missing".to_owned()) }
            };
            let actual = resolve_with(devices, *provider, *preferred, &gpus, &mut probe);
            let actual = actual
                .map_err(|error| error.to_string())
                .map(|resolved| format!("{} {}: {}", in_words(&resolved.devices), resolved.provider, resolved.reason));
            let matches = match (&actual, expected) {
                (Ok(actual), Ok(expected)) | (Err(actual), Err(expected)) => actual.starts_with(expected),
                _ => false,
            };
            assert!(matches, "{devices:?} {provider:?} {loads:?}: {actual:?} instead of {expected:?}");
        }
    }

    #[test]
    fn sessions_are_shared_evenly() {
        let share = |sessions: usize, devices: usize| {
            sessions_per_device(NonZeroUsize::new(sessions), devices).map_err(|error| error.to_string())
        };
        assert_eq!((share(4, 2), share(0, 2)), (Ok(Some(2)), Ok(None)));
        assert_eq!(share(3, 2), Err("3 sessions can't be shared evenly by 2 devices".to_owned()));
        assert!(share(1, 2).is_err());
    }

    #[test]
    fn this_machine_has_a_cpu_that_loads() {
        let devices = list();
        assert!(devices.cpu.threads > 0);
        assert_eq!(devices.gpus.is_empty(), devices.why_no_gpus.is_some());
        let statuses = probe_providers().unwrap();
        assert_eq!(statuses[0], ProviderStatus { provider: Provider::Cpu, why_not: None });
        let resolved = resolve(&DeviceRequest::Named(vec![Device::Cpu]), ProviderRequest::Auto, None).unwrap();
        assert_eq!((&resolved.devices[..], resolved.provider), (&[Device::Cpu][..], Provider::Cpu));
    }
}
