//! Why an experiment can't be done.

use std::borrow::Cow;
use std::path::PathBuf;

use crate::engine::EngineError;
use crate::engine::inputs::InputError;
use crate::geometry::GridError;
use crate::inference::{ModelError, SessionError};
use crate::native::NativeError;
use crate::onnx::lora::{AdapterError, LoraError};
use crate::onnx::passes::EvaluateError;
use crate::onnx::passes::fp16::Fp16Error;
use crate::onnx::passes::image_input::ImageInputError;
use crate::onnx::vit::VitError;
use crate::onnx::{OnnxError, RewriteError};
use crate::output::OutputError;
use crate::slide::SlideError;
use crate::stitch::TooManyClasses;
use crate::tissue::TissueError;

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
    /// The model can't be made 16 bits.
    #[error(transparent)]
    Fp16(#[from] Fp16Error),
    /// The adapter can't be read.
    #[error(transparent)]
    Adapter(#[from] AdapterError),
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
    /// An image whose data are not whole.
    #[error("{}: is damaged: {reason}", path.display())]
    DamagedImage {
        /// The file.
        path: PathBuf,
        /// What is wrong with its data.
        reason: String,
    },
    /// An image that is not what can be predicted: another size, or a slide.
    #[error("{}: {reason}", path.display())]
    Unsuited {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
        /// What to do instead.
        hint: Cow<'static, str>,
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
    /// Models that can't stand in for each other.
    #[error("{}: can't be compared with {}: {what}", other.display(), first.display())]
    Incomparable {
        /// The card or file of the first model.
        first: PathBuf,
        /// Of the other.
        other: PathBuf,
        /// How they differ.
        what: String,
    },
    /// Gates without a variant to hold against them.
    #[error("gates were given, but there is no variant beside the original to hold against them")]
    NothingToGate,
    /// Labels can't be read, or don't fit the model.
    #[error("{}: {reason}", path.display())]
    Labels {
        /// The folder, table, image or mask.
        path: PathBuf,
        /// What is wrong, with the line.
        reason: String,
    },
    /// Not one tile fits the slide.
    #[error("a tile of {tile} px is larger than the slide, which is {width} × {height} px at the model's resolution")]
    TileLargerThanSlide {
        /// Side of a tile in pixels.
        tile: u32,
        /// Of the slide at the model's resolution.
        width: u64,
        /// Of the slide at the model's resolution.
        height: u64,
    },
    /// A slide so large that its tiles can't be numbered.
    #[error("a slide of that size has {tiles} tiles, more than {max}", max = u32::MAX)]
    TooManyTiles {
        /// Of the grid.
        tiles: u128,
    },
    /// The tiles of a batch alone are more than the memory that is free.
    #[error("batches of {batch_size} in {sessions} sessions hold tiles of {needed} MiB, and {available} MiB are free")]
    TooLargeBatch {
        /// Tiles per batch.
        batch_size: usize,
        /// Each of which holds a batch.
        sessions: usize,
        /// MiB of the tiles as the model takes them.
        needed: u64,
        /// MiB.
        available: u64,
    },
    /// Nothing was inferred, so no time follows.
    #[error("the model inferred no tile, so that no time of a slide follows")]
    NoThroughput,
    /// A vision transformer that can't be built.
    #[error(transparent)]
    Vit(#[from] VitError),
    /// Merging an adapter changed what the model computes.
    #[error(
        "rank {rank}: the merged model's outputs differ from the unmerged ones by {difference:.2e}, more than rounding explains ({bound:.2e})"
    )]
    MergeDiffers {
        /// The adapter's rank.
        rank: usize,
        /// The largest difference of two outputs; infinite if one is no number.
        difference: f64,
        /// What rounding explains.
        bound: f64,
    },
    /// Nothing of what was asked for could be measured.
    #[error("nothing could be measured: {}", why.join("; "))]
    NothingMeasured {
        /// The reason for each thing.
        why: Vec<String>,
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
    /// The original gives NaN or infinite values, so that nothing can be held against it.
    #[error("{}: the original gives NaN or infinite values for {nonfinite} of {tiles} tiles", path.display())]
    OriginalNotFinite {
        /// Its file.
        path: PathBuf,
        /// Tiles with such values.
        nonfinite: usize,
        /// Tiles that were tried.
        tiles: usize,
    },
    /// No product of the model gains as bytes.
    #[error("there is nothing to quantise: no layer of the model has weights enough that bytes gain")]
    NothingToQuantize,
    /// Files of a model would be written over each other, or over the model itself.
    #[error("{}: {what}", path.display())]
    InTheWay {
        /// The folder or file.
        path: PathBuf,
        /// What is in the way.
        what: &'static str,
    },
    /// The folder that is to be written holds another model.
    #[error("{}: holds the model {found:?} already, made of other weights or described otherwise", path.display())]
    Occupied {
        /// The folder.
        path: PathBuf,
        /// The model that its card names.
        found: String,
    },
}

/// What the engine can fail with too.
macro_rules! from_engine {
    ($($error:ty),*) => { $(
        impl From<$error> for ExperimentError {
            fn from(error: $error) -> Self {
                Self::Engine(Box::new(error.into()))
            }
        }
    )* };
}
from_engine!(
    EngineError,
    GridError,
    InputError,
    ModelError,
    NativeError,
    OutputError,
    SessionError,
    SlideError,
    TissueError,
    TooManyClasses
);

impl ExperimentError {
    /// True if a device's memory did not suffice.
    #[must_use]
    pub fn is_out_of_memory(&self) -> bool {
        let Self::Engine(error) = self else { return false };
        matches!(&**error, EngineError::Session(error) if error.is_out_of_memory())
    }

    /// The message with those of its causes.
    #[must_use]
    pub fn chain(&self) -> String {
        crate::engine::chain(self)
    }

    /// How to put it right.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        let text = match self {
            Self::Engine(error) => return error.hint(),
            Self::Onnx(error) => error.hint()?,
            Self::Adapter(error) => error.hint()?,
            Self::Lora(error) => error.hint()?,
            Self::TooManyTiles { .. } => "give a smaller slide_size, or the slide's resolution with slide_mpp",
            Self::TooLargeBatch { .. } => "set smaller batch_sizes, or fewer sessions",
            Self::TileLargerThanSlide { .. } => "give a larger slide_size, or the slide's resolution with slide_mpp",
            Self::NoCalibration => "set calibrate to slides, or to a folder of images of the model's resolution",
            Self::NoTiles { .. } => "name a slide with tissue, or a folder of png, jpg or tif images",
            Self::Unsuited { hint, .. } => hint,
            Self::Image { source: image::ImageError::Unsupported(_), .. } => {
                "images of the formats png, jpg, bmp, tif and webp are read: convert it, or leave it out"
            }
            Self::DamagedImage { .. } => "copy or export it again, or leave it out",
            Self::Refused { what: "INT8", .. } => "use the TensorRT provider for INT8 on a GPU, or FP16",
            Self::Incomparable { .. } => "compare variants of one model, or models of one task, tile and classes",
            Self::Labels { .. } => {
                "give a folder with one folder of images per class, or a CSV with the columns path,label or path,mask \
                 and perhaps group"
            }
            Self::Occupied { .. } | Self::InTheWay { .. } => "choose another folder with out",
            Self::OriginalNotFinite { .. } => "check the model's weights, the adapter, and mean and std of its card",
            _ => return None,
        };
        Some(text.to_owned())
    }
}
