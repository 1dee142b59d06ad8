//! Charts of comparisons and benchmarks as inline SVG: scales, axes and text that keeps to its place.
//!
//! Every chart is drawn for a given width in pixels and grows in height with what it shows. Colours and fonts are the
//! page's: elements carry classes only.

mod bars;
mod bench;
mod scatter;
mod strips;

use std::fmt::Write;

pub(super) use bars::rates;
pub(super) use bench::{Against, entries, rank_impact, rate_against};
pub(super) use scatter::speed_against_agreement;
pub(super) use strips::latencies;

use super::compare::{CompareRecord, LadderRow, RateRecord};
use super::text::escape;

/// Size of most text in pixels, as the page's style has it.
const TEXT: f64 = 12.5;

/// Where a rate stands in a step.
type RateOf = fn(&LadderRow) -> Option<&RateRecord>;

/// The two ways in which a step is measured: class of the colour, name, where it stands.
const SERIES: [(&str, &str, RateOf); 2] =
    [("model", "model alone", |row| row.model_only.as_ref()), ("whole", "end to end", |row| row.end_to_end.as_ref())];

/// A line from values to pixels.
struct Scale {
    is_log: bool,
    /// Values at both ends.
    domain: [f64; 2],
    /// Pixels at both ends.
    range: [f64; 2],
}

impl Scale {
    /// From 0, in equal steps.
    fn linear(high: f64, range: [f64; 2]) -> Self {
        let high = if high.is_finite() && high > 0.0 { high } else { 1.0 };
        Self { is_log: false, domain: [0.0, high], range }
    }

    /// For values above 0 of any size: logarithmic if the largest is over eight times the smallest, else in equal steps,
    /// from 0 or, for what is told by its place alone, from below the smallest.
    fn fitting(values: impl Iterator<Item = f64>, from_zero: bool, range: [f64; 2]) -> Self {
        let (mut low, mut high) = (f64::INFINITY, 0.0_f64);
        for value in values.filter(|value| value.is_finite() && *value > 0.0) {
            low = low.min(value);
            high = high.max(value);
        }
        if high > 8.0 * low {
            return Self { is_log: true, domain: [low / 1.3, high * 1.3], range };
        }
        if from_zero || high == 0.0 {
            return Self::linear(high * 1.05, range);
        }
        let margin = (0.08 * (high - low)).max(0.02 * high);
        Self { is_log: false, domain: [(low - margin).max(0.0), high + margin], range }
    }

    fn at(&self, value: f64) -> f64 {
        let place = |value: f64| if self.is_log { value.max(f64::MIN_POSITIVE).ln() } else { value };
        let [low, high] = self.domain.map(place);
        let share = ((place(value) - low) / (high - low)).clamp(0.0, 1.0);
        self.range[0] + (self.range[1] - self.range[0]) * share
    }

    /// Round values inside the domain: multiples of 1, 2 or 5 · 10ⁿ (Heckbert, *Graphics Gems*, 1990), on a logarithmic
    /// scale these themselves. No two labels touch.
    fn ticks(&self, label: impl Fn(f64) -> String) -> Vec<(f64, String)> {
        let [low, high] = self.domain;
        let width = |tick: f64| text_width(&label(tick), TEXT) + 14.0;
        let room = (self.range[1] - self.range[0]).abs();
        let fits = |ticks: &[f64]| {
            ticks
                .windows(2)
                .all(|pair| (self.at(pair[1]) - self.at(pair[0])).abs() >= (width(pair[0]) + width(pair[1])) / 2.0)
        };
        let candidates: Vec<Vec<f64>> = if self.is_log {
            let sets: [(&[f64], usize); 6] =
                [(&[1.0, 2.0, 5.0], 1), (&[1.0, 3.0], 1), (&[1.0], 1), (&[1.0], 2), (&[1.0], 4), (&[1.0], 16)];
            sets.iter().map(|(mantissas, every)| log_ticks(low, high, mantissas, *every)).collect()
        } else {
            (2..=8)
                .rev()
                .map(|count| linear_ticks(low, high, (room / 60.0).clamp(2.0, 8.0).min(f64::from(count))))
                .collect()
        };
        let ticks = candidates.into_iter().find(|ticks| fits(ticks)).unwrap_or_default();
        ticks.into_iter().map(|tick| (self.at(tick), label(tick))).collect()
    }
}

fn linear_ticks(low: f64, high: f64, count: f64) -> Vec<f64> {
    let raw = (high - low) / count;
    let power = 10_f64.powf(raw.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|factor| factor * power).find(|step| *step >= raw * 0.999);
    let step = step.unwrap_or(raw);
    let first = (low / step).ceil();
    (0..20).map(|index| (first + f64::from(index)) * step).take_while(|tick| *tick <= high * 1.0001).collect()
}

fn log_ticks(low: f64, high: f64, mantissas: &[f64], every: usize) -> Vec<f64> {
    #[expect(clippy::cast_possible_truncation, reason = "an exponent of f64")]
    let [first, last] = [low.log10().floor() as i32, high.log10().ceil() as i32];
    let powers = (first..=last).step_by(every).map(|exponent| 10_f64.powi(exponent));
    let all = powers.flat_map(|power| mantissas.iter().map(move |mantissa| mantissa * power));
    all.filter(|tick| (low..=high).contains(tick)).collect()
}

/// An SVG picture in the making.
struct Svg {
    width: f64,
    body: String,
}

impl Svg {
    fn new(width: f64) -> Self {
        Self { width, body: String::new() }
    }

    /// Text at a baseline; `anchor` is `start`, `middle` or `end`.
    fn text(&mut self, at: [f64; 2], anchor: &str, class: &str, text: &str) {
        let [x, y] = at;
        let text = escape(text);
        self.put(format_args!(
            "<text x=\"{x:.1}\" y=\"{y:.1}\" class=\"{class}\" text-anchor=\"{anchor}\">{text}</text>"
        ));
    }

    fn line(&mut self, from: [f64; 2], to: [f64; 2], class: &str) {
        let ([x1, y1], [x2, y2]) = (from, to);
        self.put(format_args!("<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" class=\"{class}\"/>"));
    }

    fn rect(&mut self, at: [f64; 2], size: [f64; 2], class: &str) {
        let ([x, y], [width, height]) = (at, size);
        self.put(format_args!(
            "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" class=\"{class}\"/>"
        ));
    }

    fn circle(&mut self, at: [f64; 2], radius: f64, class: &str) {
        let [x, y] = at;
        self.put(format_args!("<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"{radius}\" class=\"{class}\"/>"));
    }

    /// Opens a group that says `title` when pointed at.
    fn open(&mut self, title: &str) {
        let title = escape(title);
        self.put(format_args!("<g><title>{title}</title>"));
    }

    fn close(&mut self) {
        self.body.push_str("</g>\n");
    }

    /// Vertical grid lines with their labels below, and the axis' title below these.
    fn x_axis(&mut self, scale: &Scale, from_to: [f64; 2], title: &str, label: impl Fn(f64) -> String) {
        let [top, bottom] = from_to;
        let mut free = 0.0;
        for (x, label) in scale.ticks(label) {
            self.line([x, top], [x, bottom], "grid");
            let half = text_width(&label, TEXT) / 2.0;
            // A label at the edge is moved inwards, and may have no room there.
            let middle = x.clamp(half, (self.width - half).max(half));
            if middle - half >= free {
                self.text([middle, bottom + 16.0], "middle", "tick", &label);
                free = middle + half + 4.0;
            }
        }
        let [start, end] = scale.range;
        self.text([(start + end) / 2.0, bottom + 35.0], "middle", "axis", title);
    }

    /// The name of a step on a line of its own, what else is said of it at the right if there is room.
    fn step_name(&mut self, y: f64, step: usize, name: &str, aside: &str) {
        let number = step.to_string();
        let indent = text_width(&number, TEXT) + 10.0;
        let aside_width = text_width(aside, TEXT);
        let room = self.width - indent;
        let has_aside = 1.1 * text_width(name, TEXT) + aside_width + 24.0 <= room || aside_width < room * 0.4;
        let room = if has_aside { room - aside_width - 16.0 } else { room };
        self.text([0.0, y], "start", "step", &number);
        // Names are bold, and so wider than the estimate.
        self.text([indent, y], "start", "name", &shortened(name, room / 1.1));
        if has_aside {
            self.text([self.width, y], "end", "aside", aside);
        }
    }

    /// Text of which the first part weighs more.
    fn value(&mut self, at: [f64; 2], strong: &str, rest: &str) {
        let ([x, y], strong, rest) = (at, escape(strong), escape(rest));
        self.put(format_args!(
            "<text x=\"{x:.1}\" y=\"{y:.1}\" class=\"value\"><tspan class=\"strong\">{strong}</tspan> {rest}</text>"
        ));
    }

    /// Swatches with the names of the series.
    fn legend(&mut self, y: f64, series: &[(&str, &str)]) {
        let mut x = 0.0;
        for (class, name) in series {
            self.rect([x, y - 9.0], [10.0, 10.0], &format!("fill-{class}"));
            self.text([x + 16.0, y], "start", "aside", name);
            x += 16.0 + text_width(name, TEXT) + 20.0;
        }
    }

    /// The whole element; `label` says in words what it shows, `class` when it is shown.
    fn finish(self, height: f64, class: &str, label: &str) -> String {
        let (width, body, label) = (self.width, self.body, escape(label));
        format!(
            "<svg class=\"chart {class}\" viewBox=\"0 0 {width:.0} {height:.0}\" width=\"{width:.0}\" \
             height=\"{height:.0}\" role=\"img\" aria-label=\"{label}\">\n{body}</svg>\n"
        )
    }

    fn put(&mut self, element: std::fmt::Arguments<'_>) {
        // Writing to a String cannot fail.
        let _ = self.body.write_fmt(element);
        self.body.push('\n');
    }
}

/// The series that some step has, as class and name.
fn series_of(record: &CompareRecord) -> Vec<(&'static str, &'static str)> {
    let is_measured = |rate_of: RateOf| record.found.ladder.iter().any(|row| rate_of(row).is_some());
    SERIES.iter().filter(|(_, _, rate_of)| is_measured(*rate_of)).map(|(class, name, _)| (*class, *name)).collect()
}

/// About how wide a text is in a sans-serif font of `size`: rather too wide than too narrow.
fn text_width(text: &str, size: f64) -> f64 {
    let ems = |character: char| match character {
        'i' | 'j' | 'l' | 'I' | '.' | ',' | ':' | ';' | '\'' | '|' | '!' | '(' | ')' | '[' | ']' | ' ' | 'f' | 't'
        | 'r' => 0.36,
        'm' | 'w' | 'M' | 'W' | '%' | '@' => 0.92,
        'A'..='Z' | '<' | '>' | '+' | '=' | '×' | '–' => 0.7,
        character if character as u32 >= 0x2e80 => 1.05,
        _ => 0.59,
    };
    text.chars().map(ems).sum::<f64>() * size
}

/// The text, or as much of its start as fits with an ellipsis.
fn shortened(text: &str, room: f64) -> String {
    if text_width(text, TEXT) <= room {
        return text.to_owned();
    }
    let mut kept = String::new();
    for character in text.chars() {
        kept.push(character);
        if text_width(&kept, TEXT) + TEXT > room {
            kept.pop();
            break;
        }
    }
    format!("{}…", kept.trim_end())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::compare::CosineRecord;
    use crate::report::compare::example::{example, with_steps};
    use crate::report::text::tick;
    use proptest::prelude::*;

    #[test]
    fn ticks_are_round() {
        let labels = |scale: Scale| scale.ticks(tick).into_iter().map(|(_, label)| label).collect::<Vec<_>>();
        assert_eq!(labels(Scale::linear(214.0, [0.0, 400.0])), ["0", "50", "100", "150", "200"]);
        assert_eq!(labels(Scale::fitting([11.6, 12.4].into_iter(), false, [0.0, 300.0])), ["11.5", "12", "12.5"]);
        let log = Scale::fitting([80.0, 10_546.0].into_iter(), true, [0.0, 400.0]);
        assert_eq!(labels(log), ["100", "300", "1,000", "3,000", "10,000"]);
        assert_eq!(labels(Scale::fitting([1e-3, 1e9].into_iter(), true, [0.0, 200.0])), ["1", "10,000", "10⁸"]);
    }

    #[test]
    fn long_names_are_cut_to_their_room() {
        assert_eq!(shortened("short", 100.0), "short");
        let cut = shortened(&"invasive carcinoma ".repeat(10), 120.0);
        assert!(cut.ends_with('…') && text_width(&cut, TEXT) <= 120.0, "{cut}");
    }

    /// What each text of a chart covers: left, top, right, bottom.
    fn text_boxes(svg: &str) -> Vec<([f64; 4], String)> {
        let attribute = |line: &str, name: &str| {
            let start = line.find(&format!("{name}=\""))? + name.len() + 2;
            Some(line[start..].split('"').next()?.to_owned())
        };
        let number = |line: &str, name: &str| attribute(line, name).unwrap().parse::<f64>().unwrap();
        let mut boxes = Vec::new();
        for line in svg.lines().filter(|line| line.starts_with("<text")) {
            let content: String =
                line.split('<').map(|part| part.split_once('>').map_or("", |(_, text)| text)).collect();
            let content =
                content.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", "\"").replace("&amp;", "&");
            let (x, y, wide) = (number(line, "x"), number(line, "y"), text_width(&content, 0.97 * TEXT));
            let left = match attribute(line, "text-anchor").as_deref() {
                Some("end") => x - wide,
                Some("middle") => x - wide / 2.0,
                _ => x,
            };
            boxes.push(([left, y - 9.0, left + wide, y + 1.0], content));
        }
        boxes
    }

    fn assert_legible(svg: &str, width: f64) {
        let boxes = text_boxes(svg);
        for (index, (a, text)) in boxes.iter().enumerate() {
            assert!(a[0] >= -2.0 && a[2] <= width + 2.0, "{text:?} leaves a chart of {width}: {a:?}");
            for (b, other) in &boxes[index + 1..] {
                let is_apart = a[2] <= b[0] || b[2] <= a[0] || a[3] <= b[1] || b[3] <= a[1];
                assert!(is_apart, "{text:?} and {other:?} overlap in a chart of {width}: {a:?} {b:?}");
            }
        }
        assert!(!svg.contains("NaN") && !svg.contains("\"inf") && !svg.contains(">inf"), "{svg}");
    }

    fn draw_all(record: &CompareRecord) {
        for width in [330.0, 920.0] {
            assert_legible(&rates(record, width, "wide"), width);
            assert_legible(&latencies(record, width, "wide"), width);
            if let Some(svg) = speed_against_agreement(record, width, "wide") {
                assert_legible(&svg, width);
            }
        }
    }

    #[test]
    fn charts_of_odd_records_are_legible() {
        draw_all(&example());
        draw_all(&with_steps(&[("original", "fp32", 1, Some(12.0), None)]));
        draw_all(&with_steps(&[("original", "fp32", 1, None, None), ("other", "int8", 1, None, None)]));
        let mut record = example();
        for row in &mut record.found.ladder {
            let rate = row.model_only.as_mut().unwrap();
            (rate.tiles_per_sec, rate.samples_ms[0], rate.ms_per_tile.median) = (f64::NAN, f64::INFINITY, f64::NAN);
        }
        record.found.ladder[2].end_to_end.as_mut().unwrap().tiles_per_sec = f64::INFINITY;
        record.found.agreement[0].cosine = Some(CosineRecord { mean: f64::NAN, p1: f64::NAN, min: f64::NAN });
        draw_all(&record);
        record.found.ladder.clear();
        draw_all(&record);
    }

    const NAMES: [&str; 4] = [
        "+ batching",
        "x",
        "<script>alert(\"everything quantised, attention included, in a transformer of many layers\")</script>",
        "浸潤性乳管癌モデル",
    ];

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn charts_of_any_ladder_are_legible(
            steps in prop::collection::vec(
                (0..4_usize, 0..4_usize, 1..99_999_usize, prop::option::of(-3.0..6.0_f64), prop::option::of(-3.0..6.0_f64)),
                1..12,
            ),
        ) {
            let ms = |exponent: Option<f64>| exponent.map(|exponent| 10_f64.powf(exponent));
            let steps: Vec<_> = steps
                .into_iter()
                .map(|(name, variant, batch, model, whole)| (NAMES[name], NAMES[variant], batch, ms(model), ms(whole)))
                .collect();
            draw_all(&with_steps(&steps));
        }
    }

    proptest! {
        #[test]
        fn scales_keep_to_their_range(values in prop::collection::vec(1e-9..1e12_f64, 1..20), width in 120.0..900.0_f64, from_zero: bool) {
            let scale = Scale::fitting(values.iter().copied(), from_zero, [0.0, width]);
            for value in values.iter().chain(&[0.0, f64::INFINITY]) {
                prop_assert!((0.0..=width).contains(&scale.at(*value)), "{value}");
            }
            let ticks = scale.ticks(tick);
            let is_apart = |pair: &[(f64, String)]| {
                pair[1].0 - pair[0].0 > (text_width(&pair[0].1, TEXT) + text_width(&pair[1].1, TEXT)) / 2.0
            };
            prop_assert!(ticks.windows(2).all(is_apart), "{ticks:?}");
        }
    }
}
