//! The entries of a benchmark as a table for other programs.

use super::{BenchEntry, BenchRecord};

/// Column names, in the order of [`fields`].
const COLUMNS: [&str; 31] = [
    "name",
    "model",
    "precision",
    "device",
    "sessions",
    "batch_size",
    "total_batch_size",
    "parameters",
    "flops",
    "samples_per_sec",
    "samples_per_sec_low",
    "samples_per_sec_high",
    "ms_per_sample",
    "ratio",
    "ratio_low",
    "ratio_high",
    "start_secs",
    "peak_host_bytes",
    "peak_device_bytes",
    "utilisation",
    "is_stable",
    "lora_rank",
    "lora_merged",
    "lora_parameters",
    "lora_share",
    "max_abs_difference",
    "difference_bound",
    "replicas",
    "scaling_speedup",
    "scaling_efficiency",
    "rounds_samples_per_sec",
];

/// The entries as CSV. What is absent or not finite is empty; `rounds_samples_per_sec` holds all rounds, set apart by
/// spaces.
///
/// # Errors
/// The writer's own.
pub fn to_csv(record: &BenchRecord) -> Result<Vec<u8>, csv::Error> {
    let mut table = csv::Writer::from_writer(Vec::new());
    table.write_record(COLUMNS)?;
    for entry in &record.found.entries {
        table.write_record(fields(entry))?;
    }
    table.into_inner().map_err(|error| error.into_error().into())
}

fn fields(entry: &BenchEntry) -> [String; 31] {
    let (ratio, lora, scaling) = (entry.ratio.as_ref(), entry.lora.as_ref(), entry.scaling.as_ref());
    let rate = &entry.samples_per_sec;
    let rounds: Vec<String> = entry.rounds_samples_per_sec.iter().map(|rate| number(Some(*rate))).collect();
    [
        entry.name.clone(),
        entry.model.clone(),
        entry.precision.clone(),
        entry.device.clone(),
        entry.sessions.to_string(),
        entry.batch_size.to_string(),
        entry.total_batch_size.to_string(),
        entry.parameters.to_string(),
        entry.flops.to_string(),
        number(Some(rate.value)),
        number(Some(rate.low)),
        number(Some(rate.high)),
        number(Some(entry.ms_per_sample)),
        number(ratio.map(|ratio| ratio.value)),
        number(ratio.map(|ratio| ratio.low)),
        number(ratio.map(|ratio| ratio.high)),
        number(entry.start_secs),
        text(entry.peak_host_bytes),
        text(entry.peak_device_bytes),
        number(entry.utilisation),
        entry.is_stable.to_string(),
        text(lora.map(|lora| lora.rank)),
        text(lora.map(|lora| lora.is_merged)),
        text(lora.map(|lora| lora.parameters)),
        number(lora.map(|lora| lora.share_of_parameters)),
        number(lora.map(|lora| lora.max_abs_difference)),
        number(lora.map(|lora| lora.difference_bound)),
        text(scaling.map(|scaling| scaling.replicas)),
        number(scaling.map(|scaling| scaling.speedup.value)),
        number(scaling.map(|scaling| scaling.efficiency)),
        rounds.join(" "),
    ]
}

fn number(value: Option<f64>) -> String {
    text(value.filter(|value| value.is_finite()))
}

fn text(value: Option<impl ToString>) -> String {
    value.map_or_else(String::new, |value| value.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::bench::example::lora;

    #[test]
    fn every_entry_is_a_row() {
        let mut record = lora();
        record.found.entries[0].ms_per_sample = f64::NAN;
        let csv = to_csv(&record).unwrap();
        let mut reader = csv::Reader::from_reader(csv.as_slice());
        let heads = reader.headers().unwrap().clone();
        let column = |name: &str| heads.iter().position(|head| head == name).unwrap();
        let rows: Vec<csv::StringRecord> = reader.records().collect::<Result<_, _>>().unwrap();
        assert_eq!(rows.len(), record.found.entries.len());
        assert_eq!(&rows[0][column("name")], "baseline");
        assert_eq!((&rows[0][column("ms_per_sample")], &rows[0][column("lora_rank")]), ("", ""));
        assert_eq!(&rows[1][column("name")], "rank 4, unmerged");
        assert_eq!((&rows[1][column("lora_rank")], &rows[1][column("lora_merged")]), ("4", "false"));
        assert_eq!(&rows[1][column("samples_per_sec")], "80");
        assert_eq!(rows[1][column("rounds_samples_per_sec")].split(' ').count(), 7);
    }
}
