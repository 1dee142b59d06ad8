//! How fast a model runs apart from everything around it: each of its batches is timed while work goes on.

use std::time::Instant;

use crate::inference::{Prediction, Predictor, Session, SessionError, device};
use crate::measure::Samples;
use crate::report::compare::SummaryRecord;
use crate::report::{PaceRecord, RanOnRecord};

/// A predictor whose batches are timed.
pub(super) struct Paced {
    pub(super) predictor: Predictor,
    /// Tiles and seconds of each batch, in order.
    batches: Vec<(usize, f64)>,
}

impl Paced {
    pub(super) fn new(predictor: Predictor) -> Self {
        Self { predictor, batches: Vec::new() }
    }

    /// What was measured; `None` before the first batch.
    pub(super) fn record(&self) -> Option<PaceRecord> {
        pace(&self.batches)
    }
}

impl Session for Paced {
    fn predict(&mut self, tiles: &[&[u8]]) -> Result<Prediction, SessionError> {
        let start = Instant::now();
        let prediction = self.predictor.predict(tiles)?;
        self.batches.push((tiles.len(), start.elapsed().as_secs_f64()));
        Ok(prediction)
    }
}

/// Where and how it runs, as records tell.
pub(super) fn ran_on(predictor: &Predictor) -> RanOnRecord {
    RanOnRecord {
        device: device::in_words(predictor.devices()),
        provider: predictor.provider().to_string(),
        reason: predictor.reason().to_owned(),
        sessions: predictor.sessions(),
        batch_size: predictor.batch_size(),
        total_batch_size: predictor.total_batch_size(),
        load_secs: predictor.load_secs(),
        warm_up_secs: predictor.warm_up_secs(),
    }
}

fn pace(batches: &[(usize, f64)]) -> Option<PaceRecord> {
    // The first one is the warm-up where another one of its size tells the same.
    let is_repeated = |first: &(usize, f64)| batches.iter().skip(1).any(|(tiles, _)| *tiles == first.0);
    let batches = &batches[usize::from(batches.first().is_some_and(is_repeated))..];
    let tiles: usize = batches.iter().map(|(tiles, _)| tiles).sum();
    let seconds: f64 = batches.iter().map(|(_, seconds)| seconds).sum();
    // A last batch that is not full takes longer for each of its tiles; it counts only if there is no full one.
    let fullest = batches.iter().map(|(tiles, _)| *tiles).max()?;
    let full = batches.iter().filter(|(tiles, _)| *tiles == fullest);
    let samples = Samples::new(full.map(|(tiles, seconds)| seconds / *tiles as f64).collect())?;
    Some(PaceRecord {
        batch_size: fullest,
        tiles: tiles as u64,
        seconds,
        tiles_per_sec: tiles as f64 / seconds,
        ms_per_tile: SummaryRecord::in_ms(&samples.summary()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn full_batches_tell_the_latency_and_all_tell_the_rate() {
        let record = pace(&[(4, 9.0), (4, 0.4), (4, 0.8), (2, 0.8)]).unwrap();
        assert_eq!((record.batch_size, record.tiles, record.seconds, record.tiles_per_sec), (4, 10, 2.0, 5.0));
        assert_eq!((record.ms_per_tile.count, record.ms_per_tile.max), (2, 200.0));
        assert!((record.ms_per_tile.p50 - 150.0).abs() < 1e-9 && (record.ms_per_tile.p99 - 199.0).abs() < 1e-9);
        let few = pace(&[(16, 0.8), (9, 0.9)]).unwrap();
        assert_eq!((few.batch_size, few.tiles, few.ms_per_tile.p50), (16, 25, 50.0));
        assert_eq!(pace(&[]), None);
        assert_eq!(pace(&[(2, 1.0)]).unwrap().ms_per_tile.p50, 500.0);
    }
}
