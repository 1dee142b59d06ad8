//! The steps of a comparison as a table for other programs.

use super::{CompareRecord, LadderRow, RateRecord};

/// Column names, in the order of [`fields`].
const COLUMNS: [&str; 29] = [
    "step",
    "name",
    "variant",
    "batch",
    "measured",
    "rounds",
    "tiles_per_sec",
    "speedup",
    "speedup_low",
    "speedup_high",
    "mean_ms",
    "median_ms",
    "std_ms",
    "mad_ms",
    "min_ms",
    "p90_ms",
    "p99_ms",
    "max_ms",
    "peak_host_bytes",
    "peak_device_bytes",
    "device_utilisation",
    "cosine_mean",
    "cosine_p1",
    "cosine_min",
    "max_abs_difference",
    "top1_agreement",
    "pixel_agreement",
    "nan_count",
    "samples_ms",
];

/// The steps as CSV: two rows for a step that was measured both ways (`measured` is `model_only` or `end_to_end`), one
/// for a step without a rate. What is absent or not finite is empty; `samples_ms` holds all samples, set apart by spaces.
///
/// # Errors
/// The writer's own.
pub fn to_csv(record: &CompareRecord) -> Result<Vec<u8>, csv::Error> {
    let mut table = csv::Writer::from_writer(Vec::new());
    table.write_record(COLUMNS)?;
    for (index, row) in record.found.ladder.iter().enumerate() {
        let rates = [("model_only", row.model_only.as_ref()), ("end_to_end", row.end_to_end.as_ref())];
        for (measured, rate) in rates.into_iter().filter(|(_, rate)| rate.is_some()) {
            table.write_record(fields(record, index + 1, row, (measured, rate)))?;
        }
        if row.rate().is_none() {
            table.write_record(fields(record, index + 1, row, ("", None)))?;
        }
    }
    table.into_inner().map_err(|error| error.into_error().into())
}

fn fields(record: &CompareRecord, step: usize, row: &LadderRow, rate: (&str, Option<&RateRecord>)) -> [String; 29] {
    let (measured, rate) = rate;
    let speedup = rate.and_then(|rate| rate.speedup);
    let times = rate.map(|rate| rate.ms_per_tile);
    let agreement = record.agreement_of(&row.variant);
    let cosine = agreement.and_then(|agreement| agreement.cosine);
    let samples = rate.map_or_else(Vec::new, |rate| rate.samples_ms.iter().map(|&ms| number(Some(ms))).collect());
    [
        step.to_string(),
        row.name.clone(),
        row.variant.clone(),
        row.batch.to_string(),
        measured.to_owned(),
        times.map_or_else(String::new, |times| times.count.to_string()),
        number(rate.map(|rate| rate.tiles_per_sec)),
        number(speedup.map(|speedup| speedup.value)),
        number(speedup.map(|speedup| speedup.low)),
        number(speedup.map(|speedup| speedup.high)),
        number(times.map(|times| times.mean)),
        number(times.map(|times| times.median)),
        number(times.and_then(|times| times.std)),
        number(times.map(|times| times.mad)),
        number(times.map(|times| times.min)),
        number(times.map(|times| times.p90)),
        number(times.map(|times| times.p99)),
        number(times.map(|times| times.max)),
        row.peak_host_bytes.map_or_else(String::new, |bytes| bytes.to_string()),
        row.peak_device_bytes.map_or_else(String::new, |bytes| bytes.to_string()),
        number(row.device_utilisation),
        number(cosine.map(|cosine| cosine.mean)),
        number(cosine.map(|cosine| cosine.p1)),
        number(cosine.map(|cosine| cosine.min)),
        number(agreement.and_then(|agreement| agreement.max_abs_difference)),
        number(agreement.and_then(|agreement| agreement.top1_agreement)),
        number(agreement.and_then(|agreement| agreement.pixel_agreement)),
        agreement.map_or_else(String::new, |agreement| agreement.nan_count.to_string()),
        samples.join(" "),
    ]
}

fn number(value: Option<f64>) -> String {
    value.filter(|value| value.is_finite()).map_or_else(String::new, |value| value.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::compare::example::{example, with_steps};

    fn read(record: &CompareRecord) -> Vec<Vec<String>> {
        let bytes = to_csv(record).unwrap();
        let mut reader = csv::ReaderBuilder::new().has_headers(false).from_reader(&*bytes);
        reader.records().map(|row| row.unwrap().iter().map(str::to_owned).collect()).collect()
    }

    #[test]
    fn each_way_of_measuring_has_a_row() {
        let record = example();
        let rows = read(&record);
        assert_eq!(rows.len(), 1 + 2 * record.found.ladder.len());
        assert_eq!(rows[0], COLUMNS);
        assert_eq!(rows[2][..5], ["1", record.found.ladder[0].name.as_str(), "fp32", "1", "end_to_end"]);
        let rate = record.found.ladder[0].end_to_end.as_ref().unwrap();
        assert_eq!(rows[2][6].parse::<f64>().unwrap(), rate.tiles_per_sec);
        let samples: Vec<f64> = rows[2][28].split(' ').map(|sample| sample.parse().unwrap()).collect();
        assert_eq!(samples, rate.samples_ms);
    }

    #[test]
    fn what_is_absent_is_empty() {
        let mut record = with_steps(&[("a, \"b\"\n", "fp32", 1, Some(1.0), None), ("c", "int8", 1, None, None)]);
        record.found.ladder[0].model_only.as_mut().unwrap().tiles_per_sec = f64::NAN;
        let rows = read(&record);
        assert_eq!(rows.len(), 3);
        assert_eq!((rows[1][1].as_str(), rows[1][6].as_str()), ("a, \"b\"\n", ""));
        assert_eq!((rows[2][4].as_str(), rows[2][6].as_str(), rows[2][28].as_str()), ("", "", ""));
    }
}
