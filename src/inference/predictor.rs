//! One model, loaded and warm, for tiles that are at hand: no slide, no stages.

use std::num::NonZeroUsize;

use super::device::{self, Device, DeviceRequest, Provider, ProviderRequest};
use super::{ModelCard, OrtSession, Prediction, Session, SessionError, SessionFactory, SessionOptions, Variant};

/// Batches that run before a predictor is handed out: kernels are chosen and memory grows in them.
const WARM_UP: usize = 2;

/// Where and how a predictor runs; the default leaves all to the machine.
#[derive(Clone, Debug)]
pub struct PredictorOptions {
    /// The card's variant; else `fp32`, or the only one.
    pub variant: Option<String>,
    /// The device, just one.
    pub devices: DeviceRequest,
    /// The execution provider.
    pub provider: ProviderRequest,
    /// Tiles per batch, for those who ask [`Predictor::batch_size`]; `None` is left to the device.
    pub batch_size: Option<NonZeroUsize>,
}

impl Default for PredictorOptions {
    fn default() -> Self {
        Self { variant: None, devices: DeviceRequest::Auto, provider: ProviderRequest::Auto, batch_size: None }
    }
}

/// A model that is loaded and has run, so that its next tile takes no longer than any other.
pub struct Predictor {
    card: ModelCard,
    variant: Variant,
    session: OrtSession,
    device: Device,
    provider: Provider,
    reason: String,
    batch_size: usize,
}

impl Predictor {
    /// Loads a model and warms it up; on the CPU its one session has all cores.
    ///
    /// # Errors
    /// [`SessionError`] if the variant, device or provider can't be had, or the model contradicts its card.
    pub fn open(card: ModelCard, options: &PredictorOptions) -> Result<Self, SessionError> {
        let variant = match &options.variant {
            Some(name) => card.variant(name)?,
            None => card.default_variant()?,
        };
        let variant = variant.clone();
        let found = device::resolve(&options.devices, options.provider, variant.provider)?;
        let device = match found.devices[..] {
            [device] => device,
            _ => {
                let device = found.devices.get(1).copied().unwrap_or(Device::Cpu);
                return Err(SessionError::NoDevice { device, reason: "one device is used here".to_owned() });
            }
        };
        let provider = found.provider;
        let factory = SessionFactory::new(&card, &variant, SessionOptions { device, provider, intra_threads: None })?;
        let batch_size = match options.batch_size {
            Some(size) => size.get(),
            None => factory.auto_batch_size()?,
        };
        let session = factory.open()?;
        let mut predictor = Self { card, variant, session, device, provider, reason: found.reason, batch_size };
        predictor.warm_up()?;
        Ok(predictor)
    }

    /// What the model says of one tile `[tile_size, tile_size, 3]`, RGB, 0 to 255: the probability of each class in the
    /// card's order; of a segmentation `[class, row, column]`; of a feature model its vector.
    ///
    /// # Errors
    /// [`SessionError::TileBytes`] for a tile of another size, else why the model did not run.
    pub fn predict_tile(&mut self, rgb: &[u8]) -> Result<Vec<f32>, SessionError> {
        Ok(match self.session.predict(&[rgb])? {
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
    pub fn device(&self) -> Device {
        self.device
    }

    /// The execution provider.
    #[must_use]
    pub fn provider(&self) -> Provider {
        self.provider
    }

    /// Why this device and provider, in a sentence.
    #[must_use]
    pub fn reason(&self) -> &str {
        &self.reason
    }

    /// Tiles per batch that were asked for, or that suit the device.
    #[must_use]
    pub fn batch_size(&self) -> usize {
        self.batch_size
    }

    fn warm_up(&mut self) -> Result<(), SessionError> {
        let side = self.card.tile_size as usize;
        let tile = vec![128; side * side * 3];
        let batch = vec![&tile[..]; self.batch_size];
        (0..WARM_UP).try_for_each(|_| self.session.predict(&batch).map(drop))
    }
}

impl Session for Predictor {
    fn predict(&mut self, tiles: &[&[u8]]) -> Result<Prediction, SessionError> {
        self.session.predict(tiles)
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
        let wrong = predictor.predict_tile(&tiles[0][3..]);
        assert!(matches!(wrong, Err(SessionError::TileBytes { index: 0, .. })));
    }
}
