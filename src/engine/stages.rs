//! The stages of a run: adapts reading, inference and stitching to [`Stage`], and moves tiles between them.
//!
//! A fixed pool of pixel buffers circulates: the source hands each tile its buffer in plan order, and the stitcher
//! gives it back once the tile is placed. So the pool bounds everything in flight, the reorder windows included.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender};
use ndarray::{ArrayView3, Axis};
use rayon::prelude::*;

use super::EngineError;
use super::config::OnFailure;
use crate::geometry::{Level0Rect, TilePlane, TilePosition};
use crate::inference::{Prediction, Session};
use crate::pipeline::{Outlet, Stage};
use crate::slide::TileReader;
use crate::stitch::{Stitcher, Strip};

/// A tile on its way: `[tile, tile, 3]` RGB8 at the plane's resolution, or why it could not be read.
pub(super) struct Tile {
    /// Place in the plan.
    pub(super) index: usize,
    pub(super) position: TilePosition,
    pub(super) pixels: Vec<u8>,
    /// Set once the tile is known to have no result.
    pub(super) failure: Option<String>,
}

/// Tiles that share a batch, in plan order; only those without a failure are inferred.
pub(super) struct TileBatch {
    /// Place in the order of batches.
    sequence: usize,
    tiles: Vec<Tile>,
}

/// A batch with its results.
pub(super) struct PredictedBatch {
    sequence: usize,
    pub(super) tiles: Vec<Tile>,
    /// Seconds that the session took.
    pub(super) secs: f64,
    prediction: Option<Prediction>,
    /// Which tile each row of the prediction belongs to.
    readable: Vec<usize>,
}

/// What reaches the writers: tiles in plan order, strips from top to bottom.
pub(super) enum Placed {
    /// One tile's place with its class probabilities, or its features.
    Tile { rect: Level0Rect, values: Vec<f32> },
    /// A tile without a result.
    Failed { rect: Level0Rect, reason: String },
    /// Finished rows of the map.
    Strip(Strip),
}

/// Reads a tile's pixels.
pub(super) struct Read {
    pub(super) reader: TileReader,
    pub(super) on_tile_error: OnFailure,
}

impl Stage for Read {
    type In = Tile;
    type Out = Tile;
    type Error = EngineError;

    fn process(&mut self, mut tile: Tile, out: &mut Outlet<'_, Tile>) -> Result<(), EngineError> {
        if let Err(error) = self.reader.read(tile.position, &mut tile.pixels) {
            match self.on_tile_error {
                OnFailure::Fail => return Err(EngineError::Slide(error)),
                OnFailure::Skip => tile.failure = Some(error.to_string()),
            }
        }
        out.send(tile);
        Ok(())
    }
}

/// Brings tiles back into plan order and groups them, so that who shares a batch depends on the plan alone.
pub(super) struct Group {
    batch_size: NonZeroUsize,
    waiting: BTreeMap<usize, Tile>,
    next_index: usize,
    batch: Vec<Tile>,
    sequence: usize,
}

impl Group {
    pub(super) fn new(batch_size: NonZeroUsize) -> Self {
        Self { batch_size, waiting: BTreeMap::new(), next_index: 0, batch: Vec::new(), sequence: 0 }
    }

    fn flush(&mut self, out: &mut Outlet<'_, TileBatch>) {
        let tiles = std::mem::take(&mut self.batch);
        out.send(TileBatch { sequence: self.sequence, tiles });
        self.sequence += 1;
    }
}

impl Stage for Group {
    type In = Tile;
    type Out = TileBatch;
    type Error = EngineError;

    fn process(&mut self, tile: Tile, out: &mut Outlet<'_, TileBatch>) -> Result<(), EngineError> {
        self.waiting.insert(tile.index, tile);
        while let Some(tile) = self.waiting.remove(&self.next_index) {
            self.next_index += 1;
            self.batch.push(tile);
            // Failed tiles keep their place, so that one failure does not change who else shares a batch.
            if self.batch.len() == self.batch_size.get() {
                self.flush(out);
            }
        }
        Ok(())
    }

    fn finish(&mut self, out: &mut Outlet<'_, TileBatch>) -> Result<(), EngineError> {
        if !self.batch.is_empty() {
            self.flush(out);
        }
        Ok(())
    }
}

/// Runs the model on a batch.
pub(super) struct Infer<'a> {
    pub(super) session: &'a mut dyn Session,
    pub(super) on_nonfinite: OnFailure,
}

impl Stage for Infer<'_> {
    type In = TileBatch;
    type Out = PredictedBatch;
    type Error = EngineError;

    fn process(&mut self, batch: TileBatch, out: &mut Outlet<'_, PredictedBatch>) -> Result<(), EngineError> {
        let TileBatch { sequence, mut tiles } = batch;
        let pixels: Vec<&[u8]> =
            tiles.iter().filter(|tile| tile.failure.is_none()).map(|tile| tile.pixels.as_slice()).collect();
        let start = Instant::now();
        let prediction = if pixels.is_empty() { None } else { Some(self.session.predict(&pixels)?) };
        let secs = start.elapsed().as_secs_f64();
        let nonfinite = prediction.as_ref().map(Prediction::nonfinite_per_tile).unwrap_or_default();
        let readable: Vec<usize> = (0..tiles.len()).filter(|index| tiles[*index].failure.is_none()).collect();
        for (row, count) in nonfinite.into_iter().enumerate().filter(|(_, count)| *count > 0) {
            let tile = &mut tiles[readable[row]];
            let reason = format!("{count} values of the model's output are NaN or infinite");
            match self.on_nonfinite {
                OnFailure::Fail => return Err(EngineError::Nonfinite { position: tile.position, count }),
                OnFailure::Skip => tile.failure = Some(reason),
            }
        }
        out.send(PredictedBatch { sequence, tiles, secs, prediction, readable });
        Ok(())
    }
}

/// Brings batches back into order, places their results on the map and returns the buffers to the pool.
pub(super) struct Stitch {
    pub(super) plane: TilePlane,
    /// `None` for features: they have no map.
    pub(super) stitcher: Option<Stitcher>,
    /// Where buffers go back to.
    pub(super) pool: Sender<Vec<u8>>,
    /// Strips that the writers are done with.
    pub(super) used_strips: Receiver<Strip>,
    pub(super) waiting: BTreeMap<usize, PredictedBatch>,
    pub(super) next_sequence: usize,
}

impl Stitch {
    fn place(&mut self, batch: PredictedBatch, out: &mut Outlet<'_, Placed>) {
        let PredictedBatch { tiles, prediction, readable, .. } = batch;
        let rows = readable.iter().map(|tile| &tiles[*tile]).enumerate();
        let rows: Vec<(usize, TilePosition)> =
            rows.filter(|(_, tile)| tile.failure.is_none()).map(|(row, tile)| (row, tile.position)).collect();
        let values = prediction.map(|prediction| self.place_rows(&prediction, &rows, out));
        let mut values = values.unwrap_or_default().into_iter();
        for tile in tiles {
            let rect = self.plane.level0_rect(tile.position);
            out.send(match tile.failure {
                Some(reason) => Placed::Failed { rect, reason },
                None => Placed::Tile { rect, values: values.next().unwrap_or_default() },
            });
            // The source is gone once it has handed out all tiles; then nobody needs the buffer.
            self.pool.try_send(tile.pixels).ok();
        }
    }

    /// Puts tiles' results, rows of a prediction, on the map; returns the tiles' values for the table.
    fn place_rows(
        &mut self,
        prediction: &Prediction,
        rows: &[(usize, TilePosition)],
        out: &mut Outlet<'_, Placed>,
    ) -> Vec<Vec<f32>> {
        let mut emit = |strip| out.send(Placed::Strip(strip));
        match (prediction, &mut self.stitcher) {
            (Prediction::Map(all), Some(stitcher)) => {
                let maps: Vec<_> = rows.iter().map(|(row, at)| (*at, all.index_axis(Axis(0), *row))).collect();
                stitcher.place_maps(&maps, emit);
                maps.par_iter().map(|(at, map)| self.mean_over_plane(*at, *map)).collect()
            }
            (Prediction::Map(_), None) => Vec::new(),
            (Prediction::Features(all) | Prediction::Classes(all), stitcher) => {
                let values: Vec<Vec<f32>> = rows.iter().map(|(row, _)| all.row(*row).to_vec()).collect();
                if let Some(stitcher) = stitcher {
                    for ((_, at), values) in rows.iter().zip(&values) {
                        stitcher.place_classes(*at, values, &mut emit);
                    }
                }
                values
            }
        }
    }

    /// Mean probability of each class over the part of the tile inside the plane.
    fn mean_over_plane(&self, at: TilePosition, map: ArrayView3<'_, f32>) -> Vec<f32> {
        let side = |start: i64, extent: u64, size: usize| {
            let left = i64::try_from(extent).unwrap_or(i64::MAX) - start;
            usize::try_from(left).unwrap_or(0).min(size)
        };
        let (_, height, width) = map.dim();
        let (height, width) =
            (side(at.plane_y, self.plane.height(), height), side(at.plane_x, self.plane.width(), width));
        let inside = map.slice(ndarray::s![.., ..height, ..width]);
        let count = (height * width).max(1) as f64;
        let mean = |plane: ndarray::ArrayView2<'_, f32>| plane.iter().map(|p| f64::from(*p)).sum::<f64>() / count;
        #[expect(clippy::cast_possible_truncation, reason = "a mean of f32 values fits f32")]
        let means = inside.outer_iter().map(|plane| mean(plane) as f32).collect();
        means
    }
}

impl Stage for Stitch {
    type In = PredictedBatch;
    type Out = Placed;
    type Error = EngineError;

    fn process(&mut self, batch: PredictedBatch, out: &mut Outlet<'_, Placed>) -> Result<(), EngineError> {
        if let Some(stitcher) = &mut self.stitcher {
            self.used_strips.try_iter().for_each(|strip| stitcher.recycle(strip));
        }
        self.waiting.insert(batch.sequence, batch);
        while let Some(batch) = self.waiting.remove(&self.next_sequence) {
            self.next_sequence += 1;
            self.place(batch, out);
        }
        Ok(())
    }

    fn finish(&mut self, out: &mut Outlet<'_, Placed>) -> Result<(), EngineError> {
        if let Some(stitcher) = &mut self.stitcher {
            stitcher.finish(|strip| out.send(Placed::Strip(strip)));
        }
        Ok(())
    }
}
