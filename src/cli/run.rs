//! `slidestream run`: a model over slides.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;

use serde_json::json;
use slidestream::engine::cohort::{self, CohortSummary, OutputFolder};
use slidestream::engine::config::TilingConfig;
use slidestream::engine::inputs::{self, SlideInput};
use slidestream::engine::{EngineError, plan};
use slidestream::inference::{ModelCard, StopHandle};
use slidestream::pipeline::Cancel;
use slidestream::report::{RunRecord, SlideRecord, StageRecord, Status, bytes};
use slidestream::slide::Slide;

use super::options::RunOptions;
use super::progress::Progress;
use super::{Failure, Outcome, interrupt, prepare, show};

/// Exit codes: 0 all done, 1 everything failed, 2 usage, 3 some slides or tiles failed, 130 interrupted
#[derive(clap::Args, Debug)]
pub(super) struct Args {
    /// Slides, folders (searched recursively) and lists (.csv with the columns slide[,mpp][,mask][,id])
    #[arg(required = true, value_name = "SLIDE|DIR|LIST.csv")]
    slides: Vec<PathBuf>,
    /// Model folder, card.toml, WSInfer config.json, or a bare .onnx
    #[arg(long, short, value_name = "DIR|CARD|MODEL.onnx")]
    model: PathBuf,
    /// Where results go
    #[arg(long, short, value_name = "DIR", default_value = "slidestream-out")]
    out: PathBuf,
    /// Options as a TOML file; flags win over it
    #[arg(long, value_name = "FILE.toml")]
    config: Option<PathBuf>,
    #[command(flatten)]
    options: RunOptions,
}

pub(super) fn execute(args: &Args) -> Result<Outcome, Failure> {
    let options = match &args.config {
        Some(path) => args.options.or_file(path)?,
        None => args.options.clone(),
    };
    let mut slides = inputs::slides(&args.slides)?;
    if let Some(path) = options.tiling.mpp_csv()? {
        inputs::add_mpp(&mut slides, &path)?;
    }
    if options.dry_run() {
        let card = ModelCard::load(&args.model, &options.bare.model(options.tiling.target_mpp()?)?)?;
        return Ok(dry_run(&slides, &prepare::config(&card, &options)?.tiling));
    }
    let cohort = options.cohort()?;
    let mut engine = prepare::engine(&args.model, &options)?;
    let cancel = Cancel::default();
    let asked = cancel.clone();
    let running = engine.stop_handles();
    interrupt::wind_down_by(move || {
        asked.cancel();
        running.iter().for_each(StopHandle::stop);
    });

    let folder = OutputFolder::lock(&args.out)?;
    let mut run = prepare::run_record(&engine, &slides);
    folder.write_run(&run)?;
    let mut progress = Progress::new(options.progress(), slides.len(), &args.out)?;
    progress.line(&format!("{}: {}", run.execution.device, run.execution.reason));
    progress.record(json!({ "event": "run started", "command": run.command, "execution": run.execution }));
    let summary = cohort::run(&mut engine, &slides, &folder, cohort, &cancel, &mut |event| progress.observe(event));
    progress.end();
    let outcome = summary.as_ref().map_or(Outcome::Failed, |summary| outcome_of(summary, slides.len()));
    run.execution = engine.execution();
    finish_run(&mut run, summary.as_ref().ok(), outcome, slides.len());
    folder.write_run(&run)?;
    progress.record(json!({ "event": "run finished", "status": run.status.as_str(), "slides": run.slides }));
    show(&summarise(&summary?, args, outcome));
    Ok(outcome)
}

fn outcome_of(summary: &CohortSummary, slides: usize) -> Outcome {
    let failed = summary.count(Status::Failed);
    if summary.interrupted {
        Outcome::Interrupted
    } else if failed == slides as u64 {
        Outcome::Failed
    } else if failed > 0 || summary.failed_tiles() > 0 || summary.slides.len() < slides {
        Outcome::Partly
    } else {
        Outcome::Done
    }
}

fn finish_run(run: &mut RunRecord, summary: Option<&CohortSummary>, outcome: Outcome, slides: usize) {
    run.status = match outcome {
        Outcome::Done => Status::Done,
        Outcome::Interrupted => Status::Interrupted,
        Outcome::Failed | Outcome::Partly | Outcome::GateFailed => Status::Failed,
    };
    run.finished = Some(cohort::now());
    let Some(summary) = summary else { return };
    run.slides = [Status::Done, Status::Failed, Status::Skipped]
        .into_iter()
        .map(|status| (status.as_str().to_owned(), summary.count(status)))
        .collect();
    let left = slides - summary.slides.len();
    run.slides.insert("not started".to_owned(), left as u64);
}

/// Plans every slide and shows what a run would do.
fn dry_run(slides: &[SlideInput], tiling: &TilingConfig) -> Outcome {
    let mut failed = 0;
    let mut table = String::new();
    for input in slides {
        let tiling = input.tiling(tiling);
        let planned = Slide::open(&input.path, tiling.reader)
            .map_err(EngineError::from)
            .and_then(|slide| plan::plan(slide, &tiling));
        match planned {
            Ok(plan) => {
                let tiles = plan.positions.len();
                let effective = plan.choice.effective;
                writeln!(
                    table,
                    "{}  {tiles} of {} tiles at {:.4} × {:.4} µm/px from level {}",
                    input.id,
                    plan.grid_tiles,
                    effective.x.get(),
                    effective.y.get(),
                    plan.choice.level.0
                )
                .ok();
            }
            Err(error) => {
                failed += 1;
                let hint = error.hint().map(|hint| format!(" ({hint})")).unwrap_or_default();
                writeln!(table, "{}  error: {}{hint}", input.id, error.chain()).ok();
            }
        }
    }
    show(&table);
    Outcome::of(failed, slides.len())
}

/// What was found and where it lies.
fn summarise(summary: &CohortSummary, args: &Args, outcome: Outcome) -> String {
    let mut text = String::new();
    if let [(status, record)] = &summary.slides[..] {
        text.push_str(&summarise_slide(*status, record));
    } else {
        let count = |status| summary.count(status);
        writeln!(
            text,
            "{} slides: {} done, {} failed, {} done before",
            summary.slides.len(),
            count(Status::Done),
            count(Status::Failed),
            count(Status::Skipped)
        )
        .ok();
        let done = || summary.slides.iter().filter(|(status, _)| *status == Status::Done).map(|(_, record)| record);
        let tiles: u64 = done().filter_map(|record| record.coverage.as_ref()).map(|c| c.inferred).sum();
        let seconds: f64 = done().filter_map(|record| record.timing.as_ref()).map(|t| t.seconds).sum();
        if tiles > 0 {
            writeln!(text, "{tiles} tiles in {seconds:.1} s, {:.1} tiles/s", tiles as f64 / seconds).ok();
        }
    }
    if outcome == Outcome::Interrupted {
        text.push_str("stopped on request: run the same command again to go on\n");
    }
    writeln!(text, "results in {}", args.out.display()).ok();
    text
}

fn summarise_slide(status: Status, record: &SlideRecord) -> String {
    let mut rows: Vec<(&str, String)> = vec![("slide", record.id.clone()), ("status", status.as_str().to_owned())];
    if let Some(coverage) = &record.coverage {
        let mut tiles =
            format!("{} of {} in the grid, {} background", coverage.inferred, coverage.grid, coverage.background);
        if coverage.unsampled > 0 {
            write!(tiles, ", {} not sampled", coverage.unsampled).ok();
        }
        if !coverage.failed.is_empty() {
            write!(tiles, ", {} failed", coverage.failed.len()).ok();
        }
        rows.push(("tiles", tiles));
    }
    if let Some(timing) = &record.timing {
        rows.push(("time", format!("{:.1} s, {:.1} tiles/s", timing.seconds, timing.tiles_per_sec)));
        rows.push(("bottleneck", timing.bottleneck.clone()));
        rows.push(("relief", timing.relief.clone()));
        let busy = |(gpu, share): (&String, &f64)| format!("{gpu} {:.0} % of the time", 100.0 * share);
        if !timing.gpu_busy.is_empty() {
            rows.push(("gpu busy", timing.gpu_busy.iter().map(busy).collect::<Vec<_>>().join(", ")));
        }
    }
    if let Some((memory, peak)) = record.memory.as_ref().and_then(|memory| Some((memory, memory.peak_bytes?))) {
        rows.push(("memory", format!("{} at most, {} expected", bytes(peak), bytes(memory.expected_bytes))));
    }
    let shares: BTreeMap<_, _> = record.class_shares.iter().collect();
    if !shares.is_empty() {
        let shares: Vec<String> =
            shares.iter().map(|(name, share)| format!("{name} {:.1} %", 100.0 * **share)).collect();
        rows.push(("classes", shares.join(", ")));
    }
    let stages = record.timing.as_ref().map(|timing| stage_table(&timing.stages)).unwrap_or_default();
    format!("{}{stages}", super::columns(rows))
}

/// What each stage did with its workers' time.
fn stage_table(stages: &[StageRecord]) -> String {
    let seconds = |seconds: f64| format!("{seconds:.2}");
    let row = |stage: &StageRecord| {
        vec![
            stage.name.clone(),
            stage.workers.to_string(),
            seconds(stage.busy_secs),
            seconds(stage.starved_secs),
            seconds(stage.blocked_secs),
            stage.utilisation().map_or_else(String::new, |share| format!("{:.0} %", 100.0 * share)),
        ]
    };
    let heads = ["stage", "workers", "busy s", "starved s", "blocked s", "busy"];
    super::table(&heads, &stages.iter().skip(1).map(row).collect::<Vec<_>>())
}
