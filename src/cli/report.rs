//! `slidestream report`: what result files say, and what changed between two.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use serde_json::Value;
use slidestream::experiment::ExperimentError;
use slidestream::report::bench::{self, Change, Rated, changes};
use walkdir::WalkDir;

use super::{Failure, Outcome, say, show, table};

#[derive(clap::Args, Debug)]
pub(super) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand, Debug)]
enum What {
    /// A line for each result file below the folders: runs, slides, optimisations, comparisons, evaluations, predictions,
    /// simulations, benchmarks
    Show {
        /// Folders, or files
        #[arg(required = true, value_name = "DIR")]
        paths: Vec<PathBuf>,
    },
    /// What changed beyond noise between two benchmarks or two simulations of the same models with the same settings
    Compare {
        /// The earlier bench.json, or what `simulate --json` printed
        #[arg(value_name = "A.json")]
        earlier: PathBuf,
        /// The later one
        #[arg(value_name = "B.json")]
        later: PathBuf,
    },
}

pub(super) fn execute(args: &Args) -> Result<Outcome, Failure> {
    match &args.what {
        What::Show { paths } => show_all(paths),
        What::Compare { earlier, later } => {
            let (earlier, later) = (read(earlier)?, read(later)?);
            other_machine(&earlier, &later).into_iter().for_each(|warning| say(&warning));
            let changes = changes(&earlier, &later);
            let said: Vec<String> = changes.iter().map(Change::in_words).collect();
            show(&format!("{}\n", said.join("\n")));
            if changes.iter().any(Change::is_judged) {
                return Ok(Outcome::Done);
            }
            Err(Failure {
                message: "nothing in the two can be held against each other".to_owned(),
                hint: Some("compare measurements of the same models with the same settings".to_owned()),
                code: 1,
            })
        }
    }
}

/// The rates of a benchmark or a simulation.
pub(super) fn read(path: &Path) -> Result<Rated, Failure> {
    let wrong = |source| ExperimentError::File { path: path.to_owned(), doing: "read", source };
    Rated::from_json(&std::fs::read(path).map_err(wrong)?).map_err(|error| Failure {
        hint: Some("name a bench.json, or what `simulate --json` printed".to_owned()),
        ..Failure::usage(format!("{}: {error}", path.display()))
    })
}

/// A warning where two were measured on different machines.
pub(super) fn other_machine(earlier: &Rated, later: &Rated) -> Option<String> {
    let differ = earlier.machine != later.machine;
    differ.then(|| format!("warning: measured on different machines: {}; {}", earlier.machine, later.machine))
}

fn show_all(paths: &[PathBuf]) -> Result<Outcome, Failure> {
    let mut rows: Vec<Vec<String>> = Vec::new();
    let (mut others, mut unread) = (0, 0);
    for path in paths {
        for entry in WalkDir::new(path).sort_by_file_name() {
            let mut not_read = |file: &Path, why: String| {
                unread += 1;
                rows.push(vec![file.display().to_string(), "not read".to_owned(), why]);
            };
            let entry = match entry {
                Ok(entry) => entry,
                Err(error) => {
                    let why = error.io_error().map_or_else(|| error.to_string(), ToString::to_string);
                    not_read(error.path().unwrap_or(path), why);
                    continue;
                }
            };
            let file = entry.path();
            // Of a link, what it leads to; one that leads nowhere is read in vain, and that is told.
            let is_json = file.extension().is_some_and(|extension| extension == "json");
            if !is_json || file.is_dir() {
                continue;
            }
            let bytes = match std::fs::read(file) {
                Ok(bytes) => bytes,
                Err(error) => {
                    not_read(file, error.to_string());
                    continue;
                }
            };
            let name = file.display().to_string();
            match serde_json::from_slice::<Value>(&bytes) {
                Ok(record) => match bench::summary(&record) {
                    Some((kind, told)) => rows.push(vec![name, kind.to_owned(), told]),
                    None => others += 1,
                },
                Err(error) => rows.push(vec![name, "damaged".to_owned(), error.to_string()]),
            }
        }
    }
    let mut text = if rows.is_empty() { String::new() } else { table(&["file", "kind", "says"], &rows) };
    if rows.is_empty() {
        text.push_str("no result of slidestream\n");
    }
    if others > 0 {
        writeln!(text, "{others} other JSON files").ok();
    }
    show(&text);
    Ok(Outcome::of(unread, rows.len() + others))
}
