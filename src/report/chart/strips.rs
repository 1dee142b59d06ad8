//! The samples themselves: every round of every step as a dot, with median and quartiles.

use super::super::compare::CompareRecord;
use super::super::text::{significant, tick};
use super::{SERIES, Scale, Svg, series_of};
use crate::measure::percentile;

/// More dots than this are not told apart: of longer series every n-th of the sorted samples is drawn.
const DOTS: usize = 150;
const STRIP: f64 = 20.0;

/// Milliseconds per tile of each round; `class` says when the page shows this size.
pub(in super::super) fn latencies(record: &CompareRecord, width: f64, class: &str) -> String {
    let mut svg = Svg::new(width);
    let series = series_of(record);
    let rates = || record.found.ladder.iter().flat_map(|row| SERIES.iter().filter_map(|(_, _, rate_of)| rate_of(row)));
    let scale = Scale::fitting(rates().flat_map(|rate| rate.samples_ms.iter().copied()), false, [4.0, width - 4.0]);
    let top = if series.len() > 1 { 26.0 } else { 4.0 };
    if series.len() > 1 {
        svg.legend(12.0, &series);
    }
    let measured = || record.found.ladder.iter().enumerate().filter(|(_, row)| row.rate().is_some());
    let strips =
        |index: usize| SERIES.iter().filter(|(_, _, rate_of)| rate_of(&record.found.ladder[index]).is_some()).count();
    let row_height = |index: usize| 22.0 + strips(index) as f64 * (STRIP + 3.0) + 7.0;
    let bottom = top + measured().map(|(index, _)| row_height(index)).sum::<f64>();
    let title = if scale.is_log { "milliseconds per tile (logarithmic)" } else { "milliseconds per tile" };
    svg.x_axis(&scale, [top, bottom], title, tick);

    let mut y = top;
    for (index, row) in measured() {
        svg.open(&row.name);
        let medians = SERIES.iter().filter_map(|(_, _, rate_of)| rate_of(row));
        let medians: Vec<String> = medians.map(|rate| significant(rate.ms_per_tile.median)).collect();
        svg.step_name(y + 15.0, index + 1, &row.name, &format!("median {} ms", medians.join(" / ")));
        let mut middle = y + 22.0 + STRIP / 2.0;
        for (class, _, rate_of) in SERIES {
            let Some(rate) = rate_of(row) else { continue };
            strip(&mut svg, &scale, middle, class, &rate.samples_ms);
            middle += STRIP + 3.0;
        }
        svg.close();
        y += row_height(index);
    }
    svg.finish(bottom + 44.0, class, "Milliseconds per tile of each round of each step, with median and quartiles")
}

fn strip(svg: &mut Svg, scale: &Scale, middle: f64, class: &str, samples: &[f64]) {
    let mut sorted: Vec<f64> = samples.iter().copied().filter(|sample| sample.is_finite()).collect();
    sorted.sort_by(f64::total_cmp);
    if sorted.is_empty() {
        return;
    }
    let [low, median, high] = [25.0, 50.0, 75.0].map(|percent| scale.at(percentile(&sorted, percent)));
    svg.rect([low, middle - 7.0], [(high - low).max(1.0), 14.0], &format!("box line-{class}"));
    // The last one always, so that the slowest round is seen.
    let step = sorted.len().div_ceil(DOTS);
    for (index, sample) in sorted.iter().rev().step_by(step).enumerate() {
        // Spread by the golden ratio: neighbours lie apart, and every drawing is the same.
        let spread = (index as f64 * 0.618_034).fract() - 0.5;
        svg.circle([scale.at(*sample), middle + spread * 12.0], 2.2, &format!("dot fill-{class}"));
    }
    svg.line([median, middle - 9.0], [median, middle + 9.0], &format!("median line-{class}"));
}
