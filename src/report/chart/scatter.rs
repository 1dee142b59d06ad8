//! What speed costs: each step's speed-up against how close its outputs are to the original's.

use super::super::compare::{AgreementRecord, CompareRecord, Verdict, verdict};
use super::super::text::{near_one, tick, times};
use super::{Scale, Svg, TEXT, shortened, text_width};

pub(super) const RADIUS: f64 = 9.0;
pub(super) const PLOT_HEIGHT: f64 = 260.0;

/// More nines than these are all the same to the eye, and within rounding of f32.
const MOST_NINES: f64 = 7.0;

struct Point {
    step: usize,
    name: String,
    title: String,
    speedup: f64,
    nines: f64,
    is_good: bool,
}

/// Speed-up to the right, agreement upwards by its nines; `None` if no step has both. `class` says when the page shows
/// this size.
pub(in super::super) fn speed_against_agreement(record: &CompareRecord, width: f64, class: &str) -> Option<String> {
    let (measure, of): (&str, fn(&AgreementRecord) -> Option<f64>) = [
        (
            "mean cosine with the original",
            (|a| a.cosine.map(|cosine| cosine.mean)) as fn(&AgreementRecord) -> Option<f64>,
        ),
        ("pixels of the same class", |a| a.pixel_agreement),
        ("tiles of the same class", |a| a.top1_agreement),
    ]
    .into_iter()
    .find(|(_, of)| record.found.agreement.iter().any(|agreement| of(agreement).is_some_and(f64::is_finite)))?;
    let points = points(record, of);
    if points.is_empty() {
        return None;
    }

    let [low, high] =
        [f64::min, f64::max].map(|pick| points.iter().map(|point| point.nines).reduce(pick).unwrap_or(0.0));
    let [low, high] = [(low - 0.3).floor().max(0.0), (high + 0.3).ceil().min(MOST_NINES)];
    let grid = || (0..=7).map(f64::from).filter(move |nines| (low..=high).contains(nines));
    let left = 12.0 + grid().map(|nines| text_width(&nines_label(nines), TEXT)).fold(0.0, f64::max);
    let (top, right) = (28.0, width - 14.0);
    let y_scale =
        |nines: f64| top + RADIUS + 4.0 + (PLOT_HEIGHT - 2.0 * RADIUS - 8.0) * (high - nines) / (high - low).max(1.0);
    let bottom = top + PLOT_HEIGHT;
    let values = points.iter().map(|point| point.speedup).chain([1.0]);
    let scale = Scale::fitting(values, true, [left + RADIUS + 4.0, right - RADIUS]);

    let mut svg = Svg::new(width);
    svg.text([0.0, 14.0], "start", "axis", &format!("{measure}, higher is closer"));
    for nines in grid() {
        svg.line([left, y_scale(nines)], [right, y_scale(nines)], "grid");
        svg.text([left - 6.0, y_scale(nines) + 4.0], "end", "tick", &nines_label(nines));
    }
    let title =
        if scale.is_log { "times as fast as the original (logarithmic)" } else { "times as fast as the original" };
    svg.x_axis(&scale, [top, bottom], title, |value| format!("{}×", tick(value)));
    svg.line([scale.at(1.0), top], [scale.at(1.0), bottom], "base");

    let marks: Vec<Mark> = points
        .into_iter()
        .map(|Point { step, name, title, speedup, nines, is_good }| Mark {
            number: step,
            name,
            title,
            at: [scale.at(speedup), y_scale(nines)],
            is_good,
        })
        .collect();
    draw(&mut svg, &marks, [left, top, right, bottom]);
    Some(svg.finish(
        bottom + 44.0,
        class,
        "Speed-up of each step against the agreement of its outputs with the original",
    ))
}

fn points(record: &CompareRecord, of: fn(&AgreementRecord) -> Option<f64>) -> Vec<Point> {
    let original = record.original();
    let point = |(index, row): (usize, &super::LadderRow)| {
        let speedup = if index == 0 { 1.0 } else { row.rate()?.speedup?.value };
        // The original's own variant is compared with nothing: it is the original.
        let agreement = match record.agreement_of(&row.variant).and_then(of) {
            Some(agreement) => agreement,
            None if original == Some(row.variant.as_str()) => 1.0,
            None => return None,
        };
        let is_shown = speedup.is_finite() && speedup > 0.0 && agreement.is_finite();
        is_shown.then(|| Point {
            step: index + 1,
            name: row.name.clone(),
            title: format!("{}: {}, {}", row.name, times(speedup), near_one(agreement)),
            speedup,
            nines: (-(1.0 - agreement).max(1e-9).log10()).clamp(0.0, MOST_NINES),
            is_good: !matches!(verdict(record, index), Verdict::FailsGate | Verdict::Slower),
        })
    };
    record.found.ladder.iter().enumerate().filter_map(point).collect()
}

/// `0.999` for three nines.
fn nines_label(nines: f64) -> String {
    match nines {
        _ if nines <= 0.0 => "≤0".to_owned(),
        _ if nines >= MOST_NINES => "equal".to_owned(),
        _ => near_one(1.0 - 10_f64.powf(-nines)).trim_end_matches('0').to_owned(),
    }
}

/// A numbered mark of something that has a name.
pub(super) struct Mark {
    pub(super) number: usize,
    pub(super) name: String,
    /// What is said when it is pointed at.
    pub(super) title: String,
    /// Pixels.
    pub(super) at: [f64; 2],
    pub(super) is_good: bool,
}

/// Draws marks inside a frame, none over another, and names where there is room.
pub(super) fn draw(svg: &mut Svg, marks: &[Mark], frame: [f64; 4]) {
    let places = settled(marks, frame);
    let mut taken: Vec<[f64; 4]> =
        places.iter().map(|[x, y]| [x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS]).collect();
    for (mark, [x, y]) in marks.iter().zip(&places) {
        svg.open(&mark.title);
        if (mark.at[0] - x).hypot(mark.at[1] - y) > 1.0 {
            svg.line(mark.at, [*x, *y], "leader");
            svg.circle(mark.at, 1.5, "dot-true");
        }
        svg.circle([*x, *y], RADIUS, if mark.is_good { "mark good" } else { "mark bad" });
        let class = if mark.is_good { "on-mark" } else { "on-hollow" };
        svg.text([*x, y + 4.0], "middle", class, &mark.number.to_string());
        let name = shortened(&mark.name, (svg.width * 0.3).min(160.0));
        if let Some((anchor, at, area)) = free_place(&name, [*x, *y], frame, &taken) {
            taken.push(area);
            svg.text(at, anchor, "mark-name", &name);
        }
        svg.close();
    }
}

/// Where the marks are drawn: at their place, or as near to it inside the frame as leaves those before them free.
fn settled(marks: &[Mark], frame: [f64; 4]) -> Vec<[f64; 2]> {
    let [left, top, right, bottom] = frame;
    let mut moves: Vec<[f64; 2]> =
        (-30..=30).flat_map(|x| (-3..=3).map(move |y| [5.0 * f64::from(x), 20.0 * f64::from(y)])).collect();
    moves.sort_by(|a, b| a[0].hypot(a[1]).total_cmp(&b[0].hypot(b[1])));
    let mut settled: Vec<[f64; 2]> = Vec::new();
    for mark in marks {
        let [x, y] = mark.at;
        let is_free = |[x, y]: &[f64; 2]| {
            let is_inside = left + RADIUS <= *x && *x + RADIUS <= right && top + RADIUS <= *y && *y + RADIUS <= bottom;
            is_inside && settled.iter().all(|other| (other[0] - x).hypot(other[1] - y) > 2.0 * RADIUS + 1.0)
        };
        let free = moves.iter().map(|by| [x + by[0], y + by[1]]).find(is_free).unwrap_or([x, y]);
        settled.push(free);
    }
    settled
}

/// A place beside a mark where its name covers nothing: the text's anchor, its baseline, and the area it takes.
fn free_place(
    name: &str,
    mark: [f64; 2],
    frame: [f64; 4],
    taken: &[[f64; 4]],
) -> Option<(&'static str, [f64; 2], [f64; 4])> {
    let [x, y] = mark;
    let (wide, gap) = (text_width(name, TEXT), RADIUS + 5.0);
    let candidates = [
        ("start", [x + gap, y + 4.0]),
        ("end", [x - gap, y + 4.0]),
        ("middle", [x, y - gap]),
        ("middle", [x, y + gap + 9.0]),
        ("start", [x + gap - 3.0, y - gap + 2.0]),
        ("start", [x + gap - 3.0, y + gap + 7.0]),
        ("end", [x - gap + 3.0, y - gap + 2.0]),
        ("end", [x - gap + 3.0, y + gap + 7.0]),
    ];
    let area = |(anchor, [x, y]): (&'static str, [f64; 2])| {
        let left = match anchor {
            "start" => x,
            "end" => x - wide,
            _ => x - wide / 2.0,
        };
        // Two names side by side must not read as one.
        (anchor, [x, y], [left - 3.0, y - 10.0, left + wide + 3.0, y + 3.0])
    };
    let is_free = |(_, _, [left, top, right, bottom]): &(&str, [f64; 2], [f64; 4])| {
        let is_inside = *left >= frame[0] && *right <= frame[2] && *top >= frame[1] && *bottom <= frame[3];
        let is_clear =
            |other: &[f64; 4]| *right < other[0] || other[2] < *left || *bottom < other[1] || other[3] < *top;
        is_inside && taken.iter().all(is_clear)
    };
    candidates.into_iter().map(area).find(is_free)
}
