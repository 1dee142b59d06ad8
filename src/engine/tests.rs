//! Slides through the whole line, with sessions whose answers are known.

use super::cohort::{CohortOptions, OutputFolder};
use super::config::{Emit, OnFailure, TilingConfig, TissueSource};
use super::*;
use crate::inference::fake::Fault;
use crate::inference::{BareModel, FakeSession};
use crate::report::Status;
use crate::slide::Slide;
use crate::slide::synthetic::{Encoding, SvsOptions, SyntheticSlide};

const TILE: u32 = 64;

/// An engine over a made-up model; the card is that of the committed classifier, cut to the fake's outputs.
fn engine(batch_size: usize, fault: Option<(u64, Fault)>) -> Engine {
    let mut card = ModelCard::load(Path::new("models/cells-vit"), &BareModel::default()).unwrap();
    card.classes.truncate(FakeSession::CHANNELS);
    card.background = None;
    card.tile_size = TILE;
    let mut session = FakeSession::new(Task::Classification, TILE as usize);
    if let Some((tile, fault)) = fault {
        session = session.with_fault(tile, fault);
    }
    let no_mask = TilingConfig { tissue: TissueSource::None, min_tissue: 0.0, ..TilingConfig::of(&card) };
    let tiling = TilingConfig { overlap: 0, ..no_mask };
    let config = RunConfig {
        tiling,
        threshold: 0.5,
        emit: vec![Emit::Csv],
        on_tile_error: OnFailure::Fail,
        on_nonfinite: OnFailure::Skip,
        icc: false,
    };
    let model = ModelRecord { name: "fake".to_owned(), ..ModelRecord::default() };
    let execution = ExecutionRecord { batch_size, readers: 2, ..ExecutionRecord::default() };
    let engine = Engine::over_sessions(card, config, vec![Box::new(session)], model, execution).unwrap();
    // Faults count the tiles of slides alone.
    Engine { warm_batch: usize::MAX, ..engine }
}

/// Runs over a slide of 640 × 320 px: 50 tiles.
fn run(engine: &mut Engine) -> (Status, crate::report::SlideRecord) {
    run_into(engine, tempfile::tempdir().unwrap().path())
}

fn run_into(engine: &mut Engine, folder: &Path) -> (Status, crate::report::SlideRecord) {
    let path = folder.join("slide.svs");
    let options = SvsOptions { encoding: Encoding::Deflate, ..SvsOptions::default() };
    SyntheticSlide::new(640, 320, 1).write(&path, &options).unwrap();
    let slides = inputs::slides(&[path]).unwrap();
    let out = OutputFolder::lock(&folder.join("out")).unwrap();
    let cancel = Cancel::default();
    let summary = cohort::run(engine, &slides, &out, CohortOptions::default(), &cancel, &mut |_| {}).unwrap();
    summary.slides.into_iter().next().unwrap()
}

#[test]
fn memory_that_runs_out_lowers_the_batch_and_is_told() {
    let mut engine = engine(16, Some((0, Fault::OutOfMemoryAbove(5))));
    let (status, record) = run(&mut engine);
    assert_eq!((status, record.error), (Status::Done, None));
    assert_eq!(record.coverage.unwrap().inferred, 50);
    assert_eq!(record.notes, ["memory sufficed for batches of 4 tiles, not 16"]);
    assert_eq!(engine.execution().batch_size, 4);
}

/// A slide of 640 × 320 px in tiles of 256 px, cut into 50 tiles.
fn planned(engine: &Engine, folder: &Path) -> SlidePlan {
    let path = folder.join("slide.svs");
    let options = SvsOptions { encoding: Encoding::Deflate, ..SvsOptions::default() };
    SyntheticSlide::new(640, 320, 1).write(&path, &options).unwrap();
    plan::plan(Slide::open(&path, None).unwrap(), &engine.config.tiling).unwrap()
}

#[test]
fn memory_is_planned_part_by_part_and_lowered_below_a_limit() {
    let (engine, folder) = (engine(2, None), tempfile::tempdir().unwrap());
    let plan = planned(&engine, folder.path());
    let (card, config, batch_size) = (&engine.card, &engine.config, engine.batch_size);
    let work = Work { plan: &plan, card, config, batch_size, sessions: 1, readers: 2, threads: 1, is_traced: false };
    let before = Before { model: 10_000_000, ..Before::default() };
    let ample = work.plan(before, None).unwrap();
    let (file_tile, tile) = (256 * 256 * 3, 64 * 64 * 3);
    // A row of three tiles of the file, and a fifth more in buffers.
    let held = 3 * file_tile + 3 * file_tile / 5;
    let expected = MemoryParts {
        model: 10_000_000,
        plan: 50 * 32,
        // What is held, and three times a tile for each reader.
        reading: held + 2 * 3 * file_tile,
        // Two batches of two for the session, four that wait, two tiles for each reader and 64 to spare: more than there are.
        tiles: 50 * tile,
        predictions: 50 * 3 * 4,
        // Two rows of ten cells in 32 bits and three strips of two rows in 8, of three classes and a fourth plane.
        stitching: 2 * 10 * 4 * 4 + 3 * 2 * 10 * 4,
        maps: 0,
        // 5 rows, and sums in 32 bits for one.
        overview: (50 + 10 * 4) * 4,
        pictures: 0,
        tables: 4 * (512 << 10),
        trace: 0,
        earlier: 0,
    };
    assert_eq!((ample.parts, ample.is_lowered(), ample.check(&plan).is_ok()), (expected, false, true));
    assert_eq!(ample.expected(), expected.total());
    assert!(
        work.plan(before, Some(expected.total())).unwrap()
            == MemoryPlan { limit: Some(expected.total()), ..ample.clone() }
    );

    let lowered = work.plan(before, Some(expected.total() - 1)).unwrap();
    assert_eq!(lowered.parts, MemoryParts { tiles: 16 * tile, predictions: 16 * 3 * 4, ..expected });
    assert!(lowered.is_lowered() && lowered.check(&plan).is_ok());
    // The decoded tiles of the file have what is left.
    let without = lowered.parts.total() - held;
    let lowest = work.plan(before, Some(without + 1000)).unwrap();
    assert_eq!((lowest.parts.reading, lowest.room.decoded_bytes), (6 * file_tile + 1000, Some(1000)));
    assert!(lowest.check(&plan).is_ok());

    let error = work.plan(before, Some(without - 1)).unwrap().check(&plan).unwrap_err();
    let EngineError::MemoryTooLittle { expected, limit, part, bytes, .. } = &error else { panic!("{error}") };
    assert_eq!((*expected, *limit, *part, *bytes), (without, without - 1, "model", 10_000_000));
    assert!(error.hint().unwrap().contains("`sessions`"));
    // Planning the slide may have taken more than all that is to come.
    let after_much = work.plan(Before { peak: 90_000_000, ..before }, Some(80_000_000)).unwrap();
    assert_eq!(after_much.expected(), 90_000_000);
    assert!(matches!(after_much.check(&plan), Err(EngineError::MemoryExceeded { peak: 90_000_000, .. })));
    // Of what an earlier slide gave back, this one uses two thirds of its own again.
    let own = ample.parts.total() - ample.parts.model - ample.parts.plan;
    let second = work.plan(Before { given_back: 9_000_000, ..before }, None).unwrap();
    assert_eq!(second.parts, MemoryParts { earlier: 9_000_000 - (own - own / 3), ..ample.parts });
    assert_eq!(work.plan(Before { given_back: 1_000_000, ..before }, None).unwrap().parts, ample.parts);
}

#[test]
fn large_tiles_have_fewer_buffers_to_spare() {
    let mut card = engine(1, None).card;
    let mut spare = |task, tile_size| {
        card.task = task;
        Room::AMPLE.spare_buffers(memory::tile_bytes(&card, tile_size))
    };
    // 10 MiB by 3 bytes a pixel and 12 for three classes; never more than wait between two stages.
    assert_eq!([96, 256, 512, 1024, 4096].map(|side| spare(Task::Classification, side)), [64, 53, 13, 3, 0]);
    assert_eq!([96, 256, 512].map(|side| spare(Task::Segmentation, side)), [64, 10, 2]);
    assert_eq!(Room { spare_bytes: 0, ..Room::AMPLE }.spare_buffers(1), 0);
    // A plan of more tiles than there are buffers: two batches of two and four that wait, four for two readers, 64 to spare.
    let (engine, folder) = (engine(2, None), tempfile::tempdir().unwrap());
    let mut plan = planned(&engine, folder.path());
    plan.positions = plan.positions.repeat(2);
    let (card, config, batch_size) = (&engine.card, &engine.config, engine.batch_size);
    let work = Work { plan: &plan, card, config, batch_size, sessions: 1, readers: 2, threads: 1, is_traced: false };
    let parts = work.plan(Before::default(), None).unwrap().parts;
    assert_eq!((parts.tiles, parts.predictions), (80 * 64 * 64 * 3, 80 * 3 * 4));
}

#[test]
fn no_sessions_are_no_engine() {
    let Engine { card, config, model, execution, .. } = engine(1, None);
    let error = Engine::over_sessions(card, config, Vec::new(), model, execution).err().unwrap();
    assert!(matches!(error, EngineError::NoSessions), "{error}");
}

#[test]
fn little_memory_gives_the_same_results() {
    let table = |room| {
        let (mut engine, folder) = (engine(8, None), tempfile::tempdir().unwrap());
        let plan = planned(&engine, folder.path());
        engine.room = room;
        let conduct = Conduct { cancel: &Cancel::default(), is_traced: false };
        engine.run_slide("slide", &plan, folder.path(), conduct, &mut |_| {}).unwrap();
        std::fs::read(folder.path().join("model-outputs-csv/slide.csv")).unwrap()
    };
    let least = Room { spare_bytes: 0, waiting_results: NonZeroUsize::MIN, decoded_bytes: Some(0) };
    assert_eq!(table(Room::AMPLE), table(least));
}

#[test]
fn outputs_that_are_no_numbers_are_counted_and_placed() {
    let (status, record) = run(&mut engine(8, Some((13, Fault::NotFinite))));
    assert_eq!(status, Status::Done);
    let coverage = record.coverage.unwrap();
    assert_eq!((coverage.grid, coverage.inferred, coverage.failed.len()), (50, 49, 1));
    // Tile 13 of 10 columns is the fourth of the second row.
    assert_eq!(coverage.failed[0].rect, [3 * 64, 64, 64, 64]);
    assert!(coverage.failed[0].reason.contains("NaN or infinite"));
}

#[test]
fn a_tile_without_a_result_leaves_the_others_theirs() {
    let rows = |fault| -> Vec<String> {
        let folder = tempfile::tempdir().unwrap();
        run_into(&mut engine(8, fault), folder.path());
        let table = folder.path().join("out/model-outputs-csv/slide.csv");
        std::fs::read_to_string(table).unwrap().lines().skip(1).map(str::to_owned).collect()
    };
    let mut expected = rows(None);
    assert_eq!(expected.len(), 50);
    expected.remove(13);
    assert_eq!(rows(Some((13, Fault::NotFinite))), expected);
}

#[test]
fn tiles_from_memory_take_the_line_of_a_run_round_by_round() {
    let tiles = vec![vec![200; (TILE * TILE * 3) as usize]; 3];
    let run = |mut engine: Engine, batches: usize| {
        let batches = NonZeroUsize::new(batches).unwrap();
        engine.simulate(&tiles, batches, &Cancel::default(), &mut |rounds| rounds.len() < 3)
    };
    let done = run(engine(4, None), 5).unwrap();
    // The first round is apart: it fills the channels.
    assert_eq!((done.rounds.len(), done.batch_secs.len()), (3, 10));
    let infer = done.stages.iter().find(|stage| stage.name == "infer").unwrap();
    assert!(infer.items >= 15, "{infer:?}");
    // It ends, and waits for no buffer.
    assert!(run(engine(4, Some((30, Fault::Fail))), 5).is_err());
    let nothing = engine(4, None).simulate(&[], NonZeroUsize::MIN, &Cancel::default(), &mut |_| true);
    assert!(matches!(nothing, Err(EngineError::NoTilesGiven)));
    let stopped = Cancel::default();
    let mut asked = |rounds: &[Duration]| {
        if rounds.len() == 2 {
            stopped.cancel();
        }
        true
    };
    let ended = engine(4, None).simulate(&tiles, NonZeroUsize::MIN, &stopped, &mut asked);
    assert!(matches!(ended, Err(EngineError::Cancelled)));
}

#[test]
fn a_failing_session_fails_the_slide_and_leaves_no_file() {
    let (status, record) = run(&mut engine(8, Some((20, Fault::Fail))));
    assert_eq!(status, Status::Failed);
    assert!(record.error.is_some() && record.outputs.is_empty() && record.timing.is_none());
}
