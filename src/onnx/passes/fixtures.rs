//! Test support: exported models to run passes on, and how much a rewritten model differs from the original.

use std::path::PathBuf;

use crate::inference::evaluate;
use crate::onnx::{Model, Tensor};

/// A file of `tests/fixtures/onnx`, which `make.py` there made.
pub(crate) fn path(name: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/onnx")).join(name)
}

/// A model of `tests/fixtures/onnx`.
pub(crate) fn model(name: &str) -> Model {
    Model::load(&path(name)).unwrap()
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
