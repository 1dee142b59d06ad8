//! The page of a benchmark.

use super::super::bench::{BenchEntry, BenchKind, BenchRecord};
use super::super::chart::{self, Against};
use super::super::compare::IntervalRecord;
use super::super::text::{ABSENT, bytes, count, escape, or_absent, percent, significant, times};
use super::tables::{Cell, owned, table, with_interval};
use super::{account, both_sizes, figures, page, section, sentences};

/// The record as an HTML page that needs nothing but itself.
#[must_use]
pub fn bench_html(record: &BenchRecord) -> String {
    let body = [
        header(record),
        figures(&best(record)),
        sentences(&record.insights),
        overview(record),
        rank_impact(record),
        efficiency(record),
        trade_off(record),
        skipped(record),
        measuring(record),
        setting(record),
    ]
    .concat();
    page(&format!("{} – slidestream bench", record.found.subject), &body, &record.account.version)
}

fn header(record: &BenchRecord) -> String {
    let device = record.found.entries.first().map_or("", |entry| entry.device.as_str());
    format!(
        "<header>\n<p class=\"kicker\">slidestream bench {}</p>\n<h1>{}</h1>\n<p class=\"facts\">{} entries · on {} · {}</p>\n\
         </header>\n",
        if record.found.kind == BenchKind::Lora { "lora" } else { "vit" },
        escape(&record.found.subject),
        record.found.entries.len(),
        escape(device),
        escape(&record.account.started)
    )
}

/// The figures that matter most.
fn best(record: &BenchRecord) -> Vec<(&'static str, String, String)> {
    let entries = &record.found.entries;
    let by_rate = |a: &&BenchEntry, b: &&BenchEntry| a.samples_per_sec.value.total_cmp(&b.samples_per_sec.value);
    let ratio = |entry: &BenchEntry| or_absent(entry.ratio, |ratio| times(ratio.value));
    let rate = |entry: &BenchEntry| significant(entry.samples_per_sec.value);
    let mut shown = Vec::new();
    match record.found.kind {
        BenchKind::Lora => {
            let of_way = |is_merged: bool| {
                entries.iter().filter(move |entry| entry.lora.is_some_and(|lora| lora.is_merged == is_merged))
            };
            shown.extend(entries.first().map(|entry| ("baseline, samples/s", rate(entry), entry.model.clone())));
            let value = |entry: &BenchEntry| entry.ratio.map_or(f64::INFINITY, |ratio| ratio.value);
            for (label, is_merged) in [("slowest unmerged", false), ("slowest merged", true)] {
                let slowest = of_way(is_merged).min_by(|a, b| value(a).total_cmp(&value(b)));
                shown.extend(slowest.map(|slowest| (label, ratio(slowest), slowest.name.clone())));
            }
            let largest = of_way(true).filter_map(|entry| Some(entry.lora?.max_abs_difference)).reduce(f64::max);
            shown.extend(largest.map(|most| ("merged − unmerged", significant(most), "max |Δ| of outputs".to_owned())));
        }
        BenchKind::Vit => {
            shown.extend(
                entries.iter().max_by(by_rate).map(|best| ("fastest, samples/s", rate(best), best.name.clone())),
            );
            shown.extend(
                entries.iter().min_by(by_rate).map(|least| ("slowest, samples/s", rate(least), least.name.clone())),
            );
            shown.push(("entries", entries.len().to_string(), format!("{} left out", record.found.skipped.len())));
        }
    }
    shown
}

fn overview(record: &BenchRecord) -> String {
    let lead = match record.found.kind {
        BenchKind::Lora => {
            "Samples per second over all sessions; the factor is against the baseline, from rounds that ran next to each other."
        }
        BenchKind::Vit => "Samples per second over all sessions; each entry ran in a process of its own.",
    };
    section("Overview", lead, &(both_sizes(|width, class| chart::entries(record, width, class)) + &numbers(record)))
}

fn numbers(record: &BenchRecord) -> String {
    let heads = owned(&[
        "",
        "entry",
        "samples/s",
        "ms/sample",
        "ratio",
        "parameters",
        "LoRA's share",
        "GFLOP",
        "start, s",
        "memory",
        "busy",
        "scaling",
        "max |Δ|",
    ]);
    let row = |(index, entry): (usize, &BenchEntry)| {
        let absent = |text: Option<String>| text.unwrap_or_else(|| ABSENT.to_owned());
        let unmerged = entry.lora.filter(|lora| !lora.is_merged);
        let scaling = entry.scaling.as_ref();
        vec![
            Cell::Number((index + 1).to_string()),
            Cell::Wide(entry.name.clone()),
            with_interval(Some(entry.samples_per_sec), significant),
            Cell::Number(significant(entry.ms_per_sample)),
            with_interval(entry.ratio, times),
            Cell::Number(count(entry.parameters)),
            Cell::Number(absent(unmerged.map(|lora| percent(lora.share_of_parameters)))),
            Cell::Number(significant(entry.flops as f64 / 1e9)),
            Cell::Number(or_absent(entry.start_secs, significant)),
            Cell::Number(or_absent(entry.peak_bytes(), bytes)),
            Cell::Number(absent(Some(entry.busy_in_words()).filter(|busy| !busy.is_empty()))),
            scaling.map_or_else(
                || Cell::Number(ABSENT.to_owned()),
                |scaling| {
                    Cell::Noted(
                        times(scaling.speedup.value),
                        format!("{} of {}", percent(scaling.efficiency), scaling.replicas),
                    )
                },
            ),
            Cell::Number(absent(entry.lora.map(|lora| significant(lora.max_abs_difference)))),
        ]
    };
    table(&heads, &record.found.entries.iter().enumerate().map(row).collect::<Vec<_>>())
}

fn rank_impact(record: &BenchRecord) -> String {
    let html = both_sizes(|width, class| chart::rank_impact(record, width, class).unwrap_or_default());
    if html.is_empty() {
        return html;
    }
    let ratios = record.found.entries.iter().filter(|entry| entry.lora.is_some()).filter_map(|entry| entry.ratio);
    let noise = ratios.filter(IntervalRecord::is_finite).map(|ratio| ratio.high - ratio.low).fold(0.0, f64::max);
    let lead = format!(
        "A model with the adapter merged is the baseline's graph: how far its points stray from 1 shows what this run can \
         resolve. The widest interval spans {}.",
        percent(noise)
    );
    section("Impact of the rank", &lead, &html)
}

fn efficiency(record: &BenchRecord) -> String {
    against(record, Against::Parameters, "Parameter efficiency")
}

/// Against memory where that is known of all, else against operations.
fn trade_off(record: &BenchRecord) -> String {
    let is_known = record.found.entries.iter().all(|entry| entry.peak_bytes().is_some());
    against(record, if is_known { Against::Memory } else { Against::Operations }, "Trade-off")
}

fn against(record: &BenchRecord, cost: Against, title: &str) -> String {
    let html = both_sizes(|width, class| chart::rate_against(record, cost, width, class).unwrap_or_default());
    if html.is_empty() {
        return html;
    }
    let hollow = match record.found.kind {
        BenchKind::Lora => " Hollow red marks are unmerged.",
        BenchKind::Vit => "",
    };
    let lead = format!("Numbers are the entries above. Marks that would cover each other are moved aside.{hollow}");
    section(title, &lead, &html)
}

fn skipped(record: &BenchRecord) -> String {
    if record.found.skipped.is_empty() {
        return String::new();
    }
    let row =
        |left: &super::super::compare::LeftOutRecord| vec![Cell::Wide(left.name.clone()), Cell::Wide(left.why.clone())];
    let rows: Vec<Vec<Cell>> = record.found.skipped.iter().map(row).collect();
    section("Left out", "", &table(&owned(&["what", "why"]), &rows))
}

fn measuring(record: &BenchRecord) -> String {
    let entries = &record.found.entries;
    let settled = entries.iter().filter(|entry| entry.is_stable).count();
    let is_settled = settled == entries.len();
    let order = match record.found.kind {
        BenchKind::Lora => {
            "Each round ran every entry once, beginning with another one each time. A ratio is the median of the ratios of \
             neighbouring rounds; its interval holds 95 % of 2,000 bootstrap resamples of pairs."
        }
        BenchKind::Vit => {
            "Entries were measured one after the other. Where two are compared, the interval of the ratio of their medians \
             holds 95 % of 2,000 bootstrap resamples of the rounds of both; what slows the machine for a while is not in it."
        }
    };
    let html = format!(
        "<p><span class=\"badge {}\">{settled} of {} settled</span></p>\n<p>Tiles lie in memory and pass the engine's batches, \
         channels and sessions. Rounds end when the distribution-free 95 % interval of the median lies within ±2 % of it, or \
         when time is up. {order}</p>\n<p>Memory is the peak of a process that runs this entry alone, on a GPU that of the \
         device.</p>\n",
        if is_settled { "good" } else { "bad" },
        entries.len()
    );
    section("How it was measured", "", &html)
}

fn setting(record: &BenchRecord) -> String {
    section("Machine and versions", "", &account(&record.account, Vec::new()))
}

#[cfg(test)]
mod tests {
    use super::super::tests::assert_self_contained;
    use super::*;
    use crate::report::bench::example::{lora, vit};
    use crate::report::bench::insights;

    #[test]
    fn a_page_holds_everything_and_needs_nothing() {
        for (mut record, only, not) in
            [(lora(), "Impact of the rank", "Left out"), (vit(), "Left out", "Impact of the rank")]
        {
            record.insights = insights(&record.found);
            let html = assert_self_contained(bench_html(&record));
            let sections = ["Overview", "Parameter efficiency", "Trade-off", "MiB of memory at the peak", only];
            let names = record.found.entries.iter().map(|entry| entry.name.as_str());
            for expected in record.insights.iter().map(String::as_str).chain(sections).chain(names) {
                assert!(html.contains(&escape(expected)), "{expected}");
            }
            assert!(!html.contains(not));
        }
    }

    #[test]
    fn what_is_odd_or_missing_is_drawn_too() {
        let mut record = lora();
        let none = IntervalRecord { value: f64::NAN, low: f64::NAN, high: f64::INFINITY };
        let entry = &mut record.found.entries[1];
        (entry.samples_per_sec, entry.ratio, entry.peak_host_bytes) = (none, Some(none), None);
        entry.name = "\"><script>".to_owned();
        assert!(assert_self_contained(bench_html(&record)).contains("GFLOP per sample"));
        record.found.entries.clear();
        assert_self_contained(bench_html(&record));
    }
}
