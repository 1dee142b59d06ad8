//! What can be wrong with a model's files, and what can go wrong while it runs.

use std::path::PathBuf;

use super::device::{Device, Provider};
use crate::native::NativeError;
use crate::onnx::OnnxError;

/// A model card, or the model it describes, that can't be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// A file can't be read.
    #[error("{}: can't be read", path.display())]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The folder holds neither a card nor one model.
    #[error("{}: holds no card.toml, no config.json and not exactly one .onnx file", path.display())]
    NoCard {
        /// The folder.
        path: PathBuf,
    },
    /// What should be a card is no text.
    #[error("{}: is neither a model's card nor an .onnx file", path.display())]
    NoText {
        /// The file.
        path: PathBuf,
    },
    /// `card.toml` is no TOML, or has an unknown, missing or mistyped key; the source shows line and key.
    #[error("{}: is no model card", path.display())]
    Toml {
        /// The card.
        path: PathBuf,
        /// Where and what.
        source: toml::de::Error,
    },
    /// `config.json` is no JSON, or has a missing or mistyped key.
    #[error("{}: is no WSInfer configuration", path.display())]
    Json {
        /// The configuration.
        path: PathBuf,
        /// Where and what.
        source: serde_json::Error,
    },
    /// A key has a value that can't be right.
    #[error("{}: `{key}` {problem}", path.display())]
    Value {
        /// The card, configuration or bare model.
        path: PathBuf,
        /// The key as the file spells it.
        key: String,
        /// The value and what is wrong with it.
        problem: String,
    },
    /// The card can't be written as a `card.toml`.
    #[error("{}: can't be written as a card: {problem}", path.display())]
    Unwritable {
        /// Where the card came from.
        path: PathBuf,
        /// Which value, and why.
        problem: String,
    },
    /// The card says one thing and the model's graph another.
    #[error("{}: `{key}` contradicts the model: {problem}", path.display())]
    Contradiction {
        /// The card, configuration or bare model.
        path: PathBuf,
        /// The key as the file spells it.
        key: &'static str,
        /// Both sides.
        problem: String,
    },
    /// The model's graph can't be run over tiles, whatever the card says.
    #[error("{}: {problem}", path.display())]
    Graph {
        /// The model file.
        path: PathBuf,
        /// What it has and what is needed.
        problem: String,
    },
    /// A WSInfer transform that isn't known.
    #[error("{}: `transform` has {name}, which is not one of Resize, ToTensor, Normalize in this order", path.display())]
    Transform {
        /// The configuration.
        path: PathBuf,
        /// The transform, and its argument if that is what is not known.
        name: String,
    },
    /// A WSInfer model whose weights are TorchScript.
    #[error("{}: holds TorchScript weights, which are not run", path.display())]
    TorchScript {
        /// The weights.
        path: PathBuf,
    },
    /// The card has no such variant.
    #[error("{}: has no variant {name:?}; it has {}", path.display(), known.join(", "))]
    UnknownVariant {
        /// The card.
        path: PathBuf,
        /// What was asked for.
        name: String,
        /// What there is.
        known: Vec<String>,
    },
    /// The weights are not those that the card was written for.
    #[error("{}: has sha256 {actual}, but its card says {expected}", path.display())]
    Changed {
        /// The model file.
        path: PathBuf,
        /// The card's hash.
        expected: String,
        /// The file's hash.
        actual: String,
    },
    /// A bare model needs settings that its graph doesn't tell.
    #[error("{}: has no card, and its graph does not tell {}", path.display(), settings.join(", "))]
    Missing {
        /// The model file.
        path: PathBuf,
        /// Every setting that is needed.
        settings: Vec<&'static str>,
    },
    /// Settings for a bare model came with a model that has a card.
    #[error("{}: has its own {}, which can't be set as well", path.display(), settings.join(", "))]
    AlreadySet {
        /// The card.
        path: PathBuf,
        /// Every setting that was given.
        settings: Vec<&'static str>,
    },
    /// The model file can't be read as ONNX.
    #[error(transparent)]
    Onnx(#[from] OnnxError),
}

impl ModelError {
    /// How to put it right, in the words of the card and the configuration.
    #[must_use]
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::NoCard { .. } => Some("name the card.toml, config.json or .onnx file itself"),
            Self::NoText { .. } => Some("name a model's folder, its card.toml or config.json, or an .onnx file"),
            Self::Toml { .. } => Some("models/README.md lists every key of a card"),
            Self::TorchScript { .. } => Some("models/train/torchscript_to_onnx.py makes an .onnx file beside it"),
            Self::Transform { .. } => Some("fold other transforms into the model, or write a card.toml"),
            Self::Changed { .. } => {
                Some("restore the file, or write the new sha256 into the card if the change is meant")
            }
            Self::Missing { .. } => Some("set each of them, or write a card.toml beside the model"),
            Self::AlreadySet { .. } => Some("leave them out, or name the .onnx file instead of its card"),
            Self::UnknownVariant { .. } => Some("set `variant` to one of those"),
            Self::Onnx(error) => error.hint(),
            _ => None,
        }
    }
}

/// A session that can't be opened, or a batch that can't be predicted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SessionError {
    /// The rate of a device's matrix product can't be measured.
    #[error("the rate of the matrix product can't be measured on {provider}")]
    Ceiling {
        /// The provider.
        provider: Provider,
        /// ONNX Runtime's reason.
        source: ort::Error,
    },
    /// ONNX Runtime can't be loaded.
    #[error(transparent)]
    Native(#[from] NativeError),
    /// The model or its card can't be used.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// Devices would have different numbers of sessions.
    #[error("{sessions} sessions can't be shared evenly by {devices} devices")]
    Uneven {
        /// How many were asked for.
        sessions: usize,
        /// How many devices there are.
        devices: usize,
    },
    /// The system gives no threads for several sessions.
    #[error("no threads for the sessions")]
    Threads(#[source] rayon::ThreadPoolBuildError),
    /// A device asked for by name isn't there.
    #[error("device {device} can't be had: {reason}")]
    NoDevice {
        /// The device.
        device: Device,
        /// Why not.
        reason: String,
    },
    /// An execution provider asked for by name doesn't load.
    #[error("provider {provider} can't be had: {reason}")]
    NoProvider {
        /// The provider.
        provider: Provider,
        /// Why not.
        reason: String,
    },
    /// The provider works on other devices.
    #[error("provider {provider} does not run on device {device}")]
    Mismatch {
        /// The provider.
        provider: Provider,
        /// The device.
        device: Device,
    },
    /// Optimised graphs can't be kept.
    #[error("{}: optimised graphs can't be kept there", folder.display())]
    GraphCache {
        /// The folder for them.
        folder: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A graph that an earlier run has kept can't be opened.
    #[error("{}: the graph that was kept can't be opened", path.display())]
    KeptGraph {
        /// Its file.
        path: PathBuf,
        /// ONNX Runtime's reason.
        source: ort::Error,
    },
    /// Optimised graphs are not kept for this provider.
    #[error("optimised graphs are kept for provider cpu, not for {0}")]
    NoGraphCache(Provider),
    /// ONNX Runtime refuses the model or its options.
    #[error("{}: can't be opened on {provider}", path.display())]
    Open {
        /// The model file.
        path: PathBuf,
        /// Where.
        provider: Provider,
        /// ONNX Runtime's reason.
        source: ort::Error,
    },
    /// ONNX Runtime failed on a batch.
    #[error("{}: failed on a batch of {batch}", path.display())]
    Run {
        /// The model file.
        path: PathBuf,
        /// Tiles in the batch.
        batch: usize,
        /// ONNX Runtime's reason.
        source: ort::Error,
    },
    /// The device has too little memory for the batch.
    #[error("{}: not enough memory for a batch of {batch}", path.display())]
    OutOfMemory {
        /// The model file.
        path: PathBuf,
        /// Tiles in the batch.
        batch: usize,
        /// ONNX Runtime's reason; `None` from a fake session.
        source: Option<ort::Error>,
    },
    /// The run was ended from outside, by [`super::StopHandle::stop`].
    #[error("inference was stopped")]
    Stopped,
    /// Operators that carry the work were placed on the CPU, where they would be many times slower.
    #[error("{}: {provider} left {nodes} to the CPU", path.display())]
    HeavyOnCpu {
        /// The model file.
        path: PathBuf,
        /// The provider that should have taken them.
        provider: Provider,
        /// The operators and how many of each, such as `Conv 3`.
        nodes: String,
    },
    /// The profile that tells where the operators ran can't be read.
    #[error("the placement of the operators can't be read from {}", path.display())]
    Placement {
        /// The profile.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A batch has no tile.
    #[error("a batch needs at least one tile")]
    EmptyBatch,
    /// A tile has not the bytes of its size.
    #[error("tile {index} of the batch has {got} bytes instead of {expected}")]
    TileBytes {
        /// Position in the batch.
        index: usize,
        /// Its bytes.
        got: usize,
        /// `tile_size` × `tile_size` × 3.
        expected: usize,
    },
    /// An output's type or shape isn't what the card's task needs.
    #[error("{}: output {output} is {got}, but {expected} is needed", path.display())]
    Output {
        /// The model file.
        path: PathBuf,
        /// The output's name.
        output: String,
        /// Its type and shape.
        got: String,
        /// The type and shape that the card leads to.
        expected: String,
    },
    /// A tile of a fake session that is made to fail.
    #[error("tile {index} of the run fails as asked")]
    Asked {
        /// Position in the run, from 0.
        index: u64,
    },
}

impl SessionError {
    /// How to put it right, in config words.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        let text = match self {
            Self::Native(error) => return Some(error.hint()),
            Self::Model(error) => return error.hint().map(str::to_owned),
            Self::Threads(_) => "set fewer `sessions`",
            Self::KeptGraph { .. } => "remove it: the next run makes it again",
            Self::GraphCache { .. } | Self::NoGraphCache(_) => "choose another `graph_cache`, or leave it out",
            Self::Uneven { .. } => "set `sessions` to a multiple of the number of devices",
            Self::NoDevice { .. } => "set `device` to auto or cpu, or see `doctor` for the devices there are",
            Self::NoProvider { .. } => "set `provider` to auto, or see `doctor` for the providers that load",
            Self::Mismatch { .. } => "set `provider` to auto",
            Self::OutOfMemory { .. } => "set `batch_size` lower",
            Self::HeavyOnCpu { .. } => "choose another variant or provider; `optimize` rewrites graphs for a provider",
            Self::Output { .. } => "correct the card's `task`, `tile_size` or `classes`",
            _ => return None,
        };
        Some(text.to_owned())
    }

    /// True if a smaller batch may succeed.
    #[must_use]
    pub fn is_out_of_memory(&self) -> bool {
        matches!(self, Self::OutOfMemory { .. })
    }
}
