//! The ladder as bars: tiles per second of every step, with its speed-up.

use super::super::compare::{CompareRecord, RateRecord};
use super::super::text::{or_absent, significant, tick, times};
use super::{SERIES, Scale, Svg, TEXT, series_of, shortened, text_width};

const BAR: f64 = 13.0;

/// Bars from 0 for each step, one per way of measuring; `class` says when the page shows this size.
pub(in super::super) fn rates(record: &CompareRecord, width: f64, class: &str) -> String {
    let mut svg = Svg::new(width);
    let series = series_of(record);
    let rates = || record.found.ladder.iter().flat_map(|row| SERIES.iter().filter_map(|(_, _, rate_of)| rate_of(row)));
    let labels = rates().map(|rate| label_of(rate).iter().map(|part| text_width(part, TEXT) + 4.0).sum());
    let label_width = labels.fold(60.0, f64::max) + 10.0;
    let fastest = rates().map(|rate| rate.tiles_per_sec).filter(|rate| rate.is_finite()).fold(0.0, f64::max);
    let scale = Scale::linear(fastest, [0.0, (width - label_width).max(60.0)]);

    let top = if series.len() > 1 { 26.0 } else { 4.0 };
    if series.len() > 1 {
        svg.legend(12.0, &series);
    }
    let row_height = |index: usize| {
        let bars =
            SERIES.iter().filter(|(_, _, rate_of)| rate_of(&record.found.ladder[index]).is_some()).count().max(1);
        22.0 + bars as f64 * (BAR + 3.0) + 9.0
    };
    let bottom = top + (0..record.found.ladder.len()).map(row_height).sum::<f64>();
    svg.x_axis(&scale, [top, bottom], "tiles per second", tick);

    let mut y = top;
    for (index, row) in record.found.ladder.iter().enumerate() {
        svg.open(&row.name);
        svg.step_name(y + 15.0, index + 1, &row.name, &format!("{} · batch {}", row.variant, row.batch));
        let mut bar_y = y + 22.0;
        for (class, _, rate_of) in SERIES {
            let Some(rate) = rate_of(row) else { continue };
            let end = if rate.tiles_per_sec.is_finite() { scale.at(rate.tiles_per_sec).max(1.5) } else { 0.0 };
            svg.rect([0.0, bar_y], [end, BAR], &format!("bar fill-{class}"));
            let [speedup, tiles] = label_of(rate);
            svg.value([end + 6.0, bar_y + BAR - 2.5], &speedup, &tiles);
            bar_y += BAR + 3.0;
        }
        if row.rate().is_some() {
            svg.line([0.0, y + 19.0], [0.0, bar_y], "base");
        } else {
            let why = row.note.as_deref().unwrap_or("not measured");
            svg.text([0.0, bar_y + BAR - 2.5], "start", "aside", &shortened(why, width));
        }
        svg.close();
        y += row_height(index);
    }
    svg.finish(bottom + 44.0, class, "Tiles per second of each step, with its speed-up over the original")
}

/// The speed-up and the rate itself.
fn label_of(rate: &RateRecord) -> [String; 2] {
    let speedup = or_absent(rate.speedup, |speedup| times(speedup.value));
    let tiles = significant(rate.tiles_per_sec);
    [speedup, if rate.tiles_per_sec.is_finite() { format!("{tiles}/s") } else { tiles }]
}
