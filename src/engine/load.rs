//! From a model card and a request to a loaded engine: variant, device, sessions, batch size, and the account of them.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::path::PathBuf;

use super::config::RunConfig;
use super::memory::Room;
use super::{Engine, EngineError};
use crate::inference::{
    Device, DeviceRequest, ModelCard, Provider, ProviderRequest, Session, SessionFactory, SessionOptions, StopHandle,
    Variant, device,
};
use crate::report::{ExecutionRecord, ModelRecord};

/// Sessions on one GPU: while one computes, the other one's tiles and results are copied. On an H100 one alone took 45 ms for
/// a batch that the GPU computes in 26 (ViT-B/16 FP16, 256 tiles); two keep it at work, and a third one gained
/// 5 % at most.
const SESSIONS_PER_GPU: usize = 2;

/// Where and how a model is to run; what is `None` is left to the machine.
#[derive(Clone, Debug)]
pub struct LoadRequest {
    /// The card's variant; else `fp32`, or the only one.
    pub variant: Option<String>,
    /// The devices.
    pub devices: DeviceRequest,
    /// The execution provider.
    pub provider: ProviderRequest,
    /// Tiles per batch.
    pub batch_size: Option<NonZeroUsize>,
    /// Reader threads.
    pub readers: Option<NonZeroUsize>,
    /// Sessions over all devices.
    pub sessions: Option<NonZeroUsize>,
    /// Where optimised graphs are kept for later runs.
    pub graph_cache: Option<PathBuf>,
}

impl LoadRequest {
    /// The same on the first of its devices, or by one session where sessions on a single device were asked for, and how
    /// many of these the request has; `None` if it has just one.
    ///
    /// # Errors
    /// [`EngineError`] if the devices can't be had.
    pub fn on_one(&self) -> Result<Option<(Self, usize)>, EngineError> {
        let devices = device::resolve(&self.devices, self.provider, None)?.devices;
        let one = |sessions| Self { devices: DeviceRequest::Named(devices[..1].to_vec()), sessions, ..self.clone() };
        let asked = self.sessions.map_or(1, NonZeroUsize::get);
        Ok(match devices.len() {
            0 | 1 => (asked > 1).then(|| (one(Some(NonZeroUsize::MIN)), asked)),
            // As many sessions as each of all devices has.
            count => {
                let each = device::sessions_per_device(self.sessions, count)?;
                Some((one(each.and_then(NonZeroUsize::new)), count))
            }
        })
    }
}

impl Engine {
    /// Loads the model and opens its sessions.
    ///
    /// # Errors
    /// [`EngineError`] if the variant, device or provider can't be had, or the model contradicts its card.
    pub fn load(card: ModelCard, request: &LoadRequest, config: RunConfig) -> Result<Self, EngineError> {
        let variant = match &request.variant {
            Some(name) => card.variant(name)?,
            None => card.default_variant()?,
        };
        let resolved = device::resolve(&request.devices, request.provider, variant.provider)?;
        let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        // OpenVINO brings threads of its own.
        let has_own_threads = resolved.provider == Provider::OpenVino;
        let sessions_per_device = match device::sessions_per_device(request.sessions, resolved.devices.len())? {
            Some(sessions) => sessions,
            None if resolved.provider == Provider::Cpu => cores,
            // Each session of TensorRT compiles the model anew, for minutes.
            None if has_own_threads || resolved.provider == Provider::TensorRt => 1,
            None => SESSIONS_PER_GPU,
        };
        // One thread a session: sessions side by side need no synchronisation inside an operator, and results do not
        // depend on their number.
        let intra_threads = (!has_own_threads).then_some(NonZeroUsize::MIN);
        let factory = |device: &Device| {
            let options = SessionOptions { device: *device, provider: resolved.provider, intra_threads };
            let factory = SessionFactory::new(&card, variant, options)?;
            match &request.graph_cache {
                Some(folder) => factory.keeping_graph(folder),
                None => Ok(factory),
            }
        };
        let factories: Vec<SessionFactory> = resolved.devices.iter().map(factory).collect::<Result<_, _>>()?;
        let mut sessions: Vec<Box<dyn Session>> = Vec::new();
        for factory in &factories {
            let opened = factory.open_all(sessions_per_device)?.into_iter();
            sessions.extend(opened.map(|session| Box::new(session) as Box<dyn Session>));
        }
        let batch_size = match request.batch_size {
            Some(size) => size,
            None => smallest_batch(&factories, sessions_per_device)?,
        };
        let readers = request.readers.or(NonZeroUsize::new(cores)).unwrap_or(NonZeroUsize::MIN);
        // On a GPU all cores are there for reading.
        let is_split_due =
            resolved.provider == Provider::Cpu && request.readers.is_none() && request.sessions.is_none();
        let model = model_record(&card, variant);
        let kept = factories.first().and_then(SessionFactory::kept_graph);
        let kept = kept.map(|file| format!("; its graph was optimised by an earlier run: {}", file.display()));
        let execution = ExecutionRecord {
            device: device::in_words(&resolved.devices),
            provider: resolved.provider.to_string(),
            reason: resolved.reason + &kept.unwrap_or_default(),
            placement: BTreeMap::new(),
            batch_size: batch_size.get(),
            readers: readers.get(),
            sessions: sessions.len(),
            threads_per_session: intra_threads.map_or(cores, NonZeroUsize::get),
        };
        Ok(Self { factories, is_split_due, ..Self::over_sessions(card, config, sessions, model, execution)? })
    }

    /// An engine over sessions that were made elsewhere: by another runtime, or with answers that are known beforehand.
    ///
    /// Sessions must answer as `card` says: its task, a row for each tile, a score for each class. Slides are done again when
    /// anything in `model` differs from what their records say. `execution` says where the sessions run, in the words of
    /// records (`cpu`, `cuda:0`), and how many readers and tiles per batch the engine has, at least one each; their own
    /// number is counted. Who asks to stop waits for the batches under way.
    ///
    /// # Errors
    /// [`EngineError::NoSessions`].
    pub fn over_sessions(
        card: ModelCard,
        config: RunConfig,
        sessions: Vec<Box<dyn Session>>,
        model: ModelRecord,
        execution: ExecutionRecord,
    ) -> Result<Self, EngineError> {
        if sessions.is_empty() {
            return Err(EngineError::NoSessions);
        }
        let at_least_one = |count| NonZeroUsize::new(count).unwrap_or(NonZeroUsize::MIN);
        let (readers, batch_size) = (at_least_one(execution.readers), at_least_one(execution.batch_size));
        let execution = ExecutionRecord {
            readers: readers.get(),
            sessions: sessions.len(),
            threads_per_session: execution.threads_per_session.max(1),
            ..execution
        };
        Ok(Self {
            card,
            config,
            sessions,
            factories: Vec::new(),
            readers,
            is_split_due: false,
            batch_size,
            warm_batch: 0,
            cold_bytes: 0,
            model_bytes: None,
            room: Room::AMPLE,
            model,
            execution,
        })
    }

    /// The model that was loaded.
    #[must_use]
    pub fn model(&self) -> &ModelRecord {
        &self.model
    }

    /// Where and how it runs; the placement of nodes is known once a batch was inferred on a GPU.
    #[must_use]
    pub fn execution(&self) -> ExecutionRecord {
        let mut placement = self.execution.placement.clone();
        for of_device in self.factories.iter().filter_map(SessionFactory::placement) {
            for (provider, operators) in &of_device.nodes {
                let of_provider = placement.entry(provider.clone()).or_default();
                for (operator, count) in operators {
                    *of_provider.entry(operator.clone()).or_default() += *count as u64;
                }
            }
        }
        ExecutionRecord { placement, batch_size: self.batch_size.get(), ..self.execution.clone() }
    }

    /// The devices that it runs on.
    pub(super) fn devices(&self) -> Vec<Device> {
        self.factories.iter().map(SessionFactory::device).collect()
    }

    /// What ends running batches from another thread.
    #[must_use]
    pub fn stop_handles(&self) -> Vec<StopHandle> {
        self.factories.iter().map(SessionFactory::stop_handle).collect()
    }
}

/// The model as records name it.
pub(crate) fn model_record(card: &ModelCard, variant: &Variant) -> ModelRecord {
    ModelRecord {
        name: card.name.clone(),
        variant: variant.name.clone(),
        file: variant.file.display().to_string(),
        sha256: variant.sha256.clone(),
        task: card.task.to_string(),
        classes: card.class_names(),
    }
}

/// The batch that suits every device: who shares a batch must not depend on the device that takes it.
fn smallest_batch(factories: &[SessionFactory], sessions: usize) -> Result<NonZeroUsize, EngineError> {
    let mut smallest = usize::MAX;
    for factory in factories {
        smallest = smallest.min(factory.auto_batch_size(sessions)?);
    }
    Ok(NonZeroUsize::new(smallest).unwrap_or(NonZeroUsize::MIN))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_of_several_sessions_is_a_request_of_its_own() {
        let request = |sessions| LoadRequest {
            variant: Some("int8".to_owned()),
            devices: "cpu".parse().unwrap(),
            provider: ProviderRequest::Auto,
            batch_size: None,
            readers: None,
            sessions: NonZeroUsize::new(sessions),
            graph_cache: None,
        };
        let (one, replicas) = request(4).on_one().unwrap().unwrap();
        assert_eq!((one.sessions.map(NonZeroUsize::get), replicas), (Some(1), 4));
        assert_eq!((one.variant.as_deref(), one.devices), (Some("int8"), "cpu".parse().unwrap()));
        assert!(request(1).on_one().unwrap().is_none() && request(0).on_one().unwrap().is_none());
    }
}
