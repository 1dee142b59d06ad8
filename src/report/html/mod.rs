//! Reports as one page each, here that of a comparison: everything inline, no script, light and dark, for screens of any width and for paper.

mod bench;
mod evaluate;
mod tables;

use std::fmt::Write;

use super::AccountRecord;
use super::chart;
use super::compare::{CompareRecord, Verdict, fastest};
use super::text::{bytes, count, duration, escape, exact, near_one, significant, times};

pub use self::bench::bench_html;
pub use self::evaluate::evaluate_html;

const STYLE: &str = include_str!("style.css");

/// Widths in pixels for which charts are drawn; the page shows the one that suits.
const WIDE: f64 = 920.0;
const NARROW: f64 = 330.0;

/// The record as an HTML page that needs nothing but itself.
#[must_use]
pub fn compare_html(record: &CompareRecord) -> String {
    let names: Vec<&str> = record.found.models.iter().map(|model| model.name.as_str()).collect();
    let title = if names.is_empty() { "Comparison".to_owned() } else { names.join(", ") };
    let body = [
        header(record, &title),
        tiles(record),
        findings(record),
        ladder(record),
        agreement(record),
        tables::accuracy(record),
        tables::gates(record),
        pictures(record),
        latencies(record),
        measuring(record),
        setting(record),
    ]
    .concat();
    page(&format!("{title} – slidestream compare"), &body, &record.account.version)
}

/// A page around a body; it needs nothing but itself.
fn page(title: &str, body: &str, version: &str) -> String {
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n\
         <title>{}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\
         <footer>Written by slidestream {}. Not a medical device.</footer>\n</main>\n</body>\n</html>\n",
        escape(title),
        escape(version)
    )
}

fn header(record: &CompareRecord, title: &str) -> String {
    let mut devices: Vec<&str> =
        record.found.models.iter().flat_map(|m| &m.variants).map(|v| v.device.as_str()).collect();
    devices.sort_unstable();
    devices.dedup();
    let input = &record.found.input;
    format!(
        "<header>\n<p class=\"kicker\">slidestream compare</p>\n<h1>{}</h1>\n<p class=\"facts\">{} tiles of {} · on {} · {}</p>\n\
         </header>\n",
        escape(title),
        count(input.tiles),
        escape(&input.source),
        escape(&devices.join(", ")),
        escape(&record.account.started)
    )
}

/// The figures that matter most.
fn tiles(record: &CompareRecord) -> String {
    let mut shown: Vec<(&str, String, String)> = Vec::new();
    let good = fastest(record, &[Verdict::Faster]);
    let label = if good.is_some() && !record.found.gates.is_empty() { "fastest within gates" } else { "fastest" };
    let best = good.or_else(|| fastest(record, &[Verdict::FailsGate]));
    if let Some((_, row, speedup)) = best {
        shown.push((label, times(speedup.value), row.name.clone()));
    }
    let original = record.found.ladder.first();
    if let Some(row) = best.map(|(_, row, _)| row).or(original) {
        let is_other = best.is_some();
        if let Some(now) = row.rate() {
            let how = if row.end_to_end.is_some() { "tiles/s end to end" } else { "tiles/s, model alone" };
            let before = original.and_then(|original| original.rate()).filter(|_| is_other);
            let aside = before.map(|before| format!("instead of {}", significant(before.tiles_per_sec)));
            shown.push((how, significant(now.tiles_per_sec), aside.unwrap_or_else(|| row.name.clone())));
        }
        if let Some(now) = row.projected.iter().max_by_key(|projected| projected.tiles) {
            let before =
                original.and_then(|original| original.projected.iter().find(|before| before.tiles == now.tiles));
            let before = before.filter(|_| is_other).map(|before| format!(", instead of {}", duration(before.seconds)));
            let aside = format!("{} tiles{}", count(now.tiles), before.unwrap_or_default());
            shown.push(("projected", duration(now.seconds), aside));
        }
        if let Some(cosine) = record.agreement_of(&row.variant).and_then(|agreement| agreement.cosine) {
            shown.push(("mean cosine", near_one(cosine.mean), row.variant.clone()));
        }
    }
    if !record.found.gates.is_empty() {
        let passed = record.found.gates.iter().filter(|gate| gate.passed).count();
        let failed = record.found.gates.len() - passed;
        let aside = if failed == 0 { "all passed".to_owned() } else { format!("{failed} failed") };
        shown.push(("gates passed", format!("{passed} of {}", record.found.gates.len()), aside));
    }
    figures(&shown)
}

/// Label, figure and what stands smaller below it, side by side.
fn figures(shown: &[(&str, String, String)]) -> String {
    let mut html = String::from("<div class=\"tiles\">\n");
    for (label, figure, aside) in shown {
        let (figure, aside) = (escape(figure), escape(aside));
        let _ = writeln!(
            html,
            "<div class=\"tile\"><span class=\"label\">{label}</span><span class=\"figure\">{figure}</span>\
             <span class=\"aside\" title=\"{aside}\">{aside}</span></div>"
        );
    }
    html + "</div>\n"
}

fn findings(record: &CompareRecord) -> String {
    sentences(&record.conclusions)
}

fn sentences(said: &[String]) -> String {
    if said.is_empty() {
        return String::new();
    }
    let items: String = said.iter().map(|said| format!("<li>{}</li>\n", escape(said))).collect();
    section("What was found", "", &format!("<ul class=\"findings\">\n{items}</ul>\n"))
}

fn ladder(record: &CompareRecord) -> String {
    let lead = "Each step adds one thing to the one before it, unless its name says otherwise. The factor is the speed-up over \
                the original, from rounds that ran next to each other.";
    section(
        "The ladder",
        lead,
        &(both_sizes(|width, class| chart::rates(record, width, class)) + &tables::ladder(record)),
    )
}

fn agreement(record: &CompareRecord) -> String {
    if record.found.agreement.is_empty() {
        return String::new();
    }
    let draw = |width, class: &str| chart::speed_against_agreement(record, width, class).unwrap_or_default();
    let lead = "How close the outputs are to the original's on the same tiles, whoever is right. Numbers are the ladder's \
                steps; a hollow red mark is slower than the original or fails a gate. Marks that would cover each other are \
                moved aside, with a line to their place.";
    section("Speed against agreement", lead, &(both_sizes(draw) + &tables::agreement(record)))
}

fn latencies(record: &CompareRecord) -> String {
    let rates = || record.found.ladder.iter().flat_map(|row| [&row.model_only, &row.end_to_end]).flatten();
    if rates().all(|rate| rate.samples_ms.is_empty()) {
        return String::new();
    }
    let lead = "A dot is a round; the box holds the middle half of the rounds, the line in it is the median.";
    let notes: String = record
        .found
        .ladder
        .iter()
        .enumerate()
        .flat_map(|(index, row)| {
            let rates = [("model alone", &row.model_only), ("end to end", &row.end_to_end)];
            rates.into_iter().filter_map(|(way, rate)| Some((way, rate.as_ref()?))).flat_map(move |(way, rate)| {
                rate.notes.iter().map(move |note| format!("<li>Step {}, {way}: {}</li>\n", index + 1, escape(note)))
            })
        })
        .collect();
    let notes = if notes.is_empty() { notes } else { format!("<h3>Odd rounds</h3>\n<ul>\n{notes}</ul>\n") };
    section("Every round", lead, &(both_sizes(|width, class| chart::latencies(record, width, class)) + &notes))
}

fn pictures(record: &CompareRecord) -> String {
    if record.found.pictures.is_empty() {
        return String::new();
    }
    let mut html = String::from("<div class=\"pictures\">\n");
    for picture in &record.found.pictures {
        html.push_str(&figure(&picture.png_base64, &picture.title, &picture.caption));
    }
    section("On the slide", "", &(html + "</div>\n"))
}

/// A picture with its title and caption.
fn figure(png_base64: &str, title: &str, caption: &str) -> String {
    let data: String = png_base64.chars().filter(|c| c.is_ascii_alphanumeric() || "+/=".contains(*c)).collect();
    let (title, caption) = (escape(title), escape(caption));
    format!(
        "<figure><img src=\"data:image/png;base64,{data}\" alt=\"{title}\"><figcaption><b>{title}</b>{caption}\
         </figcaption></figure>\n"
    )
}

fn measuring(record: &CompareRecord) -> String {
    let how = &record.found.measuring;
    let order = if how.is_interleaved {
        "Each round ran every step once, one after the other, so that what slowed the machine slowed all of them."
    } else {
        "The steps were measured one after the other, each with all its rounds."
    };
    let html = format!(
        "<p><span class=\"badge {}\">{}</span> {}</p>\n\
         <p>{} rounds counted after {} to warm up; they took {} of at most {}. {order}</p>\n\
         <p>Rounds end when there are at least six, the distribution-free 95 % interval of every median lies within ±{} of it, \
         and the earlier and the later half agree as well as that.</p>\n\
         <p>A speed-up is the median of the ratios of neighbouring rounds. Intervals hold {} of {} bootstrap resamples \
         (seed {}), drawn as pairs. Percentiles are linear between ranks (Hyndman &amp; Fan’s definition 7). Outliers are \
         rounds with a modified z-score over 3.5 (Iglewicz &amp; Hoaglin 1993); they are kept. Projected times are tiles \
         divided by the median rate.</p>\n",
        if how.is_stable { "good" } else { "bad" },
        if how.is_stable { "stable" } else { "time was up" },
        escape(&how.note),
        count(how.rounds),
        count(how.warmup_rounds),
        duration(how.seconds),
        duration(how.time_limit_secs),
        format_args!("{} %", exact(100.0 * how.tolerance)),
        format_args!("{} %", exact(100.0 * how.confidence)),
        count(how.resamples),
        how.seed,
    );
    section("How it was measured", "", &html)
}

fn setting(record: &CompareRecord) -> String {
    let mut facts = vec![("tiles", format!("{} of {}", count(record.found.input.tiles), record.found.input.source))];
    if let Some(tiles) = record.found.input.slide_tiles {
        facts.push(("whole slide", format!("{} tiles", count(tiles))));
    }
    section("Machine, versions and files", "", &(account(&record.account, facts) + &tables::variants(record)))
}

/// Where, when and with what a page's figures were made: a list that `facts` belong to, and the command line.
fn account(account: &AccountRecord, facts: Vec<(&str, String)>) -> String {
    let hardware = &account.hardware;
    let mut all = vec![
        ("processor", format!("{}, {} logical cores", hardware.cpu, count(hardware.cores as u64))),
        ("memory", bytes(hardware.memory_bytes)),
    ];
    if !hardware.gpus.is_empty() {
        all.push(("GPU", hardware.gpus.join(", ")));
    }
    all.extend(facts);
    all.push(("started", account.started.clone()));
    all.push(("finished", account.finished.clone()));
    all.push(("slidestream", account.version.clone()));
    let mut list = String::new();
    for (name, fact) in &all {
        let _ = writeln!(list, "<dt>{name}</dt><dd>{}</dd>", escape(fact));
    }
    for (name, library) in &account.libraries {
        let (name, version) = (escape(name), escape(&library.version));
        let (path, origin) = (escape(&library.path), escape(&library.origin));
        let _ = writeln!(list, "<dt>{name}</dt><dd>{version} <code>{path}</code>, {origin}</dd>");
    }
    let command: Vec<String> = account.command.iter().map(|word| escape(&quoted(word))).collect();
    format!("<dl>\n{list}</dl>\n<h3>Command</h3>\n<pre><code>{}</code></pre>\n", command.join(" "))
}

fn section(title: &str, lead: &str, content: &str) -> String {
    let lead = if lead.is_empty() { String::new() } else { format!("<p class=\"lead\">{lead}</p>\n") };
    format!("<section>\n<h2>{title}</h2>\n{lead}{content}</section>\n")
}

fn both_sizes(draw: impl Fn(f64, &str) -> String) -> String {
    draw(WIDE, "wide") + &draw(NARROW, "narrow")
}

/// A word of a command line as a shell takes it.
fn quoted(word: &str) -> String {
    let is_plain = |c: char| c.is_alphanumeric() || "-_./=:,@%+".contains(c);
    if !word.is_empty() && word.chars().all(is_plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::compare::example::{example, with_steps};
    use crate::report::compare::{CosineRecord, IntervalRecord, conclusions};

    const VOID: [&str; 8] = ["!DOCTYPE", "meta", "img", "line", "rect", "circle", "br", "hr"];

    /// Fails unless every element that is opened is closed, in order.
    pub(super) fn assert_nested(html: &str) {
        let mut open: Vec<&str> = Vec::new();
        let (before_style, after_style) = (html.find("<style>").unwrap(), html.find("</style>").unwrap());
        let outside = [&html[..before_style], &html[after_style + 8..]];
        for tag in outside.iter().flat_map(|part| part.split('<').skip(1)) {
            let tag = tag.split('>').next().unwrap();
            let name = tag.trim_end_matches('/').split_whitespace().next().unwrap();
            match name.strip_prefix('/') {
                Some(name) => assert_eq!(open.pop(), Some(name), "<{tag}>"),
                None if VOID.contains(&name) => {}
                None => open.push(name),
            }
        }
        assert_eq!(open, Vec::<&str>::new());
    }

    fn assert_sound(record: &CompareRecord) -> String {
        assert_self_contained(compare_html(record))
    }

    /// Fails unless the page is well formed and asks for nothing from elsewhere.
    pub(super) fn assert_self_contained(html: String) -> String {
        assert_nested(&html);
        for foreign in ["<script", "http:", "https:", "@import", "url(", "NaN", ">inf", ">-inf"] {
            assert!(!html.contains(foreign), "{foreign}");
        }
        let sources = html.matches("src=").count();
        assert_eq!(sources, html.matches("src=\"data:image/png;base64,").count());
        html
    }

    #[test]
    fn a_page_holds_everything_and_needs_nothing() {
        let record = example();
        let html = assert_sound(&record);
        let said = record.conclusions.iter().map(String::as_str);
        let sections =
            ["The ladder", "Speed against agreement", "Against labels", "Gates", "On the slide", "Every round"];
        for expected in said.chain(sections).chain(["✗ fails a gate", "✓ passed", "✗ failed", "iVBORw=="]) {
            assert!(html.contains(&escape(expected)), "{expected}");
        }
        assert!(html.contains("'a slide.svs'".replace('\'', "&#39;").as_str()), "a word with a space is quoted");
    }

    #[test]
    fn what_is_missing_leaves_no_empty_place() {
        let mut record = with_steps(&[("original", "fp32", 1, Some(12.0), None)]);
        (record.found.accuracy, record.found.pictures, record.found.gates) = (None, Vec::new(), Vec::new());
        let html = assert_sound(&record);
        for section in ["Against labels", "Gates", "On the slide", "Speed against agreement", "end to end, ms"] {
            assert!(!html.contains(section), "{section}");
        }
        (record.found.models, record.found.ladder, record.conclusions) = (Vec::new(), Vec::new(), Vec::new());
        assert_sound(&record);
    }

    #[test]
    fn names_cannot_leave_their_place() {
        let hostile = "\"><script>alert('x')</script>&";
        let mut record = with_steps(&[
            (hostile, hostile, 1, Some(12.0), Some(20.0)),
            (hostile, "\u{0}<b>", 1, Some(10.0), None),
            (hostile, "int8", 1, None, None),
        ]);
        record.found.models[0].name = hostile.to_owned();
        record.found.models[0].variants[0].file = hostile.to_owned();
        record.found.input.source = hostile.to_owned();
        record.account.command = vec![hostile.to_owned()];
        record.found.pictures[0].title = hostile.to_owned();
        record.found.pictures[0].png_base64 = "AA\" onload=\"x".to_owned();
        record.found.gates[0].reason = hostile.to_owned();
        record.found.measuring.note = hostile.to_owned();
        record.conclusions = conclusions(&record);
        let html = assert_sound(&record);
        assert!(html.contains("&lt;script&gt;") && !html.contains('\u{0}') && !html.contains("onload=\""));
    }

    #[test]
    fn what_is_no_number_is_a_dash() {
        let mut record = example();
        let none = IntervalRecord { value: f64::NAN, low: f64::NEG_INFINITY, high: f64::INFINITY };
        for row in &mut record.found.ladder {
            let rate = row.end_to_end.as_mut().unwrap();
            (rate.tiles_per_sec, rate.speedup, rate.ms_per_tile.median) = (f64::INFINITY, Some(none), f64::NAN);
            rate.samples_ms.fill(f64::NAN);
            row.device_utilisation = Some(f64::NAN);
            row.projected[0].seconds = f64::INFINITY;
        }
        record.found.agreement[0].cosine = Some(CosineRecord { mean: f64::NAN, p1: f64::NAN, min: f64::NAN });
        record.found.agreement[1].max_abs_difference = Some(f64::INFINITY);
        record.found.agreement[2].pixel_agreement = Some(f64::NAN);
        (record.found.gates[0].value, record.found.gates[0].limit) = (Some(f64::NAN), f64::INFINITY);
        (record.found.measuring.tolerance, record.found.measuring.seconds) = (f64::NAN, f64::NAN);
        record.conclusions = conclusions(&record);
        assert!(assert_sound(&record).contains("<td class=\"number\">–</td>"));
    }

    #[test]
    fn commands_can_be_typed_again() {
        assert_eq!(
            ["a-b/c.svs", "two words", "it's", ""].map(quoted),
            ["a-b/c.svs", "'two words'", r"'it'\''s'", "''"]
        );
    }
}
