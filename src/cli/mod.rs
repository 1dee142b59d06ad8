//! The command line: one file per subcommand, exit codes and messages in one place.
//!
//! stdout is for results, stderr for talk. Only this module knows flags, colours and exit codes.

mod bench;
mod compare;
mod doctor;
mod evaluate;
mod inspect;
mod interrupt;
mod optimize;
mod options;
mod own_process;
mod predict;
mod prepare;
mod processor;
mod progress;
mod report;
mod run;
mod simulate;
mod tiles;

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use slidestream::engine::EngineError;
use slidestream::experiment::ExperimentError;
use slidestream::native;

/// Runs neural networks over whole-slide images, and tells exactly what was done
#[derive(Parser, Debug)]
#[command(version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// ONNX Runtime's library file [env: ORT_DYLIB_PATH]
    #[arg(long, value_name = "FILE", global = true, help_heading = "Native libraries")]
    onnxruntime_library: Option<PathBuf>,
    /// OpenSlide's library file [env: OPENSLIDE_LIBRARY]
    #[arg(long, value_name = "FILE", global = true, help_heading = "Native libraries")]
    openslide_library: Option<PathBuf>,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Run a model over slides: tile table, heatmaps, regions, overlay, features
    Run(Box<run::Args>),
    /// Write the coordinates of a slide's tissue tiles, without a model
    Tiles(tiles::Args),
    /// Show what a slide is and how a model would read it
    Inspect(inspect::Args),
    /// Make faster variants of a model, and prove them
    Optimize(Box<optimize::Args>),
    /// Hold variants of a model side by side: speed, agreement, accuracy
    Compare(Box<compare::Args>),
    /// Run a model without slides: throughput, cost, and the time of a slide
    Simulate(Box<simulate::Args>),
    /// Hold a model against labelled images: accuracy, class by class, with intervals
    Evaluate(Box<evaluate::Args>),
    /// Predict images that are no slides: a class for each, or a mask
    Predict(Box<predict::Args>),
    /// Measure models of one kind side by side: vision transformers of many sizes, or LoRA by rank
    Bench(bench::Args),
    /// Show what result files say, or what changed between two
    Report(report::Args),
    /// Check that this machine has what it takes
    Doctor(doctor::Args),
}

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Done,
    /// Everything failed, or what all depends on did.
    Failed,
    /// Some slides, tiles or images failed.
    Partly,
    /// All was done, and something was not as it must be: a gate, or a regression.
    GateFailed,
    Interrupted,
}

impl Outcome {
    /// How a command over `total` slides ended of which `failed` failed.
    fn of(failed: usize, total: usize) -> Self {
        match failed {
            0 => Self::Done,
            _ if failed == total => Self::Failed,
            _ => Self::Partly,
        }
    }
}

impl From<Outcome> for ExitCode {
    fn from(outcome: Outcome) -> Self {
        Self::from(match outcome {
            Outcome::Done => 0,
            Outcome::Failed => 1,
            Outcome::Partly => 3,
            Outcome::GateFailed => 4,
            Outcome::Interrupted => INTERRUPTED,
        })
    }
}

/// Exit code of a wrong command line; the one that clap uses.
const USAGE: u8 = 2;
/// Exit code after an interrupt; the one that a shell gives.
const INTERRUPTED: u8 = 130;

/// Why a command could not do its work, with how to put it right.
#[derive(Debug)]
struct Failure {
    message: String,
    hint: Option<String>,
    code: u8,
}

impl Failure {
    /// The command line or configuration is wrong.
    fn usage(message: impl Into<String>) -> Self {
        Self { message: message.into(), hint: None, code: USAGE }
    }
}

impl<E: Into<ExperimentError>> From<E> for Failure {
    fn from(error: E) -> Self {
        let error = error.into();
        let code = match &error {
            // What names the slides is typed on the command line.
            ExperimentError::Engine(error) if matches!(**error, EngineError::Input(_)) => USAGE,
            ExperimentError::NoCalibration
            | ExperimentError::Refused { .. }
            | ExperimentError::Incomparable { .. }
            | ExperimentError::TileLargerThanSlide { .. }
            | ExperimentError::TooManyTiles { .. }
            | ExperimentError::TooLargeBatch { .. }
            | ExperimentError::InTheWay { .. }
            | ExperimentError::NothingToGate
            | ExperimentError::Vit(_)
            | ExperimentError::Labels { .. }
            | ExperimentError::Unsuited { .. } => USAGE,
            _ => 1,
        };
        Self { message: error.chain(), hint: error.hint(), code }
    }
}

pub(crate) fn main() -> ExitCode {
    processor::check();
    let cli = Cli::parse();
    native::set_paths(native::Paths { onnx_runtime: cli.onnxruntime_library, openslide: cli.openslide_library });
    let temporary = match interrupt::listen() {
        Ok(folder) => folder,
        Err(failure) => return ended_by(&failure),
    };
    let outcome = execute(cli.command);
    interrupt::wait_if_ending();
    drop(temporary);
    outcome.map_or_else(|failure| ended_by(&failure), ExitCode::from)
}

fn execute(command: Command) -> Result<Outcome, Failure> {
    match command {
        Command::Run(args) => run::execute(&args),
        Command::Tiles(args) => tiles::execute(&args),
        Command::Inspect(args) => inspect::execute(&args),
        Command::Optimize(args) => optimize::execute(&args),
        Command::Compare(args) => compare::execute(&args),
        Command::Simulate(args) => simulate::execute(&args),
        Command::Evaluate(args) => evaluate::execute(&args),
        Command::Predict(args) => predict::execute(&args),
        Command::Bench(args) => bench::execute(&args),
        Command::Report(args) => report::execute(&args),
        Command::Doctor(args) => doctor::execute(&args),
    }
}

fn ended_by(failure: &Failure) -> ExitCode {
    say(&format!("error: {}", failure.message));
    if let Some(hint) = &failure.hint {
        say(&format!("help: {hint}"));
    }
    ExitCode::from(failure.code)
}

/// One line of talk, to stderr; a reader who has gone away is not an error.
fn say(line: &str) {
    writeln!(std::io::stderr(), "{line}").ok();
}

/// Results, to stdout. A reader who has gone away is not an error; anything else, such as a full disk, ends the program:
/// who reads them must not take a part for the whole.
fn show(text: &str) {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            say(&format!("error: the results can't be written to stdout: {error}"));
            interrupt::end(1);
        }
        _ => {}
    }
}

/// A folder for a command's own files, gone at its end.
fn temporary_folder() -> Result<tempfile::TempDir, Failure> {
    let path = tempfile::env::temp_dir();
    Ok(tempfile::tempdir().map_err(|source| ExperimentError::File { path, doing: "written", source })?)
}

/// Names and values in two columns.
fn columns<'a>(rows: impl IntoIterator<Item = (&'a str, String)>) -> String {
    let rows: Vec<(&str, String)> = rows.into_iter().collect();
    let width = rows.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
    rows.iter().fold(String::new(), |mut text, (name, value)| {
        writeln!(text, "{name:width$}  {value}").ok();
        text
    })
}

/// Rows of cells under each other; those in which something is a number stand at the right.
fn table(heads: &[&str], rows: &[Vec<String>]) -> String {
    let all = || std::iter::once(heads.to_vec()).chain(rows.iter().map(|row| row.iter().map(String::as_str).collect()));
    let width = |column: usize| all().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..heads.len()).map(width).collect();
    let is_number = |column: usize| rows.iter().any(|row| row[column].starts_with(|c: char| c.is_ascii_digit()));
    let mut text = String::new();
    for row in all() {
        let cells = row.iter().zip(&widths).enumerate().map(|(column, (cell, width))| {
            if is_number(column) && column > 0 { format!("{cell:>width$}") } else { format!("{cell:<width$}") }
        });
        writeln!(text, "{}", cells.collect::<Vec<_>>().join("  ").trim_end()).ok();
    }
    text
}
