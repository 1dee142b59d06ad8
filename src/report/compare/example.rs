//! A made-up comparison for tests: its numbers were computed here and measured nowhere.

use std::collections::BTreeMap;

use crate::measure::{Bootstrap, Samples};
use crate::report::compare::{
    AccuracyRecord, AccuracyRow, AgreementRecord, Bound, COMPARE_SCHEMA, ClassValue, CompareRecord, ComparedInput,
    ComparedModel, ComparedVariant, CosineRecord, Findings, FlipsRecord, GateRecord, IntervalRecord, LadderRow,
    MeasuringRecord, MetricRecord, PictureRecord, RateRecord, conclusions,
};
use crate::report::{AccountRecord, HardwareRecord, LibraryRecord};

/// A step as name, variant, batch, milliseconds per tile of the model alone and end to end.
type Step = (&'static str, &'static str, usize, Option<f64>, Option<f64>);

const STEPS: [Step; 7] = [
    ("original: FP32, one tile at a time, read and infer in turn", "fp32", 1, Some(16.0), Some(40.0)),
    ("+ batching", "fp32", 8, Some(15.8), Some(39.0)),
    ("+ overlapped stages", "fp32", 8, Some(15.8), Some(17.0)),
    ("+ graph rewriting", "fp32-rewritten", 8, Some(12.0), Some(13.1)),
    ("+ FP16", "fp16", 8, Some(17.2), Some(45.0)),
    ("+ INT8", "int8", 8, Some(5.5), Some(6.2)),
    ("everything", "int8-dynamic", 8, Some(4.0), Some(5.9)),
];

/// A ladder of seven steps with everything that a record can hold.
pub(crate) fn example() -> CompareRecord {
    with_steps(&STEPS)
}

/// The same with other steps.
pub(crate) fn with_steps(steps: &[Step]) -> CompareRecord {
    let mut names: Vec<&str> = steps.iter().map(|step| step.1).collect();
    names.dedup();
    let variants = names.iter().map(|&name| ComparedVariant {
        name: name.to_owned(),
        file: format!("models/example/{name}.onnx"),
        bytes: 7_654_321,
        sha256: "5f".repeat(32),
        provider: "CPUExecutionProvider".to_owned(),
        device: "cpu".to_owned(),
        options: BTreeMap::from([("intra_op_num_threads".to_owned(), "2".to_owned())]),
    });
    let models = vec![ComparedModel {
        name: "example-unet".to_owned(),
        task: "segmentation".to_owned(),
        classes: ["tumour epithelium", "stroma", "lymphocyte"].map(str::to_owned).to_vec(),
        tile_size: 256,
        variants: variants.collect(),
    }];
    let compared = names.iter().skip(1);
    let mut record = CompareRecord {
        schema: COMPARE_SCHEMA.to_owned(),
        account: AccountRecord {
            started: "2026-01-02T03:04:05Z".to_owned(),
            finished: "2026-01-02T03:14:05Z".to_owned(),
            version: "0.1.0".to_owned(),
            command: ["slidestream", "compare", "a slide.svs", "--model", "models/example"].map(str::to_owned).to_vec(),
            libraries: BTreeMap::from([(
                "ONNX Runtime".to_owned(),
                LibraryRecord { version: "1.2.3".to_owned(), path: "lib/x.so".to_owned(), origin: "in lib".to_owned() },
            )]),
            hardware: HardwareRecord {
                cpu: "Example CPU".to_owned(),
                cores: 2,
                memory_bytes: 25_769_803_776,
                gpus: vec![],
            },
        },
        found: Findings {
            models,
            left_out: Vec::new(),
            input: ComparedInput { source: "a slide.svs".to_owned(), tiles: 512, slide_tiles: Some(4_967) },
            measuring: MeasuringRecord {
                warmup_rounds: 2,
                rounds: 24,
                is_interleaved: true,
                tolerance: 0.02,
                time_limit_secs: 600.0,
                seconds: 321.0,
                is_stable: true,
                note: "Every median was known within ±2 %.".to_owned(),
                confidence: 0.95,
                resamples: 2000,
                seed: 0,
            },
            ladder: ladder(steps),
            agreement: compared.clone().enumerate().map(|(index, name)| agreement(index, name)).collect(),
            accuracy: Some(AccuracyRecord {
                labels: "labels.csv".to_owned(),
                items: 512,
                unit: "tiles".to_owned(),
                rows: names.iter().enumerate().map(|(index, name)| accuracy(index, name)).collect(),
            }),
            gates: compared.enumerate().flat_map(|(index, name)| gates(index, name)).collect(),
            pictures: vec![PictureRecord::new("The original's map", "colours by class", &[137, 80, 78, 71])],
        },
        conclusions: Vec::new(),
    };
    record.conclusions = conclusions(&record);
    record
}

fn rounds(ms: f64, phase: usize) -> Samples {
    let noise =
        |round: usize| ((round * 7 + phase * 3) as f64 * 1.7).sin() * 0.02 + 0.004 * ((round * phase) as f64).cos();
    Samples::new((0..24).map(|round| ms / 1e3 * (1.0 + noise(round))).collect()).unwrap()
}

fn ladder(steps: &[Step]) -> Vec<LadderRow> {
    let (model, whole) = (steps[0].3.map(|ms| rounds(ms, 0)), steps[0].4.map(|ms| rounds(ms, 0)));
    let rate = |ms: Option<f64>, index: usize, original: &Option<Samples>| {
        let seconds = rounds(ms?, index);
        let ratio = |original: &Samples| Bootstrap::default().ratio(original.seconds(), seconds.seconds());
        Some(RateRecord::new(&seconds, original.as_ref().and_then(ratio)))
    };
    let row = |(index, step): (usize, &Step)| {
        let (model_only, end_to_end) = (rate(step.3, index, &model), rate(step.4, index, &whole));
        let projected = end_to_end.as_ref().or(model_only.as_ref()).map(|rate| rate.projected(Some(4_967)));
        LadderRow {
            name: step.0.to_owned(),
            variant: step.1.to_owned(),
            batch: step.2,
            bottleneck: end_to_end.as_ref().map(|_| "read (97 % busy over 2 workers)".to_owned()),
            note: model_only.is_none().then(|| "The provider has no kernels for it.".to_owned()),
            model_only,
            end_to_end,
            peak_host_bytes: Some(445_644_800 + 10_000_000 * index as u64),
            peak_device_bytes: None,
            device_utilisation: None,
            projected: projected.unwrap_or_default(),
        }
    };
    steps.iter().enumerate().map(row).collect()
}

fn agreement(index: usize, name: &str) -> AgreementRecord {
    let gap = [1e-9, 2e-6, 2e-4, 0.124][index % 4];
    AgreementRecord {
        variant: name.to_owned(),
        tiles: 512,
        cosine: Some(CosineRecord { mean: 1.0 - gap, p1: 1.0 - 3.0 * gap, min: 1.0 - 5.0 * gap }),
        max_abs_difference: Some(gap.sqrt()),
        top1_agreement: None,
        dice: vec![
            ClassValue { class: "tumour epithelium".to_owned(), value: Some(1.0 - gap) },
            ClassValue { class: "stroma".to_owned(), value: Some(1.0 - 2.0 * gap) },
            ClassValue { class: "lymphocyte".to_owned(), value: None },
        ],
        pixel_agreement: Some(1.0 - gap),
        flips: Some(FlipsRecord { threshold: 0.5, tiles: index as u64 }),
        nan_count: 0,
    }
}

fn accuracy(index: usize, name: &str) -> AccuracyRow {
    let loss = [0.0, 0.0, 0.001, 0.002, 0.06][index % 5];
    let around = |value: f64, half: f64| IntervalRecord { value, low: value - half, high: value + half };
    let metric = |value: f64| MetricRecord {
        value: around(value - loss, 0.012),
        difference: (index > 0).then(|| around(-loss, 0.003)),
    };
    AccuracyRow {
        variant: name.to_owned(),
        accuracy: Some(metric(0.91)),
        balanced_accuracy: Some(metric(0.88)),
        auc: Some(metric(0.96)),
        dice: None,
    }
}

fn gates(index: usize, name: &str) -> [GateRecord; 2] {
    let cosine = 1.0 - [1e-9, 2e-6, 2e-4, 0.124][index % 4];
    let passed = cosine >= 0.99;
    let reason = if passed { "outputs keep their direction" } else { "outputs point elsewhere" };
    let gate = |name_of: &str, bound, limit, value, passed, reason: &str| GateRecord {
        variant: name.to_owned(),
        name: name_of.to_owned(),
        bound,
        limit,
        value: Some(value),
        passed,
        reason: reason.to_owned(),
    };
    [
        gate("mean cosine", Bound::AtLeast, 0.99, cosine, passed, reason),
        gate("values not finite", Bound::AtMost, 0.0, 0.0, true, "none"),
    ]
}
