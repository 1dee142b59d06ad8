//! What every worker of a slide's run did when, in the trace event format that Perfetto and chrome://tracing show.

use serde::Serialize;

/// A row of the trace.
#[derive(Clone, Debug, PartialEq)]
pub struct TraceRow {
    /// Name of the worker.
    pub name: String,
    /// Its stretches of time: what it did, when that began and how long it took, in µs from the slide's first tile on.
    pub spans: Vec<(&'static str, f64, f64)>,
}

#[derive(Serialize)]
struct Trace<'a> {
    #[serde(rename = "displayTimeUnit")]
    unit: &'static str,
    #[serde(rename = "traceEvents")]
    events: Vec<Event<'a>>,
}

#[derive(Serialize)]
#[serde(tag = "ph")]
enum Event<'a> {
    /// Names a row.
    #[serde(rename = "M")]
    Name { name: &'static str, pid: u32, tid: usize, args: Args<'a> },
    /// A stretch of time.
    #[serde(rename = "X")]
    Span { name: &'static str, pid: u32, tid: usize, ts: f64, dur: f64 },
}

#[derive(Serialize)]
struct Args<'a> {
    name: &'a str,
}

/// The trace of a slide as JSON.
#[must_use]
pub fn trace_json(slide: &str, rows: &[TraceRow]) -> Vec<u8> {
    let pid = 1;
    let mut events = vec![Event::Name { name: "process_name", pid, tid: 0, args: Args { name: slide } }];
    for (tid, row) in (1..).zip(rows) {
        events.push(Event::Name { name: "thread_name", pid, tid, args: Args { name: &row.name } });
        events.extend(row.spans.iter().map(|(name, ts, dur)| Event::Span { name, pid, tid, ts: *ts, dur: *dur }));
    }
    // Not indented: a large slide has millions of events. Wire types always serialise.
    serde_json::to_vec(&Trace { unit: "ms", events }).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_named_threads_of_complete_events() {
        let rows = [
            TraceRow { name: "read 1".to_owned(), spans: vec![("starved", 0.0, 2.5), ("busy", 2.5, 100.0)] },
            TraceRow { name: "write".to_owned(), spans: Vec::new() },
        ];
        let trace: serde_json::Value = serde_json::from_slice(&trace_json("a", &rows)).unwrap();
        let events = trace["traceEvents"].as_array().unwrap();
        assert_eq!(events.len(), 5);
        assert_eq!(events[1]["args"]["name"], "read 1");
        let busy = &events[3];
        assert_eq!((&busy["ph"], &busy["name"], &busy["tid"]), (&"X".into(), &"busy".into(), &1.into()));
        assert_eq!((busy["ts"].as_f64(), busy["dur"].as_f64()), (Some(2.5), Some(100.0)));
    }
}
