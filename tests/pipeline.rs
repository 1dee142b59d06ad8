//! What a run promises of its results: the same bytes however it is run, values that can be computed by hand, and
//! only that redone which is missing or was made differently.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use serde_json::json;
use slidestream::slide::synthetic::SvsOptions;
use tiff::decoder::{Decoder, DecodingResult};

use support::{
    Finished, Json, Kind, TILE, Workplace, assert_no_partial_files, assert_same_results, classify, files,
    has_partial_file, lossless, results, sha256, small, table, two_pieces,
};

#[test]
fn results_do_not_depend_on_readers_and_sessions() {
    let place = Workplace::new();
    let slide = place.slide("a.svs", &two_pieces(), &SvsOptions::default());
    for (kind, flags) in [
        (Kind::Classifier, &["--target-mpp", "0.7"][..]),
        (Kind::Segmentation, &["--overlap", "25%"]),
        (Kind::Features, &["--overlap", "25%"]),
    ] {
        let model = place.model(kind);
        let run = |workers: &str| {
            // Features name the folder that they were written to, so it is called the same.
            let folder = place.at(&format!("{kind:?}-{workers}"));
            fs::create_dir(&folder).unwrap();
            let flags = [flags, &["--readers", workers, "--sessions", workers, "--batch-size", "5"]].concat();
            let mut command = place.run_command(&model, &[&slide], Path::new("out"), &flags);
            place.start(command.current_dir(&folder)).wait().code(0);
            let out = folder.join("out");
            let execution = Json::read(out.join("run.json"))["execution"].clone();
            assert_eq!(
                (execution["readers"].to_string(), execution["sessions"].to_string()),
                (workers.into(), workers.into())
            );
            assert!(Json::of_slide(&out, "a").coverage().inferred > 20);
            out
        };
        assert_same_results(&run("1"), &run("4"));
    }
}

#[test]
fn every_file_of_a_slide_is_listed_with_its_checksum() {
    let place = Workplace::new();
    let slide = place.slide("a.svs", &small(), &SvsOptions::default());
    for (kind, kinds) in [(Kind::Classifier, "csv,geojson,tiff,png"), (Kind::Features, "csv,geojson,png,h5")] {
        let out = place.at(&format!("out-{kind:?}"));
        place.run(&place.model(kind), &[&slide], &out, &[]).code(0);
        let record = Json::of_slide(&out, "a");
        assert_eq!(record["settings"]["emit"], json!(kinds.split(',').collect::<Vec<_>>()));
        let results = results(&out);
        let listed = record["outputs"].as_array().unwrap();
        assert_eq!(listed.len(), results.len());
        for output in listed {
            let bytes = &results[output["path"].as_str().unwrap()];
            assert_eq!(
                (output["bytes"].as_u64(), &output["sha256"]),
                (Some(bytes.len() as u64), &json!(sha256(bytes)))
            );
        }
        assert_eq!(record["slide"]["bytes"], fs::metadata(&slide).unwrap().len());
    }
}

#[test]
fn the_classifiers_table_is_what_the_pixels_give_by_hand() {
    let place = Workplace::new();
    let synthetic = two_pieces();
    let slide = place.slide("a.svs", &synthetic, &lossless());
    let out = place.at("out");
    place.run(&place.model(Kind::Classifier), &[&slide], &out, &["--tissue", "none", "--overlap", "25%"]).code(0);
    let header = fs::read_to_string(out.join("model-outputs-csv/a.csv")).unwrap();
    assert!(header.starts_with("minx,miny,width,height,prob_pale,prob_deep\n"));
    let rows = table(&out.join("model-outputs-csv/a.csv"));
    let side = f64::from(TILE);
    let (mut inside, mut least, mut most) = (0, f64::INFINITY, f64::NEG_INFINITY);
    for row in rows.iter().filter(|row| row[0] + side <= 1500.0 && row[1] + side <= 1200.0) {
        assert_eq!(row[2..4], [side, side]);
        let [x, y] = [row[0], row[1]].map(|place| place.to_string().parse::<u32>().unwrap());
        let expected = classify(&synthetic.pixels(x, y, TILE, TILE));
        for (found, expected) in row[4..].iter().zip(expected) {
            assert!((found - expected).abs() < 1e-5, "at {x},{y}: {:?} instead of {expected}", &row[4..]);
        }
        (inside, least, most) = (inside + 1, least.min(row[5]), most.max(row[5]));
    }
    assert_eq!(inside, 15 * 12);
    // The test would prove little if all tiles were alike.
    assert!(most - least > 0.2, "{least} to {most}");
}

/// Width, height and pixels of a TIFF's first image.
fn pixels(path: &Path) -> (u32, u32, Vec<u8>) {
    let mut decoder = Decoder::new(File::open(path).unwrap()).unwrap();
    let (width, height) = decoder.dimensions().unwrap();
    let DecodingResult::U8(pixels) = decoder.read_image().unwrap() else { panic!("{}: no bytes", path.display()) };
    (width, height, pixels)
}

#[test]
fn the_segmentations_maps_are_the_slides_pixels() {
    let place = Workplace::new();
    let synthetic = two_pieces();
    let slide = place.slide("a.svs", &synthetic, &lossless());
    let model = place.model(Kind::Segmentation);
    let rgb = synthetic.pixels(0, 0, 1500, 1200);
    let largest = |pixel: &[u8]| {
        let most = *pixel.iter().max().unwrap();
        u8::try_from(pixel.iter().position(|value| *value == most).unwrap() + 1).unwrap()
    };
    for overlap in ["0", "25%"] {
        let out = place.at(&format!("out-{overlap}"));
        place.run(&model, &[&slide], &out, &["--tissue", "none", "--overlap", overlap, "--emit", "tiff"]).code(0);
        for (channel, class) in ["red", "green", "blue"].into_iter().enumerate() {
            let (width, height, map) = pixels(&out.join(format!("heatmaps/a.{class}.tif")));
            assert_eq!((width, height), (1500, 1200));
            let expected = rgb.iter().skip(channel).step_by(3);
            assert_eq!(map.iter().zip(expected).position(|(found, expected)| found != expected), None, "{class}");
        }
        let (_, _, classes) = pixels(&out.join("classes/a.tif"));
        let wrong = classes.iter().zip(rgb.chunks_exact(3)).position(|(class, pixel)| *class != largest(pixel));
        assert_eq!(wrong, None);
    }
}

#[test]
fn what_was_not_inferred_has_no_class() {
    let place = Workplace::new();
    let slide = place.slide("a.svs", &small(), &lossless());
    let out = place.at("out");
    let flags = ["--tissue", "none", "--region", "128,128,256,128", "--max-tiles", "1", "--emit", "tiff"];
    place.run(&place.model(Kind::Segmentation), &[&slide], &out, &flags).code(0);
    let (width, height, classes) = pixels(&out.join("classes/a.tif"));
    assert_eq!((width, height), (256, 128));
    for row in classes.chunks_exact(256) {
        assert!(row[..128].iter().all(|class| *class > 0) && row[128..].iter().all(|class| *class == 0));
    }
}

#[test]
fn only_what_is_missing_or_made_differently_is_redone() {
    let place = Workplace::new();
    let slide = place.slide("a.svs", &small(), &SvsOptions::default());
    let model = place.model(Kind::Classifier);
    let out = place.at("out");
    let run = |flags: &[&str]| place.run(&model, &[&slide], &out, flags).code(0);
    let finished = || Json::of_slide(&out, "a")["timing"].clone();
    let is_skipped = |run: Finished| {
        run.says(&["a: was done before with the same settings"]);
        let list = fs::read_to_string(out.join("process_list.csv")).unwrap();
        assert!(list.contains("a,skipped,30,"), "{list}");
    };
    let is_redone = |run: Finished, reason: &str| drop(run.says(&[&format!("a: done again: {reason}")]));

    let first = run(&[]);
    assert!(!first.stderr.contains("again"), "{}", first.stderr);
    let (before, timing) = (results(&out), finished());
    // What changes the speed alone changes no result.
    is_skipped(run(&["--readers", "1", "--sessions", "1", "--batch-size", "3"]));
    assert_eq!((results(&out), finished()), (before.clone(), timing.clone()));

    is_redone(run(&["--threshold", "0.9"]), "made with threshold 0.5, now 0.9");
    is_redone(run(&[]), "made with threshold 0.9, now 0.5");
    assert_eq!(results(&out), before);

    fs::remove_file(out.join("overlays/a.png")).unwrap();
    is_redone(run(&[]), "overlays/a.png is missing or has another size");
    fs::write(out.join("model-outputs-csv/a.csv"), "cut").unwrap();
    is_redone(run(&[]), "model-outputs-csv/a.csv is missing or has another size");
    fs::write(out.join("slides/a.json"), "{ cut").unwrap();
    run(&[]);
    assert_eq!(results(&out), before);

    let timing = finished();
    run(&["--force"]);
    assert_ne!(finished(), timing);
    assert_eq!(results(&out), before);

    // Fewer outputs: those not asked for any more don't stay behind.
    is_redone(run(&["--emit", "csv"]), "made with emit ");
    assert_eq!(results(&out).into_keys().collect::<Vec<_>>(), ["model-outputs-csv/a.csv"]);

    small().write(&slide, &lossless()).unwrap();
    is_redone(run(&["--emit", "csv"]), "the slide file changed");
}

#[test]
fn an_interrupted_run_leaves_nothing_finished_and_goes_on() {
    let place = Workplace::new();
    let first = place.slide("a.svs", &small(), &SvsOptions::default());
    let second = place.at("b.svs");
    fs::copy(&first, &second).unwrap();
    let slides: [&Path; 2] = [&first, &second];
    let model = place.model(Kind::Slow);
    let (out, whole) = (place.at("out"), place.at("whole"));
    let mut run = place.start(&mut place.run_command(&model, &slides, &out, &["--sessions", "1"]));
    run.until("the second slide is at work", || {
        out.join("slides/a.json").exists() && has_partial_file(&out.join("model-outputs-csv"))
    });
    run.signal("INT");
    run.wait().code(130).shows(&["stopped on request: run the same command again to go on"]);
    assert!(!out.join("slides/b.json").exists(), "the run was too fast to be interrupted");
    assert_no_partial_files(&out);
    assert_eq!(results(&out).into_keys().find(|name| name.contains("/b.")), None);
    let record = Json::read(out.join("run.json"));
    assert_eq!((&record["status"], &record["slides"]["not started"]), (&json!("interrupted"), &json!(1)));

    let again = place.run(&model, &slides, &out, &[]).code(0);
    again.says(&["a: was done before"]).shows(&["2 slides: 1 done, 0 failed, 1 done before"]);
    place.run(&model, &slides, &whole, &[]).code(0);
    assert_same_results(&out, &whole);
}

#[test]
fn a_cohort_keeps_account_of_every_slide() {
    let place = Workplace::new();
    let paths: Vec<PathBuf> =
        (0..3).map(|index| place.slide(&format!("cohort/s{index}.svs"), &small(), &SvsOptions::default())).collect();
    let out = place.at("out");
    let finished = place.run(&place.model(Kind::Classifier), &[&place.at("cohort")], &out, &["--emit", "csv"]).code(0);
    finished.shows(&["3 slides: 3 done, 0 failed, 0 done before", "90 tiles in "]);
    let list = fs::read_to_string(out.join("process_list.csv")).unwrap();
    let lines: Vec<&str> = list.lines().collect();
    assert_eq!((lines[0], lines.len()), ("slide,status,tiles,seconds,tiles_per_s,error", 4));
    let run = Json::read(out.join("run.json"));
    assert_eq!(
        (&run["status"], &run["slides"]),
        (&json!("done"), &json!({ "done": 3, "failed": 0, "not started": 0, "skipped": 0 }))
    );
    assert!(
        run["libraries"]["openslide"]["version"].is_string() && run["libraries"]["onnxruntime"]["version"].is_string()
    );
    for (index, path) in paths.iter().enumerate() {
        assert!(lines[index + 1].starts_with(&format!("s{index},done,30,")));
        assert_eq!(Json::of_slide(&out, &format!("s{index}"))["slide"]["path"], path.to_str().unwrap());
    }
    // Nothing but results and accounts.
    assert_eq!(files(&out).len(), 3 + 3 + 4);
}
