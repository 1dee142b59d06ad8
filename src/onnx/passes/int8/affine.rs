//! How floats become bytes: scales, zero points and the bytes themselves.

use super::{Range, RangeError};
use crate::onnx::{Tensor, Values};

/// An unsigned byte's meaning: `value = scale · (byte − zero_point)`. Zero is always one of the values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Affine {
    pub(super) scale: f32,
    pub(super) zero_point: u8,
}

impl Affine {
    /// Bytes that cover a range and zero; `value` names it for the error.
    pub(super) fn covering(range: Range, value: &str) -> Result<Self, RangeError> {
        let (min, max) = (f64::from(range.min.min(0.0)), f64::from(range.max.max(0.0)));
        #[expect(clippy::cast_possible_truncation, reason = "at most a 127th of the largest float")]
        let scale = ((max - min) / 255.0) as f32;
        if !scale.is_normal() {
            return Err(RangeError::Zero { value: value.to_owned() });
        }
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped to a byte")]
        let zero_point = (-min / f64::from(scale)).round().clamp(0.0, 255.0) as u8;
        Ok(Self { scale, zero_point })
    }
}

/// Weights as signed bytes, with one scale per channel: `weight = scale[channel] · byte`.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct ByteWeights {
    pub(super) bytes: Tensor,
    pub(super) scales: Vec<f32>,
}

/// Largest magnitude of a weight's byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Magnitude {
    /// 127.
    Full,
    /// 64: two products with an unsigned byte fit into 16 bits, in which x86 without VNNI adds them.
    Reduced,
}

impl Magnitude {
    pub(super) fn of(reduce_range: bool) -> Self {
        if reduce_range { Self::Reduced } else { Self::Full }
    }

    fn largest(self) -> f32 {
        match self {
            Self::Full => 127.0,
            Self::Reduced => 64.0,
        }
    }
}

/// Quantises weights along `axis`, whose channels get a scale each. A channel whose bias would not fit into 32 bits as
/// a multiple of `x_scale` times the channel's scale gets a larger one.
///
/// # Errors
/// Why it can't be done.
pub(super) fn quantize_weights(
    weights: &Tensor,
    axis: usize,
    magnitude: Magnitude,
    bias: Option<(&[f32], f32)>,
) -> Result<ByteWeights, String> {
    let floats = weights.to_f32().ok_or("its weights are no floats")?;
    if floats.iter().any(|weight| !weight.is_finite()) {
        return Err("its weights hold NaN or infinity".to_owned());
    }
    let channels = weights.dims[axis];
    let inner: usize = weights.dims[axis + 1..].iter().product();
    let channel_of = |index: usize| index / inner.max(1) % channels.max(1);
    let mut peaks = vec![0.0_f32; channels];
    for (index, weight) in floats.iter().enumerate() {
        let peak = &mut peaks[channel_of(index)];
        *peak = peak.max(weight.abs());
    }
    let scales: Vec<f32> = peaks
        .iter()
        .enumerate()
        .map(|(channel, peak)| {
            // 2^30: half of what 32 bits hold, so that the sum of products beside it has room.
            let least = bias.map_or(0.0, |(bias, x_scale)| bias[channel].abs() / x_scale / 1_073_741_824.0);
            let scale = (peak / magnitude.largest()).max(least);
            // A channel of zeros may have any scale.
            if scale.is_normal() { scale } else { 1.0 }
        })
        .collect();
    if scales.iter().any(|scale| !scale.is_finite()) {
        return Err("its bias is too large for its weights".to_owned());
    }
    let bytes = floats.iter().enumerate().map(|(index, weight)| {
        #[expect(clippy::cast_possible_truncation, reason = "at most the magnitude, by the choice of scale")]
        let byte = (weight / scales[channel_of(index)]).round_ties_even() as i8;
        byte
    });
    let bytes = Tensor { dims: weights.dims.clone(), values: Values::I8(bytes.collect()) };
    Ok(ByteWeights { bytes, scales })
}

/// A bias as 32-bit multiples of `x_scale` times each channel's scale, and these scales.
pub(super) fn quantize_bias(bias: &[f32], x_scale: f32, weight_scales: &[f32]) -> (Tensor, Vec<f32>) {
    let scales: Vec<f32> = weight_scales.iter().map(|scale| (x_scale * scale).max(f32::MIN_POSITIVE)).collect();
    let values = bias.iter().zip(&scales).map(|(value, scale)| {
        #[expect(clippy::cast_possible_truncation, reason = "the weights' scales leave room; the cast saturates")]
        let steps = (f64::from(*value) / f64::from(*scale)).round_ties_even() as i32;
        steps
    });
    (Tensor { dims: vec![bias.len()], values: Values::I32(values.collect()) }, scales)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_is_a_byte_of_every_range() {
        for (min, max) in [(-1.0, 3.0), (0.5, 2.0), (-3.0, -1.0), (0.0, 1e-30), (f32::MIN, f32::MAX), (-1.0, 0.0)] {
            let affine = Affine::covering(Range { min, max }, "x").unwrap();
            let low = -affine.scale * f32::from(affine.zero_point);
            // Rounding the zero point moves both ends by half a step at most.
            assert!(low - min.min(0.0) <= affine.scale * 0.5001, "{min} {max} {affine:?}");
            assert!(
                max.max(0.0) - affine.scale * f32::from(255 - affine.zero_point) <= affine.scale * 0.5001,
                "{min} {max} {affine:?}"
            );
        }
    }

    #[test]
    fn a_range_of_nothing_has_no_scale() {
        for peak in [0.0, 1e-42] {
            let error = Affine::covering(Range { min: -peak, max: peak }, "x").unwrap_err();
            assert_eq!(error.to_string(), "\"x\" was zero on every calibration tile");
        }
    }

    #[test]
    fn every_channel_uses_its_whole_scale() {
        let weights = Tensor::f32(&[2, 3], vec![1.0, -0.1, 0.0, -2.0, 20.0, 0.0]);
        let rows = quantize_weights(&weights, 0, Magnitude::Full, None).unwrap();
        assert_eq!(rows.bytes.values, Values::I8(vec![127, -13, 0, -13, 127, 0]));
        let columns = quantize_weights(&weights, 1, Magnitude::Reduced, None).unwrap();
        assert_eq!(columns.bytes.values, Values::I8(vec![32, 0, 0, -64, 64, 0]));
        assert_eq!(columns.scales, [2.0 / 64.0, 20.0 / 64.0, 1.0]);
    }

    #[test]
    fn a_large_bias_beside_small_weights_fits() {
        let weights = Tensor::f32(&[2, 1], vec![1e-12, 0.0]);
        let bias = [100.0, -3.0];
        let quantized = quantize_weights(&weights, 0, Magnitude::Full, Some((&bias, 0.01))).unwrap();
        let (steps, scales) = quantize_bias(&bias, 0.01, &quantized.scales);
        let Values::I32(steps) = steps.values else { panic!("{steps:?}") };
        for channel in 0..2 {
            let error = steps[channel] as f32 * scales[channel] - bias[channel];
            assert!(error.abs() <= scales[channel], "{error}");
        }
    }

    #[test]
    fn broken_weights_are_told() {
        let weights = Tensor::f32(&[1, 1], vec![f32::NAN]);
        assert_eq!(
            quantize_weights(&weights, 0, Magnitude::Full, None).unwrap_err(),
            "its weights hold NaN or infinity"
        );
    }
}
