//! Why an experiment can't be done.

use std::path::PathBuf;

use crate::engine::EngineError;
use crate::inference::{ModelError, SessionError};
use crate::onnx::lora::LoraError;
use crate::onnx::passes::EvaluateError;
use crate::onnx::passes::image_input::ImageInputError;
use crate::onnx::{OnnxError, RewriteError};
use crate::slide::SlideError;

/// What stopped an experiment.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExperimentError {
    /// Planning or reading a slide, or running the engine, failed.
    #[error(transparent)]
    Engine(Box<EngineError>),
    /// The model's file is not what it should be.
    #[error(transparent)]
    Onnx(#[from] OnnxError),
    /// The model can't be rewritten.
    #[error(transparent)]
    Rewrite(#[from] RewriteError),
    /// The model was to be run for a pass, and did not.
    #[error(transparent)]
    Evaluate(#[from] EvaluateError),
    /// The model's input can't take bytes.
    #[error(transparent)]
    ImageInput(#[from] ImageInputError),
    /// The adapter can't be merged.
    #[error(transparent)]
    Lora(#[from] LoraError),
    /// INT8 needs to know what values occur.
    #[error("INT8 needs tiles to calibrate on, and none were given")]
    NoCalibration,
    /// No tile was found to work on.
    #[error("{}: no tile of tissue, and no image", path.display())]
    NoTiles {
        /// The slide or folder.
        path: PathBuf,
    },
    /// An image can't be read.
    #[error("{}: is no image that can be read", path.display())]
    Image {
        /// The file.
        path: PathBuf,
        /// The decoder's reason.
        source: image::ImageError,
    },
    /// A precision that makes no sense on the device.
    #[error("{what} is not made for {device}: {why}")]
    Refused {
        /// What was asked for.
        what: &'static str,
        /// For what.
        device: &'static str,
        /// The reason.
        why: &'static str,
    },
    /// A file or folder can't be read or written.
    #[error("{}: can't be {doing}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// `read` or `written`.
        doing: &'static str,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The folder that is to be written holds another model.
    #[error("{}: holds the model {found:?} already", path.display())]
    Occupied {
        /// The folder.
        path: PathBuf,
        /// The model that its card names.
        found: String,
    },
}

impl<E: Into<EngineError>> From<E> for ExperimentError {
    fn from(error: E) -> Self {
        Self::Engine(Box::new(error.into()))
    }
}

impl ExperimentError {
    /// How to put it right.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        let text = match self {
            Self::Engine(error) => return error.hint(),
            Self::Onnx(error) => error.hint()?,
            Self::NoCalibration => "set calibrate to slides, or to a folder of images of the model's resolution",
            Self::NoTiles { .. } => "name a slide with tissue, or a folder of png, jpg or tif images",
            Self::Refused { what: "INT8", .. } => "use the TensorRT provider for INT8 on a GPU, or FP16",
            Self::Occupied { .. } => "choose another folder with out",
            _ => return None,
        };
        Some(text.to_owned())
    }
}
