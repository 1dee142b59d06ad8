//! The charts of a benchmark: rates of all entries, rates against what they cost, and what the rank of an adapter does.

use super::super::bench::{BenchEntry, BenchRecord, LoraRecord};
use super::super::compare::IntervalRecord;
use super::super::text::{bytes, or_absent, significant, tick, times};
use super::scatter::{Mark, PLOT_HEIGHT, RADIUS, draw};
use super::{Scale, Svg, TEXT, text_width};

const BAR: f64 = 13.0;
const ROW: f64 = 22.0 + BAR + 12.0;
/// Class and name of both ways to have an adapter.
const WAYS: [(&str, &str, bool); 2] = [("whole", "unmerged", false), ("model", "merged", true)];

/// Bars from 0 for each entry, in the order of the record; `class` says when the page shows this size.
pub(in super::super) fn entries(record: &BenchRecord, width: f64, class: &str) -> String {
    let mut svg = Svg::new(width);
    let entries = &record.found.entries;
    let label_width = |entry: &BenchEntry| label_of(entry).iter().map(|part| text_width(part, TEXT) + 4.0).sum();
    let label_width = entries.iter().map(label_width).fold(60.0, f64::max) + 10.0;
    let rates = entries.iter().map(|entry| entry.samples_per_sec.value);
    let fastest = rates.filter(|rate| rate.is_finite()).fold(0.0, f64::max);
    let scale = Scale::linear(fastest, [0.0, (width - label_width).max(60.0)]);
    let bottom = 4.0 + entries.len() as f64 * ROW;
    svg.x_axis(&scale, [4.0, bottom], "samples per second", tick);
    for (index, entry) in entries.iter().enumerate() {
        let y = 4.0 + index as f64 * ROW;
        svg.open(&entry.name);
        let aside = format!("{} × {} in a batch", entry.sessions, entry.batch_size);
        svg.step_name(y + 15.0, index + 1, &entry.name, &aside);
        let rate = entry.samples_per_sec.value;
        let end = if rate.is_finite() { scale.at(rate).max(1.5) } else { 0.0 };
        let way = WAYS.iter().find(|way| entry.lora.is_some_and(|lora| lora.is_merged == way.2));
        svg.rect([0.0, y + 22.0], [end, BAR], &format!("bar fill-{}", way.map_or("model", |way| way.0)));
        let [strong, rest] = label_of(entry);
        svg.value([end + 6.0, y + 22.0 + BAR - 2.5], &strong, &rest);
        svg.line([0.0, y + 19.0], [0.0, y + 25.0 + BAR], "base");
        svg.close();
    }
    svg.finish(bottom + 44.0, class, "Samples per second of each entry")
}

/// The rate, and the ratio to the first entry where there is one.
fn label_of(entry: &BenchEntry) -> [String; 2] {
    let rate = significant(entry.samples_per_sec.value);
    [format!("{rate}/s"), or_absent(entry.ratio, |ratio| times(ratio.value)).replace('–', "")]
}

/// What a rate is held against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum Against {
    /// Elements of all weights.
    Parameters,
    /// Peak memory.
    Memory,
    /// Operations per sample.
    Operations,
}

impl Against {
    fn of(self, entry: &BenchEntry) -> Option<f64> {
        match self {
            Self::Parameters => Some(entry.parameters as f64 / 1e6),
            Self::Memory => entry.peak_bytes().map(|bytes| bytes as f64 / f64::from(1 << 20)),
            Self::Operations => Some(entry.flops as f64 / 1e9),
        }
    }

    fn title(self) -> &'static str {
        match self {
            Self::Parameters => "million parameters",
            Self::Memory => "MiB of memory at the peak",
            Self::Operations => "GFLOP per sample",
        }
    }

    fn in_words(self, entry: &BenchEntry) -> String {
        match self {
            Self::Parameters => format!("{} million parameters", significant(entry.parameters as f64 / 1e6)),
            Self::Memory => or_absent(entry.peak_bytes(), bytes),
            Self::Operations => format!("{} GFLOP", significant(entry.flops as f64 / 1e9)),
        }
    }
}

/// Samples per second upwards against a cost to the right; `None` if no entry has both. `class` says when the page shows
/// this size.
pub(in super::super) fn rate_against(
    record: &BenchRecord,
    against: Against,
    width: f64,
    class: &str,
) -> Option<String> {
    let entries = record.found.entries.iter().enumerate();
    let points: Vec<(usize, &BenchEntry, f64, f64)> = entries
        .filter_map(|(index, entry)| Some((index, entry, against.of(entry)?, entry.samples_per_sec.value)))
        .filter(|(.., cost, rate)| *cost > 0.0 && rate.is_finite() && *rate > 0.0)
        .collect();
    if points.is_empty() {
        return None;
    }
    let mut svg = Svg::new(width);
    let title =
        |title: &str, scale: &Scale| if scale.is_log { format!("{title} (logarithmic)") } else { title.to_owned() };
    let (top, bottom, right) = (28.0, 28.0 + PLOT_HEIGHT, width - 14.0);
    let inside = [bottom - RADIUS - 4.0, top + RADIUS + 4.0];
    let y = Scale::fitting(points.iter().map(|point| point.3), false, inside);
    let left = y_labels_width(&y, tick);
    svg.text([0.0, 14.0], "start", "axis", &title("samples per second", &y));
    y_axis(&mut svg, &y, [left, right], tick);
    let x = Scale::fitting(points.iter().map(|point| point.2), false, [left + RADIUS + 4.0, right - RADIUS]);
    svg.x_axis(&x, [top, bottom], &title(against.title(), &x), tick);
    let mark = |(index, entry, cost, rate): &(usize, &BenchEntry, f64, f64)| Mark {
        number: index + 1,
        name: entry.name.clone(),
        title: format!("{}: {} samples/s, {}", entry.name, significant(*rate), against.in_words(entry)),
        at: [x.at(*cost), y.at(*rate)],
        is_good: entry.lora.is_none_or(|lora| lora.is_merged),
    };
    let marks: Vec<Mark> = points.iter().map(mark).collect();
    draw(&mut svg, &marks, [left, top, right, bottom]);
    Some(svg.finish(bottom + 44.0, class, &format!("Samples per second against {}", against.title())))
}

/// The ratio to the baseline by rank, with its interval, merged and unmerged; `None` if there is none.
pub(in super::super) fn rank_impact(record: &BenchRecord, width: f64, class: &str) -> Option<String> {
    let ratios: Vec<(LoraRecord, IntervalRecord)> = record
        .found
        .entries
        .iter()
        .filter_map(|entry| Some((entry.lora?, entry.ratio.filter(IntervalRecord::is_finite)?)))
        .collect();
    if ratios.is_empty() {
        return None;
    }
    let mut svg = Svg::new(width);
    let (top, bottom, right) = (48.0, 48.0 + PLOT_HEIGHT * 0.8, width - 24.0);
    let label = |ratio: f64| format!("{}×", tick(ratio));
    let ends = ratios.iter().flat_map(|(_, ratio)| [ratio.low, ratio.high]).chain([1.0]);
    let y = Scale::fitting(ends, false, [bottom - 6.0, top + 6.0]);
    let left = y_labels_width(&y, label);
    let mut ranks: Vec<usize> = ratios.iter().map(|(lora, _)| lora.rank).collect();
    ranks.sort_unstable();
    ranks.dedup();
    let column = (right - left) / ranks.len() as f64;
    let x = |rank: usize| {
        let place = ranks.iter().position(|other| *other == rank).unwrap_or(0);
        left + column * (place as f64 + 0.5)
    };
    svg.legend(12.0, &WAYS.map(|(class, name, _)| (class, name)));
    svg.text([0.0, 36.0], "start", "axis", "times as fast as the baseline, with the interval of 95 %");
    y_axis(&mut svg, &y, [left, right], label);
    svg.line([left, y.at(1.0)], [right, y.at(1.0)], "base");
    for rank in &ranks {
        svg.text([x(*rank), bottom + 16.0], "middle", "tick", &rank.to_string());
    }
    svg.text([(left + right) / 2.0, bottom + 35.0], "middle", "axis", "rank");
    for (aside, (class, name, is_merged)) in [-6.0, 6.0].into_iter().zip(WAYS) {
        let mut of_way: Vec<&(LoraRecord, IntervalRecord)> =
            ratios.iter().filter(|(lora, _)| lora.is_merged == is_merged).collect();
        of_way.sort_by_key(|(lora, _)| lora.rank);
        let at = |(lora, ratio): &(LoraRecord, IntervalRecord)| [x(lora.rank) + aside, y.at(ratio.value)];
        for pair in of_way.windows(2) {
            svg.line(at(pair[0]), at(pair[1]), &format!("series line-{class}"));
        }
        for point in of_way {
            let (lora, ratio) = point;
            let [x, value] = at(point);
            svg.open(&format!("rank {}, {name}: {}", lora.rank, times(ratio.value)));
            svg.line([x, y.at(ratio.low)], [x, y.at(ratio.high)], &format!("median line-{class}"));
            svg.circle([x, value], 4.5, &format!("fill-{class}"));
            svg.close();
        }
    }
    Some(svg.finish(bottom + 44.0, class, "Times as fast as the baseline by rank, merged and unmerged"))
}

/// Pixels that the labels of an upright axis take.
fn y_labels_width(scale: &Scale, label: impl Fn(f64) -> String) -> f64 {
    12.0 + scale.ticks(label).iter().map(|(_, label)| text_width(label, TEXT)).fold(0.0, f64::max)
}

/// Horizontal grid lines with their labels at the left.
fn y_axis(svg: &mut Svg, scale: &Scale, from_to: [f64; 2], label: impl Fn(f64) -> String) {
    let [left, right] = from_to;
    for (y, label) in scale.ticks(label) {
        svg.line([left, y], [right, y], "grid");
        svg.text([left - 6.0, y + 4.0], "end", "tick", &label);
    }
}
