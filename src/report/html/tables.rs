//! The tables of the page. A column in which nothing was measured is left out.

use std::fmt::Write;

use super::super::compare::{
    Bound, CompareRecord, CosineRecord, IntervalRecord, LadderRow, MetricRecord, Verdict, verdict,
};
use super::super::text::{
    ABSENT, bytes, count, duration, escape, exact, fixed, near_one, or_absent, percent, points, significant, times,
};
use super::section;

/// A cell: text, escaped when written.
pub(super) enum Cell {
    Text(String),
    Wide(String),
    Number(String),
    /// A figure and what stands smaller below it.
    Noted(String, String),
    Badge(&'static str, &'static str),
}

impl Cell {
    fn is_absent(&self) -> bool {
        matches!(self, Self::Text(text) | Self::Wide(text) | Self::Number(text) | Self::Noted(text, _) if text == ABSENT)
    }

    fn is_number(&self) -> bool {
        matches!(self, Self::Number(_) | Self::Noted(..))
    }

    fn html(&self) -> String {
        match self {
            Self::Text(text) => format!("<td class=\"text\">{}</td>", escape(text)),
            Self::Wide(text) => format!("<td class=\"text wide\">{}</td>", escape(text)),
            Self::Number(text) => format!("<td class=\"number\">{}</td>", escape(text)),
            Self::Noted(text, note) if note.is_empty() => format!("<td class=\"number\">{}</td>", escape(text)),
            Self::Noted(text, note) => {
                format!("<td class=\"number\">{}<small>{}</small></td>", escape(text), escape(note))
            }
            Self::Badge(class, text) => format!("<td><span class=\"badge {class}\">{text}</span></td>"),
        }
    }
}

/// Rows of cells under their heads, without the columns that are absent throughout.
pub(super) fn table(heads: &[String], rows: &[Vec<Cell>]) -> String {
    let is_shown: Vec<bool> = (0..heads.len()).map(|column| !rows.iter().all(|row| row[column].is_absent())).collect();
    let mut html = String::from("<div class=\"scroll\"><table>\n<thead><tr>");
    for (column, head) in heads.iter().enumerate().filter(|(column, _)| is_shown[*column]) {
        let class = if rows.iter().any(|row| row[column].is_number()) { " class=\"number\"" } else { "" };
        let _ = write!(html, "<th scope=\"col\"{class}>{}</th>", escape(head));
    }
    html.push_str("</tr></thead>\n<tbody>\n");
    for row in rows {
        let cells = row.iter().zip(&is_shown).filter(|(_, is_shown)| **is_shown).map(|(cell, _)| cell.html());
        let _ = writeln!(html, "<tr>{}</tr>", cells.collect::<String>());
    }
    html + "</tbody>\n</table></div>\n"
}

/// The ladder's times, and what they cost and mean.
pub(super) fn ladder(record: &CompareRecord) -> String {
    let heads =
        owned(&["", "step", "verdict", "model alone, ms/tile", "speed-up", "end to end, ms/tile", "speed-up", "note"]);
    let row = |(index, row): (usize, &LadderRow)| {
        let mut cells = vec![step(index), Cell::Wide(row.name.clone()), badge(record, index)];
        for rate in [&row.model_only, &row.end_to_end] {
            let median = or_absent(rate.as_ref(), |rate| significant(rate.ms_per_tile.median));
            let spread = rate.as_ref().map(|rate| format!("±{} MAD", significant(rate.ms_per_tile.mad)));
            cells.push(Cell::Noted(median, spread.unwrap_or_default()));
            cells.push(with_interval(rate.as_ref().and_then(|rate| rate.speedup), times));
        }
        cells.push(Cell::Wide(or_absent(row.note.clone(), |text| text)));
        cells
    };
    let rows: Vec<Vec<Cell>> = record.found.ladder.iter().enumerate().map(row).collect();
    table(&heads, &rows) + &resources(record)
}

/// Memory and devices of each step, and the projections as columns.
fn resources(record: &CompareRecord) -> String {
    let projections =
        distinct(record.found.ladder.iter().flat_map(|row| &row.projected).map(|projected| &*projected.name));
    let mut heads = owned(&["", "step", "variant", "batch"]);
    heads.extend(projections.iter().map(|&name| name.to_owned()));
    heads.extend(owned(&["host memory", "device memory", "device busy", "bounded by"]));
    let row = |(index, row): (usize, &LadderRow)| {
        let mut cells = vec![
            step(index),
            Cell::Wide(row.name.clone()),
            Cell::Text(row.variant.clone()),
            Cell::Number(count(row.batch as u64)),
        ];
        for name in &projections {
            let projected = row.projected.iter().find(|projected| projected.name == *name);
            cells.push(Cell::Number(or_absent(projected, |projected| duration(projected.seconds))));
        }
        cells.push(Cell::Number(or_absent(row.peak_host_bytes, bytes)));
        cells.push(Cell::Number(or_absent(row.peak_device_bytes, bytes)));
        cells.push(Cell::Number(or_absent(row.device_utilisation, percent)));
        cells.push(Cell::Text(or_absent(row.bottleneck.clone(), |text| text)));
        cells
    };
    let rows: Vec<Vec<Cell>> = record.found.ladder.iter().enumerate().map(row).collect();
    format!("<h3>What it takes</h3>\n{}", table(&heads, &rows))
}

/// Each variant's outputs against the original's, and the overlap of the class maps with classes as columns.
pub(super) fn agreement(record: &CompareRecord) -> String {
    let heads = owned(&[
        "variant",
        "tiles",
        "mean cosine",
        "1st percentile",
        "worst tile",
        "largest difference",
        "tiles of same class",
        "pixels of same class",
        "tiles changing side",
        "not finite",
    ]);
    let rows = record.found.agreement.iter().map(|agreement| {
        let cosine = |pick: fn(&CosineRecord) -> f64| {
            Cell::Number(or_absent(agreement.cosine, |cosine| near_one(pick(&cosine))))
        };
        let flips = agreement.flips.map(|flips| (count(flips.tiles), format!("of p = {}", exact(flips.threshold))));
        let (flips, threshold) = flips.unwrap_or_else(|| (ABSENT.to_owned(), String::new()));
        vec![
            Cell::Text(agreement.variant.clone()),
            Cell::Number(count(agreement.tiles)),
            cosine(|cosine| cosine.mean),
            cosine(|cosine| cosine.p1),
            cosine(|cosine| cosine.min),
            Cell::Number(or_absent(agreement.max_abs_difference, significant)),
            Cell::Number(or_absent(agreement.top1_agreement, percent)),
            Cell::Number(or_absent(agreement.pixel_agreement, percent)),
            Cell::Noted(flips, threshold),
            Cell::Number(count(agreement.nan_count)),
        ]
    });
    table(&heads, &rows.collect::<Vec<_>>()) + &overlap(record)
}

fn overlap(record: &CompareRecord) -> String {
    let classes =
        distinct(record.found.agreement.iter().flat_map(|agreement| &agreement.dice).map(|value| &*value.class));
    if classes.is_empty() {
        return String::new();
    }
    let heads: Vec<String> = std::iter::once("variant").chain(classes.iter().copied()).map(str::to_owned).collect();
    let rows = record.found.agreement.iter().filter(|agreement| !agreement.dice.is_empty()).map(|agreement| {
        let value =
            |class: &&str| agreement.dice.iter().find(|value| value.class == *class).and_then(|value| value.value);
        let cells = classes.iter().map(|class| Cell::Number(or_absent(value(class), near_one)));
        std::iter::once(Cell::Text(agreement.variant.clone())).chain(cells).collect()
    });
    let table = table(&heads, &rows.collect::<Vec<_>>());
    format!("<h3>Overlap of the class maps (Dice)</h3>\n{table}")
}

/// Each variant against labels, with the difference to the original below; nothing without labels.
pub(super) fn accuracy(record: &CompareRecord) -> String {
    let Some(accuracy) = &record.found.accuracy else { return String::new() };
    let rows = accuracy.rows.iter().map(|row| {
        let metrics = [row.accuracy, row.balanced_accuracy, row.auc, row.dice];
        let pairs = metrics.into_iter().flat_map(|metric: Option<MetricRecord>| {
            let value = with_interval(metric.map(|metric| metric.value), |value| fixed(value, 4));
            [value, with_interval(metric.and_then(|metric| metric.difference), points)]
        });
        std::iter::once(Cell::Text(row.variant.clone())).chain(pairs).collect()
    });
    let heads = owned(&[
        "variant",
        "accuracy",
        "Δ points",
        "balanced accuracy",
        "Δ points",
        "AUC",
        "Δ points",
        "mean Dice",
        "Δ points",
    ]);
    let lead = format!(
        "Labels: {}; {} {unit}. Intervals come from drawing {unit} anew; a difference is paired, on the same draws for both.",
        escape(&accuracy.labels),
        count(accuracy.items),
        unit = escape(&accuracy.unit)
    );
    section("Against labels", &lead, &table(&heads, &rows.collect::<Vec<_>>()))
}

/// The limits and what was held against them; nothing without gates.
pub(super) fn gates(record: &CompareRecord) -> String {
    if record.found.gates.is_empty() {
        return String::new();
    }
    let rows = record.found.gates.iter().map(|gate| {
        let bound = if gate.bound == Bound::AtLeast { "≥" } else { "≤" };
        vec![
            if gate.passed { Cell::Badge("good", "✓ passed") } else { Cell::Badge("bad", "✗ failed") },
            Cell::Text(gate.variant.clone()),
            Cell::Text(gate.name.clone()),
            Cell::Number(or_absent(gate.value, exact)),
            Cell::Number(format!("{bound} {}", exact(gate.limit))),
            Cell::Wide(gate.reason.clone()),
        ]
    });
    let heads = owned(&["", "variant", "figure", "value", "limit", "reason"]);
    section("Gates", "What a variant must keep to be recommended.", &table(&heads, &rows.collect::<Vec<_>>()))
}

/// The files that ran, and how.
pub(super) fn variants(record: &CompareRecord) -> String {
    let variants =
        record.found.models.iter().flat_map(|model| model.variants.iter().map(move |variant| (model, variant)));
    let rows: Vec<Vec<Cell>> = variants
        .map(|(model, variant)| {
            let options: Vec<String> =
                variant.options.iter().map(|(name, value)| format!("{name} = {value}")).collect();
            let options = if options.is_empty() { ABSENT.to_owned() } else { options.join(", ") };
            vec![
                Cell::Text(variant.name.clone()),
                Cell::Text(model.name.clone()),
                Cell::Text(format!("{} on {}", variant.provider, variant.device)),
                Cell::Number(bytes(variant.bytes)),
                Cell::Wide(variant.file.clone()),
                Cell::Wide(variant.sha256.clone()),
                Cell::Wide(options),
            ]
        })
        .collect();
    if rows.is_empty() {
        return String::new();
    }
    let heads = owned(&["variant", "model", "ran by", "size", "file", "SHA-256", "options"]);
    format!("<h3>Variants</h3>\n{}", table(&heads, &rows))
}

fn badge(record: &CompareRecord, index: usize) -> Cell {
    let (class, text) = match verdict(record, index) {
        Verdict::Original => ("", "original"),
        Verdict::Faster => ("good", "✓ faster"),
        Verdict::FailsGate => ("bad", "✗ fails a gate"),
        Verdict::NoDifference => ("", "≈ no difference"),
        Verdict::Slower => ("bad", "✗ not recommended"),
        Verdict::Unknown => ("", "not compared"),
    };
    Cell::Badge(class, text)
}

pub(super) fn with_interval(interval: Option<IntervalRecord>, format: impl Fn(f64) -> String) -> Cell {
    let Some(IntervalRecord { value, low, high }) = interval.filter(IntervalRecord::is_finite) else {
        return Cell::Number(ABSENT.to_owned());
    };
    Cell::Noted(format(value), format!("{} to {}", format(low), format(high)))
}

pub(super) fn owned(heads: &[&str]) -> Vec<String> {
    heads.iter().map(|&head| head.to_owned()).collect()
}

fn step(index: usize) -> Cell {
    Cell::Number((index + 1).to_string())
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
