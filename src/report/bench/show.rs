//! What a result file of any command says, in a line.

use serde_json::Value;

use super::super::compare::COMPARE_SCHEMA;
use super::super::text::{ABSENT, count, duration, or_absent, significant, times};
use super::super::{EVALUATE_SCHEMA, OPTIMIZE_SCHEMA, PREDICT_SCHEMA, RUN_SCHEMA, SIMULATE_SCHEMA, SLIDE_SCHEMA};
use super::BENCH_SCHEMA;

/// The kind of record and what matters most in it; `None` if it is none of slidestream's.
#[must_use]
pub fn summary(record: &Value) -> Option<(&'static str, String)> {
    let schema = record.get("schema")?.as_str()?;
    Some(match schema {
        RUN_SCHEMA => ("run", run(record)),
        SLIDE_SCHEMA => ("slide", slide(record)),
        OPTIMIZE_SCHEMA => ("optimize", optimize(record)),
        COMPARE_SCHEMA => ("compare", concluded(record, "/conclusions")),
        SIMULATE_SCHEMA => ("simulate", simulate(record)),
        BENCH_SCHEMA => ("bench", bench(record)),
        EVALUATE_SCHEMA => ("evaluate", evaluate(record)),
        PREDICT_SCHEMA => ("predict", predict(record)),
        _ => return None,
    })
}

fn run(record: &Value) -> String {
    let slides = record.get("slides").and_then(Value::as_object);
    let counts = slides.into_iter().flatten().filter(|(_, slides)| **slides != 0);
    let counts: Vec<String> = counts.map(|(status, slides)| format!("{slides} {status}")).collect();
    format!(
        "{}, {} on {}; slides: {}",
        text(record, "/status"),
        model(record),
        text(record, "/execution/device"),
        counts.join(", ")
    )
}

fn slide(record: &Value) -> String {
    if let Some(error) = record.get("error").and_then(Value::as_str) {
        return format!("{}: {error}", text(record, "/status"));
    }
    let (seconds, rate) = (number(record, "/timing/seconds"), number(record, "/timing/tiles_per_sec"));
    format!(
        "{}, {}: {} tiles in {}, {} tiles/s",
        text(record, "/status"),
        model(record),
        whole(record, "/coverage/inferred"),
        duration(seconds),
        significant(rate)
    )
}

fn optimize(record: &Value) -> String {
    let told = |variant: &Value| {
        let gain = variant.pointer("/speed/ratio").and_then(Value::as_f64);
        let gain = gain.map_or_else(|| "not timed".to_owned(), times);
        let is_recommended = variant.get("is_recommended") == Some(&Value::Bool(true));
        format!("{} {gain}{}", text(variant, "/name"), if is_recommended { ", recommended" } else { "" })
    };
    let variants: Vec<String> = list(record, "/variants").iter().map(told).collect();
    format!("{} for {}: {}", text(record, "/source"), text(record, "/made_for"), variants.join("; "))
}

fn simulate(record: &Value) -> String {
    let best = record.get("best").and_then(Value::as_u64).unwrap_or(0);
    let point = |key: &str| format!("/points/{best}/{key}");
    format!(
        "{} on {}: {} tiles/s in batches of {}",
        model(record),
        text(record, "/execution/device"),
        significant(number(record, &point("tiles_per_sec/value"))),
        whole(record, &point("batch_size"))
    )
}

fn bench(record: &Value) -> String {
    let entries = list(record, "/entries").len();
    format!("{}, {entries} entries. {}", text(record, "/subject"), concluded(record, "/insights"))
}

fn evaluate(record: &Value) -> String {
    let figures = match text(record, "/model/task") {
        "segmentation" => [("mean_dice", "mean Dice"), ("mean_iou", "mean IoU")],
        _ => [("top1", "top-1"), ("auc", "AUC")],
    };
    let told = |(key, name): (&str, &str)| {
        let at = |end: &str| record.pointer(&format!("/figures/{key}/{end}")).and_then(Value::as_f64);
        let interval = at("low").zip(at("high"));
        let interval = interval.map_or_else(String::new, |(low, high)| format!(" [{low:.3}, {high:.3}]"));
        Some(format!("{name} {:.3}{interval}", at("value")?))
    };
    let images = format!(
        "{} on {}, {} images of {}",
        model(record),
        text(record, "/ran_on/device"),
        whole(record, "/images"),
        text(record, "/labels")
    );
    let parts = [Some(images), failed(record, "not read")].into_iter().chain(figures.map(told));
    parts.flatten().collect::<Vec<_>>().join("; ")
}

fn predict(record: &Value) -> String {
    let images = list(record, "/images");
    // A segmentation covers an image with tiles and lists none of them.
    let tiles = |image: &Value| match list(image, "/tiles").len() as u64 {
        0 => image.get("grid_tiles").and_then(Value::as_u64).unwrap_or(0),
        listed => listed,
    };
    let folders: Vec<&str> = list(record, "/folders").iter().map(|folder| text(folder, "/path")).collect();
    let predicted = format!(
        "{} on {}, {}{}{} in {}",
        model(record),
        text(record, "/ran_on/device"),
        counted(images.len() as u64, "image"),
        if folders.is_empty() { "" } else { " of " },
        folders.join(", "),
        counted(images.iter().map(tiles).sum(), "tile")
    );
    let parts = [Some(predicted), failed(record, "not predicted"), pace(record)];
    parts.into_iter().flatten().collect::<Vec<_>>().join("; ")
}

/// How fast a model ran alone: in batches of one the latency of a tile.
fn pace(record: &Value) -> Option<String> {
    Some(match record.pointer("/pace/batch_size")?.as_u64()? {
        1 => format!("{} ms a tile p50", significant(number(record, "/pace/ms_per_tile/p50"))),
        batch => format!("{} tiles/s in batches of {batch}", significant(number(record, "/pace/tiles_per_sec"))),
    })
}

fn counted(number: u64, what: &str) -> String {
    format!("{} {what}{}", count(number), if number == 1 { "" } else { "s" })
}

fn failed(record: &Value, how: &str) -> Option<String> {
    let failed = list(record, "/failed").len();
    (failed > 0).then(|| format!("{failed} {how}"))
}

/// The recommendation, or else the first of the sentences that a record ends with.
fn concluded(record: &Value, place: &str) -> String {
    let sentences: Vec<&str> = list(record, place).iter().filter_map(Value::as_str).collect();
    let recommended = sentences.iter().find(|said| said.starts_with("Recommendation"));
    recommended.or(sentences.first()).map_or_else(|| "nothing was concluded".to_owned(), |said| (*said).to_owned())
}

fn model(record: &Value) -> String {
    format!("{} {}", text(record, "/model/name"), text(record, "/model/variant"))
}

fn text<'a>(record: &'a Value, place: &str) -> &'a str {
    record.pointer(place).and_then(Value::as_str).unwrap_or(ABSENT)
}

fn whole(record: &Value, place: &str) -> String {
    or_absent(record.pointer(place).and_then(Value::as_u64), count)
}

/// Empty where there is none.
fn list<'a>(record: &'a Value, place: &str) -> &'a [Value] {
    record.pointer(place).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

/// NaN, which is shown as a dash, where there is none.
fn number(record: &Value, place: &str) -> f64 {
    record.pointer(place).and_then(Value::as_f64).unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::report::bench::example::lora;
    use crate::report::bench::insights;

    fn of(record: Value) -> String {
        let (kind, told) = summary(&record).unwrap();
        format!("{kind}: {told}")
    }

    #[test]
    fn every_kind_of_record_has_its_line() {
        let model = json!({"name": "cells", "variant": "int8"});
        let run = json!({"schema": RUN_SCHEMA, "status": "done", "model": model, "execution": {"device": "cpu"},
            "slides": {"done": 3, "failed": 0}});
        assert_eq!(of(run), "run: done, cells int8 on cpu; slides: 3 done");
        let failed = json!({"schema": SLIDE_SCHEMA, "status": "failed", "error": "is no slide"});
        assert_eq!(of(failed), "slide: failed: is no slide");
        let slide = json!({"schema": SLIDE_SCHEMA, "status": "done", "error": null, "model": model,
            "coverage": {"inferred": 1200}, "timing": {"seconds": 60.0, "tiles_per_sec": 20.0}});
        assert_eq!(of(slide), "slide: done, cells int8: 1,200 tiles in 60.0 s, 20.0 tiles/s");
        let few = json!({"schema": SLIDE_SCHEMA, "status": "done", "coverage": {"inferred": 6}});
        assert_eq!(of(few), "slide: done, – –: 6 tiles in –, – tiles/s");
        let optimize = json!({"schema": OPTIMIZE_SCHEMA, "source": "m", "made_for": "cpu", "variants": [
            {"name": "int8", "speed": {"ratio": 2.5}, "is_recommended": true}, {"name": "fp16", "speed": null}]});
        assert_eq!(of(optimize), "optimize: m for cpu: int8 2.50×, recommended; fp16 not timed");
        let compare = json!({"schema": COMPARE_SCHEMA, "conclusions": ["First.", "Second."]});
        assert_eq!(of(compare), "compare: First.");
        let simulate = json!({"schema": SIMULATE_SCHEMA, "model": model, "execution": {"device": "cpu"}, "best": 1,
            "points": [{}, {"batch_size": 8, "tiles_per_sec": {"value": 31.25}}]});
        assert_eq!(of(simulate), "simulate: cells int8 on cpu: 31.2 tiles/s in batches of 8");
        assert_eq!(summary(&json!({"schema": "other/1"})), None);
        assert_eq!(summary(&json!([1])), None);
    }

    #[test]
    fn an_evaluation_is_told_by_the_figures_of_its_task() {
        let figures = json!({"top1": {"value": 0.75, "low": 0.5, "high": 1.0}, "auc": {"value": 0.9871, "low": null},
            "mean_dice": {"value": 0.8121, "low": 0.75, "high": 0.875}, "mean_iou": null});
        let of_task = |task: &str, failed: Value| {
            of(json!({"schema": EVALUATE_SCHEMA, "model": {"name": "cells", "variant": "int8", "task": task},
                "ran_on": {"device": "cuda:0"}, "labels": "data", "images": 1200, "failed": failed, "figures": figures}))
        };
        assert_eq!(
            of_task("classification", json!([])),
            "evaluate: cells int8 on cuda:0, 1,200 images of data; top-1 0.750 [0.500, 1.000]; AUC 0.987"
        );
        assert_eq!(
            of_task("segmentation", json!([{}, {}])),
            "evaluate: cells int8 on cuda:0, 1,200 images of data; 2 not read; mean Dice 0.812 [0.750, 0.875]"
        );
    }

    #[test]
    fn a_prediction_is_told_by_its_rate_or_in_batches_of_one_by_its_latency() {
        let of_pace = |pace: Value| {
            of(json!({"schema": PREDICT_SCHEMA, "model": {"name": "cells", "variant": "int8"},
                "ran_on": {"device": "cpu"}, "folders": [{"path": "a"}, {"path": "b"}], "failed": [{}], "pace": pace,
                "images": [{"grid_tiles": 6, "tiles": [{}, {}]}, {"grid_tiles": 1500, "tiles": []}]}))
        };
        let predicted = "predict: cells int8 on cpu, 2 images of a, b in 1,502 tiles; 1 not predicted";
        let paced = json!({"batch_size": 16, "tiles_per_sec": 31.25, "ms_per_tile": {"p50": 2.121}});
        assert_eq!(of_pace(paced), format!("{predicted}; 31.2 tiles/s in batches of 16"));
        let paced = json!({"batch_size": 1, "tiles_per_sec": 31.25, "ms_per_tile": {"p50": 2.121}});
        assert_eq!(of_pace(paced), format!("{predicted}; 2.12 ms a tile p50"));
        assert_eq!(of_pace(Value::Null), predicted);
        let one = json!({"schema": PREDICT_SCHEMA, "images": [{"grid_tiles": 6, "tiles": [{}]}]});
        assert_eq!(of(one), "predict: – – on –, 1 image in 1 tile");
    }

    #[test]
    fn a_benchmark_is_told_by_its_recommendation() {
        let mut record = lora();
        record.insights = insights(&record.found);
        let told = of(serde_json::to_value(&record).unwrap());
        assert!(told.starts_with("bench: vit with LoRA, 5 entries. Recommendation: merge at every rank"), "{told}");
    }
}
