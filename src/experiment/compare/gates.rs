//! What a variant must keep of the original, and whether it does.

use std::str::FromStr;

use crate::inference::{ModelCard, Task};
use crate::report::compare::{AccuracyRecord, AgreementRecord, Bound, GateRecord, LeftOutRecord, MetricRecord};

/// The limits; `None` is not asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Gates {
    /// Least mean cosine of raw outputs, 0 to 1.
    pub min_cosine: Option<f64>,
    /// Most tiles that change sides at the threshold.
    pub max_flips: Option<MostFlips>,
    /// Most of the balanced accuracy, or for maps of the mean Dice, that may be lost against labels, 0 to 1: held
    /// against the far end of the loss's interval, so that chance can't pass it.
    pub max_metric_loss: Option<f64>,
}

/// A most of tiles that change sides.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum MostFlips {
    /// So many.
    Tiles(u32),
    /// A share of the tiles, 0 to 1.
    Share(f64),
}

impl FromStr for MostFlips {
    type Err = String;

    /// A whole number is of tiles, one with a point a share: `1` is one tile, `1.0` all.
    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(tiles) = text.parse() {
            return Ok(Self::Tiles(tiles));
        }
        match text.parse() {
            Ok(share) if (0.0..=1.0).contains(&share) => Ok(Self::Share(share)),
            _ => Err(format!("{text:?} is neither a number of tiles nor a share of 0.0 to 1.0")),
        }
    }
}

impl Gates {
    /// Whether anything is asked for.
    pub(super) fn any(&self) -> bool {
        *self != Self::default()
    }

    /// Holds every variant against the limits; one that failed to run passes none.
    pub(super) fn judge(
        &self,
        card: &ModelCard,
        agreement: &[AgreementRecord],
        accuracy: Option<&AccuracyRecord>,
        left_out: &[LeftOutRecord],
    ) -> Vec<GateRecord> {
        let mut gates = Vec::new();
        for left in left_out.iter().filter(|left| left.is_failure && self.any()) {
            gates.push(GateRecord {
                variant: left.name.clone(),
                name: "runs".to_owned(),
                bound: Bound::AtLeast,
                limit: 1.0,
                value: None,
                passed: false,
                reason: left.why.clone(),
            });
        }
        for of in agreement {
            if let Some(limit) = self.min_cosine {
                let value = of.cosine.map(|cosine| cosine.mean).filter(|_| of.nan_count == 0);
                gates.push(gate(&of.variant, "mean cosine", Bound::AtLeast, limit, value, ""));
            }
            let flips = of.flips.map(|flips| flips.tiles as f64);
            gates.extend(self.max_flips.map(|most| match most {
                MostFlips::Tiles(limit) => {
                    gate(&of.variant, "tiles changing side", Bound::AtMost, f64::from(limit), flips, "")
                }
                MostFlips::Share(limit) => {
                    let share = flips.map(|flips| flips / of.tiles.max(1) as f64);
                    gate(&of.variant, "share of tiles changing side", Bound::AtMost, limit, share, "")
                }
            }));
            if let Some(limit) = self.max_metric_loss {
                let is_map = card.task == Task::Segmentation;
                let name = if is_map { "loss of mean Dice" } else { "loss of balanced accuracy" };
                let row = accuracy.and_then(|record| record.rows.iter().find(|row| row.variant == of.variant));
                let metric = row.and_then(|row| if is_map { row.dice } else { row.balanced_accuracy });
                let difference = metric.and_then(|metric: MetricRecord| metric.difference);
                // Subtracted: a negated 0 would be shown as −0.
                let far_end = difference.map(|difference| 0.0 - difference.low);
                let measured = difference.map(|difference| format!("measured {:.6}; ", 0.0 - difference.value));
                let of_interval = "the far end of its 95 % interval counts";
                let about = format!("{}{of_interval}", measured.unwrap_or_default());
                gates.push(gate(&of.variant, name, Bound::AtMost, limit, far_end, &about));
            }
        }
        gates
    }
}

fn gate(variant: &str, name: &str, bound: Bound, limit: f64, value: Option<f64>, about: &str) -> GateRecord {
    let passed = value.is_some_and(|value| match bound {
        Bound::AtLeast => value >= limit,
        Bound::AtMost => value <= limit,
    });
    let least = if bound == Bound::AtLeast { "at least" } else { "at most" };
    let found = value.map_or_else(|| "there is no figure".to_owned(), |value| format!("{value:.6}"));
    let about = if about.is_empty() { String::new() } else { format!(" ({about})") };
    GateRecord {
        variant: variant.to_owned(),
        name: name.to_owned(),
        bound,
        limit,
        value,
        passed,
        reason: format!("{found}, {least} {limit} is asked for{about}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inference::BareModel;
    use crate::report::compare::{AccuracyRow, CosineRecord, FlipsRecord, IntervalRecord};
    use std::path::Path;

    fn agreement(cosine: Option<f64>, flips: u64) -> AgreementRecord {
        AgreementRecord {
            variant: "int8".to_owned(),
            tiles: 100,
            cosine: cosine.map(|cosine| CosineRecord { mean: cosine, p1: cosine, min: cosine }),
            max_abs_difference: None,
            top1_agreement: None,
            dice: Vec::new(),
            pixel_agreement: None,
            flips: Some(FlipsRecord { threshold: 0.5, tiles: flips }),
            nan_count: 0,
        }
    }

    fn judge(gates: Gates, of: AgreementRecord, accuracy: Option<&AccuracyRecord>) -> Vec<bool> {
        let card = ModelCard::load(Path::new("models/cells-vit"), &BareModel::default()).unwrap();
        gates.judge(&card, &[of], accuracy, &[]).iter().map(|gate| gate.passed).collect()
    }

    #[test]
    fn limits_are_held_against_figures() {
        let gates = Gates { min_cosine: Some(0.99), max_flips: Some(MostFlips::Tiles(2)), max_metric_loss: None };
        assert_eq!(judge(gates, agreement(Some(0.99), 2), None), [true, true]);
        assert_eq!(judge(gates, agreement(Some(0.98), 3), None), [false, false]);
        let share = Gates { max_flips: Some(MostFlips::Share(0.02)), ..Gates::default() };
        assert_eq!(judge(share, agreement(None, 2), None), [true]);
        assert_eq!(judge(Gates::default(), agreement(None, 9), None), [false; 0]);
    }

    #[test]
    fn no_figure_passes_no_gate() {
        let gates = Gates { min_cosine: Some(0.0), max_flips: None, max_metric_loss: Some(1.0) };
        assert_eq!(judge(gates, agreement(None, 0), None), [false, false]);
        let gates = Gates { min_cosine: Some(0.5), ..Gates::default() };
        assert_eq!(judge(gates, AgreementRecord { nan_count: 1, ..agreement(Some(1.0), 0) }, None), [false]);
    }

    #[test]
    fn a_loss_counts_by_the_far_end_of_its_interval() {
        let around = |value, low, high| IntervalRecord { value, low, high };
        let metric = |low| MetricRecord { value: around(0.9, 0.8, 0.95), difference: Some(around(-0.005, low, 0.0)) };
        let record = |low| AccuracyRecord {
            labels: String::new(),
            items: 10,
            unit: "tiles".to_owned(),
            rows: vec![AccuracyRow {
                variant: "int8".to_owned(),
                accuracy: None,
                balanced_accuracy: Some(metric(low)),
                auc: None,
                dice: None,
            }],
        };
        let gates = Gates { max_metric_loss: Some(0.01), ..Gates::default() };
        assert_eq!(judge(gates, agreement(None, 0), Some(&record(-0.009))), [true]);
        assert_eq!(judge(gates, agreement(None, 0), Some(&record(-0.011))), [false]);
    }

    #[test]
    fn flips_are_tiles_or_a_share() {
        assert_eq!("3".parse(), Ok(MostFlips::Tiles(3)));
        assert_eq!("0.03".parse(), Ok(MostFlips::Share(0.03)));
        for wrong in ["-1", "1.5", "many", "NaN"] {
            assert!(wrong.parse::<MostFlips>().is_err(), "{wrong}");
        }
    }
}
