//! How well scores put the right items and classes first.

/// Scores of items of two kinds in their order, made once, for areas over draws of the items.
#[derive(Clone, Debug, PartialEq)]
pub struct Ranking {
    /// Positions of the items from the lowest score to the highest.
    order: Vec<usize>,
    /// For each place in the order, whether the next has a higher score.
    ends_tie: Vec<bool>,
    is_positive: Vec<bool>,
}

impl Ranking {
    /// Ranks items by their scores; `None` with a NaN score or with lists that differ in length.
    #[must_use]
    pub fn new(scores: &[f32], is_positive: Vec<bool>) -> Option<Self> {
        if scores.len() != is_positive.len() || scores.iter().any(|score| score.is_nan()) {
            return None;
        }
        let mut order: Vec<usize> = (0..scores.len()).collect();
        order.sort_by(|&a, &b| scores[a].total_cmp(&scores[b]));
        // 0 and −0 are equal scores but sort apart, so ties are told by comparison.
        let ends_tie = |place: usize| order.get(place + 1).is_none_or(|&next| scores[next] > scores[order[place]]);
        let ends_tie = (0..order.len()).map(ends_tie).collect();
        Some(Self { order, ends_tie, is_positive })
    }

    /// Area under the ROC curve where each item counts as often as `times` says: the chance that a positive item scores
    /// above a negative one, ties counting half (Hanley & McNeil, *Radiology* 143, 1982). `None` without both kinds.
    #[must_use]
    pub fn area(&self, times: impl Fn(usize) -> u32) -> Option<f64> {
        let (mut won, mut positives, mut negatives) = (0.0, 0.0, 0.0);
        let (mut tied_positives, mut tied_negatives) = (0.0, 0.0);
        for (&item, ends_tie) in self.order.iter().zip(&self.ends_tie) {
            let tied = if self.is_positive[item] { &mut tied_positives } else { &mut tied_negatives };
            *tied += f64::from(times(item));
            if *ends_tie {
                won += tied_positives * (negatives + tied_negatives / 2.0);
                positives += tied_positives;
                negatives += tied_negatives;
                (tied_positives, tied_negatives) = (0.0, 0.0);
            }
        }
        let area = won / (positives * negatives);
        area.is_finite().then_some(area)
    }
}

/// [`Ranking::area`] of items that count once each; `None` too with a NaN score or with lists that differ in length.
#[must_use]
pub fn auc(scores: &[f32], is_positive: &[bool]) -> Option<f64> {
    Ranking::new(scores, is_positive.to_vec())?.area(|_| 1)
}

/// Whether a class is among the `top` classes with the largest scores, of equal ones the first; false for a score of NaN.
#[must_use]
pub fn is_in_top(scores: &[f32], class: usize, top: usize) -> bool {
    let Some(own) = scores.get(class).filter(|_| scores.iter().all(|score| !score.is_nan())) else { return false };
    let is_before = |(other, score): (usize, &f32)| score > own || (score == own && other < class);
    scores.iter().enumerate().filter(|&other| is_before(other)).count() < top
}

/// [`auc`] of each class against all others; `None` for a class that all or no items have.
///
/// `scores`: `[items, classes]`; `labels`: a class per item.
#[must_use]
pub fn auc_one_vs_rest(scores: &[f32], labels: &[usize], classes: usize) -> Vec<Option<f64>> {
    let of_class = |class| {
        let column: Vec<f32> = scores.iter().skip(class).step_by(classes).copied().collect();
        let is_positive: Vec<bool> = labels.iter().map(|&label| label == class).collect();
        auc(&column, &is_positive)
    };
    (0..classes).map(of_class).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn areas_match_hand_computed_values() {
        assert_eq!(auc(&[0.1, 0.4, 0.35, 0.8], &[false, false, true, true]), Some(0.75));
        assert_eq!(auc(&[0.5, 0.5, 0.5], &[true, false, false]), Some(0.5));
        // Pairs of (0.2, 0.8) with (0.2, 0.1): a tie, a win, two wins.
        assert_eq!(auc(&[0.2, 0.8, 0.2, 0.1], &[true, true, false, false]), Some(0.875));
        assert_eq!(auc(&[0.0, -0.0], &[true, false]), Some(0.5));
        assert_eq!(auc(&[0.1, 0.2], &[true, true]), None);
        assert_eq!(auc(&[0.1, f32::NAN], &[true, false]), None);
        assert_eq!(auc(&[], &[]), None);
        assert_eq!(auc(&[0.1], &[]), None);
    }

    #[test]
    fn each_class_is_set_against_the_rest() {
        let scores = [0.8, 0.2, 0.0, 0.3, 0.7, 0.0, 0.6, 0.4, 0.0];
        assert_eq!(auc_one_vs_rest(&scores, &[0, 1, 0], 3), [Some(1.0), Some(1.0), None]);
        assert_eq!(auc_one_vs_rest(&scores, &[1, 0, 0], 3)[0], Some(0.0));
    }

    #[test]
    fn an_item_drawn_twice_counts_twice() {
        let ranking = Ranking::new(&[0.1, 0.4, 0.35, 0.8], vec![false, false, true, true]).unwrap();
        // The pairs of 0.35 once and 0.8 twice with 0.1 and 0.4: one of six is lost.
        assert_eq!(ranking.area(|item| if item == 3 { 2 } else { 1 }), Some(5.0 / 6.0));
        assert_eq!(ranking.area(|item| u32::from(item < 2)), None);
    }

    #[test]
    fn the_top_classes_are_those_of_largest_scores() {
        let scores = [0.1, 0.3, 0.3, 0.2, 0.05, 0.05];
        let in_top = |top| (0..6).filter(|&class| is_in_top(&scores, class, top)).collect::<Vec<_>>();
        assert_eq!((in_top(1), in_top(2), in_top(5)), (vec![1], vec![1, 2], vec![0, 1, 2, 3, 4]));
        assert!(!is_in_top(&[0.9, f32::NAN], 0, 2) && !is_in_top(&scores, 6, 5));
    }

    proptest! {
        #[test]
        fn the_area_counts_pairs(items in prop::collection::vec((0..6_u8, any::<bool>()), 2..40)) {
            let scores: Vec<f32> = items.iter().map(|(score, _)| f32::from(*score)).collect();
            let is_positive: Vec<bool> = items.iter().map(|(_, is_positive)| *is_positive).collect();
            let (mut won, mut pairs) = (0.0, 0.0);
            for (a, _) in items.iter().filter(|item| item.1) {
                for (b, _) in items.iter().filter(|item| !item.1) {
                    pairs += 1.0;
                    won += if a > b { 1.0 } else if a == b { 0.5 } else { 0.0 };
                }
            }
            match auc(&scores, &is_positive) {
                Some(area) => prop_assert!((area - won / pairs).abs() < 1e-12),
                None => prop_assert_eq!(pairs, 0.0),
            }
        }
    }
}
