//! Test support: exported models to run passes on, and how much a rewritten model differs from the original.

use std::path::PathBuf;

use super::EvaluateError;
use super::freeze::Case;
use crate::inference::{device, evaluate};
use crate::onnx::{Dim, Model, Rewriter, Shapes, Tensor};

/// A file of `tests/fixtures/onnx`, which `make.py` there made.
pub(crate) fn path(name: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/onnx")).join(name)
}

/// A model of `tests/fixtures/onnx`.
pub(crate) fn model(name: &str) -> Model {
    Model::load(&path(name)).unwrap()
}

/// Whether weights must have 7 bits here, as on an x86 without VNNI, where larger products of bytes don't fit their sums.
pub(crate) fn reduce_range() -> bool {
    !device::list().cpu.features.iter().any(|feature| feature.contains("vnni"))
}

/// Values between -2 and 2, the same for the same dimensions.
pub(crate) fn noise(dims: &[usize]) -> Tensor {
    let mut state = 1_u32;
    let mut next = || {
        // The constants of Numerical Recipes; the low bits are poor.
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        f32::from(u16::try_from(state >> 16).unwrap()) / 16_384.0 - 2.0
    };
    Tensor::f32(dims, (0..dims.iter().product()).map(|_| next()).collect())
}

/// The largest difference between the first outputs of two models, as a part of the largest value.
pub(crate) fn difference(before: &Model, after: &Model, inputs: &[(&str, Tensor)]) -> f32 {
    let [before, after] = [before, after].map(|model| evaluate(model, inputs).unwrap().swap_remove(0));
    assert_eq!(before.dims, after.dims);
    relative(&before.to_f32().unwrap(), &after.to_f32().unwrap())
}

/// The largest difference, as a part of the largest expected value.
pub(crate) fn relative(expected: &[f32], found: &[f32]) -> f32 {
    assert!(found.iter().all(|value| value.is_finite()));
    let scale = expected.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
    expected.iter().zip(found).fold(0.0_f32, |largest, (a, b)| largest.max((a - b).abs())) / scale
}

/// Runs a model with at most one input, an image, on noise; symbolic sides are 8, or 12 for the other side.
pub(crate) fn evaluate_images(model: &Model, case: Case) -> Result<Option<Vec<Tensor>>, EvaluateError> {
    let (batch, side) = match case {
        Case::Batch(batch) => (batch, 8),
        Case::OtherSide => (1, 12),
    };
    let inputs = model.inputs();
    let is_open = |index: usize| !inputs.is_empty() && inputs[0].dims.as_ref().unwrap()[index].fixed().is_none();
    if case == Case::OtherSide && !(is_open(2) || is_open(3)) {
        return Ok(None);
    }
    let inputs: Vec<(&str, Tensor)> = inputs
        .iter()
        .map(|input| {
            let dims = input.dims.as_ref().unwrap().iter().enumerate();
            let size = |(index, dim): (usize, &Dim)| dim.fixed().unwrap_or(if index == 0 { batch } else { side });
            let dims: Vec<usize> = dims.map(size).collect();
            (input.name.as_str(), noise(&dims))
        })
        .collect();
    evaluate(model, &inputs).map(Some).map_err(|error| EvaluateError::Run(Box::new(error)))
}

/// The dimensions of all values for two images.
pub(crate) fn shapes_of(rewriter: &Rewriter) -> Shapes {
    let (question, values) = Shapes::question(rewriter).unwrap();
    let answer = evaluate_images(&question, Case::Batch(2)).unwrap().unwrap();
    Shapes::from_answer(values, &answer, 2)
}
