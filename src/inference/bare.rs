//! A card for a model that has none, out of its graph and the user's settings.

use std::path::Path;

use super::card::{self, Activation, BareModel, ModelCard, Task};
use super::contract::{Layout, layout_of};
use super::error::ModelError;
use crate::onnx::{Dim, ElementType, Model, Value};

/// What the graph tells without a card.
struct Told {
    task: Option<Task>,
    tile_size: Option<u32>,
    activation: Option<Activation>,
    /// True if the model takes bytes and so normalises by itself.
    takes_bytes: bool,
    has_tokens: bool,
}

impl Told {
    fn by(model: &Model) -> Self {
        let inputs = model.inputs();
        let outputs = model.outputs();
        let output = outputs.first();
        let rank = |value: &Value| value.dims.as_ref().map(Vec::len);
        Self {
            // Two dimensions may be scores or features, three may be one map or tokens.
            task: (output.and_then(rank) == Some(4)).then_some(Task::Segmentation),
            tile_size: inputs.first().and_then(side),
            activation: output.and_then(|output| producer(model, &output.name)),
            takes_bytes: inputs.first().is_some_and(|input| input.element == ElementType::U8),
            has_tokens: output.and_then(rank) == Some(3),
        }
    }
}

/// The side of a square input whose size is fixed.
fn side(input: &Value) -> Option<u32> {
    let (layout, dims) = layout_of(input)?;
    let (height, width) = match layout {
        Layout::Nchw => (&dims[2], &dims[3]),
        Layout::Nhwc => (&dims[1], &dims[2]),
    };
    let side = height.fixed().filter(|_| height == width || *width == Dim::Unknown)?;
    u32::try_from(side).ok()
}

/// A graph that ends in an activation needs none after it.
fn producer(model: &Model, output: &str) -> Option<Activation> {
    matches!(model.producer(output)?, "Softmax" | "Sigmoid").then_some(Activation::None)
}

pub(super) fn card(file: &Path, bare: &BareModel) -> Result<ModelCard, ModelError> {
    let (model, sha256) = card::load_hashed(file)?;
    let told = Told::by(&model);
    let task = bare.task.or(told.task);
    let has_classes = task != Some(Task::Features);
    let needs_pool = task == Some(Task::Features) && told.has_tokens;
    let bytes_as_they_are = |default: f32| told.takes_bytes.then_some([default; 3]);
    let tile_size = bare.tile_size.or(told.tile_size);
    let mean = bare.mean.or(bytes_as_they_are(0.0));
    let std = bare.std.or(bytes_as_they_are(1.0));
    let activation = if has_classes { bare.activation.or(told.activation) } else { Some(Activation::None) };
    let settings: Vec<_> = [
        ("task", task.is_none()),
        ("tile_size", tile_size.is_none()),
        ("target_mpp", bare.target_mpp.is_none()),
        ("class_names", has_classes && bare.class_names.is_none()),
        ("mean", mean.is_none()),
        ("std", std.is_none()),
        ("activation", activation.is_none()),
        ("pool", needs_pool && bare.pool.is_none()),
    ]
    .into_iter()
    .filter_map(|(name, is_missing)| is_missing.then_some(name))
    .collect();
    let (Some(task), Some(tile_size), Some(mpp), Some(mean), Some(std), Some(activation), true) =
        (task, tile_size, bare.target_mpp, mean, std, activation, settings.is_empty())
    else {
        return Err(ModelError::Missing { path: file.to_owned(), settings });
    };
    let classes = card::classes_of(bare.class_names.as_deref().unwrap_or(&[]));
    ModelCard {
        path: file.to_owned(),
        name: file.file_stem().map_or_else(String::new, |stem| stem.to_string_lossy().into_owned()),
        description: String::new(),
        task,
        tile_size,
        mpp,
        mean,
        std,
        overlap: 0,
        activation,
        background: card::index_of(bare.background.as_deref(), &classes, file)?,
        classes,
        pool: bare.pool,
        register_tokens: bare.register_tokens.unwrap_or(0),
        resize: bare.resize.filter(|&side| side != tile_size),
        licence: None,
        source: None,
        variants: card::only_variant(file, sha256),
        metrics: toml::Table::new(),
    }
    .validate()
}
