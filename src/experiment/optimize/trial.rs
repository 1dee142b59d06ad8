//! Holds a candidate against the original: does it load, run, agree, and is it faster.

use std::num::NonZeroUsize;

use super::{Candidate, OptimizeRequest, record};
use crate::experiment::ExperimentError;
use crate::experiment::agreement::{self, Agreement};
use crate::experiment::race::{Contestant, RaceRules, race, timed};
use crate::inference::{
    Activation, Device, DeviceRequest, ModelCard, Prediction, Provider, ProviderRequest, Session, SessionError,
    SessionFactory, SessionOptions, Variant, device,
};
use crate::measure::{Bootstrap, Samples};
use crate::onnx::Model;
use crate::report::{SpeedRecord, VariantAgreement, VariantRecord};

/// A turn should be long against the clock and the scheduler.
const TURN_SECS: f64 = 0.15;
/// Tiles that speed is measured on.
const MOST_TILES: usize = 64;
/// Threads of a session in a run on the CPU, where each core has one of its own.
const AS_IN_A_RUN: Option<NonZeroUsize> = NonZeroUsize::new(1);

/// The original, ready to be compared with.
pub(super) struct Trial<'a> {
    card: ModelCard,
    original: Variant,
    predictions: Vec<Prediction>,
    request: &'a OptimizeRequest,
}

/// What came of a candidate.
pub(super) struct Verdict {
    pub(super) record: VariantRecord,
    pub(super) model: Model,
    pub(super) variant: Variant,
    /// It ran, gave numbers, and agrees as much as its precision must.
    pub(super) is_sound: bool,
}

impl Verdict {
    /// How many times faster than the original; 0 if it was not measured.
    pub(super) fn speed(&self) -> f64 {
        self.record.speed.as_ref().map_or(0.0, |speed| speed.ratio)
    }
}

impl<'a> Trial<'a> {
    pub(super) fn new(
        card: &ModelCard,
        original: &Variant,
        request: &'a OptimizeRequest,
    ) -> Result<Self, ExperimentError> {
        // Raw outputs: an activation hides differences where it saturates.
        let card = ModelCard { activation: Activation::None, ..card.clone() };
        let mut session = open(&card, original, Provider::Cpu, None)?;
        let predictions = agreement::predict(&mut session, &request.tiles.slices(), 1)?;
        let nonfinite = predictions.iter().flat_map(Prediction::nonfinite_per_tile).filter(|count| *count > 0).count();
        if nonfinite > 0 {
            let (path, tiles) = (original.file.clone(), predictions.len());
            return Err(ExperimentError::OriginalNotFinite { path, nonfinite, tiles });
        }
        Ok(Self { card, original: original.clone(), predictions, request })
    }

    /// How much a model agrees with the original, on the CPU.
    pub(super) fn agreement_of(&self, model: &Model) -> Result<Agreement, ExperimentError> {
        let folder =
            tempfile::tempdir().map_err(|source| super::file_error(&std::env::temp_dir(), "written", source))?;
        let file = folder.path().join("candidate.onnx");
        model.clone().save_with_weights(&file)?;
        let variant = Variant::of_file("candidate", &file)?;
        self.agreement(&variant, Provider::Cpu)
    }

    fn agreement(&self, variant: &Variant, provider: Provider) -> Result<Agreement, ExperimentError> {
        let mut session = open(&self.card, variant, provider, None)?;
        let tiles = self.request.tiles.slices();
        let predictions = agreement::predict(&mut session, &tiles, 1)?;
        // The batch must be as open as the original's.
        session.predict(&tiles[..tiles.len().min(3)])?;
        Ok(agreement::compare(self.card.task, &self.predictions, &predictions, 0.5))
    }

    /// Measures candidates of one precision against the original, in turns.
    pub(super) fn judge(
        &self,
        candidates: Vec<Candidate>,
        say: &mut dyn FnMut(&str),
    ) -> Result<Vec<Verdict>, ExperimentError> {
        let folder =
            tempfile::tempdir().map_err(|source| super::file_error(&std::env::temp_dir(), "written", source))?;
        let mut tried = Vec::new();
        for (index, candidate) in candidates.into_iter().enumerate() {
            say(&format!("checking {} ({})", candidate.name, candidate.note));
            let file = folder.path().join(format!("{index}.onnx"));
            candidate.model.clone().save_with_weights(&file)?;
            let variant = Variant {
                provider: Some(candidate.provider),
                options: candidate.options.clone(),
                ..Variant::of_file(candidate.name, &file)?
            };
            let provider = here(candidate.provider);
            let agreement = self.agreement(&variant, provider.unwrap_or(Provider::Cpu))?;
            tried.push((candidate, variant, provider, agreement));
        }
        say("measuring speed in turns");
        let speeds = self.speeds(&tried)?;
        let verdict = |((candidate, variant, _, agreement), speed): (Tried, Option<SpeedRecord>)| {
            let is_sound = agreement.nonfinite == 0 && agreement.mean_cosine() >= self.least_cosine(candidate.name);
            verdict(candidate, variant, &agreement, speed, is_sound)
        };
        Ok(tried.into_iter().zip(speeds).map(verdict).collect())
    }

    fn least_cosine(&self, name: &str) -> f64 {
        match name {
            "int8" | "int8-openvino" => self.request.min_cosine,
            "fp16" => 0.9999,
            // Only the order of sums may differ.
            _ => 0.99999,
        }
    }

    /// The speed of each, `None` where its provider is not in this machine.
    fn speeds(&self, tried: &[Tried]) -> Result<Vec<Option<SpeedRecord>>, ExperimentError> {
        let Some(provider) = tried.iter().find_map(|(_, _, provider, _)| *provider) else {
            return Ok(tried.iter().map(|_| None).collect());
        };
        let tiles = self.request.tiles.slices();
        let tiles = &tiles[..tiles.len().min(MOST_TILES)];
        // OpenVINO takes all cores for a session, so the original has them too; it runs as it would without OpenVINO.
        let (plain, threads) = match provider {
            Provider::OpenVino => (Provider::Cpu, None),
            _ => (provider, AS_IN_A_RUN),
        };
        let mut sessions: Vec<Box<dyn Session>> = vec![Box::new(open(&self.card, &self.original, plain, threads)?)];
        for (_, variant, ..) in tried {
            sessions.push(Box::new(open(&self.card, variant, provider, threads)?));
        }
        let batch = if provider.runs_on(Device::Cpu) { 1 } else { tiles.len() };
        let count = turn_size(sessions[0].as_mut(), tiles, batch)?;
        let contestants = sessions.iter_mut().map(|session| {
            let turn: Vec<&[u8]> = tiles.iter().copied().cycle().take(count).collect();
            Box::new(move || timed(|| turn.chunks(batch).try_for_each(|batch| session.predict(batch).map(drop))))
                as Contestant<'_, SessionError>
        });
        let rules = RaceRules { warm_up: 1, least_rounds: 11, tolerance: 0.01, most_time: self.request.most_time };
        let raced = race(&mut contestants.collect::<Vec<_>>(), rules)?;
        let (original, others) = raced.seconds.split_first().map_or((&[][..], &[][..]), |(first, rest)| (first, rest));
        let speed = |seconds: &Vec<f64>| {
            let ratio = Bootstrap::default().ratio(original, seconds)?;
            let median = Samples::new(seconds.clone())?.median();
            Some(SpeedRecord {
                ratio: ratio.value,
                low: ratio.low,
                high: ratio.high,
                ms_per_tile: 1000.0 * median / count as f64,
                batch,
                original_secs: original.to_vec(),
                secs: seconds.clone(),
            })
        };
        Ok(others.iter().map(speed).collect())
    }
}

type Tried = (Candidate, Variant, Option<Provider>, Agreement);

fn verdict(
    candidate: Candidate,
    variant: Variant,
    agreement: &Agreement,
    speed: Option<SpeedRecord>,
    is_sound: bool,
) -> Verdict {
    let Candidate { name, model, passes, note, .. } = candidate;
    let is_faster = speed.as_ref().map(|speed| speed.low > 1.0);
    let said = match (&speed, is_sound) {
        (_, false) => format!("does not agree with the original: mean cosine {:.5}", agreement.mean_cosine()),
        (None, _) => "not measured: its provider is not in this machine".to_owned(),
        (Some(speed), _) if is_faster == Some(true) => format!("{:.2} times as fast as the original here", speed.ratio),
        (Some(speed), _) => {
            format!("not recommended: {:.2} times as fast as the original here", speed.ratio)
        }
    };
    let max_abs = agreement.max_abs_difference;
    let record = VariantRecord {
        name: name.to_owned(),
        file: None,
        bytes: 0,
        sha256: String::new(),
        provider: variant.provider.map_or_else(String::new, |provider| provider.to_string()),
        options: variant.options.clone(),
        agreement: VariantAgreement {
            tiles: agreement.tiles,
            mean_cosine: agreement.mean_cosine(),
            min_cosine: agreement.min_cosine(),
            max_abs_difference: max_abs.is_finite().then_some(max_abs),
            top1_agreement: agreement.top1,
            nonfinite: agreement.nonfinite,
        },
        is_recommended: is_sound && is_faster == Some(true),
        speed,
        note: format!("{note}; {said}"),
        passes: passes.iter().map(record).collect(),
    };
    Verdict { record, model, variant, is_sound }
}

/// The provider, if it loads in this machine.
fn here(provider: Provider) -> Option<Provider> {
    let devices = match provider.runs_on(Device::Cpu) {
        true => DeviceRequest::Named(vec![Device::Cpu]),
        false => DeviceRequest::Named(vec![Device::Cuda { index: 0 }]),
    };
    device::resolve(&devices, ProviderRequest::Named(provider), None).ok().map(|resolved| resolved.provider)
}

/// A session with so many threads on a CPU; `None` for one per core.
fn open(
    card: &ModelCard,
    variant: &Variant,
    provider: Provider,
    intra_threads: Option<NonZeroUsize>,
) -> Result<impl Session + 'static, SessionError> {
    let device = if provider.runs_on(Device::Cpu) { Device::Cpu } else { Device::Cuda { index: 0 } };
    let options = SessionOptions { device, provider, intra_threads };
    SessionFactory::new(card, variant, options)?.open()
}

/// Tiles of one turn, so that it is long against the clock.
fn turn_size(session: &mut dyn Session, tiles: &[&[u8]], batch: usize) -> Result<usize, SessionError> {
    let batch_tiles = &tiles[..batch.min(tiles.len())];
    session.predict(batch_tiles)?;
    let start = std::time::Instant::now();
    session.predict(batch_tiles)?;
    let batches = (TURN_SECS / start.elapsed().as_secs_f64().max(1e-6)).ceil().clamp(1.0, 64.0);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "1 to 64")]
    let batches = batches as usize;
    Ok(batches * batch_tiles.len())
}
