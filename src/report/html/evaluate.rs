//! A model against labels as one page.

use std::fmt::Write;

use super::super::evaluate::{ClassFigures, EvaluateRecord, FigureRecord, WorstRecord};
use super::super::predict::start_in_words;
use super::super::text::{ABSENT, count, escape, fixed, or_absent, percent, significant};
use super::tables::{Cell, owned, table};
use super::{account, figure, figures, page, section};

/// A matrix of more classes is no picture: its most frequent confusions are listed instead.
const MOST_CLASSES: usize = 24;
/// Confusions that are listed then.
const MOST_CONFUSIONS: usize = 30;
/// From this share on a cell's text is light.
const DEEP: f64 = 0.55;

/// The record as an HTML page that needs nothing but itself.
#[must_use]
pub fn evaluate_html(record: &EvaluateRecord) -> String {
    let body = [
        header(record),
        figures(&shown(record)),
        notes(record),
        confusion(record),
        classes(record),
        worst(record),
        calibration(record),
        failed(record),
        speed(record),
        computed(record),
        setting(record),
    ]
    .concat();
    page(&format!("{} – slidestream evaluate", record.found.model.name), &body, &record.account.version)
}

fn header(record: &EvaluateRecord) -> String {
    let found = &record.found;
    format!(
        "<header>\n<p class=\"kicker\">slidestream evaluate</p>\n<h1>{}</h1>\n\
         <p class=\"facts\">variant {} · {} labelled images of {} · on {} · {}</p>\n</header>\n",
        escape(&found.model.name),
        escape(&found.model.variant),
        count(found.images),
        escape(&found.labels),
        escape(&found.ran_on.device),
        escape(&record.account.started)
    )
}

/// The figures over all classes with their intervals.
fn shown(record: &EvaluateRecord) -> Vec<(&'static str, String, String)> {
    let figures = record.found.figures.named(record.found.is_map()).into_iter();
    figures.map(|(name, figure)| (name, fixed(figure.value, 3), interval(&figure))).collect()
}

fn interval(figure: &FigureRecord) -> String {
    match (figure.low, figure.high) {
        (Some(low), Some(high)) => format!("{} to {}", fixed(low, 3), fixed(high, 3)),
        _ => String::new(),
    }
}

fn notes(record: &EvaluateRecord) -> String {
    let (found, mut notes) = (&record.found, record.found.notes.clone());
    if !found.failed.is_empty() {
        let images = found.failed.len() as u64;
        notes.insert(0, format!("Left out because they could not be read: {}, listed below.", count(images)));
    }
    if notes.is_empty() {
        return String::new();
    }
    let items: String = notes.iter().map(|note| format!("<li>{}</li>\n", escape(note))).collect();
    section("To know", "", &format!("<ul class=\"findings plain\">\n{items}</ul>\n"))
}

fn confusion(record: &EvaluateRecord) -> String {
    let what = if record.found.is_map() { "pixels" } else { "images" };
    let lead = format!("Rows are labels, columns what the model says; colours are shares of the label's {what}.");
    let content = if record.found.classes.len() > MOST_CLASSES { frequent(record) } else { matrix(record) };
    section("Confusion matrix", &lead, &content)
}

fn matrix(record: &EvaluateRecord) -> String {
    let found = &record.found;
    let names = || found.classes.iter().map(|class| class.class.as_str());
    let has_none = found.not_a_number > 0;
    let heads: String = names()
        .chain(has_none.then_some("no number"))
        .map(|name| format!("<th scope=\"col\">{}</th>", escape(name)))
        .collect();
    let mut html = format!(
        "<div class=\"scroll\"><table class=\"heat\">\n<thead><tr><th scope=\"col\">label</th>{heads}\
         <th scope=\"col\" class=\"sum\">all</th></tr></thead>\n<tbody>\n"
    );
    for (label, (name, row)) in names().zip(&found.confusion).enumerate() {
        let all: u64 = row.iter().sum();
        let cells: String = row
            .iter()
            .take(found.classes.len() + usize::from(has_none))
            .enumerate()
            .map(|(predicted, items)| heat(*items, all, label == predicted))
            .collect();
        let _ = writeln!(
            html,
            "<tr><th scope=\"row\">{}</th>{cells}<td class=\"sum\">{}</td></tr>",
            escape(name),
            count(all)
        );
    }
    html + "</tbody>\n</table></div>\n"
}

fn heat(items: u64, all: u64, is_right: bool) -> String {
    let share = if all == 0 { 0.0 } else { items as f64 / all as f64 };
    let class = if is_right { "right" } else { "wrong" };
    let deep = if share >= DEEP { " deep" } else { "" };
    let text = if all == 0 { ABSENT.to_owned() } else { percent(share) };
    format!(
        "<td class=\"{class}{deep}\" style=\"--share:{:.1}%\">{}<small>{text}</small></td>",
        100.0 * share,
        count(items)
    )
}

/// The most frequent confusions as a list.
fn frequent(record: &EvaluateRecord) -> String {
    let classes = &record.found.classes;
    let mut pairs: Vec<(u64, usize, usize)> = Vec::new();
    for (label, row) in record.found.confusion.iter().enumerate() {
        let wrong = row.iter().enumerate().filter(|(predicted, items)| *predicted != label && **items > 0);
        pairs.extend(wrong.map(|(predicted, items)| (*items, label, predicted)));
    }
    pairs.sort_by(|(a, ..), (b, ..)| b.cmp(a));
    let rows = pairs.into_iter().take(MOST_CONFUSIONS).map(|(items, label, predicted)| {
        let name = classes.get(predicted).map_or("no number", |class| class.class.as_str());
        let share = items as f64 / classes[label].support.max(1) as f64;
        vec![
            Cell::Text(classes[label].class.clone()),
            Cell::Text(name.to_owned()),
            Cell::Number(count(items)),
            Cell::Number(percent(share)),
        ]
    });
    table(&owned(&["label", "predicted", "items", "of the label"]), &rows.collect::<Vec<_>>())
}

fn classes(record: &EvaluateRecord) -> String {
    let (f1, items) = if record.found.is_map() { ("Dice", "pixels") } else { ("F1", "images") };
    let heads = owned(&["class", items, "predicted", "precision", "recall", f1, "IoU", "AUC"]);
    let row = |class: &ClassFigures| {
        let iou = class.iou.filter(|_| record.found.is_map());
        let mut cells = vec![
            Cell::Text(class.class.clone()),
            Cell::Number(count(class.support)),
            Cell::Number(count(class.predicted)),
        ];
        cells.extend([class.precision, class.recall, class.f1, iou, class.auc].map(cell));
        cells
    };
    let rows: Vec<Vec<Cell>> = record.found.classes.iter().map(row).collect();
    section("Class by class", "Each class against all others.", &table(&heads, &rows))
}

fn cell(figure: Option<FigureRecord>) -> Cell {
    let note = figure.map_or_else(String::new, |figure| interval(&figure));
    Cell::Noted(or_absent(figure, |figure| fixed(figure.value, 3)), note)
}

fn worst(record: &EvaluateRecord) -> String {
    if record.found.worst.is_empty() {
        return String::new();
    }
    let (lead, class) = if record.found.is_map() {
        ("The images with the lowest mean Dice: image, mask and prediction. Black has no label.", "pictures maps")
    } else {
        (
            "The wrong images of which the model was surest: label → what it says, with its probability.",
            "pictures tiles-of",
        )
    };
    let mut html = if record.found.is_map() { legend(&record.found.classes) } else { String::new() };
    let _ = writeln!(html, "<div class=\"{class}\">");
    for WorstRecord { path, label, predicted, value, png_base64 } in &record.found.worst {
        let name = path.rsplit(['/', '\\']).next().unwrap_or(path);
        let title = match (label, predicted) {
            (Some(label), Some(predicted)) => format!("{label} → {predicted}"),
            _ => format!("Dice {}", fixed(*value, 3)),
        };
        let caption = if record.found.is_map() { name.to_owned() } else { format!("{} · {name}", fixed(*value, 3)) };
        html.push_str(&figure(png_base64, &title, &caption));
    }
    section("The worst errors", lead, &(html + "</div>\n"))
}

/// The colours of the classes.
fn legend(classes: &[ClassFigures]) -> String {
    let item = |class: &ClassFigures| {
        let [red, green, blue] = class.color;
        let name = escape(&class.class);
        format!("<span><i style=\"background:rgb({red} {green} {blue})\"></i>{name}</span>\n")
    };
    format!("<p class=\"legend\">{}</p>\n", classes.iter().map(item).collect::<String>())
}

fn calibration(record: &EvaluateRecord) -> String {
    let bins: Vec<_> = record.found.calibration.iter().filter(|bin| bin.items > 0).collect();
    if bins.is_empty() {
        return String::new();
    }
    let rows = bins.into_iter().map(|bin| {
        let gap = bin.confidence.zip(bin.accuracy).map(|(confidence, accuracy)| accuracy - confidence);
        vec![
            Cell::Text(format!("{} to {}", fixed(bin.above, 3), fixed(bin.up_to, 3))),
            Cell::Number(count(bin.items)),
            Cell::Number(or_absent(bin.confidence, |value| fixed(value, 3))),
            Cell::Number(or_absent(bin.accuracy, |value| fixed(value, 3))),
            Cell::Number(or_absent(gap, |value| fixed(value, 3))),
        ]
    });
    let heads = owned(&["confidence", "images", "mean confidence", "right", "difference"]);
    let lead = "How often the model is right where it says that it is so sure. Below 0 it is too sure of itself.";
    section("Calibration", lead, &table(&heads, &rows.collect::<Vec<_>>()))
}

fn failed(record: &EvaluateRecord) -> String {
    if record.found.failed.is_empty() {
        return String::new();
    }
    let row =
        |failed: &super::super::FailedImage| vec![Cell::Wide(failed.path.clone()), Cell::Wide(failed.reason.clone())];
    let rows: Vec<Vec<Cell>> = record.found.failed.iter().map(row).collect();
    section("Not read", "", &table(&owned(&["image", "reason"]), &rows))
}

fn speed(record: &EvaluateRecord) -> String {
    let Some(pace) = &record.found.pace else { return String::new() };
    let ms = &pace.ms_per_tile;
    let row = vec![
        Cell::Number(count(pace.batch_size as u64)),
        Cell::Number(count(pace.tiles)),
        Cell::Number(significant(pace.tiles_per_sec)),
        Cell::Number(significant(ms.p50)),
        Cell::Number(significant(ms.p90)),
        Cell::Number(significant(ms.p99)),
        Cell::Number(significant(record.found.images as f64 / record.found.seconds)),
    ];
    let heads =
        owned(&["batch", "tiles", "tiles/s, model alone", "ms/tile, p50", "p90", "p99", "images/s with reading"]);
    let lead = "The warm model alone, timed batch by batch while it predicted; the last column counts reading and decoding too.";
    section("Speed", lead, &table(&heads, &[row]))
}

fn computed(record: &EvaluateRecord) -> String {
    let drawn = &record.found.drawn;
    let html = format!(
        "<p>Means are over the classes that occur. AUC is the chance that an image of the class scores above another, ties \
         counting half (Hanley &amp; McNeil 1982), against the rest. Kappa is Cohen’s (1960), unweighted. ECE is Σ |B|/n · \
         |accuracy(B) − confidence(B)| over {} bins of equal width (Guo et al., <i>On Calibration of Modern Neural \
         Networks</i>, ICML 2017). Dice is 2·|A∩B| / (|A| + |B|), IoU |A∩B| / |A∪B|, over the pixels of all images; F1 is \
         Dice over images.</p>\n\
         <p>Intervals hold {} of {} bootstrap resamples (seed {}) of the {} {}, drawn whole.</p>\n",
        crate::measure::CALIBRATION_BINS,
        percent(drawn.confidence),
        count(drawn.resamples),
        drawn.seed,
        count(drawn.units),
        escape(&drawn.unit)
    );
    section("How it was computed", "", &html)
}

fn setting(record: &EvaluateRecord) -> String {
    let found = &record.found;
    let facts = vec![
        ("model", format!("{} ({}), {}", found.model.name, found.model.variant, found.model.file)),
        ("SHA-256", found.model.sha256.clone()),
        ("ran by", format!("{} on {}: {}", found.ran_on.provider, found.ran_on.device, found.ran_on.reason)),
        ("start", start_in_words(&found.ran_on)),
        ("images", format!("{}, fit {}", found.labels, found.fit)),
    ];
    section("Machine, versions and files", "", &account(&record.account, facts))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::super::compare::example;
    use super::super::super::{
        BinRecord, DrawnRecord, EVALUATE_SCHEMA, EvaluatedRecord, FailedImage, Figures, ModelRecord, RanOnRecord,
    };
    use super::super::tests::assert_nested;
    use super::*;

    const HOSTILE: &str = "\"><script>alert('x')</script>&";

    fn record(classes: usize) -> EvaluateRecord {
        let setting = example::example();
        let figure = |value| Some(FigureRecord { value, low: Some(value - 0.1), high: None });
        let class = |index: usize| ClassFigures {
            class: format!("{HOSTILE}{index}"),
            color: [1, 2, 3],
            support: 3,
            predicted: 4,
            precision: figure(0.5),
            recall: None,
            f1: figure(0.25),
            iou: None,
            auc: figure(0.75),
        };
        let row = |label: usize| (0..=classes).map(|predicted| if label == predicted { 2 } else { 1 }).collect();
        let worst = |_| WorstRecord::new(HOSTILE.into(), (Some("a".into()), Some(HOSTILE.into())), 0.9, b"png");
        EvaluateRecord {
            schema: EVALUATE_SCHEMA.into(),
            account: setting.account,
            found: EvaluatedRecord {
                model: ModelRecord {
                    name: HOSTILE.into(),
                    variant: "fp32".into(),
                    file: "m.onnx".into(),
                    sha256: "0".into(),
                    task: "classification".into(),
                    classes: Vec::new(),
                },
                ran_on: RanOnRecord {
                    device: "cpu".into(),
                    provider: "cpu".into(),
                    reason: "asked".into(),
                    sessions: 1,
                    batch_size: 1,
                    total_batch_size: 1,
                    load_secs: 0.5,
                    warm_up_secs: 0.25,
                },
                labels: HOSTILE.into(),
                fit: "exact".into(),
                images: 9,
                items: 9,
                not_a_number: 2,
                failed: vec![FailedImage { path: HOSTILE.into(), reason: HOSTILE.into(), hint: None }],
                skipped: std::collections::BTreeMap::new(),
                figures: Figures { top1: figure(0.5), ece: figure(f64::NAN), ..Figures::default() },
                classes: (0..classes).map(class).collect(),
                confusion: (0..classes).map(row).collect(),
                calibration: vec![BinRecord {
                    above: 0.0,
                    up_to: 0.1,
                    items: 1,
                    confidence: Some(0.1),
                    accuracy: None,
                }],
                drawn: DrawnRecord { unit: "images".into(), units: 1, resamples: 200, confidence: 0.95, seed: 0 },
                worst: (0..3).map(worst).collect(),
                pace: None,
                utilisation_by_device: BTreeMap::new(),
                seconds: 0.0,
                notes: vec![HOSTILE.into()],
            },
        }
    }

    #[test]
    fn a_page_is_sound_whatever_names_are_given() {
        for classes in [3, MOST_CLASSES + 1] {
            let html = evaluate_html(&record(classes));
            assert_nested(&html);
            for foreign in ["<script", "http:", "https:", "@import", "url(", "NaN", ">inf"] {
                assert!(!html.contains(foreign), "{foreign}");
            }
            assert_eq!(html.matches("src=\"data:image/png;base64,").count(), 3);
            assert_eq!(html.contains("class=\"heat\""), classes == 3);
            for expected in ["could not be read: 1, listed", "no number"] {
                assert!(html.contains(expected), "{expected}");
            }
        }
    }

    #[test]
    fn maps_have_a_legend() {
        let mut record = record(3);
        record.found.model.task = "segmentation".into();
        record.found.worst.iter_mut().for_each(|worst| worst.label = None);
        let html = evaluate_html(&record);
        assert_nested(&html);
        assert_eq!(html.matches("background:rgb(1 2 3)").count(), 3);
        assert!(html.contains("<b>Dice 0.900</b>"));
    }

    #[test]
    fn shares_are_of_the_label() {
        let html = matrix(&record(3));
        // A row is 2 right, 1 to each other class, 1 no number: two fifths and one fifth.
        assert!(html.contains("<td class=\"right\" style=\"--share:40.0%\">2<small>40.0 %</small></td>"), "{html}");
        assert!(html.contains("<td class=\"wrong\" style=\"--share:20.0%\">1<small>20.0 %</small></td>"));
        assert!(heat(5, 5, true).contains("right deep") && heat(0, 0, false).contains("–"));
    }
}
