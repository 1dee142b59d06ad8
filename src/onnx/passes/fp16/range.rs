//! What a constant loses in 16 bits.

use half::f16;

use crate::onnx::Tensor;

/// The largest 16-bit float.
const LARGEST: f32 = 65504.0;
/// The smallest positive 16-bit float is 2⁻²⁴.
const SMALLEST: &str = "2^-24";
/// From this share on it is told how many values of a constant vanish.
const TOLD_SHARE: f64 = 0.01;
/// A single number that is off by more than this is not what it was: an epsilon, say. Rounding alone is 2⁻¹¹.
const LARGEST_ERROR: f32 = 0.01;

/// What a constant loses in 16 bits.
pub(super) struct Loss {
    /// By magnitude.
    largest: f32,
    nonzero: usize,
    vanished: usize,
    /// The value, if there is one only.
    only: Option<f32>,
}

impl Loss {
    pub(super) fn of(tensor: &Tensor) -> Self {
        let values = tensor.to_f32().unwrap_or_default();
        // Infinities stay what they are.
        let finite = values.iter().copied().filter(|value| value.is_finite());
        let larger = |a: f32, b: f32| if b.abs() > a.abs() { b } else { a };
        let vanishes = |value: &&f32| **value != 0.0 && f16::from_f32(**value) == f16::ZERO;
        Self {
            largest: finite.fold(0.0, larger),
            nonzero: values.iter().filter(|value| **value != 0.0).count(),
            vanished: values.iter().filter(vanishes).count(),
            only: if let [only] = values[..] { Some(only) } else { None },
        }
    }

    /// Why what reads the constant must stay 32 bits.
    pub(super) fn objection(&self) -> Option<String> {
        if self.largest.abs() > LARGEST {
            return Some(format!("holds {:e}, and 16 bits end at {LARGEST}", self.largest));
        }
        let error = |value: f32| (f16::from_f32(value).to_f32() - value).abs() / value.abs();
        self.only
            .filter(|value| value.is_finite() && *value != 0.0 && error(*value) > LARGEST_ERROR)
            .map(|value| format!("is {value:e}, which 16 bits don't hold"))
    }

    /// What the constant loses, if it is worth telling.
    pub(super) fn remark(&self) -> Option<String> {
        let share = self.vanished as f64 / self.nonzero.max(1) as f64;
        (share > TOLD_SHARE)
            .then(|| format!("but {:.1} % of its values vanish: they are below {SMALLEST}", share * 100.0))
    }
}
