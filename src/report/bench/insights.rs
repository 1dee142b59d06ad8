//! What the numbers of a benchmark say, and what follows from them: a sentence each, from this record alone.

use super::super::compare::IntervalRecord;
use super::super::text::{bytes, count, percent, significant};
use super::{Bench, BenchEntry, BenchKind, ratio_in_words};
use crate::measure::Bootstrap;

/// What the numbers say, in sentences; the recommendation is the last.
#[must_use]
pub fn insights(bench: &Bench) -> Vec<String> {
    let mut said = match bench.kind {
        BenchKind::Lora => of_lora(bench),
        BenchKind::Vit => of_vit(bench),
    };
    let unsettled = bench.entries.iter().filter(|entry| !entry.is_stable).count();
    if unsettled > 0 {
        let of = bench.entries.len();
        let told =
            format!("{unsettled} of {of} entries had not settled when time was up: small differences may be noise.");
        // The recommendation stays last.
        said.insert(said.len().saturating_sub(1), told);
    }
    said
}

/// A rank's two entries.
struct Rank<'a> {
    rank: usize,
    unmerged: &'a BenchEntry,
    merged: &'a BenchEntry,
}

impl Rank<'_> {
    /// Times as fast merged as unmerged, from rounds side by side.
    fn gain(&self) -> Option<IntervalRecord> {
        let (merged, unmerged) = (&self.merged.rounds_samples_per_sec, &self.unmerged.rounds_samples_per_sec);
        Bootstrap::default().ratio(merged, unmerged).map(IntervalRecord::from)
    }
}

fn ranks(bench: &Bench) -> Vec<Rank<'_>> {
    let find = |rank: usize, is_merged: bool| {
        let is_it =
            |entry: &&BenchEntry| entry.lora.is_some_and(|lora| (lora.rank, lora.is_merged) == (rank, is_merged));
        bench.entries.iter().find(is_it)
    };
    let mut ranks: Vec<usize> = bench.entries.iter().filter_map(|entry| Some(entry.lora?.rank)).collect();
    ranks.sort_unstable();
    ranks.dedup();
    let both = |rank| Some(Rank { rank, unmerged: find(rank, false)?, merged: find(rank, true)? });
    ranks.into_iter().filter_map(both).collect()
}

fn of_lora(bench: &Bench) -> Vec<String> {
    let ranks = ranks(bench);
    let Some(baseline) = bench.entries.first().filter(|_| !ranks.is_empty()) else {
        return vec!["Nothing was measured.".to_owned()];
    };
    let mut said: Vec<String> = ranks.iter().filter_map(|rank| speed_of(rank, baseline)).collect();
    said.extend(merged_speed(&ranks));
    said.extend(size_of(&ranks, baseline));
    let largest = |of: fn(&super::LoraRecord) -> f64| {
        ranks.iter().filter_map(|rank| rank.merged.lora.as_ref().map(of)).fold(0.0, f64::max)
    };
    said.push(format!(
        "Merged and unmerged models gave the same outputs at every rank: they differ by {} at most, where rounding \
         explains up to {}.",
        significant(largest(|lora| lora.max_abs_difference)),
        significant(largest(|lora| lora.difference_bound))
    ));
    said.push(merging_advice(&ranks));
    said
}

fn speed_of(rank: &Rank<'_>, baseline: &BenchEntry) -> Option<String> {
    let ratio = rank.unmerged.ratio?;
    let numbers = ratio_in_words(&ratio);
    let rates = [rank.unmerged, baseline].map(|entry| significant(entry.samples_per_sec.value));
    Some(match holds_one(&ratio) {
        true => format!("Unmerged rank {} makes no measurable difference: {numbers} of the baseline.", rank.rank),
        false => format!(
            "Unmerged rank {} runs at {numbers} of the baseline: {} samples/s instead of {}.",
            rank.rank, rates[0], rates[1]
        ),
    })
}

/// Whether merged models are as fast as the baseline.
fn merged_speed(ranks: &[Rank<'_>]) -> Vec<String> {
    let ratios: Vec<(usize, IntervalRecord)> =
        ranks.iter().filter_map(|rank| Some((rank.rank, rank.merged.ratio?))).collect();
    let (same, other): (Vec<_>, Vec<_>) = ratios.into_iter().partition(|(_, ratio)| holds_one(ratio));
    let list = |ratios: &[(usize, IntervalRecord)]| {
        let each = ratios.iter().map(|(rank, ratio)| format!("rank {rank} {}", ratio_in_words(ratio)));
        each.collect::<Vec<_>>().join(", ")
    };
    let mut said = Vec::new();
    if !same.is_empty() {
        said.push(format!("Merged, there is no measurable difference to the baseline: {}.", list(&same)));
    }
    if !other.is_empty() {
        let differ = "though the graph is the baseline's: take it for what this run can't resolve";
        said.push(format!("Merged, these differ from the baseline, {differ}: {}.", list(&other)));
    }
    said
}

/// What the largest rank adds.
fn size_of(ranks: &[Rank<'_>], baseline: &BenchEntry) -> Option<String> {
    let most = ranks.last()?;
    let lora = most.unmerged.lora?;
    let operations = most.unmerged.flops as f64 / baseline.flops as f64 - 1.0;
    let mut text = format!(
        "Rank {} adds {} parameters, {} of the whole, and unmerged {} more operations",
        most.rank,
        count(lora.parameters),
        percent(lora.share_of_parameters),
        percent(operations)
    );
    if let (Some(unmerged), Some(baseline)) = (most.unmerged.peak_bytes(), baseline.peak_bytes()) {
        text.push_str(&format!(
            "; at the peak it took {} of memory, the baseline {}",
            bytes(unmerged),
            bytes(baseline)
        ));
    }
    Some(text + ".")
}

fn merging_advice(ranks: &[Rank<'_>]) -> String {
    let gains: Vec<(usize, IntervalRecord)> = ranks.iter().filter_map(|rank| Some((rank.rank, rank.gain()?))).collect();
    let faster: Vec<&(usize, IntervalRecord)> = gains.iter().filter(|(_, gain)| gain.low > 1.0).collect();
    let best = faster.iter().max_by(|(_, a), (_, b)| a.value.total_cmp(&b.value));
    match best {
        None => {
            "Recommendation: merging makes nothing measurably faster here; keep the adapter apart where it is to be \
                 exchanged."
                .to_owned()
        }
        Some((rank, gain)) => {
            let whom = if faster.len() == gains.len() {
                "at every rank".to_owned()
            } else {
                let ranks: Vec<String> = faster.iter().map(|(rank, _)| rank.to_string()).collect();
                format!("rank {}", ranks.join(", "))
            };
            format!(
                "Recommendation: merge {whom} before deployment; rank {rank} then runs {} as fast as unmerged.",
                ratio_in_words(gain)
            )
        }
    }
}

fn of_vit(bench: &Bench) -> Vec<String> {
    let Some(fastest) = fastest(bench.entries.iter()) else { return vec!["Nothing was measured.".to_owned()] };
    let mut said = vec![format!(
        "{} is the fastest: {} samples/s [{}, {}].",
        fastest.name,
        significant(fastest.samples_per_sec.value),
        significant(fastest.samples_per_sec.low),
        significant(fastest.samples_per_sec.high)
    )];
    let models = distinct(bench.entries.iter().map(|entry| entry.model.as_str()));
    for model in &models {
        let of_model: Vec<&BenchEntry> = bench.entries.iter().filter(|entry| entry.model == *model).collect();
        said.extend(precisions(&of_model));
    }
    said.extend(bench.entries.iter().filter_map(scaling));
    if models.len() > 1 {
        let per_parameter = |entry: &&BenchEntry| entry.samples_per_sec.value * entry.parameters as f64;
        let best = bench.entries.iter().max_by(|a, b| per_parameter(a).total_cmp(&per_parameter(b)));
        said.extend(best.map(|best| {
            let (rate, parameters) = (significant(best.samples_per_sec.value), count(best.parameters));
            format!("{} puts most parameters to work per second: {parameters} at {rate} samples/s.", best.name)
        }));
    }
    let choices: Vec<String> = models
        .iter()
        .filter_map(|model| {
            let chosen = frugal(&bench.entries.iter().filter(|entry| entry.model == *model).collect::<Vec<_>>())?;
            let (precision, batch) = (&chosen.precision, chosen.batch_size);
            Some(format!("{model} {precision} in batches of {batch} ({}/s)", significant(chosen.samples_per_sec.value)))
        })
        .collect();
    said.push(format!(
        "Recommendation: run {}: the smallest batch of those that nothing is measurably faster than.",
        choices.join("; ")
    ));
    said
}

/// The entry of the highest rate.
fn fastest<'a>(entries: impl Iterator<Item = &'a BenchEntry>) -> Option<&'a BenchEntry> {
    entries.max_by(|a, b| a.samples_per_sec.value.total_cmp(&b.samples_per_sec.value))
}

/// Of the entries that the fastest is not measurably faster than, the one with the smallest batch.
fn frugal<'a>(entries: &[&'a BenchEntry]) -> Option<&'a BenchEntry> {
    let best = fastest(entries.iter().copied())?;
    let is_as_fast = |entry: &&&BenchEntry| ratio(entry, best).is_none_or(|ratio| ratio.low <= 1.0);
    entries.iter().filter(is_as_fast).min_by_key(|entry| entry.total_batch_size).copied()
}

/// The best of each precision of a model against the best of the first.
fn precisions(entries: &[&BenchEntry]) -> Vec<String> {
    let names = distinct(entries.iter().map(|entry| entry.precision.as_str()));
    let best = |precision: &str| fastest(entries.iter().copied().filter(|entry| entry.precision == precision));
    let Some(first) = names.first().and_then(|name| best(name)) else { return Vec::new() };
    let tell = |precision: &&str| {
        let other = best(precision)?;
        let ratio = ratio(first, other)?;
        let (model, of, numbers) = (&first.model, &first.precision, ratio_in_words(&ratio));
        Some(match holds_one(&ratio) {
            true => format!("{model}: {precision} makes no measurable difference to {of}, {numbers}."),
            false => format!("{model}: {precision} runs at {numbers} of {of}, each at its best batch size."),
        })
    };
    names.iter().skip(1).filter_map(tell).collect()
}

fn scaling(entry: &BenchEntry) -> Option<String> {
    let scaling = entry.scaling.as_ref()?;
    let what = if entry.device.contains(',') { "devices" } else { "sessions" };
    let (name, replicas, numbers) = (&entry.name, scaling.replicas, ratio_in_words(&scaling.speedup));
    Some(match holds_one(&scaling.speedup) {
        true => format!("{name}: {replicas} {what} make no measurable difference to one, {numbers}."),
        false => {
            let efficiency = percent(scaling.efficiency);
            format!("{name}: {replicas} {what} run at {numbers} of one, an efficiency of {efficiency}.")
        }
    })
}

/// Times as fast as `base`, where both were measured one after the other.
fn ratio(base: &BenchEntry, other: &BenchEntry) -> Option<IntervalRecord> {
    let (base, other) = (&base.rounds_samples_per_sec, &other.rounds_samples_per_sec);
    Bootstrap::default().unpaired_ratio(base, other).map(IntervalRecord::from)
}

fn holds_one(ratio: &IntervalRecord) -> bool {
    ratio.low <= 1.0 && 1.0 <= ratio.high
}

/// Each text once, in the order of their first places.
fn distinct<'a>(texts: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut distinct = Vec::new();
    for text in texts {
        if !distinct.contains(&text) {
            distinct.push(text);
        }
    }
    distinct
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::bench::ScalingRecord;
    use crate::report::bench::example::{lora, rounds, vit};

    #[test]
    fn lora_is_judged_by_its_numbers() {
        let said = insights(&lora().found);
        assert_eq!(
            said,
            [
                "Unmerged rank 4 runs at 0.80× [0.78, 0.82] of the baseline: 80.0 samples/s instead of 100.",
                "Unmerged rank 64 runs at 0.71× [0.69, 0.73] of the baseline: 71.0 samples/s instead of 100.",
                "Merged, there is no measurable difference to the baseline: rank 4 1.00× [0.99, 1.01], rank 64 1.01× \
                 [0.99, 1.03].",
                "Rank 64 adds 64,000 parameters, 6.0 % of the whole, and unmerged 6.4 % more operations; at the peak it took \
                 200 MiB of memory, the baseline 200 MiB.",
                "Merged and unmerged models gave the same outputs at every rank: they differ by 2.0 × 10⁻⁶ at most, \
                 where rounding explains up to 0.00030.",
                "Recommendation: merge at every rank before deployment; rank 64 then runs 1.42× [1.42, 1.42] as fast as \
                 unmerged.",
            ]
        );
    }

    #[test]
    fn other_numbers_say_something_else() {
        let mut record = lora();
        for index in [1, 3] {
            let entry = &mut record.found.entries[index];
            (entry.rounds_samples_per_sec, entry.samples_per_sec) = rounds(100.0);
            entry.rounds_samples_per_sec.swap(0, 1);
            entry.ratio = Some(IntervalRecord { value: 0.99, low: 0.97, high: 1.01 });
        }
        let (merged, of) = rounds(100.0);
        (record.found.entries[4].rounds_samples_per_sec, record.found.entries[4].samples_per_sec) = (merged, of);
        record.found.entries[4].ratio = Some(IntervalRecord { value: 0.9, low: 0.88, high: 0.92 });
        record.found.entries[4].is_stable = false;
        let said = insights(&record.found);
        assert_eq!(said[0], "Unmerged rank 4 makes no measurable difference: 0.99× [0.97, 1.01] of the baseline.");
        assert!(
            said[3].starts_with("Merged, these differ from the baseline")
                && said[3].ends_with("rank 64 0.90× [0.88, 0.92].")
        );
        assert!(said[said.len() - 2].starts_with("1 of 5 entries had not settled"));
        assert!(said.last().unwrap().starts_with("Recommendation: merging makes nothing measurably faster here"));
        record.found.entries.clear();
        assert_eq!(insights(&record.found), ["Nothing was measured."]);
    }

    #[test]
    fn only_ranks_that_gain_are_to_be_merged() {
        let mut record = lora();
        let entry = &mut record.found.entries[1];
        (entry.rounds_samples_per_sec, entry.samples_per_sec) = rounds(100.0);
        let said = insights(&record.found);
        assert!(said.last().unwrap().starts_with("Recommendation: merge rank 64 before"), "{said:?}");
    }

    #[test]
    fn a_sweep_is_judged_by_its_numbers() {
        let mut record = vit();
        let speedup = IntervalRecord { value: 1.8, low: 1.75, high: 1.85 };
        record.found.entries[7].scaling =
            Some(ScalingRecord { replicas: 2, rounds_of_one: vec![1.0], speedup, efficiency: 0.9 });
        let said = insights(&record.found);
        assert!(said[0].starts_with("small, fp16, batch 8 is the fastest: 200 samples/s [198, 202]."), "{said:#?}");
        assert!(
            said[1].starts_with("small: fp16 runs at 1.99× [")
                && said[1].ends_with("of fp32, each at its best batch size.")
        );
        assert!(said[2].starts_with("base: fp16 runs at 1.94× ["));
        assert_eq!(
            said[3],
            "base, fp16, batch 8: 2 sessions run at 1.80× [1.75, 1.85] of one, an efficiency of 90.0 %."
        );
        assert!(said[4].starts_with("base, fp16, batch 8 puts most parameters to work per second: 86,000,000 at 60.0"));
        record.found.entries[7].scaling.as_mut().unwrap().speedup.low = 0.9;
        let unsure = "base, fp16, batch 8: 2 sessions make no measurable difference to one, 1.80× [0.90, 1.85].";
        assert_eq!(insights(&record.found)[3], unsure);
        let last = said.last().unwrap();
        assert!(last.contains("small fp16 in batches of 8 (200/s); base fp16 in batches of 8 (60.0/s)"), "{last}");
    }

    #[test]
    fn the_smallest_batch_is_enough_where_larger_ones_gain_nothing() {
        let mut record = vit();
        record.found.entries.truncate(2);
        let said = insights(&record.found);
        // 100 and 100.5 within noise of 1 %.
        assert!(
            said.last().unwrap().starts_with("Recommendation: run small fp32 in batches of 1 (100/s):"),
            "{said:?}"
        );
    }
}
