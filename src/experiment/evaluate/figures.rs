//! From predictions to figures with intervals: everything is computed anew on each draw of groups, in one pass.

use super::predictions::Sample;
use crate::experiment::images::are_probabilities;
use crate::inference::ModelCard;
use crate::measure::{Bootstrap, CALIBRATION_BINS, Calibration, ClassCounts, Ranking, mean_of_some};
use crate::report::{BinRecord, ClassFigures, DrawnRecord, FigureRecord, Figures};

/// Top-5 says something from this many classes on.
const TOP_5_CLASSES: usize = 6;
/// Work that intervals may take, in scores that are looked at: about a minute.
const MOST_WORK: usize = 20_000_000_000;
/// Fewer resamples tell no tail.
const LEAST_RESAMPLES: usize = 200;

/// What figures are of.
pub(super) struct Computed {
    pub(super) figures: Figures,
    pub(super) classes: Vec<ClassFigures>,
    pub(super) calibration: Vec<BinRecord>,
    pub(super) drawn: DrawnRecord,
    pub(super) notes: Vec<String>,
}

/// The groups that are drawn.
#[derive(Clone, Copy)]
pub(super) struct Groups {
    pub(super) count: usize,
    pub(super) are_named: bool,
}

/// Figures of a classification.
pub(super) fn of_samples(samples: &[Sample], card: &ModelCard, groups: Groups) -> Computed {
    let classes = card.classes.len();
    let rankings: Vec<Option<Ranking>> = (0..classes)
        .map(|class| {
            let column: Vec<f32> = samples.iter().map(|sample| sample.scores[class]).collect();
            Ranking::new(&column, samples.iter().map(|sample| sample.label == class).collect())
        })
        .collect();
    let are_probabilities = are_probabilities(card, samples.iter().flat_map(|sample| &sample.scores));
    let bootstrap = bootstrap(samples.len() * classes);
    let statistics = |drawn: &[usize]| {
        let times = times(drawn, groups.count);
        let times = |sample: &Sample| times[sample.group];
        let mut counts = ClassCounts::new(classes);
        let (mut calibration, mut in_top) = (Calibration::default(), 0_u64);
        for sample in samples.iter().filter(|sample| times(sample) > 0) {
            let often = u64::from(times(sample));
            counts.add_many(sample.label, sample.predicted, often);
            in_top += if sample.is_in_top5 { often } else { 0 };
            if let Some(confidence) = sample.confidence().filter(|_| are_probabilities) {
                calibration.add(confidence, sample.predicted == Some(sample.label), often);
            }
        }
        let area = |ranking: &Option<Ranking>| ranking.as_ref()?.area(|item| times(&samples[item]));
        let areas: Vec<Option<f64>> = rankings.iter().map(area).collect();
        let top5 = (classes >= TOP_5_CLASSES).then(|| in_top as f64 / counts.items() as f64);
        let f1 = counts.dice();
        let over_all = [
            counts.accuracy(),
            top5,
            counts.balanced_accuracy(),
            mean_of_some(&areas),
            counts.kappa(),
            calibration.error(),
            mean_of_some(&f1),
        ];
        [&over_all[..], &counts.precision(), &counts.recall(), &f1, &counts.iou(), &areas].concat()
    };
    let figures = figures(&statistics, &bootstrap, groups);
    let (over_all, by_class) = figures.split_at(7);
    let mut counts = ClassCounts::new(classes);
    samples.iter().for_each(|sample| counts.add_many(sample.label, sample.predicted, 1));
    let mut notes = notes(&counts, card, over_all[1].is_none(), are_probabilities);
    if over_all[3].is_none() && samples.iter().any(|sample| sample.scores.iter().any(|score| score.is_nan())) {
        notes.push("AUC is not told: some of the model's scores are no numbers.".to_owned());
    }
    notes.extend(about_intervals(&bootstrap, groups));
    Computed {
        figures: Figures {
            top1: over_all[0],
            top5: over_all[1],
            balanced_accuracy: over_all[2],
            auc: over_all[3],
            kappa: over_all[4],
            ece: over_all[5],
            macro_f1: over_all[6],
            ..Figures::default()
        },
        classes: by_classes(card, &counts, by_class),
        calibration: if are_probabilities { bins(samples) } else { Vec::new() },
        drawn: drawn(&bootstrap, groups),
        notes,
    }
}

/// Figures of a segmentation, from the pixel counts of each group.
pub(super) fn of_maps(by_group: &[ClassCounts], card: &ModelCard, groups: Groups) -> Computed {
    let classes = card.classes.len();
    let bootstrap = bootstrap(groups.count * classes);
    let sum = |drawn: &[usize]| {
        let mut sum = ClassCounts::new(classes);
        drawn.iter().for_each(|group| sum.merge(&by_group[*group], 1));
        sum
    };
    let statistics = |drawn: &[usize]| {
        let counts = sum(drawn);
        let (dice, iou) = (counts.dice(), counts.iou());
        let [mean_dice, mean_iou] = [&dice, &iou].map(|values| mean_of_some(&foreground(values, card)));
        let over_all = [counts.accuracy(), counts.balanced_accuracy(), counts.kappa(), mean_dice, mean_iou];
        let no_areas = vec![None; classes];
        [&over_all[..], &counts.precision(), &counts.recall(), &dice, &iou, &no_areas].concat()
    };
    let figures = figures(&statistics, &bootstrap, groups);
    let (over_all, by_class) = figures.split_at(5);
    let counts = sum(&(0..groups.count).collect::<Vec<_>>());
    let background = card.background.and_then(|class| card.classes.get(class));
    let left_out =
        background.map(|class| format!("Mean Dice and mean IoU are without the background class, {}.", class.name));
    Computed {
        figures: Figures {
            top1: over_all[0],
            balanced_accuracy: over_all[1],
            kappa: over_all[2],
            mean_dice: over_all[3],
            mean_iou: over_all[4],
            ..Figures::default()
        },
        classes: by_classes(card, &counts, by_class),
        calibration: Vec::new(),
        drawn: drawn(&bootstrap, groups),
        notes: left_out.into_iter().chain(absent(&counts, card)).chain(about_intervals(&bootstrap, groups)).collect(),
    }
}

/// What classes have but the background, which would hide the others in a mean.
pub(super) fn foreground(by_class: &[Option<f64>], card: &ModelCard) -> Vec<Option<f64>> {
    let is_foreground = |(class, _): &(usize, &Option<f64>)| card.background != Some(*class);
    by_class.iter().enumerate().filter(is_foreground).map(|(_, value)| *value).collect()
}

/// Each statistic with its interval; `None` where it is absent over all groups.
fn figures(
    statistics: &dyn Fn(&[usize]) -> Vec<Option<f64>>,
    bootstrap: &Bootstrap,
    groups: Groups,
) -> Vec<Option<FigureRecord>> {
    let all: Vec<usize> = (0..groups.count).collect();
    let values = statistics(&all);
    // Of one group every draw is the same, and an interval of no width would look like certainty.
    let intervals = if groups.count < 2 {
        vec![None; values.len()]
    } else {
        let numbers = |drawn: &[usize]| statistics(drawn).into_iter().map(|value| value.unwrap_or(f64::NAN)).collect();
        bootstrap.intervals(groups.count, numbers)
    };
    let record = |(value, interval): (Option<f64>, Option<crate::measure::Interval>)| {
        let (low, high) = (interval.map(|interval| interval.low), interval.map(|interval| interval.high));
        value.map(|value| FigureRecord { value, low, high })
    };
    values.into_iter().zip(intervals).map(record).collect()
}

/// How often each group was drawn.
fn times(drawn: &[usize], groups: usize) -> Vec<u32> {
    let mut times = vec![0; groups];
    drawn.iter().for_each(|group| times[*group] += 1);
    times
}

/// The usual intervals; fewer resamples where there are very many scores.
fn bootstrap(scores: usize) -> Bootstrap {
    let usual = Bootstrap::default();
    let resamples = (MOST_WORK / scores.max(1)).clamp(LEAST_RESAMPLES, usual.resamples);
    Bootstrap { resamples, ..usual }
}

fn about_intervals(bootstrap: &Bootstrap, groups: Groups) -> Option<String> {
    let (taken, usual) = (bootstrap.resamples, Bootstrap::default().resamples);
    if groups.count < 2 {
        return Some("There are no intervals: they need two groups to draw from, or images.".to_owned());
    }
    (taken < usual).then(|| format!("Intervals are of {taken} draws instead of {usual}: there are very many scores."))
}

fn drawn(bootstrap: &Bootstrap, groups: Groups) -> DrawnRecord {
    DrawnRecord {
        unit: if groups.are_named { "groups" } else { "images" }.to_owned(),
        units: groups.count as u64,
        resamples: if groups.count < 2 { 0 } else { bootstrap.resamples as u64 },
        confidence: bootstrap.confidence,
        seed: bootstrap.seed,
    }
}

/// `figures`: precision, recall, F1, IoU and area of all classes, one after the other.
fn by_classes(card: &ModelCard, counts: &ClassCounts, figures: &[Option<FigureRecord>]) -> Vec<ClassFigures> {
    let classes = card.classes.len();
    let record = |(index, class): (usize, &crate::inference::Class)| ClassFigures {
        class: class.name.clone(),
        color: class.color,
        support: counts.support(index),
        predicted: counts.predicted(index),
        precision: figures[index],
        recall: figures[classes + index],
        f1: figures[2 * classes + index],
        iou: figures[3 * classes + index],
        auc: figures[4 * classes + index],
    };
    card.classes.iter().enumerate().map(record).collect()
}

fn bins(samples: &[Sample]) -> Vec<BinRecord> {
    let mut calibration = Calibration::default();
    for sample in samples {
        if let Some(confidence) = sample.confidence() {
            calibration.add(confidence, sample.predicted == Some(sample.label), 1);
        }
    }
    let edge = |bin: usize| bin as f64 / CALIBRATION_BINS as f64;
    let record = |(index, bin): (usize, &crate::measure::Bin)| BinRecord {
        above: edge(index),
        up_to: edge(index + 1),
        items: bin.items,
        confidence: bin.confidence(),
        accuracy: bin.accuracy(),
    };
    calibration.bins().iter().enumerate().map(record).collect()
}

fn notes(counts: &ClassCounts, card: &ModelCard, lacks_top5: bool, are_probabilities: bool) -> Vec<String> {
    let mut notes = Vec::new();
    if lacks_top5 {
        let classes = card.classes.len();
        notes.push(format!("Top-5 is not told: with {classes} classes it says little; from {TOP_5_CLASSES} on it is."));
    }
    if !are_probabilities {
        notes.push("ECE is not told: the model's scores are no probabilities.".to_owned());
    }
    notes.extend(absent(counts, card));
    notes
}

fn absent(counts: &ClassCounts, card: &ModelCard) -> Option<String> {
    let is_absent = |(index, _): &(usize, &crate::inference::Class)| counts.support(*index) == 0;
    let names: Vec<&str> =
        card.classes.iter().enumerate().filter(is_absent).map(|(_, class)| class.name.as_str()).collect();
    (!names.is_empty()).then(|| format!("No label has the class {}: means are over the others, but where it was predicted its F1, Dice and IoU are 0.", names.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inference::{Activation, BareModel, Class};
    use std::path::Path;

    fn card(classes: usize) -> ModelCard {
        let mut card = ModelCard::load(Path::new("models/cells-vit"), &BareModel::default()).unwrap();
        let class = |index: usize| Class { name: format!("c{index}"), color: [0; 3] };
        (card.classes, card.background) = ((0..classes).map(class).collect(), None);
        card
    }

    fn samples() -> Vec<Sample> {
        // Label 0 as 0 with 0.8 and 0.6, label 1 as 1 with 0.7 and as 0 with 0.9.
        let rows = [(0, [0.8, 0.2]), (0, [0.6, 0.4]), (1, [0.3, 0.7]), (1, [0.9, 0.1])];
        rows.iter().enumerate().map(|(item, (label, row))| Sample::new(item, *label, item, row.to_vec())).collect()
    }

    #[test]
    fn figures_match_hand_computed_values() {
        let computed = of_samples(&samples(), &card(2), Groups { count: 4, are_named: false });
        let Figures { top1, top5, balanced_accuracy, auc, kappa, ece, macro_f1, .. } = computed.figures;
        let close = |figure: Option<FigureRecord>, expected: f64| (figure.unwrap().value - expected).abs() < 1e-6;
        assert!(close(top1, 0.75) && close(balanced_accuracy, 0.75) && top5.is_none());
        // Pairs of label 0's 0.8 and 0.6 with label 1's 0.3 and 0.9: two of four are won.
        assert!(close(auc, 0.5) && close(kappa, 0.5));
        // Each in a bin of its own: (0.2 + 0.4 + 0.3 + 0.9) / 4.
        assert!(close(ece, 0.45), "{ece:?}");
        assert!(close(macro_f1, (0.8 + 2.0 / 3.0) / 2.0));
        assert_eq!((computed.classes[0].support, computed.classes[0].predicted), (2, 3));
        assert!(close(computed.classes[0].precision, 2.0 / 3.0) && close(computed.classes[1].recall, 0.5));
        assert!(computed.notes[0].contains("Top-5 is not told: with 2 classes"));
        let top1 = top1.unwrap();
        assert!(top1.low.unwrap() < 0.75 && top1.high == Some(1.0));
        assert_eq!(computed.calibration.iter().map(|bin| bin.items).sum::<u64>(), 4);
    }

    #[test]
    fn groups_are_drawn_whole() {
        // Both of a group are right or wrong together: the accuracy of a draw is 0, 1/2 or 1.
        let mut samples = samples();
        for (index, sample) in samples.iter_mut().enumerate() {
            (sample.group, sample.predicted) =
                (index % 2, Some(if index % 2 == 0 { sample.label } else { 1 - sample.label }));
        }
        let drawn = of_samples(&samples, &card(2), Groups { count: 2, are_named: true });
        assert_eq!(drawn.figures.top1, Some(FigureRecord { value: 0.5, low: Some(0.0), high: Some(1.0) }));
        assert_eq!((drawn.drawn.unit.as_str(), drawn.drawn.units), ("groups", 2));
        samples.iter_mut().for_each(|sample| sample.group = 0);
        let alone = of_samples(&samples, &card(2), Groups { count: 1, are_named: true });
        assert_eq!(alone.figures.top1, Some(FigureRecord { value: 0.5, low: None, high: None }));
    }

    #[test]
    fn top_5_is_of_six_classes_and_no_number_is_wrong() {
        let rows = [vec![0.3, 0.2, 0.2, 0.1, 0.1, 0.1], vec![f32::NAN; 6]];
        let samples: Vec<Sample> =
            rows.into_iter().enumerate().map(|(item, row)| Sample::new(item, 4, item, row)).collect();
        let bare = ModelCard { activation: Activation::None, ..card(6) };
        let computed = of_samples(&samples, &bare, Groups { count: 2, are_named: false });
        assert!(computed.figures.ece.is_some(), "what is no number is no reason against the others");
        assert_eq!(computed.figures.top5.map(|figure| figure.value), Some(0.5));
        assert_eq!(computed.figures.top1.map(|figure| figure.value), Some(0.0));
        assert_eq!(computed.figures.auc, None);
        assert!(computed.notes.iter().any(|note| note.starts_with("AUC is not told")), "{:?}", computed.notes);
        assert!(computed.notes.iter().any(|note| note.contains("c0, c1, c2, c3, c5")), "{:?}", computed.notes);
    }

    #[test]
    fn pixels_of_groups_are_summed() {
        let counts = |right: u64, wrong: u64| {
            let mut counts = ClassCounts::new(2);
            counts.add_many(0, Some(0), right);
            counts.add_many(0, Some(1), wrong);
            counts.add_many(1, Some(1), 10);
            counts
        };
        let computed = of_maps(&[counts(10, 0), counts(4, 6)], &card(2), Groups { count: 2, are_named: true });
        // Class 0: 14 in both, 20 and 14. Class 1: 20 in both, 20 and 26.
        let value = |figure: Option<FigureRecord>| figure.unwrap().value;
        assert_eq!(value(computed.classes[0].f1), 28.0 / 34.0);
        assert_eq!(value(computed.classes[1].iou), 20.0 / 26.0);
        assert_eq!(value(computed.figures.mean_dice), (28.0 / 34.0 + 40.0 / 46.0) / 2.0);
        assert_eq!(value(computed.figures.mean_iou), (14.0 / 20.0 + 20.0 / 26.0) / 2.0);
        assert_eq!(value(computed.figures.top1), 34.0 / 40.0);
        let card = ModelCard { background: Some(1), ..card(2) };
        let without = of_maps(&[counts(10, 0), counts(4, 6)], &card, Groups { count: 2, are_named: true });
        assert_eq!(value(without.figures.mean_dice), 28.0 / 34.0);
        assert!(without.notes[0].contains("without the background class, c1"));
    }
}
