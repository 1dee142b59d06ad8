//! Reads an output: checks its shape against the card, pools tokens, applies the activation.

use half::f16;
use half::slice::HalfFloatSliceExt;
use ort::value::{DynValue, ValueType};
use rayon::prelude::*;

use crate::inference::activation;
use crate::inference::card::{ModelCard, Pool, Task};

/// Appends the scores of the first `tiles` of a batch to `scores`, activated or pooled. Returns their dimensions after
/// the batch, `[c, 1, 1]` for vectors; `None` if the output's type or shape is not as [`expected`].
pub(super) fn append(
    card: &ModelCard,
    batch: usize,
    tiles: usize,
    output: &DynValue,
    scores: &mut Vec<f32>,
) -> Option<[usize; 3]> {
    let shape = shape(output)?;
    let dims = match_shape(card, batch, &shape)?;
    let row: usize = dims.iter().product();
    let start = scores.len();
    let raw = Raw::of(output)?;
    if let Some(pool) = card.pool {
        let [tokens, width, _] = dims;
        let mut values = vec![0.0; row];
        for tile in 0..tiles {
            raw.read(tile * row, &mut values)?;
            pool_tokens(pool, card.register_tokens, &values, width, scores);
        }
        debug_assert!(tokens > card.register_tokens);
        return Some([(scores.len() - start) / tiles, 1, 1]);
    }
    if start == 0 {
        // The system's zeros: large ones come untouched.
        *scores = vec![0.0; tiles * row];
    } else {
        scores.resize(start + tiles * row, 0.0);
    }
    let read = |(tile, scores): (usize, &mut [f32])| {
        raw.read(tile * row, scores)?;
        if card.task != Task::Features {
            activation::apply(card.activation, scores, dims[0]);
        }
        Some(())
    };
    if tiles < super::SHARED_WORK {
        scores[start..].chunks_exact_mut(row).enumerate().try_for_each(read)?;
    } else {
        scores[start..].par_chunks_exact_mut(row).enumerate().try_for_each(read)?;
    }
    Some(dims)
}

/// An output's type and shape, for a message.
pub(super) fn describe(output: &DynValue) -> String {
    match output.dtype() {
        ValueType::Tensor { ty, shape, .. } => format!("{ty} {shape}"),
        other => other.to_string(),
    }
}

/// The shape that the card leads to, for a message.
pub(super) fn expected(card: &ModelCard, batch: usize) -> String {
    let (classes, side) = (card.classes.len(), card.tile_size);
    match (card.task, card.pool) {
        (Task::Classification, _) => format!("float [{batch}, {classes}]"),
        (Task::Segmentation, _) => format!("float [{batch}, {classes}, {side}, {side}]"),
        (Task::Features, None) => format!("float [{batch}, features]"),
        (Task::Features, Some(_)) => {
            format!("float [{batch}, more than {} tokens, features]", 1 + card.register_tokens)
        }
    }
}

fn shape(output: &DynValue) -> Option<Vec<usize>> {
    let ValueType::Tensor { shape, .. } = output.dtype() else { return None };
    shape.iter().map(|&dim| usize::try_from(dim).ok()).collect()
}

/// The dimensions after the batch, as `[c, h, w]`, `[c, 1, 1]` or `[t, d, 1]`.
fn match_shape(card: &ModelCard, batch: usize, shape: &[usize]) -> Option<[usize; 3]> {
    let (&first, rest) = shape.split_first()?;
    let classes = card.classes.len();
    let side = card.tile_size as usize;
    let dims = match (card.task, card.pool, rest) {
        (Task::Classification, _, []) if classes == 1 => [1, 1, 1],
        (Task::Classification, _, &[channels]) if channels == classes => [channels, 1, 1],
        (Task::Segmentation, _, &[height, width]) if classes == 1 => [1, height, width],
        (Task::Segmentation, _, &[channels, height, width]) if channels == classes => [channels, height, width],
        (Task::Features, None, &[width]) if width > 0 => [width, 1, 1],
        (Task::Features, Some(_), &[tokens, width]) if tokens > 1 + card.register_tokens && width > 0 => {
            [tokens, width, 1]
        }
        _ => return None,
    };
    let is_whole_map = card.task != Task::Segmentation || dims[1..] == [side, side];
    (first == batch && is_whole_map).then_some(dims)
}

/// Raw scores in the precision of the model.
enum Raw<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
}

impl<'a> Raw<'a> {
    fn of(output: &'a DynValue) -> Option<Self> {
        let f32s = || output.try_extract_tensor().ok().map(|(_, values)| Self::F32(values));
        let f16s = || output.try_extract_tensor().ok().map(|(_, values)| Self::F16(values));
        f32s().or_else(f16s)
    }

    /// Copies as many scores as `into` holds, from `start` on.
    fn read(&self, start: usize, into: &mut [f32]) -> Option<()> {
        match self {
            Self::F32(values) => into.copy_from_slice(values.get(start..start + into.len())?),
            Self::F16(values) => values.get(start..start + into.len())?.convert_to_f32_slice(into),
        }
        Some(())
    }
}

/// Appends the vector of one tile out of its tokens, `[t, width]`.
fn pool_tokens(pool: Pool, register_tokens: usize, tokens: &[f32], width: usize, into: &mut Vec<f32>) {
    let (class_token, others) = tokens.split_at(width);
    if matches!(pool, Pool::Cls | Pool::ClsAndMean) {
        into.extend_from_slice(class_token);
    }
    if matches!(pool, Pool::Mean | Pool::ClsAndMean) {
        let patches = &others[register_tokens * width..];
        let start = into.len();
        into.resize(start + width, 0.0);
        for token in patches.chunks_exact(width) {
            for (sum, value) in into[start..].iter_mut().zip(token) {
                *sum += value;
            }
        }
        let factor = width as f32 / patches.len() as f32;
        into[start..].iter_mut().for_each(|sum| *sum *= factor);
    }
}
