//! Softmax and sigmoid over scores `[c, pixels]`, in place, in loops that the compiler vectorises over pixels.

use super::card::Activation;

/// Pixels per block: the sums of a block stay in the first-level cache.
const BLOCK: usize = 1024;

/// Applies `activation` to the scores of one tile, `[classes, pixels]` in row-major order. A score that isn't finite
/// becomes NaN; under softmax, so do the other classes of its pixel.
pub(super) fn apply(activation: Activation, scores: &mut [f32], classes: usize) {
    match activation {
        Activation::Softmax => softmax(scores, classes),
        Activation::Sigmoid => scores.iter_mut().for_each(|score| *score = sigmoid(*score)),
        Activation::None => {}
    }
}

fn softmax(scores: &mut [f32], classes: usize) {
    let pixels = scores.len() / classes;
    let mut max = [0.0; BLOCK];
    let mut sum = [0.0; BLOCK];
    for start in (0..pixels).step_by(BLOCK) {
        let width = BLOCK.min(pixels - start);
        let (max, sum) = (&mut max[..width], &mut sum[..width]);
        max.fill(f32::NEG_INFINITY);
        sum.fill(0.0);
        for class in 0..classes {
            let row = &scores[class * pixels + start..][..width];
            for (max, &score) in max.iter_mut().zip(row) {
                *max = if score > *max { score } else { *max };
            }
        }
        for class in 0..classes {
            let row = &mut scores[class * pixels + start..][..width];
            for ((score, max), sum) in row.iter_mut().zip(&*max).zip(&mut *sum) {
                // 0 for a finite score, else NaN, which the sum carries to every class of the pixel.
                let poison = *score * 0.0;
                *score = exp(*score - max) + poison;
                *sum += *score;
            }
        }
        for sum in &mut *sum {
            *sum = 1.0 / *sum;
        }
        for class in 0..classes {
            let row = &mut scores[class * pixels + start..][..width];
            for (score, factor) in row.iter_mut().zip(&*sum) {
                *score *= factor;
            }
        }
    }
}

fn sigmoid(score: f32) -> f32 {
    1.0 / (1.0 + exp(-score)) + score * 0.0
}

/// e to the power of `x`, to within 3 parts in 10 million for -87 to 87 and held at those ends. `f32::exp` is a call per
/// value and can't be vectorised.
#[inline]
fn exp(x: f32) -> f32 {
    // Added to a number, it leaves that number's nearest integer in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two parts, the first with so few bits that its product with an exponent is exact.
    const LN_2_HIGH: f32 = 355.0 / 512.0;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    let x = if x < -87.0 { -87.0 } else { x };
    let x = if x > 87.0 { 87.0 } else { x };
    let rounded = x * std::f32::consts::LOG2_E + ROUND;
    let power = rounded - ROUND;
    let r = x - power * LN_2_HIGH - power * LN_2_LOW;
    // Taylor's series: |r| is at most ln 2 / 2, so the first term left out is below 1e-7.
    let series = 1.0 + r * (1.0 + r * (0.5 + r * (1.0 / 6.0 + r * (1.0 / 24.0 + r * (1.0 / 120.0 + r / 720.0)))));
    let scale = f32::from_bits((rounded.to_bits() << 23).wrapping_add(1.0_f32.to_bits()));
    series * scale
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_right_to_a_few_parts_in_ten_million() {
        for step in -87_000..=87_000_i32 {
            let x = f64::from(step) / 1000.0;
            #[expect(clippy::cast_possible_truncation, reason = "the test's own input")]
            let x = x as f32;
            let exact = f64::from(x).exp();
            let error = (f64::from(exp(x)) - exact).abs() / exact;
            assert!(error < 3e-7, "exp({x}) is off by {error}");
        }
        assert!(exp(-1e9) < 2e-38 && exp(1e9).is_finite());
    }

    #[test]
    fn softmax_of_planes_is_softmax_per_pixel() {
        let pixels = BLOCK + 7;
        let mut scores = vec![0.0; 3 * pixels];
        // ln 1, ln 2, ln 5 sum to 8 as exponentials, whatever is added to all three.
        for pixel in 0..pixels {
            for (class, value) in [1.0_f32, 2.0, 5.0].into_iter().enumerate() {
                scores[class * pixels + pixel] = value.ln() + if pixel % 2 == 0 { 60.0 } else { -60.0 };
            }
        }
        apply(Activation::Softmax, &mut scores, 3);
        for (class, expected) in [0.125, 0.25, 0.625].into_iter().enumerate() {
            // 1e-5: the spacing of floats near 60 is 4e-6, which the exponential turns into relative error.
            assert!(scores[class * pixels..][..pixels].iter().all(|score| (score - expected).abs() < 1e-5));
        }
    }

    #[test]
    fn extreme_scores_stay_probabilities() {
        let mut scores = [3e38, -3e38, 0.0];
        apply(Activation::Softmax, &mut scores, 3);
        assert!((scores[0] - 1.0).abs() < 1e-6 && scores[1] < 1e-30 && scores[2] < 1e-30);
        let mut scores = [0.0, 200.0, -200.0];
        apply(Activation::Sigmoid, &mut scores, 1);
        assert_eq!(&scores[..2], [0.5, 1.0]);
        assert!(scores[2] >= 0.0 && scores[2] < 1e-30);
    }

    #[test]
    fn what_is_not_finite_is_not_hidden() {
        for bad in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
            // Two classes, two pixels; the first pixel has one bad score.
            let mut scores = [bad, 1.0, 0.0, 1.0];
            apply(Activation::Softmax, &mut scores, 2);
            assert!(scores[0].is_nan() && scores[2].is_nan(), "{bad}");
            assert_eq!((scores[1], scores[3]), (0.5, 0.5));
            let mut scores = [bad, 0.0];
            apply(Activation::Sigmoid, &mut scores, 1);
            assert!(scores[0].is_nan() && scores[1] == 0.5, "{bad}");
        }
    }
}
