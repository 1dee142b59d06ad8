//! Runs a model over batches of tiles: what the model is ([`ModelCard`]), on what it runs ([`device`]), and the run
//! itself ([`Session`]). Knows tiles as pixels only: where they lie on a slide, and in which thread this happens, is
//! the caller's.

mod activation;
mod bare;
pub mod card;
mod card_file;
mod ceiling;
mod contract;
pub mod device;
mod error;
pub mod evaluate;
pub mod fake;
mod gpu;
pub mod ort;
mod pixels;
pub mod placement;
mod predictor;
mod wsinfer;

use ndarray::{Array2, Array4, Axis, ErrorKind, ShapeError};

pub use self::ort::{OrtSession, SessionFactory, SessionOptions, StopHandle};
pub use card::{Activation, BareModel, Class, ModelCard, Pool, Task, Variant};
pub use ceiling::matmul_flops_per_sec;
pub use contract::{Contract, Layout};
pub use device::{Device, DeviceRequest, Provider, ProviderRequest};
pub use error::{ModelError, SessionError};
pub use evaluate::{Evaluator, evaluate};
pub use fake::FakeSession;
pub use pixels::image_tensor;
pub use predictor::{Predictor, PredictorOptions};

/// Something that predicts tiles: ONNX Runtime, or a fake for tests.
pub trait Session: Send {
    /// Predicts a batch of 1 or more tiles, each `[tile_size, tile_size, 3]` RGB, 0 to 255. Row `i` of the prediction
    /// belongs to tile `i`.
    ///
    /// # Errors
    /// [`SessionError`]; after [`SessionError::OutOfMemory`] a smaller batch may be tried on the same session.
    fn predict(&mut self, tiles: &[&[u8]]) -> Result<Prediction, SessionError>;
}

/// What a model says of a batch, by its card's task.
///
/// A score whose raw output was infinite or not a number is NaN here (without an activation: as it came), also where
/// the activation alone would have hidden it: sigmoid makes a plausible 1 of infinity.
#[derive(Clone, Debug, PartialEq)]
pub enum Prediction {
    /// `[n, c]`: a score per class, after the activation.
    Classes(Array2<f32>),
    /// `[n, c, h, w]`: a score per class and pixel, after the activation; `h` and `w` are the tile's side.
    Map(Array4<f32>),
    /// `[n, d]`: a vector per tile, pooled.
    Features(Array2<f32>),
}

impl Prediction {
    /// How many tiles it is about.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::Classes(scores) | Self::Features(scores) => scores.nrows(),
            Self::Map(map) => map.dim().0,
        }
    }

    /// True if it is about no tile, which no session returns.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Puts the tiles of another prediction of the same model behind its own.
    fn append(&mut self, more: &Self) -> Result<(), ShapeError> {
        match (self, more) {
            (Self::Classes(rows), Self::Classes(more)) | (Self::Features(rows), Self::Features(more)) => {
                rows.append(Axis(0), more.view())
            }
            (Self::Map(maps), Self::Map(more)) => maps.append(Axis(0), more.view()),
            _ => Err(ShapeError::from_kind(ErrorKind::IncompatibleShape)),
        }
    }

    /// The same after an activation, for the prediction of a session that applied none; features stay as they are.
    #[must_use]
    pub fn activated(mut self, activation: Activation) -> Self {
        match &mut self {
            Self::Classes(scores) => {
                for mut row in scores.outer_iter_mut() {
                    let classes = row.len();
                    if let Some(scores) = row.as_slice_mut() {
                        activation::apply(activation, scores, classes);
                    }
                }
            }
            Self::Map(map) => {
                for mut tile in map.outer_iter_mut() {
                    let classes = tile.dim().0;
                    if let Some(scores) = tile.as_slice_mut() {
                        activation::apply(activation, scores, classes);
                    }
                }
            }
            Self::Features(_) => {}
        }
        self
    }

    /// Per tile, how many of its values are infinite or not a number; all 0 for a sound prediction.
    #[must_use]
    pub fn nonfinite_per_tile(&self) -> Vec<usize> {
        match self {
            Self::Classes(scores) | Self::Features(scores) => scores.rows().into_iter().map(count_nonfinite).collect(),
            Self::Map(map) => map.outer_iter().map(count_nonfinite).collect(),
        }
    }
}

fn count_nonfinite<D: ndarray::Dimension>(values: ndarray::ArrayView<'_, f32, D>) -> usize {
    match values.as_slice() {
        Some(slice) => slice.iter().map(|value| usize::from(!value.is_finite())).sum(),
        None => values.iter().filter(|value| !value.is_finite()).count(),
    }
}
