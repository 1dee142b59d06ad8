//! What changed between two measurements of the same things, beyond their noise.

use serde::Deserialize;

use super::super::compare::IntervalRecord;
use super::super::text::{count, exact};
use super::super::{PointRecord, SIMULATE_SCHEMA, SimulateRecord};
use super::{BENCH_SCHEMA, BenchEntry, BenchRecord, ratio_in_words};
use crate::measure::Bootstrap;

/// Rates of named things, and where they were measured.
#[derive(Clone, Debug, PartialEq)]
pub struct Rated {
    /// The processor and GPUs, in words.
    pub machine: String,
    /// Each thing with its rate.
    pub rates: Vec<Rate>,
}

/// How fast one thing ran.
#[derive(Clone, Debug, PartialEq)]
pub struct Rate {
    /// What it is matched by; unique among the others.
    pub name: String,
    /// What else must be the same for rates to be held against each other, the most telling first. What is not known, as
    /// in a record of an earlier version, is not here.
    pub settings: Vec<(&'static str, String)>,
    /// Samples per second of each round.
    pub rounds: Vec<f64>,
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
        let rate = |entry: &BenchEntry| Rate {
            name: entry.name.clone(),
            settings: settings_of(entry, &record.found.lora_targets),
            rounds: entry.rounds_samples_per_sec.clone(),
        };
        Self { machine: record.account.hardware.in_words(), rates: record.found.entries.iter().map(rate).collect() }
    }
}

impl From<&SimulateRecord> for Rated {
    fn from(record: &SimulateRecord) -> Self {
        let (model, execution, size) = (&record.found.model, &record.found.execution, &record.found.size);
        let settings = [
            ("model", model.name.clone()),
            ("variant", model.variant.clone()),
            ("device", execution.device.clone()),
            ("provider", execution.provider.clone()),
            ("sessions", execution.sessions.to_string()),
            ("parameters", count(size.parameters)),
            ("operations per sample", count(size.flops)),
        ];
        let rate = |point: &PointRecord| Rate {
            name: format!("batch {}", point.batch_size),
            settings: settings.to_vec(),
            rounds: point.samples_tiles_per_sec.clone(),
        };
        Self { machine: record.account.hardware.in_words(), rates: record.found.points.iter().map(rate).collect() }
    }
}

fn settings_of(entry: &BenchEntry, lora_targets: &[String]) -> Vec<(&'static str, String)> {
    let mut settings = vec![
        ("model", entry.model.clone()),
        ("precision", entry.precision.clone()),
        ("variant", entry.variant.clone()),
        ("device", entry.device.clone()),
        ("provider", entry.provider.clone()),
        ("sessions", entry.sessions.to_string()),
        ("batch size", entry.batch_size.to_string()),
    ];
    if let Some(lora) = &entry.lora {
        let mut targets = lora_targets.to_vec();
        targets.sort_unstable();
        settings.extend([("LoRA's targets", targets.join(" and ")), ("LoRA's α", exact(lora.alpha))]);
        settings.push(("LoRA's parameters", count(lora.parameters)));
    }
    settings.push(("parameters", count(entry.parameters)));
    settings.push(("operations per sample", count(entry.flops)));
    settings.retain(|(_, value)| !value.is_empty());
    settings
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
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    /// The interval lies above 1.
    Faster(IntervalRecord),
    /// The interval lies below 1.
    Slower(IntervalRecord),
    /// The interval holds 1.
    NoDifference(IntervalRecord),
    /// The two were not measured with the same settings; the first that differs, in words.
    Different(String),
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
    let held = earlier.rates.iter().map(|before| {
        let verdict = later.find(&before.name).map_or(Verdict::Gone, |after| judge(before, after));
        Change { name: before.name.clone(), verdict }
    });
    let new = later.rates.iter().filter(|after| earlier.find(&after.name).is_none());
    held.chain(new.map(|after| Change { name: after.name.clone(), verdict: Verdict::New })).collect()
}

fn judge(before: &Rate, after: &Rate) -> Verdict {
    if let Some(difference) = before.difference(after) {
        return Verdict::Different(difference);
    }
    match Bootstrap::default().unpaired_ratio(&before.rounds, &after.rounds).map(IntervalRecord::from) {
        None => Verdict::Unknown,
        Some(ratio) if ratio.low > 1.0 => Verdict::Faster(ratio),
        Some(ratio) if ratio.high < 1.0 => Verdict::Slower(ratio),
        Some(ratio) => Verdict::NoDifference(ratio),
    }
}

impl Rated {
    fn find(&self, name: &str) -> Option<&Rate> {
        self.rates.iter().find(|rate| rate.name == name)
    }
}

impl Rate {
    /// One of its settings.
    #[must_use]
    pub fn setting(&self, name: &str) -> Option<&str> {
        self.settings.iter().find(|(what, _)| *what == name).map(|(_, value)| value.as_str())
    }

    /// The first setting that is known of both and differs, with both values.
    fn difference(&self, later: &Self) -> Option<String> {
        self.settings.iter().find_map(|(what, before)| {
            let (_, now) = later.settings.iter().find(|(other, _)| other == what)?;
            (before != now).then(|| format!("{what} {before}, now {now}"))
        })
    }
}

impl Change {
    /// Whether the two rates could be held against each other.
    #[must_use]
    pub fn is_judged(&self) -> bool {
        matches!(self.verdict, Verdict::Faster(_) | Verdict::Slower(_) | Verdict::NoDifference(_))
    }

    /// In a sentence.
    #[must_use]
    pub fn in_words(&self) -> String {
        let what = match &self.verdict {
            Verdict::Faster(ratio) => format!("faster, {}", ratio_in_words(ratio)),
            Verdict::Slower(ratio) => format!("slower, {}", ratio_in_words(ratio)),
            Verdict::NoDifference(ratio) => format!("no difference, {}", ratio_in_words(ratio)),
            Verdict::Different(difference) => format!("not comparable: {difference}"),
            Verdict::Unknown => "not comparable: rates are missing".to_owned(),
            Verdict::Gone => "only in the earlier one".to_owned(),
            Verdict::New => "only in the later one".to_owned(),
        };
        format!("{}: {what}", self.name)
    }
}

/// Those that are slower by more than `most` (a share, such as 0.05) with their whole interval, and those whose rate is
/// not known any more or was measured with other settings, in sentences.
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
        Verdict::Different(difference) => {
            Some(format!("{} can't be held against the baseline: {difference}", change.name))
        }
        Verdict::Unknown => Some(format!("{} has no rates to compare", change.name)),
        _ => None,
    };
    changes.iter().filter_map(tell).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::bench::LoraRecord;
    use crate::report::bench::example::lora;
    use crate::report::to_json;

    fn rated(rates: &[(&str, &[f64])]) -> Rated {
        let rate = |(name, rounds): &(&str, &[f64])| Rate {
            name: (*name).to_owned(),
            settings: vec![("device", "cpu".to_owned())],
            rounds: rounds.to_vec(),
        };
        Rated { machine: "m".to_owned(), rates: rates.iter().map(rate).collect() }
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

    /// What is said of the merged rank 4, and whether a gate fails by it, once the later record was changed.
    fn after(change: impl Fn(&mut BenchRecord)) -> (String, bool) {
        let (before, mut later) = (lora(), lora());
        change(&mut later);
        let changes = changes(&Rated::from(&before), &Rated::from(&later));
        (changes[2].in_words(), regressions(&changes[2..=2], 0.5).len() == 1)
    }

    #[test]
    fn only_what_was_measured_with_the_same_settings_is_held_against_each_other() {
        let differs = |what: &str| (format!("rank 4, merged: not comparable: {what}"), true);
        let of_entry = |change: fn(&mut BenchEntry)| after(|record| change(&mut record.found.entries[2]));
        assert_eq!(of_entry(|entry| entry.model = "larger".to_owned()), differs("model vit, now larger"));
        assert_eq!(of_entry(|entry| entry.precision = "fp16".to_owned()), differs("precision as built, now fp16"));
        assert_eq!(of_entry(|entry| entry.variant = "fp16".to_owned()), differs("variant fp32, now fp16"));
        assert_eq!(of_entry(|entry| entry.device = "cuda:0".to_owned()), differs("device cpu, now cuda:0"));
        assert_eq!(of_entry(|entry| entry.provider = "openvino".to_owned()), differs("provider cpu, now openvino"));
        assert_eq!(of_entry(|entry| entry.sessions = 1), differs("sessions 2, now 1"));
        assert_eq!(of_entry(|entry| entry.batch_size = 8), differs("batch size 4, now 8"));
        assert_eq!(of_entry(|entry| entry.parameters = 999_999), differs("parameters 1,000,000, now 999,999"));
        let operations = "operations per sample 2,000,000,000, now 1";
        assert_eq!(of_entry(|entry| entry.flops = 1), differs(operations));
        let targets = |targets: &[&str]| {
            let targets: Vec<String> = targets.iter().map(|target| (*target).to_owned()).collect();
            after(move |record| record.found.lora_targets.clone_from(&targets))
        };
        assert_eq!(targets(&["qkv"]), differs("LoRA's targets proj and qkv, now qkv"));
        let (said, is_regression) = targets(&["proj", "qkv"]);
        assert!(said.starts_with("rank 4, merged: no difference, 1.00× [") && !is_regression, "{said}");
        let told = after(|record| {
            record.found.entries[2].lora = record.found.entries[2].lora.map(|lora| LoraRecord { alpha: 32.0, ..lora })
        });
        assert_eq!(told, differs("LoRA's α 16, now 32"));
    }

    #[test]
    fn the_model_alone_has_no_settings_of_an_adapter() {
        let (before, mut later) = (lora(), lora());
        later.found.lora_targets.clear();
        later.found.lora_targets.push("qkv".to_owned());
        let changes = changes(&Rated::from(&before), &Rated::from(&later));
        assert!(matches!(changes[0].verdict, Verdict::NoDifference(_)), "{changes:?}");
        assert!(matches!(changes[1].verdict, Verdict::Different(_)), "{changes:?}");
    }

    #[test]
    fn what_an_earlier_version_did_not_write_down_does_not_differ() {
        let mut record = serde_json::to_value(lora()).unwrap();
        record.as_object_mut().unwrap().remove("lora_targets");
        for entry in record["entries"].as_array_mut().unwrap() {
            entry.as_object_mut().unwrap().retain(|key, _| key != "variant" && key != "provider");
        }
        let earlier = Rated::from_json(record.to_string().as_bytes()).unwrap();
        let changes = changes(&earlier, &Rated::from(&lora()));
        assert!(changes.iter().all(|change| matches!(change.verdict, Verdict::NoDifference(_))), "{changes:?}");
    }

    #[test]
    fn records_are_read_back() {
        let record = lora();
        let read = Rated::from_json(&to_json(&record)).unwrap();
        let written = Rated::from(&record);
        assert_eq!(read.machine, written.machine);
        assert_eq!(read.rates.len(), written.rates.len());
        for (rate, expected) in read.rates.iter().zip(&written.rates) {
            assert_eq!((&rate.name, &rate.settings), (&expected.name, &expected.settings));
            // JSON may lose a number's last bit.
            let is_near = |(a, b): (&f64, &f64)| (a - b).abs() <= 1e-12 * b.abs();
            assert_eq!(rate.rounds.len(), expected.rounds.len());
            assert!(rate.rounds.iter().zip(&expected.rounds).all(is_near), "{}", rate.name);
        }
        assert!(changes(&read, &read).iter().all(|change| matches!(change.verdict, Verdict::NoDifference(_))));
        let error = Rated::from_json(br#"{"schema": "slidestream/run/1"}"#).unwrap_err();
        assert!(error.to_string().contains("slidestream/run/1"));
        assert!(Rated::from_json(b"[]").is_err());
    }
}
