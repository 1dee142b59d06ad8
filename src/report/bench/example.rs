//! Made-up benchmarks for tests.

use std::collections::BTreeMap;

use super::super::compare::{IntervalRecord, LeftOutRecord};
use super::super::{AccountRecord, HardwareRecord};
use super::{BENCH_SCHEMA, Bench, BenchEntry, BenchKind, BenchRecord, LoraRecord};

/// Seven rounds around a rate, and their median with an interval of ±1 %.
pub(crate) fn rounds(rate: f64) -> (Vec<f64>, IntervalRecord) {
    let rounds = [0.99, 1.01, 1.0, 0.995, 1.005, 1.0, 1.0].map(|factor| factor * rate).to_vec();
    (rounds, IntervalRecord { value: rate, low: 0.99 * rate, high: 1.01 * rate })
}

pub(crate) fn entry(name: &str, rate: f64) -> BenchEntry {
    let (rounds_samples_per_sec, samples_per_sec) = rounds(rate);
    BenchEntry {
        name: name.to_owned(),
        model: "vit".to_owned(),
        precision: "as built".to_owned(),
        variant: "fp32".to_owned(),
        device: "cpu".to_owned(),
        provider: "cpu".to_owned(),
        sessions: 2,
        batch_size: 4,
        total_batch_size: 8,
        parameters: 1_000_000,
        flops: 2_000_000_000,
        samples_per_sec,
        ms_per_sample: 1000.0 / rate,
        rounds_samples_per_sec,
        ratio: None,
        start_secs: Some(0.25),
        peak_host_bytes: Some(200 << 20),
        peak_device_bytes: None,
        utilisation: Some(0.97),
        utilisation_by_device: BTreeMap::new(),
        is_stable: true,
        lora: None,
        scaling: None,
    }
}

fn adapted(rank: usize, is_merged: bool, rate: f64, ratio: [f64; 3]) -> BenchEntry {
    let parameters = 1000 * rank as u64;
    let lora = LoraRecord {
        rank,
        alpha: 16.0,
        is_merged,
        parameters,
        share_of_parameters: parameters as f64 / (1_000_000 + parameters) as f64,
        max_abs_difference: 2e-6,
        difference_bound: 3e-4,
    };
    let [value, low, high] = ratio;
    let (beside, way) = if is_merged { (0, "merged") } else { (parameters, "unmerged") };
    BenchEntry {
        ratio: Some(IntervalRecord { value, low, high }),
        lora: Some(lora),
        parameters: 1_000_000 + beside,
        flops: 2_000_000_000 + 2000 * beside,
        ..entry(&format!("rank {rank}, {way}"), rate)
    }
}

fn record(kind: BenchKind, subject: &str, entries: Vec<BenchEntry>) -> BenchRecord {
    BenchRecord {
        schema: BENCH_SCHEMA.to_owned(),
        account: AccountRecord {
            started: "2026-01-01T00:00:00Z".to_owned(),
            finished: "2026-01-01T00:01:00Z".to_owned(),
            version: "0.1.0".to_owned(),
            command: vec!["slidestream".to_owned(), "bench".to_owned()],
            libraries: BTreeMap::new(),
            hardware: HardwareRecord { cpu: "cpu".to_owned(), cores: 2, memory_bytes: 1 << 30, gpus: Vec::new() },
        },
        found: Bench { kind, subject: subject.to_owned(), lora_targets: Vec::new(), entries, skipped: Vec::new() },
        insights: Vec::new(),
    }
}

/// Ranks 4 and 64: unmerged 0.80× and 0.71×, merged as fast as the baseline.
pub(crate) fn lora() -> BenchRecord {
    let mut baseline = entry("baseline", 100.0);
    baseline.ratio = Some(IntervalRecord { value: 1.0, low: 1.0, high: 1.0 });
    let entries = vec![
        baseline,
        adapted(4, false, 80.0, [0.8, 0.78, 0.82]),
        adapted(4, true, 100.0, [1.0, 0.99, 1.01]),
        adapted(64, false, 71.0, [0.71, 0.69, 0.73]),
        adapted(64, true, 101.0, [1.01, 0.99, 1.03]),
    ];
    let mut record = record(BenchKind::Lora, "vit with LoRA", entries);
    record.found.lora_targets = vec!["qkv".to_owned(), "proj".to_owned()];
    record
}

/// Two models at two precisions and two batch sizes; one combination was skipped.
pub(crate) fn vit() -> BenchRecord {
    let mut entries = Vec::new();
    let rates = [("small", 22, 4_600, [100.0, 100.5, 180.0, 200.0]), ("base", 86, 17_500, [30.0, 31.0, 50.0, 60.0])];
    for (model, megaparameters, megaflops, rates) in rates {
        let cases = [("fp32", 1), ("fp32", 8), ("fp16", 1), ("fp16", 8)];
        for ((precision, batch_size), rate) in cases.into_iter().zip(rates) {
            let name = format!("{model}, {precision}, batch {batch_size}");
            entries.push(BenchEntry {
                model: model.to_owned(),
                precision: precision.to_owned(),
                batch_size,
                total_batch_size: 2 * batch_size,
                parameters: megaparameters * 1_000_000,
                flops: megaflops * 1_000_000,
                peak_host_bytes: Some((megaparameters * 4 + 50 * batch_size as u64) << 20),
                ..entry(&name, rate)
            });
        }
    }
    let mut record = record(BenchKind::Vit, "2 vision transformers", entries);
    let why = "image=224 is no multiple of patch=15".to_owned();
    record.found.skipped.push(LeftOutRecord { name: "image=224,patch=15".to_owned(), why, is_failure: false });
    record
}
