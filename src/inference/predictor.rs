//! One model, loaded and warm, for tiles that are at hand: no slide, no stages.

use std::num::NonZeroUsize;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use rayon::{ThreadPool, ThreadPoolBuilder};

use super::device::{self, Device, DeviceRequest, Provider, ProviderRequest};
use super::{ModelCard, OrtSession, Prediction, Session, SessionError, SessionFactory, SessionOptions, Variant};

/// Batches that run on a GPU before a predictor is handed out: kernels are chosen and memory grows in them. A CPU has
/// nothing to choose; it runs a tile.
const WARM_UP: usize = 2;

/// Where and how a predictor runs; the default is a tile at a time, on what the machine has.
#[derive(Clone, Debug)]
pub struct PredictorOptions {
    /// The card's variant; else `fp32`, or the only one.
    pub variant: Option<String>,
    /// The devices, which share every batch.
    pub devices: DeviceRequest,
    /// The execution provider.
    pub provider: ProviderRequest,
    /// Tiles per batch of one session; `None` is left to the device. A GPU runs every batch as large as the largest before
    /// it, so that who predicts single tiles should say 1, which is the default.
    pub batch_size: Option<NonZeroUsize>,
    /// Sessions over all devices; `None` for one on each. Several on the CPU share its cores.
    pub sessions: Option<NonZeroUsize>,
}

impl Default for PredictorOptions {
    fn default() -> Self {
        let (devices, provider) = (DeviceRequest::Auto, ProviderRequest::Auto);
        Self { variant: None, devices, provider, batch_size: Some(NonZeroUsize::MIN), sessions: None }
    }
}

/// A model that is loaded and has run, so that its next tile takes no longer than any other.
pub struct Predictor {
    card: ModelCard,
    variant: Variant,
    /// Those of one device after the other's.
    sessions: Vec<Mutex<OrtSession>>,
    /// A thread for each session, if there are several: on a GPU a new thread costs tens of milliseconds.
    workers: Option<ThreadPool>,
    devices: Vec<Device>,
    provider: Provider,
    reason: String,
    batch_size: usize,
    load_secs: f64,
    warm_up_secs: f64,
}

impl Predictor {
    /// Loads a model and warms it up; on the CPU a single session has all cores.
    ///
    /// # Errors
    /// [`SessionError`] if the variant, devices or provider can't be had, or the model contradicts its card.
    pub fn open(card: ModelCard, options: &PredictorOptions) -> Result<Self, SessionError> {
        let start = Instant::now();
        let variant = match &options.variant {
            Some(name) => card.variant(name)?,
            None => card.default_variant()?,
        };
        let variant = variant.clone();
        let found = device::resolve(&options.devices, options.provider, variant.provider)?;
        let (devices, provider) = (found.devices, found.provider);
        let per_device = device::sessions_per_device(options.sessions, devices.len())?.unwrap_or(1);
        let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        // OpenVINO brings threads of its own.
        let intra_threads =
            (per_device > 1 && provider != Provider::OpenVino).then(|| NonZeroUsize::new(cores / per_device));
        let intra_threads = intra_threads.map(|threads| threads.unwrap_or(NonZeroUsize::MIN));
        let (mut sessions, mut batch_size) = (Vec::new(), usize::MAX);
        for &device in &devices {
            let options_here = SessionOptions { device, provider, intra_threads };
            let factory = SessionFactory::new(&card, &variant, options_here)?;
            batch_size = match options.batch_size {
                Some(size) => size.get(),
                None => batch_size.min(factory.auto_batch_size(per_device)?),
            };
            sessions.extend(factory.open_all(per_device)?.into_iter().map(Mutex::new));
        }
        let workers = match sessions.len() {
            1 => None,
            count => Some(ThreadPoolBuilder::new().num_threads(count).build().map_err(SessionError::Threads)?),
        };
        let load_secs = start.elapsed().as_secs_f64();
        let reason = found.reason;
        let mut predictor = Self {
            card,
            variant,
            sessions,
            workers,
            devices,
            provider,
            reason,
            batch_size,
            load_secs,
            warm_up_secs: 0.0,
        };
        let start = Instant::now();
        predictor.warm_up()?;
        predictor.warm_up_secs = start.elapsed().as_secs_f64();
        Ok(predictor)
    }

    /// What the model says of one tile `[tile_size, tile_size, 3]`, RGB, 0 to 255: the probability of each class in the
    /// card's order; of a segmentation `[class, row, column]`; of a feature model its vector.
    ///
    /// # Errors
    /// [`SessionError::TileBytes`] for a tile of another size, else why the model did not run.
    pub fn predict_tile(&mut self, rgb: &[u8]) -> Result<Vec<f32>, SessionError> {
        Ok(match self.predict(&[rgb])? {
            Prediction::Classes(values) | Prediction::Features(values) => values.into_iter().collect(),
            Prediction::Map(values) => values.into_iter().collect(),
        })
    }

    /// What the model is.
    #[must_use]
    pub fn card(&self) -> &ModelCard {
        &self.card
    }

    /// The variant that runs.
    #[must_use]
    pub fn variant(&self) -> &Variant {
        &self.variant
    }

    /// On what it runs.
    #[must_use]
    pub fn devices(&self) -> &[Device] {
        &self.devices
    }

    /// The execution provider.
    #[must_use]
    pub fn provider(&self) -> Provider {
        self.provider
    }

    /// Why these devices and this provider, in a sentence.
    #[must_use]
    pub fn reason(&self) -> &str {
        &self.reason
    }

    /// Sessions over all devices.
    #[must_use]
    pub fn sessions(&self) -> usize {
        self.sessions.len()
    }

    /// Tiles per batch of one session, as asked for or as suits the devices.
    #[must_use]
    pub fn batch_size(&self) -> usize {
        self.batch_size
    }

    /// Tiles that keep all sessions at work with full batches.
    #[must_use]
    pub fn total_batch_size(&self) -> usize {
        self.batch_size * self.sessions.len()
    }

    /// Seconds until the sessions were open.
    #[must_use]
    pub fn load_secs(&self) -> f64 {
        self.load_secs
    }

    /// Seconds of the first batches, in which kernels are chosen and compiled.
    #[must_use]
    pub fn warm_up_secs(&self) -> f64 {
        self.warm_up_secs
    }

    fn warm_up(&mut self) -> Result<(), SessionError> {
        let side = self.card.tile_size as usize;
        let tile = vec![128; side * side * 3];
        let is_cpu = self.devices.contains(&Device::Cpu);
        let (batches, tiles) = if is_cpu { (1, self.sessions()) } else { (WARM_UP, self.total_batch_size()) };
        let batch = vec![&tile[..]; tiles];
        (0..batches).try_for_each(|_| self.predict(&batch).map(drop))
    }
}

impl Session for Predictor {
    /// The sessions share the tiles in equal parts, each a batch.
    fn predict(&mut self, tiles: &[&[u8]]) -> Result<Prediction, SessionError> {
        let share = tiles.len().div_ceil(self.sessions.len()).max(1);
        let predict = |index: usize| {
            let start = index * share;
            let tiles = tiles.get(start..tiles.len().min(start + share)).filter(|tiles| !tiles.is_empty())?;
            let mut session = self.sessions[index].lock().unwrap_or_else(PoisonError::into_inner);
            Some(session.predict(tiles).map_err(|error| match error {
                SessionError::TileBytes { index, got, expected } => {
                    SessionError::TileBytes { index: start + index, got, expected }
                }
                error => error,
            }))
        };
        let parts = match &self.workers {
            None => vec![predict(0)],
            Some(workers) => workers.broadcast(|worker| predict(worker.index())),
        };
        let mut parts = parts.into_iter().flatten();
        let mut whole = parts.next().ok_or(SessionError::EmptyBatch)??;
        for part in parts {
            whole.append(&part?).map_err(|error| {
                let session = self.sessions[0].lock().unwrap_or_else(PoisonError::into_inner);
                session.changing_shape(&error)
            })?;
        }
        Ok(whole)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inference::BareModel;
    use std::path::Path;

    fn card() -> ModelCard {
        ModelCard::load(Path::new("models/cells-vit"), &BareModel::default()).unwrap()
    }

    #[test]
    fn a_tile_gets_the_probabilities_that_a_batch_gives_it() {
        let options = PredictorOptions { devices: "cpu".parse().unwrap(), ..PredictorOptions::default() };
        let mut predictor = Predictor::open(card(), &options).unwrap();
        let side = card().tile_size as usize;
        let tiles = [[90, 40, 120].repeat(side * side), [230, 200, 220].repeat(side * side)];
        let Prediction::Classes(both) = predictor.predict(&[&tiles[0], &tiles[1]]).unwrap() else { panic!() };
        for (tile, row) in tiles.iter().zip(both.outer_iter()) {
            let alone = predictor.predict_tile(tile).unwrap();
            assert!((alone.iter().sum::<f32>() - 1.0).abs() < 1e-5);
            // Batches of other sizes may add in another order.
            assert!(alone.iter().zip(row).all(|(a, b)| (a - b).abs() < 1e-5), "{alone:?} {row}");
        }
        let shared = PredictorOptions { sessions: NonZeroUsize::new(2), batch_size: NonZeroUsize::new(1), ..options };
        let mut replicas = Predictor::open(card(), &shared).unwrap();
        assert_eq!((predictor.batch_size(), predictor.total_batch_size()), (1, 1), "a tile must not pay for others");
        assert_eq!((replicas.sessions(), replicas.batch_size(), replicas.total_batch_size()), (2, 1, 2));
        let three = [&tiles[0][..], &tiles[1], &tiles[0]];
        let Prediction::Classes(by_two) = replicas.predict(&three).unwrap() else { panic!() };
        let Prediction::Classes(by_one) = predictor.predict(&three).unwrap() else { panic!() };
        assert!(by_two.iter().zip(&by_one).all(|(a, b)| (a - b).abs() < 1e-5), "{by_two} {by_one}");
        assert!(by_two.row(0) != by_two.row(1), "rows keep their order");
        assert!(matches!(replicas.predict(&[]), Err(SessionError::EmptyBatch)));
        assert_eq!(replicas.predict(&three[..1]).unwrap().len(), 1, "fewer tiles than sessions");
        let third_is_short = [&tiles[0][..], &tiles[1], &tiles[0][3..]];
        assert!(matches!(replicas.predict(&third_is_short), Err(SessionError::TileBytes { index: 2, .. })));
        let wrong = predictor.predict_tile(&tiles[0][3..]);
        assert!(matches!(wrong, Err(SessionError::TileBytes { index: 0, .. })));
    }
}
