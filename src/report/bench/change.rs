//! What changed between two measurements of the same things, beyond their noise.

use serde::Deserialize;

use super::super::compare::IntervalRecord;
use super::super::{SIMULATE_SCHEMA, SimulateRecord};
use super::{BENCH_SCHEMA, BenchRecord, ratio_in_words};
use crate::measure::Bootstrap;

/// Rates of named things, and where they were measured.
#[derive(Clone, Debug, PartialEq)]
pub struct Rated {
    /// The processor and GPUs, in words.
    pub machine: String,
    /// Name, and the rate of each round.
    pub rates: Vec<(String, Vec<f64>)>,
}

/// A file that holds no rates to compare.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NotComparable {
    /// It is no JSON, or not what its schema says.
    #[error("is no record of slidestream")]
    Json(#[from] serde_json::Error),
    /// It is a record of something else.
    #[error("has schema {found:?}; rates are in {BENCH_SCHEMA} and {SIMULATE_SCHEMA}")]
    Schema {
        /// Its schema.
        found: String,
    },
}

impl Rated {
    /// The rates in a `bench.json`, or in the JSON that `simulate` prints.
    ///
    /// # Errors
    /// [`NotComparable`] if it is neither.
    pub fn from_json(bytes: &[u8]) -> Result<Self, NotComparable> {
        #[derive(Deserialize)]
        struct Schema {
            schema: String,
        }
        let Schema { schema } = serde_json::from_slice(bytes)?;
        match schema.as_str() {
            BENCH_SCHEMA => Ok(Self::from(&serde_json::from_slice::<BenchRecord>(bytes)?)),
            SIMULATE_SCHEMA => Ok(Self::from(&serde_json::from_slice::<SimulateRecord>(bytes)?)),
            _ => Err(NotComparable::Schema { found: schema }),
        }
    }
}

impl From<&BenchRecord> for Rated {
    fn from(record: &BenchRecord) -> Self {
        let rate = |entry: &super::BenchEntry| (entry.name.clone(), entry.rounds_samples_per_sec.clone());
        Self { machine: record.account.hardware.in_words(), rates: record.found.entries.iter().map(rate).collect() }
    }
}

impl From<&SimulateRecord> for Rated {
    fn from(record: &SimulateRecord) -> Self {
        let (model, execution) = (&record.found.model, &record.found.execution);
        let rate = |point: &super::super::PointRecord| {
            let name = format!(
                "{}, {}, {} sessions on {}, batch {}",
                model.name, model.variant, execution.sessions, execution.device, point.batch_size
            );
            (name, point.samples_tiles_per_sec.clone())
        };
        Self { machine: record.account.hardware.in_words(), rates: record.found.points.iter().map(rate).collect() }
    }
}

/// What became of one thing.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    /// Its name.
    pub name: String,
    /// How its rate changed.
    pub verdict: Verdict,
}

/// How a rate changed; ratios are later by earlier, of medians, with an interval of 95 % over the rounds of both.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Verdict {
    /// The interval lies above 1.
    Faster(IntervalRecord),
    /// The interval lies below 1.
    Slower(IntervalRecord),
    /// The interval holds 1.
    NoDifference(IntervalRecord),
    /// It has no rates, or rates that are not above 0, in one of them.
    Unknown,
    /// It is not in the later one.
    Gone,
    /// It is not in the earlier one.
    New,
}

/// Holds the later rates against the earlier ones, name by name, in the earlier order; what is new comes last.
#[must_use]
pub fn changes(earlier: &Rated, later: &Rated) -> Vec<Change> {
    let find = |rated: &Rated, name: &str| rated.rates.iter().find(|(other, _)| other == name).cloned();
    let held = earlier.rates.iter().map(|(name, before)| {
        let verdict = find(later, name).map_or(Verdict::Gone, |(_, after)| judge(before, &after));
        Change { name: name.clone(), verdict }
    });
    let new = later.rates.iter().filter(|(name, _)| find(earlier, name).is_none());
    held.chain(new.map(|(name, _)| Change { name: name.clone(), verdict: Verdict::New })).collect()
}

fn judge(before: &[f64], after: &[f64]) -> Verdict {
    match Bootstrap::default().unpaired_ratio(before, after).map(IntervalRecord::from) {
        None => Verdict::Unknown,
        Some(ratio) if ratio.low > 1.0 => Verdict::Faster(ratio),
        Some(ratio) if ratio.high < 1.0 => Verdict::Slower(ratio),
        Some(ratio) => Verdict::NoDifference(ratio),
    }
}

impl Change {
    /// In a sentence.
    #[must_use]
    pub fn in_words(&self) -> String {
        let what = match &self.verdict {
            Verdict::Faster(ratio) => format!("faster, {}", ratio_in_words(ratio)),
            Verdict::Slower(ratio) => format!("slower, {}", ratio_in_words(ratio)),
            Verdict::NoDifference(ratio) => format!("no difference, {}", ratio_in_words(ratio)),
            Verdict::Unknown => "not comparable: rates are missing".to_owned(),
            Verdict::Gone => "only in the earlier one".to_owned(),
            Verdict::New => "only in the later one".to_owned(),
        };
        format!("{}: {what}", self.name)
    }
}

/// Those that are slower by more than `most` (a share, such as 0.05) with their whole interval, and those whose rate is
/// not known any more, in sentences.
#[must_use]
pub fn regressions(changes: &[Change], most: f64) -> Vec<String> {
    let tell = |change: &Change| match &change.verdict {
        Verdict::Slower(ratio) if ratio.high < 1.0 - most => Some(format!(
            "{} runs at {} of the baseline: all of the interval is below {:.2}×",
            change.name,
            ratio_in_words(ratio),
            1.0 - most
        )),
        Verdict::Gone => Some(format!("{} is in the baseline and was not measured", change.name)),
        Verdict::Unknown => Some(format!("{} has no rates to compare", change.name)),
        _ => None,
    };
    changes.iter().filter_map(tell).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::bench::example::lora;
    use crate::report::to_json;

    fn rated(rates: &[(&str, &[f64])]) -> Rated {
        let rates = rates.iter().map(|(name, rates)| ((*name).to_owned(), rates.to_vec())).collect();
        Rated { machine: "m".to_owned(), rates }
    }

    const STEADY: [f64; 7] = [100.0, 101.0, 99.0, 100.0, 100.5, 99.5, 100.0];

    #[test]
    fn only_what_is_beyond_noise_changed() {
        let half = STEADY.map(|rate| rate / 2.0);
        let noisy = [80.0, 120.0, 95.0, 105.0, 70.0, 130.0, 99.0];
        let before = rated(&[("a", &STEADY), ("b", &half), ("c", &STEADY), ("d", &STEADY), ("e", &[])]);
        let after = rated(&[("c", &noisy), ("a", &half), ("b", &STEADY), ("e", &STEADY), ("f", &STEADY)]);
        let said: Vec<String> = changes(&before, &after).iter().map(Change::in_words).collect();
        assert!(said[0].starts_with("a: slower, 0.50× ["), "{said:?}");
        assert!(said[1].starts_with("b: faster, 2.00× ["), "{said:?}");
        assert!(said[2].starts_with("c: no difference, 0.99× ["), "{said:?}");
        let rest = ["d: only in the earlier one", "e: not comparable: rates are missing", "f: only in the later one"];
        assert_eq!(said[3..], rest);
    }

    #[test]
    fn a_regression_is_more_than_the_limit_and_more_than_noise() {
        let before = rated(&[("a", &STEADY)]);
        let at =
            |factor: f64| regressions(&changes(&before, &rated(&[("a", &STEADY.map(|rate| rate * factor))])), 0.05);
        assert_eq!(at(1.0), Vec::<String>::new());
        assert_eq!(at(0.97), Vec::<String>::new(), "measurably slower, but within the limit");
        assert!(at(0.9)[0].contains("below 0.95×"));
        let gone = regressions(&changes(&before, &rated(&[])), 0.05);
        assert_eq!(gone, ["a is in the baseline and was not measured"]);
    }

    #[test]
    fn records_are_read_back() {
        let record = lora();
        let read = Rated::from_json(&to_json(&record)).unwrap();
        let written = Rated::from(&record);
        assert_eq!(read.machine, written.machine);
        for ((name, rates), (expected, others)) in read.rates.iter().zip(&written.rates) {
            // JSON may lose a number's last bit.
            let is_near = |(a, b): (&f64, &f64)| (a - b).abs() <= 1e-12 * b.abs();
            assert!(name == expected && rates.len() == others.len() && rates.iter().zip(others).all(is_near), "{name}");
        }
        assert!(changes(&read, &read).iter().all(|change| matches!(change.verdict, Verdict::NoDifference(_))));
        let error = Rated::from_json(br#"{"schema": "slidestream/run/1"}"#).unwrap_err();
        assert!(error.to_string().contains("slidestream/run/1"));
        assert!(Rated::from_json(b"[]").is_err());
    }
}
