//! Runs the model over tiles from memory, through the batching, sessions and channels of a run: what it can do where
//! reading, stitching and writing cost nothing.

use std::num::NonZeroUsize;
use std::time::{Duration, Instant};

use crossbeam_channel::bounded;

use super::stages::{Group, Infer, Tile};
use super::{Engine, EngineError, QUEUE, failed};
use crate::geometry::TilePosition;
use crate::pipeline::{self, Cancel, StageStats};

/// What a run over tiles from memory took.
#[derive(Clone, Debug, PartialEq)]
pub struct Simulated {
    /// Tiles that were inferred.
    pub tiles: u64,
    /// Tiles per batch; the last one may have fewer.
    pub batch_size: NonZeroUsize,
    /// From the first tile to the last result.
    pub duration: Duration,
    /// Seconds that a session took for each full batch, in the order in which they ended.
    pub batch_secs: Vec<f64>,
    /// What the stages did with their time.
    pub stages: Vec<StageStats>,
}

impl Engine {
    /// Infers `count` tiles, taken from `tiles` in turn; `progress` is told how many are done.
    ///
    /// # Errors
    /// [`EngineError`] if a batch can't be inferred, or someone asked to stop.
    pub fn simulate(
        &mut self,
        tiles: &[Vec<u8>],
        count: usize,
        cancel: &Cancel,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Simulated, EngineError> {
        let Self { sessions, batch_size, config, .. } = self;
        let batch_size = *batch_size;
        // As in a run; the buffers hold the tiles already, so that nothing is copied while the clock runs.
        let pool_size = batch_size.get() * (2 * sessions.len() + 2);
        let (pool, free_buffers) = bounded(pool_size);
        for tile in tiles.iter().cycle().take(pool_size) {
            pool.send(tile.clone()).ok();
        }
        let source = (0..count).map_while(move |index| {
            let pixels = free_buffers.recv().ok()?;
            Some(Tile { index, position: TilePosition::default(), pixels, failure: None })
        });
        let on_nonfinite = config.on_nonfinite;
        let infer: Vec<Infer<'_>> =
            sessions.iter_mut().map(|session| Infer { session: session.as_mut(), on_nonfinite }).collect();
        let (mut done, mut batch_secs) = (0, Vec::new());
        let (done_here, secs_here) = (&mut done, &mut batch_secs);
        let start = Instant::now();
        // Owns the pool's sender: when results end, by a failure too, the source must not wait for a buffer.
        let stages = pipeline::run(cancel, move |line| {
            let predicted = line
                .source("tiles", QUEUE, source)
                .through("batch", QUEUE, vec![Group::new(batch_size)])
                .through("infer", QUEUE, infer);
            predicted.fold(
                "results",
                move |batch| {
                    if batch.tiles.len() == batch_size.get() {
                        secs_here.push(batch.secs);
                    }
                    *done_here += batch.tiles.len() as u64;
                    progress(*done_here);
                    for tile in batch.tiles {
                        // The source is gone once it has handed out all tiles.
                        pool.try_send(tile.pixels).ok();
                    }
                    Ok(())
                },
                || Ok(()),
            );
        });
        let stages = stages.map_err(|error| failed(error, cancel))?;
        Ok(Simulated { tiles: done, batch_size, duration: start.elapsed(), batch_secs, stages })
    }

    /// Tiles per batch.
    #[must_use]
    pub fn batch_size(&self) -> NonZeroUsize {
        self.batch_size
    }

    /// Sets the tiles per batch of what follows.
    pub fn set_batch_size(&mut self, batch_size: NonZeroUsize) {
        self.batch_size = batch_size;
    }
}
