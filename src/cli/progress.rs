//! Shows how far a run is, and what happened: a bar for people, JSON lines for machines, nothing if asked for quiet.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use serde_json::{Map, Value, json};
use slidestream::engine::cohort::{Event, now};
use slidestream::report::Status;

use super::Failure;

/// How progress is shown on stderr.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Style {
    People,
    Json,
    Quiet,
}

/// Follows the events of a run.
pub(super) struct Progress {
    style: Style,
    bars: MultiProgress,
    slides: ProgressBar,
    tiles: ProgressBar,
    log: File,
}

impl Progress {
    /// Progress over `slides` slides; every event also goes to a new file in `logs/` below `out`.
    pub(super) fn new(style: Style, slides: usize, out: &Path) -> Result<Self, Failure> {
        let folder = out.join("logs");
        let path = folder.join(format!("{}.jsonl", now().replace(':', "")));
        let log = std::fs::create_dir_all(&folder).and_then(|()| File::create(&path)).map_err(|error| Failure {
            message: format!("{}: {error}", path.display()),
            hint: Some("choose an `out` that you may write to".to_owned()),
            code: 1,
        })?;
        let bars = MultiProgress::new();
        if style != Style::People {
            bars.set_draw_target(indicatif::ProgressDrawTarget::hidden());
        }
        let bar = |template: &str, length: u64| {
            let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
            bars.add(ProgressBar::new(length).with_style(style))
        };
        let tiles = bar("{prefix:24!} {bar:32} {pos}/{len} tiles, {per_sec}, ETA {eta} {msg}", 0);
        let slides = if slides > 1 {
            bar("{prefix:24!} {bar:32} {pos}/{len} slides, ETA {eta}", slides as u64).with_prefix("all slides")
        } else {
            ProgressBar::hidden()
        };
        tiles.enable_steady_tick(Duration::from_millis(250));
        Ok(Self { style, bars, slides, tiles, log })
    }

    /// Shows and logs one event.
    pub(super) fn observe(&mut self, event: &Event<'_>) {
        match event {
            Event::SlideStarted { id, index, count } => {
                self.tiles.reset();
                self.tiles.set_length(0);
                self.tiles.set_prefix((*id).to_owned());
                self.tiles.set_message("looking for tissue");
                self.record(json!({ "event": "slide started", "slide": id, "index": index, "slides": count }));
            }
            Event::SlidePlanned { id, plan, redone_because } => {
                self.tiles.set_message("");
                self.tiles.set_length(plan.positions.len() as u64);
                self.tiles.reset_eta();
                if let Some(reason) = redone_because {
                    self.line(&format!("{id}: done again: {reason}"));
                }
                self.record(json!({
                    "event": "slide planned", "slide": id, "tiles": plan.positions.len(), "grid": plan.grid_tiles,
                    "redone_because": redone_because,
                }));
            }
            Event::CoresSplit { reason } => {
                self.line(reason);
                self.record(json!({ "event": "cores split", "reason": reason }));
            }
            Event::MemoryPlanned { id, plan } => {
                self.line(&format!("{id}: {}", plan.in_words()));
                let parts: Map<String, Value> =
                    plan.parts.named().into_iter().map(|(name, bytes)| (name.to_owned(), json!(bytes))).collect();
                self.record(json!({
                    "event": "memory planned", "slide": id, "expected_bytes": plan.expected(), "parts": parts,
                    "limit_bytes": plan.limit, "lowered": plan.is_lowered(),
                }));
            }
            Event::Progress { tiles } => self.tiles.set_position(*tiles),
            Event::SlideFinished { record, status } => {
                self.slides.inc(1);
                if let Some(error) = &record.error {
                    self.error(&format!("error: {}: {error}", record.id));
                    if let Some(hint) = &record.hint {
                        self.error(&format!("help: {hint}"));
                    }
                } else if *status == Status::Skipped {
                    self.line(&format!("{}: was done before with the same settings", record.id));
                }
                for note in &record.notes {
                    self.line(&format!("{}: {note}", record.id));
                }
                self.record(json!({
                    "event": "slide finished", "slide": record.id, "status": status.as_str(), "error": record.error,
                    "tiles": record.coverage.as_ref().map(|coverage| coverage.inferred),
                    "seconds": record.timing.as_ref().map(|timing| timing.seconds),
                }));
            }
            _ => {}
        }
    }

    /// One line for people, above the bars.
    pub(super) fn line(&self, text: &str) {
        if self.style == Style::People {
            self.bars.suspend(|| super::say(text));
        }
    }

    /// One line for people that quiet does not hold back; machines read it in the slide's event.
    fn error(&self, text: &str) {
        if self.style != Style::Json {
            self.bars.suspend(|| super::say(text));
        }
    }

    /// Takes the bars away.
    pub(super) fn end(&self) {
        self.tiles.finish_and_clear();
        self.slides.finish_and_clear();
    }

    /// One JSON line to the log, and to stderr for machines.
    pub(super) fn record(&mut self, mut event: Value) {
        event["time"] = json!(now());
        // The log is a convenience: a full disk is reported where results are written.
        writeln!(self.log, "{event}").ok();
        if self.style == Style::Json {
            super::say(&event.to_string());
        }
    }
}
