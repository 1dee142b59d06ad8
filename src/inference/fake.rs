//! A session whose answers are computed from the pixels alone, for tests of what lies around inference.

use std::collections::HashMap;
use std::thread;
use std::time::Duration;

use ndarray::{Array2, Array4};

use super::{Prediction, Session, SessionError, Task};

/// What goes wrong at a tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The batch fails. Its tiles count as seen, so that the same tiles given again succeed.
    Fail,
    /// The tile's values are NaN.
    NotFinite,
    /// Batches larger than this are out of memory, from that tile on.
    OutOfMemoryAbove(usize),
}

/// A session without a model. Its three classes are the colour channels:
///
/// - classification: the tile's mean red, green and blue, as parts of their sum (a third each for a black tile);
/// - segmentation: the same per pixel;
/// - features: the tile's mean red, green and blue, 0 to 1.
#[derive(Clone, Debug)]
pub struct FakeSession {
    task: Task,
    tile_size: usize,
    delay: Duration,
    faults: HashMap<u64, Fault>,
    max_batch: Option<usize>,
    seen: u64,
}

impl FakeSession {
    /// How many classes or features it predicts.
    pub const CHANNELS: usize = 3;

    /// A session that predicts tiles of `tile_size` pixels without fault.
    #[must_use]
    pub fn new(task: Task, tile_size: usize) -> Self {
        Self { task, tile_size, delay: Duration::ZERO, faults: HashMap::new(), max_batch: None, seen: 0 }
    }

    /// Makes each batch take at least `delay`.
    #[must_use]
    pub fn with_delay(self, delay: Duration) -> Self {
        Self { delay, ..self }
    }

    /// Makes `fault` happen at the tile of that position in the run, counted from 0 over all batches predicted.
    #[must_use]
    pub fn with_fault(mut self, tile: u64, fault: Fault) -> Self {
        self.faults.insert(tile, fault);
        self
    }

    fn scores(&self, rgb: &[u8]) -> [f32; 3] {
        let mut sums = [0_u64; 3];
        for pixel in rgb.chunks_exact(3) {
            for (sum, &value) in sums.iter_mut().zip(pixel) {
                *sum += u64::from(value);
            }
        }
        let pixels = (rgb.len() / 3).max(1);
        let means = sums.map(|sum| sum as f32 / pixels as f32 / 255.0);
        if self.task == Task::Features { means } else { parts(means) }
    }
}

/// Each value as its part of the sum.
fn parts(values: [f32; 3]) -> [f32; 3] {
    let sum: f32 = values.iter().sum();
    if sum > 0.0 { values.map(|value| value / sum) } else { [1.0 / 3.0; 3] }
}

impl Session for FakeSession {
    fn predict(&mut self, tiles: &[&[u8]]) -> Result<Prediction, SessionError> {
        if tiles.is_empty() {
            return Err(SessionError::EmptyBatch);
        }
        let expected = self.tile_size * self.tile_size * 3;
        if let Some(index) = tiles.iter().position(|tile| tile.len() != expected) {
            return Err(SessionError::TileBytes { index, got: tiles[index].len(), expected });
        }
        thread::sleep(self.delay);
        let positions: Vec<u64> = (self.seen..).take(tiles.len()).collect();
        let fault_of = |position: &u64| self.faults.get(position).copied();
        for position in &positions {
            match fault_of(position) {
                Some(Fault::Fail) => {
                    self.seen += tiles.len() as u64;
                    return Err(SessionError::Asked { index: *position });
                }
                Some(Fault::OutOfMemoryAbove(limit)) => self.max_batch = Some(limit),
                Some(Fault::NotFinite) | None => {}
            }
        }
        if self.max_batch.is_some_and(|limit| tiles.len() > limit) {
            let path = "fake session".into();
            return Err(SessionError::OutOfMemory { path, batch: tiles.len(), source: None });
        }
        let is_bad: Vec<bool> = positions.iter().map(|p| fault_of(p) == Some(Fault::NotFinite)).collect();
        self.seen += positions.len() as u64;
        let side = self.tile_size;
        Ok(match self.task {
            Task::Segmentation => {
                Prediction::Map(Array4::from_shape_fn((tiles.len(), Self::CHANNELS, side, side), |(n, c, y, x)| {
                    let pixel = &tiles[n][(y * side + x) * 3..][..3];
                    if is_bad[n] { f32::NAN } else { parts([pixel[0], pixel[1], pixel[2]].map(f32::from))[c] }
                }))
            }
            Task::Classification | Task::Features => {
                let rows: Vec<_> = tiles.iter().map(|tile| self.scores(tile)).collect();
                let values =
                    Array2::from_shape_fn(
                        (tiles.len(), Self::CHANNELS),
                        |(n, c)| {
                            if is_bad[n] { f32::NAN } else { rows[n][c] }
                        },
                    );
                match self.task {
                    Task::Features => Prediction::Features(values),
                    _ => Prediction::Classes(values),
                }
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RED: [u8; 12] = [200, 0, 0, 200, 0, 0, 200, 0, 0, 200, 0, 0];
    const MIXED: [u8; 12] = [255, 0, 0, 0, 255, 0, 0, 255, 0, 0, 255, 0];

    #[test]
    fn answers_come_from_the_pixels() {
        let tiles: [&[u8]; 2] = [&RED, &MIXED];
        let predict = |task| FakeSession::new(task, 2).predict(&tiles).unwrap();
        let Prediction::Classes(scores) = predict(Task::Classification) else { panic!() };
        assert_eq!(scores, ndarray::array![[1.0, 0.0, 0.0], [0.25, 0.75, 0.0]]);
        let Prediction::Features(features) = predict(Task::Features) else { panic!() };
        assert_eq!(features.row(1).to_vec(), [0.25, 0.75, 0.0]);
        let Prediction::Map(map) = predict(Task::Segmentation) else { panic!() };
        assert_eq!(map.dim(), (2, 3, 2, 2));
        assert_eq!((map[[1, 0, 0, 0]], map[[1, 1, 0, 1]], map[[1, 1, 0, 0]]), (1.0, 1.0, 0.0));
    }

    #[test]
    fn faults_come_where_they_are_put() {
        let mut session = FakeSession::new(Task::Classification, 2)
            .with_fault(1, Fault::NotFinite)
            .with_fault(2, Fault::OutOfMemoryAbove(1))
            .with_fault(3, Fault::Fail);
        let prediction = session.predict(&[&RED, &RED]).unwrap();
        assert_eq!(prediction.nonfinite_per_tile(), [0, 3]);
        assert!(session.predict(&[&RED, &RED]).unwrap_err().to_string().contains("tile 3 of the run"));
        assert!(session.predict(&[&RED]).is_ok());
        assert!(session.predict(&[&RED[1..]]).unwrap_err().to_string().contains("11 bytes instead of 12"));
        let mut session = FakeSession::new(Task::Classification, 2).with_fault(0, Fault::OutOfMemoryAbove(1));
        assert!(session.predict(&[&RED, &RED]).unwrap_err().is_out_of_memory());
        assert!(session.predict(&[&RED]).is_ok());
        assert!(matches!(session.predict(&[]), Err(SessionError::EmptyBatch)));
    }
}
