//! What a result file of any command says, in a line.

use serde_json::Value;

use super::super::compare::COMPARE_SCHEMA;
use super::super::text::{duration, significant, times};
use super::super::{OPTIMIZE_SCHEMA, RUN_SCHEMA, SIMULATE_SCHEMA, SLIDE_SCHEMA};
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
        _ => return None,
    })
}

fn run(record: &Value) -> String {
    let slides = record.get("slides").and_then(Value::as_object);
    let counts = slides.into_iter().flatten().filter(|(_, count)| **count != 0);
    let counts: Vec<String> = counts.map(|(status, count)| format!("{count} {status}")).collect();
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
    let tiles = number(record, "/coverage/inferred");
    let (seconds, rate) = (number(record, "/timing/seconds"), number(record, "/timing/tiles_per_sec"));
    format!(
        "{}, {}: {} tiles in {}, {} tiles/s",
        text(record, "/status"),
        model(record),
        significant(tiles),
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
    let variants = record.get("variants").and_then(Value::as_array);
    let variants: Vec<String> = variants.into_iter().flatten().map(told).collect();
    format!("{} for {}: {}", text(record, "/source"), text(record, "/made_for"), variants.join("; "))
}

fn simulate(record: &Value) -> String {
    let best = record.get("best").and_then(Value::as_u64).unwrap_or(0);
    let point = |key: &str| number(record, &format!("/points/{best}/{key}"));
    format!(
        "{} on {}: {} tiles/s in batches of {}",
        model(record),
        text(record, "/execution/device"),
        significant(point("tiles_per_sec/value")),
        point("batch_size")
    )
}

fn bench(record: &Value) -> String {
    let entries = record.get("entries").and_then(Value::as_array).map_or(0, Vec::len);
    format!("{}, {entries} entries. {}", text(record, "/subject"), concluded(record, "/insights"))
}

/// The recommendation, or else the first of the sentences that a record ends with.
fn concluded(record: &Value, place: &str) -> String {
    let sentences = record.pointer(place).and_then(Value::as_array);
    let sentences: Vec<&str> = sentences.into_iter().flatten().filter_map(Value::as_str).collect();
    let recommended = sentences.iter().find(|said| said.starts_with("Recommendation"));
    recommended.or(sentences.first()).map_or_else(|| "nothing was concluded".to_owned(), |said| (*said).to_owned())
}

fn model(record: &Value) -> String {
    format!("{} {}", text(record, "/model/name"), text(record, "/model/variant"))
}

fn text<'a>(record: &'a Value, place: &str) -> &'a str {
    record.pointer(place).and_then(Value::as_str).unwrap_or("–")
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
    fn a_benchmark_is_told_by_its_recommendation() {
        let mut record = lora();
        record.insights = insights(&record.found);
        let told = of(serde_json::to_value(&record).unwrap());
        assert!(told.starts_with("bench: vit with LoRA, 5 entries. Recommendation: merge at every rank"), "{told}");
    }
}
