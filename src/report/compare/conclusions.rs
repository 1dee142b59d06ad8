//! What the numbers of a comparison say, in sentences.

use super::super::text::{count, duration, exact, fixed, near_one, percent, points, significant, times};
use super::{AccuracyRow, AgreementRecord, Bound, CompareRecord, GateRecord, IntervalRecord, LadderRow};

/// What is to be thought of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// What the others are held against.
    Original,
    /// Faster, and every gate of its variant is passed.
    Faster,
    /// Faster, but its variant fails a gate.
    FailsGate,
    /// The interval of its speed-up holds 1.
    NoDifference,
    /// Slower than the original.
    Slower,
    /// Without a rate to compare.
    Unknown,
}

/// Judges the step at an index of the ladder by the rate that counts ([`LadderRow::rate`]).
#[must_use]
pub fn verdict(record: &CompareRecord, index: usize) -> Verdict {
    let Some(row) = record.found.ladder.get(index) else { return Verdict::Unknown };
    if index == 0 {
        return Verdict::Original;
    }
    match speedup(row) {
        None => Verdict::Unknown,
        Some(speedup) if speedup.high < 1.0 => Verdict::Slower,
        Some(speedup) if speedup.low <= 1.0 => Verdict::NoDifference,
        Some(_) if failed_gates(record, &row.variant).next().is_some() => Verdict::FailsGate,
        Some(_) => Verdict::Faster,
    }
}

/// What the numbers say: which step is fastest and by how much, what bounds it, which are not worth having, how close
/// the outputs are, which gates fail, what was left out, and how far the times can be trusted. A sentence each.
#[must_use]
pub fn conclusions(record: &CompareRecord) -> Vec<String> {
    let mut said = Vec::new();
    said.extend(fastest_step(record));
    said.extend(slower_steps(record));
    said.extend(record.found.agreement.iter().map(agreement_in_words));
    if let Some(accuracy) = &record.found.accuracy {
        let held = |row: &AccuracyRow| accuracy_in_words(row, accuracy.items, &accuracy.unit);
        said.extend(accuracy.rows.iter().filter_map(held));
    }
    said.extend(gates_in_words(&record.found.gates));
    said.extend(record.found.left_out.iter().map(|left| format!("{} was left out: {}.", left.name, left.why)));
    let measuring = &record.found.measuring;
    if !measuring.is_stable {
        said.push(format!(
            "The rounds ended after {} because time was up, not because every median was known within ±{}: small \
             differences may be noise.",
            duration(measuring.seconds),
            format_args!("{} %", exact(100.0 * measuring.tolerance))
        ));
    }
    said
}

fn fastest_step(record: &CompareRecord) -> Vec<String> {
    let Some(original) = record.found.ladder.first() else { return vec!["Nothing was measured.".to_owned()] };
    let any = fastest(record, &[Verdict::Faster, Verdict::FailsGate]);
    let good = fastest(record, &[Verdict::Faster]);
    let Some(best) = good.or(any) else {
        let has_other = record.found.ladder.iter().skip(1).any(|row| speedup(row).is_some());
        let text = if has_other { "No step is measurably faster than the original." } else { "Nothing was compared." };
        return vec![text.to_owned()];
    };
    let faster = any.filter(|(index, ..)| *index != best.0);
    let rank = if faster.is_some() { "the fastest that passes every gate" } else { "the fastest" };
    let mut said = vec![lead(record, original, best, rank)];
    if let Some((index, row, speedup)) = faster {
        let gain = times(speedup.value);
        said.push(format!("{} is faster still, {gain}, but fails a gate: not recommended.", step(index, row)));
    } else if good.is_none() {
        said.push("It fails a gate: not recommended. No faster step passes every gate.".to_owned());
    }
    said.extend(bound_in_words(best.1));
    let now = best.1.projected.iter().max_by_key(|projected| projected.tiles);
    let before = now.and_then(|now| original.projected.iter().find(|projected| projected.tiles == now.tiles));
    if let (Some(now), Some(before)) = (now, before) {
        let tiles = count(now.tiles);
        let (now, before) = (duration(now.seconds), duration(before.seconds));
        said.push(format!("At these rates {tiles} tiles take {now} instead of {before}."));
    }
    said
}

/// The fastest step with one of the wanted verdicts: its index, itself and its speed-up.
pub(in super::super) fn fastest<'a>(
    record: &'a CompareRecord,
    wanted: &[Verdict],
) -> Option<(usize, &'a LadderRow, IntervalRecord)> {
    let steps = record.found.ladder.iter().enumerate().filter(|(index, _)| wanted.contains(&verdict(record, *index)));
    let with_speedup = steps.filter_map(|(index, row)| Some((index, row, speedup(row)?)));
    with_speedup.max_by(|(_, _, a), (_, _, b)| a.value.total_cmp(&b.value))
}

fn lead(record: &CompareRecord, original: &LadderRow, best: (usize, &LadderRow, IntervalRecord), rank: &str) -> String {
    let (index, row, speedup) = best;
    let rate = |row: &LadderRow| row.rate().map_or_else(String::new, |rate| significant(rate.tiles_per_sec));
    format!(
        "{} is {rank}: {} the original {} ({} interval {}), {} tiles/s instead of {}.",
        step(index, row),
        times(speedup.value),
        if row.end_to_end.is_some() { "end to end" } else { "for the model alone" },
        confidence(record),
        interval(&speedup, times),
        rate(row),
        rate(original)
    )
}

/// Whether end to end gains less than the model alone, and what bounds it.
fn bound_in_words(row: &LadderRow) -> Option<String> {
    let (Some(model), Some(whole)) = (&row.model_only, &row.end_to_end) else {
        return row.end_to_end.is_none().then(|| "End to end was not measured for it.".to_owned());
    };
    let finite = IntervalRecord::is_finite;
    let (alone, together) = (model.speedup.filter(finite)?, whole.speedup.filter(finite)?);
    let bound = row.bottleneck.as_ref().map_or_else(String::new, |stage| format!("; what bounds it is {stage}"));
    let (alone_text, together_text) = (times(alone.value), times(together.value));
    Some(if together.high < alone.low {
        format!("The model alone gains {alone_text}, end to end {together_text}{bound}.")
    } else if together.low > alone.high {
        format!("End to end gains {together_text}, more than the model alone ({alone_text}){bound}.")
    } else {
        format!("End to end gains as much as the model alone: {together_text} and {alone_text}{bound}.")
    })
}

fn slower_steps(record: &CompareRecord) -> Vec<String> {
    let judge = |(index, row): (usize, &LadderRow)| {
        let speedup = speedup(row)?;
        let (name, gain) = (step(index, row), times(speedup.value));
        match verdict(record, index) {
            Verdict::Slower => Some(format!("{name} is slower than the original, {gain}: not recommended.")),
            Verdict::NoDifference => {
                let interval = interval(&speedup, times);
                Some(format!("{name} makes no measurable difference in speed: {gain} ({interval})."))
            }
            _ => None,
        }
    };
    record.found.ladder.iter().enumerate().filter_map(judge).collect()
}

fn agreement_in_words(agreement: &AgreementRecord) -> String {
    let mut parts = Vec::new();
    let is_equal = agreement.max_abs_difference == Some(0.0) && agreement.nan_count == 0;
    let closeness = match agreement.cosine.map(|cosine| cosine.p1).filter(|cosine| cosine.is_finite()) {
        _ if is_equal => "gives exactly the original's outputs",
        _ if agreement.nan_count > 0 => "gives outputs that are not finite",
        Some(cosine) if cosine >= 0.9999 => "is all but equal to the original",
        Some(cosine) if cosine >= 0.999 => "is very close to the original",
        Some(cosine) if cosine >= 0.99 => "is close to the original",
        Some(_) => "differs clearly from the original",
        None => "was compared with the original",
    };
    if agreement.nan_count > 0 {
        parts.push(format!("{} values are NaN or infinite", count(agreement.nan_count)));
    }
    if let Some(cosine) = agreement.cosine.filter(|cosine| cosine.mean.is_finite()) {
        parts.push(format!("mean cosine {}, worst tile {}", near_one(cosine.mean), near_one(cosine.min)));
    }
    if let Some(same) = agreement.top1_agreement.filter(|same| same.is_finite()) {
        parts.push(format!("same class for {} of the tiles", percent(same)));
    }
    if let Some(same) = agreement.pixel_agreement.filter(|same| same.is_finite()) {
        parts.push(format!("same class for {} of the pixels", percent(same)));
    }
    if let Some(flips) = agreement.flips {
        let tiles = match flips.tiles {
            0 => "no tile changes".to_owned(),
            1 => "1 tile changes".to_owned(),
            tiles => format!("{} tiles change", count(tiles)),
        };
        parts.push(format!("{tiles} side of p = {}", exact(flips.threshold)));
    }
    let tiles = count(agreement.tiles);
    let details = if parts.is_empty() { String::new() } else { format!(": {}", parts.join(", ")) };
    format!("{} {closeness} over {tiles} tiles{details}.", agreement.variant)
}

fn accuracy_in_words(row: &AccuracyRow, items: u64, unit: &str) -> Option<String> {
    let metrics = [
        ("accuracy", row.accuracy),
        ("balanced accuracy", row.balanced_accuracy),
        ("AUC", row.auc),
        ("mean Dice", row.dice),
    ];
    let compared = metrics
        .into_iter()
        .filter_map(|(name, metric)| Some((name, metric?.difference.filter(IntervalRecord::is_finite)?)));
    let (worse, other): (Vec<_>, Vec<_>) = compared.partition(|(_, difference)| difference.high < 0.0);
    let tell = |(name, difference): &(&str, IntervalRecord)| {
        format!("{name} {} points ({})", points(difference.value), interval(difference, points))
    };
    let (said, listed) = match (worse.is_empty(), other.is_empty()) {
        (false, _) => ("loses accuracy", worse),
        // One metric stands for all of which nothing is known to be lost.
        (true, false) => ("shows no measurable loss", vec![other[0]]),
        (true, true) => return None,
    };
    let listed: Vec<String> = listed.iter().map(tell).collect();
    Some(format!("Against the labels of {} {unit}, {} {said}: {}.", count(items), row.variant, listed.join(", ")))
}

fn gates_in_words(gates: &[GateRecord]) -> Vec<String> {
    let failed: Vec<&GateRecord> = gates.iter().filter(|gate| !gate.passed).collect();
    if gates.is_empty() {
        return Vec::new();
    }
    if failed.is_empty() {
        let all =
            if gates.len() == 1 { "The one gate is".to_owned() } else { format!("All {} gates are", gates.len()) };
        return vec![format!("{all} passed.")];
    }
    let tell = |gate: &GateRecord| {
        let bound = if gate.bound == Bound::AtLeast { "at least" } else { "at most" };
        let value = gate.value.filter(|value| value.is_finite()).map_or_else(|| "no figure".to_owned(), exact);
        format!("{} fails the gate on {}: {value}, {bound} {} asked for.", gate.variant, gate.name, exact(gate.limit))
    };
    failed.into_iter().map(tell).collect()
}

fn failed_gates<'a>(record: &'a CompareRecord, variant: &'a str) -> impl Iterator<Item = &'a GateRecord> {
    record.found.gates.iter().filter(move |gate| gate.variant == variant && !gate.passed)
}

/// Such as `95 %`.
fn confidence(record: &CompareRecord) -> String {
    format!("{} %", fixed(100.0 * record.found.measuring.confidence, 0))
}

/// A step's speed-up by the rate that counts, if it is a number.
fn speedup(row: &LadderRow) -> Option<IntervalRecord> {
    row.rate()?.speedup.filter(IntervalRecord::is_finite)
}

fn step(index: usize, row: &LadderRow) -> String {
    format!("Step {} “{}” ({}, batch {})", index + 1, row.name, row.variant, row.batch)
}

fn interval(interval: &IntervalRecord, format: fn(f64) -> String) -> String {
    format!("{} to {}", format(interval.low), format(interval.high))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::compare::example::{example, with_steps};
    use crate::report::compare::{CosineRecord, FlipsRecord};

    fn says(record: &CompareRecord, what: &str) -> bool {
        conclusions(record).iter().any(|sentence| sentence.contains(what))
    }

    #[test]
    fn the_fastest_that_passes_leads() {
        let mut record = example();
        let said = conclusions(&record);
        assert!(
            said[0].starts_with("Step 6 “+ INT8” (int8, batch 8) is the fastest that passes every gate: 6."),
            "{said:#?}"
        );
        assert!(said[0].contains("end to end (95 % interval 6.") && said[0].contains("tiles/s instead of 25.0."));
        assert!(said[1].starts_with("Step 7 “everything” (int8-dynamic, batch 8) is faster still"));
        record.found.gates.clear();
        assert!(conclusions(&record)[0].starts_with("Step 7 “everything” (int8-dynamic, batch 8) is the fastest: 6."));
        assert!(!says(&record, "gate"));
    }

    #[test]
    fn what_bounds_the_whole_is_named() {
        let bounded = [("original", "a", 1, Some(10.0), Some(20.0)), ("fast", "b", 1, Some(1.0), Some(10.0))];
        let record = with_steps(&bounded);
        assert!(
            says(&record, "end to end 2.0") && says(&record, "; what bounds it is read (97 % busy over 2 workers).")
        );
        let equal =
            with_steps(&[("original", "a", 1, Some(10.0), Some(20.0)), ("fast", "b", 1, Some(5.0), Some(10.0))]);
        assert!(says(&equal, "End to end gains as much as the model alone"));
        let alone = with_steps(&[("original", "a", 1, Some(10.0), None), ("fast", "b", 1, Some(5.0), None)]);
        assert!(says(&alone, "for the model alone") && says(&alone, "End to end was not measured"));
    }

    #[test]
    fn what_is_not_worth_having_is_named() {
        let record = example();
        assert_eq!(verdict(&record, 0), Verdict::Original);
        assert_eq!(verdict(&record, 4), Verdict::Slower);
        assert_eq!(verdict(&record, 6), Verdict::FailsGate);
        assert_eq!(verdict(&record, 99), Verdict::Unknown);
        assert!(says(&record, "Step 5 “+ FP16” (fp16, batch 8) is slower than the original, 0.88"));
        assert!(says(&record, "int8-dynamic fails the gate on mean cosine: 0.876, at least 0.99 asked for."));
        assert!(says(&record, "int8-dynamic loses accuracy: accuracy −6.00 points (−6.30 to −5.70)"));
        assert!(says(&record, "int8 shows no measurable loss: accuracy −0.20 points (−0.50 to +0.10)."));
        let same = with_steps(&[("original", "a", 1, Some(10.0), None), ("same", "b", 1, Some(10.0), None)]);
        assert_eq!(verdict(&same, 1), Verdict::NoDifference);
        assert_eq!(conclusions(&same)[0], "No step is measurably faster than the original.");
        assert!(says(&same, "makes no measurable difference in speed"));
    }

    #[test]
    fn agreement_is_put_into_words() {
        let mut agreement = example().found.agreement.remove(0);
        agreement.flips = Some(FlipsRecord { threshold: 0.5, tiles: 1 });
        let words = agreement_in_words(&agreement);
        assert!(
            words.starts_with("fp32-rewritten is all but equal to the original over 512 tiles: mean cosine >0.9999999")
        );
        assert!(words.ends_with("1 tile changes side of p = 0.5."), "{words}");
        agreement.max_abs_difference = Some(0.0);
        assert!(agreement_in_words(&agreement).contains("gives exactly the original's outputs"));
        agreement.nan_count = 3;
        assert!(agreement_in_words(&agreement).contains("not finite over 512 tiles: 3 values are NaN or infinite"));
    }

    #[test]
    fn nothing_is_said_without_a_number() {
        let one = with_steps(&[("original", "a", 1, Some(10.0), None)]);
        assert_eq!(conclusions(&one), ["Nothing was compared."]);
        let mut record = example();
        record.found.measuring.is_stable = false;
        record.found.agreement[0].cosine = Some(CosineRecord { mean: f64::NAN, p1: f64::NAN, min: f64::NAN });
        for row in &mut record.found.ladder {
            row.model_only.as_mut().unwrap().speedup = Some(IntervalRecord { value: 1.0, low: f64::NAN, high: 2.0 });
        }
        let said = conclusions(&record);
        assert!(said.iter().all(|sentence| !sentence.contains("NaN") && !sentence.contains('–')), "{said:#?}");
        assert!(said.last().unwrap().contains("known within ±2 %"));
        record.found.ladder.clear();
        assert_eq!(conclusions(&record)[0], "Nothing was measured.");
    }
}
