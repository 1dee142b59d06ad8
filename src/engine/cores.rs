//! How reading and inference share a CPU's cores: both are timed on a few tiles, once, before the first slide.

use std::time::{Duration, Instant};

use super::EngineError;
use super::plan::SlidePlan;
use crate::inference::Session;
use crate::slide::{ReadOptions, TileReader};

/// Neighbouring tiles, of which the first one warms up and the others are timed.
const TILES: usize = 8;
/// No tile more is begun after this: the other cores wait meanwhile, and a tile that takes long leaves no doubt about who needs
/// them.
const MOST_TIME: Duration = Duration::from_millis(50);

/// Seconds of a core that a tile takes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct TileCost {
    read: f64,
    infer: f64,
}

/// Workers that keep the cores busy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Split {
    pub(super) readers: usize,
    pub(super) sessions: usize,
}

impl TileCost {
    /// Times tiles from the middle of the plan on this thread; `None` if it has none, or none can be read to be timed.
    pub(super) fn measure(
        plan: &SlidePlan,
        options: ReadOptions,
        session: &mut dyn Session,
    ) -> Result<Option<Self>, EngineError> {
        let middle = plan.positions.len().saturating_sub(TILES) / 2;
        let tiles = &plan.positions[middle..plan.positions.len().min(middle + TILES)];
        let mut readers = TileReader::several(&plan.slide, &plan.choice, options, tiles, 1)?;
        let Some(reader) = readers.first_mut() else { return Ok(None) };
        let (mut read, mut infer) = (Vec::new(), Vec::new());
        let (begin, mut pixels, mut is_warm) = (Instant::now(), Vec::new(), false);
        for tile in tiles {
            let start = Instant::now();
            // What can't be read is the run's to judge.
            if reader.read(*tile, &mut pixels).is_err() {
                continue;
            }
            let took = start.elapsed();
            if !is_warm {
                // The first batch also makes the session's memory, the first read opens the file and fills caches.
                session.predict(&[&pixels])?;
                is_warm = true;
                if tiles.len() > 1 {
                    continue;
                }
            }
            read.push(took);
            let start = Instant::now();
            session.predict(&[&pixels])?;
            infer.push(start.elapsed());
            if begin.elapsed() > MOST_TIME {
                break;
            }
        }
        let mean = |times: &[Duration]| times.iter().sum::<Duration>().as_secs_f64() / times.len() as f64;
        Ok((!read.is_empty()).then(|| Self { read: mean(&read), infer: mean(&infer) }))
    }

    /// Each stage has its share of the cores, rounded up, and one worker to spare, as one that waits leaves its core to
    /// another.
    pub(super) fn split(&self, cores: usize) -> Split {
        let whole = (self.read + self.infer).max(f64::MIN_POSITIVE);
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "at most the number of cores")]
        let workers = |secs: f64| ((secs / whole * cores as f64).ceil() as usize + 1).clamp(1, cores.max(1));
        Split { readers: workers(self.read), sessions: workers(self.infer) }
    }

    /// The split and why it is so, in a sentence.
    pub(super) fn reason(&self, split: Split, cores: usize) -> String {
        let Split { readers, sessions } = split;
        let (read, infer) = (1000.0 * self.read, 1000.0 * self.infer);
        format!(
            "a tile takes a core {read:.2} ms to read and {infer:.2} ms to infer: {readers} readers and {sessions} \
             sessions share {cores} cores"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_stage_has_its_share_and_one_to_spare() {
        let split = |read, infer, cores| {
            let Split { readers, sessions } = TileCost { read, infer }.split(cores);
            (readers, sessions)
        };
        assert_eq!(split(1.0, 1.0, 16), (9, 9));
        assert_eq!(split(0.003, 0.001, 8), (7, 3));
        assert_eq!(split(0.001, 0.1, 16), (2, 16));
        assert_eq!(split(1.0, 1.0, 2), (2, 2));
        assert_eq!(split(1.0, 0.0, 4), (4, 1));
        assert_eq!(split(0.0, 0.0, 1), (1, 1));
    }

    #[test]
    fn the_reason_has_the_figures() {
        let cost = TileCost { read: 0.0005, infer: 0.0123 };
        assert_eq!(
            cost.reason(cost.split(4), 4),
            "a tile takes a core 0.50 ms to read and 12.30 ms to infer: 2 readers and 4 sessions share 4 cores"
        );
    }
}
