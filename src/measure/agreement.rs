//! How close the outputs of two variants are to each other, whoever is right.

/// Cosine of the angle between two outputs, in −1..=1, summed in f64; `None` if one holds what isn't finite, or they
/// differ in length. Exactly 1 for equal outputs; 0 if only one is all zeros, which has no direction.
#[must_use]
pub fn cosine(a: &[f32], b: &[f32]) -> Option<f64> {
    if a.len() != b.len() {
        return None;
    }
    let (mut dot, mut a_squared, mut b_squared) = (0.0, 0.0, 0.0);
    for (&a, &b) in a.iter().zip(b) {
        let (a, b) = (f64::from(a), f64::from(b));
        dot += a * b;
        a_squared += a * a;
        b_squared += b * b;
    }
    if a_squared == 0.0 || b_squared == 0.0 {
        return Some(if a_squared == b_squared { 1.0 } else { 0.0 }).filter(|_| dot.is_finite());
    }
    // The root of the product, not the product of the roots: what is equal then gives exactly 1.
    let cosine = dot / f64::sqrt(a_squared * b_squared);
    cosine.is_finite().then(|| cosine.clamp(-1.0, 1.0))
}

/// The largest |a − b|; infinite if a value is not finite or the lengths differ, so that no limit holds.
#[must_use]
pub fn max_abs_difference(a: &[f32], b: &[f32]) -> f64 {
    if a.len() != b.len() {
        return f64::INFINITY;
    }
    let differences = a.iter().zip(b).map(|(&a, &b)| (f64::from(a) - f64::from(b)).abs());
    differences
        .fold(0.0, |largest, difference| if difference.is_nan() { f64::INFINITY } else { difference.max(largest) })
}

/// How many values are NaN or infinite.
#[must_use]
pub fn non_finite(values: &[f32]) -> usize {
    values.iter().filter(|value| !value.is_finite()).count()
}

/// The class with the largest score, the first of equal ones; `None` if a score is NaN or there is none.
#[must_use]
pub fn predicted_class(scores: &[f32]) -> Option<usize> {
    let mut best: Option<(usize, f32)> = None;
    for (class, &score) in scores.iter().enumerate() {
        if score.is_nan() {
            return None;
        }
        if best.is_none_or(|(_, highest)| score > highest) {
            best = Some((class, score));
        }
    }
    best.map(|(class, _)| class)
}

/// Share of the tiles for which both give the same class; a tile with NaN agrees with nothing.
///
/// `a` and `b`: `[tiles, classes]`. `None` for no tiles, no classes or shapes that don't match.
#[must_use]
pub fn top1_agreement(a: &[f32], b: &[f32], classes: usize) -> Option<f64> {
    if classes == 0 || a.is_empty() || a.len() != b.len() || !a.len().is_multiple_of(classes) {
        return None;
    }
    let pairs = a.chunks_exact(classes).zip(b.chunks_exact(classes));
    let agreeing = pairs.filter(|(a, b)| predicted_class(a).is_some_and(|class| predicted_class(b) == Some(class)));
    Some(agreeing.count() as f64 / (a.len() / classes) as f64)
}

/// How many tiles change side of a threshold: `p ≥ threshold` in one and not in the other, or no number in just one.
///
/// `a` and `b`: a probability per tile.
#[must_use]
pub fn flips(a: &[f32], b: &[f32], threshold: f32) -> usize {
    let side = |p: f32| (!p.is_nan()).then_some(p >= threshold);
    a.iter().zip(b).filter(|(a, b)| side(**a) != side(**b)).count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn cosines_match_hand_computed_values() {
        assert_eq!(cosine(&[1.0, 0.0], &[0.0, 2.0]), Some(0.0));
        assert_eq!(cosine(&[1.0, 2.0], &[-2.0, -4.0]), Some(-1.0));
        // 3·4 + 4·3 = 24, norms 5 and 5.
        assert!((cosine(&[3.0, 4.0], &[4.0, 3.0]).unwrap() - 0.96).abs() < 1e-15);
        assert_eq!((cosine(&[0.0, 0.0], &[1.0, 0.0]), cosine(&[0.0; 2], &[0.0; 2])), (Some(0.0), Some(1.0)));
        assert_eq!(cosine(&[f32::NAN, 0.0], &[1.0, 0.0]), None);
        assert_eq!(cosine(&[f32::INFINITY, 0.0], &[1.0, 0.0]), None);
        assert_eq!(cosine(&[1.0], &[1.0, 0.0]), None);
        // In f32 the squares would overflow.
        assert_eq!(cosine(&[3e38, 0.0], &[3e38, 0.0]), Some(1.0));
    }

    #[test]
    fn the_largest_difference_never_hides_what_is_no_number() {
        assert_eq!(max_abs_difference(&[1.0, -2.0, 3.0], &[1.5, -2.0, 2.75]), 0.5);
        assert_eq!(max_abs_difference(&[], &[]), 0.0);
        for odd in [f32::NAN, f32::INFINITY] {
            assert_eq!(max_abs_difference(&[1.0, odd, 1.0], &[1.0, 1.0, 1.0]), f64::INFINITY);
            assert_eq!(max_abs_difference(&[odd, 1.0], &[odd, 1.0]), f64::INFINITY);
        }
        assert_eq!(max_abs_difference(&[1.0], &[]), f64::INFINITY);
        assert_eq!(non_finite(&[1.0, f32::NAN, f32::NEG_INFINITY, 0.0]), 2);
    }

    #[test]
    fn classes_agree_tile_by_tile() {
        assert_eq!(predicted_class(&[0.2, 0.5, 0.5]), Some(1));
        assert_eq!(predicted_class(&[0.9, f32::NAN]), None);
        assert_eq!(predicted_class(&[]), None);
        let a = [0.9, 0.1, 0.4, 0.6, 0.5, 0.5, f32::NAN, 0.0];
        let b = [0.6, 0.4, 0.6, 0.4, 0.7, 0.3, f32::NAN, 0.0];
        assert_eq!(top1_agreement(&a, &b, 2), Some(0.5));
        assert_eq!(top1_agreement(&a, &b[..6], 2), None);
        assert_eq!(top1_agreement(&a, &b, 3), None);
        assert_eq!(top1_agreement(&[], &[], 2), None);
    }

    #[test]
    fn flips_are_counted_at_the_threshold() {
        let a = [0.49, 0.50, 0.51, 0.9, f32::NAN, f32::NAN];
        let b = [0.50, 0.49, 0.52, 0.1, f32::NAN, 0.2];
        assert_eq!(flips(&a, &b, 0.5), 4);
        assert_eq!(flips(&a, &a, 0.5), 0);
    }

    proptest! {
        #[test]
        fn agreement_is_symmetric_and_perfect_with_itself(
            pairs in prop::collection::vec((0.01..1.0_f32, 0.01..1.0_f32), 1..40), scale in 0.1..10.0_f32,
        ) {
            let (a, b): (Vec<f32>, Vec<f32>) = pairs.into_iter().unzip();
            prop_assert_eq!(cosine(&a, &a), Some(1.0));
            prop_assert_eq!(cosine(&a, &b), cosine(&b, &a));
            let scaled: Vec<f32> = b.iter().map(|value| value * scale).collect();
            prop_assert!((cosine(&a, &b).unwrap() - cosine(&a, &scaled).unwrap()).abs() < 1e-6);
            prop_assert_eq!(max_abs_difference(&a, &b), max_abs_difference(&b, &a));
            prop_assert_eq!(top1_agreement(&a, &a, 1), Some(1.0));
            prop_assert_eq!(flips(&a, &b, 0.5), flips(&b, &a, 0.5));
        }
    }
}
