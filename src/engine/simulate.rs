//! Runs the model over tiles from memory, through the batching, sessions and channels of a run: what it can do where
//! reading, stitching and writing cost nothing.

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::bounded;

use super::memory::{Room, buffer_count, tile_bytes};
use super::stages::{Group, Infer, Tile};
use super::{Engine, EngineError, QUEUE, failed};
use crate::geometry::TilePosition;
use crate::pipeline::{self, Cancel, StageStats};

/// What a run over tiles from memory took.
#[derive(Clone, Debug, PartialEq)]
pub struct Simulated {
    /// How long each round took, from the end of the one before. The first also has the filling of the channels and what
    /// libraries set up for the threads of this run: on a GPU tens of milliseconds.
    pub rounds: Vec<Duration>,
    /// Seconds that a session took for each batch of all rounds but the first, in the order in which they ended.
    pub batch_secs: Vec<f64>,
    /// What the stages did with their time.
    pub stages: Vec<StageStats>,
}

impl Engine {
    /// Infers `tiles`, which take turns, in rounds of `batches` full batches for as long as `goes_on` says so of the rounds
    /// that are done. No clock stands still between two rounds: the stages never run dry. What is under way after the last
    /// one is inferred too, and belongs to none.
    ///
    /// # Errors
    /// [`EngineError`] if there are no tiles, a batch can't be inferred, or someone asked to stop.
    pub fn simulate(
        &mut self,
        tiles: &[Vec<u8>],
        batches: NonZeroUsize,
        cancel: &Cancel,
        goes_on: &mut dyn FnMut(&[Duration]) -> bool,
    ) -> Result<Simulated, EngineError> {
        if tiles.is_empty() {
            return Err(EngineError::NoTilesGiven);
        }
        let Self { card, sessions, batch_size, config, .. } = self;
        let batch_size = *batch_size;
        // As in a run; the buffers hold the tiles already, so that nothing is copied while the clock runs.
        let pool_size =
            buffer_count(batch_size, sessions.len(), 0) + Room::AMPLE.spare_buffers(tile_bytes(card, card.tile_size));
        let (pool, free_buffers) = bounded(pool_size);
        for tile in tiles.iter().cycle().take(pool_size) {
            pool.send(tile.clone()).ok();
        }
        let is_over = &AtomicBool::new(false);
        let source = (0..).map_while(move |index| {
            let pixels = free_buffers.recv().ok().filter(|_| !is_over.load(Ordering::Relaxed))?;
            Some(Tile { index, position: TilePosition::default(), pixels, failure: None })
        });
        let on_nonfinite = config.on_nonfinite;
        let infer: Vec<Infer<'_>> =
            sessions.iter_mut().map(|session| Infer { session: session.as_mut(), on_nonfinite }).collect();
        let (mut rounds, mut batch_secs, mut batches_left) = (Vec::new(), Vec::new(), batches.get());
        let (rounds_here, secs_here) = (&mut rounds, &mut batch_secs);
        let mut begin = Instant::now();
        // Owns the pool's sender: when results end, by a failure too, the source must not wait for a buffer.
        let stages = pipeline::run(cancel, move |line| {
            let predicted = line
                .source("tiles", QUEUE, source)
                .through("batch", QUEUE, vec![Group::new(batch_size)])
                .through("infer", QUEUE, infer);
            predicted.fold(
                "results",
                move |batch| {
                    // What is under way at the end belongs to no round.
                    if !is_over.load(Ordering::Relaxed) {
                        if !rounds_here.is_empty() {
                            secs_here.push(batch.secs);
                        }
                        batches_left -= 1;
                        if batches_left == 0 {
                            let now = Instant::now();
                            rounds_here.push(now - begin);
                            (begin, batches_left) = (now, batches.get());
                            is_over.store(!goes_on(rounds_here), Ordering::Relaxed);
                        }
                    }
                    for tile in batch.tiles {
                        // The source is gone once it was told to end.
                        pool.try_send(tile.pixels).ok();
                    }
                    Ok(())
                },
                || Ok(()),
            );
        });
        let stages = stages.map_err(|error| failed(error, cancel))?;
        Ok(Simulated { rounds, batch_secs, stages })
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

    /// A batch for every session.
    #[must_use]
    pub fn batches_of_all(&self) -> NonZeroUsize {
        NonZeroUsize::new(self.sessions.len()).unwrap_or(NonZeroUsize::MIN)
    }
}
