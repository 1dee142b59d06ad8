//! The command line's promises: exit codes, messages, precedence, and what every option does to the results.

mod support;

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use slidestream::slide::synthetic::{MppField, SvsOptions, SyntheticSlide, Tissue};

use support::{
    Coverage, Json, Kind, TILE, Workplace, assert_failed, assert_no_results_of, assert_same_results, files, results,
    small, table, two_pieces, with_mpp,
};

/// A workplace with the classifier and the small slide `a`.
fn with_classifier() -> (Workplace, PathBuf, PathBuf) {
    let place = Workplace::new();
    let slide = place.slide("a.svs", &small(), &SvsOptions::default());
    let model = place.model(Kind::Classifier);
    (place, model, slide)
}

fn csv_of(out: &Path) -> Vec<Vec<f64>> {
    table(&out.join("model-outputs-csv/a.csv"))
}

/// The corners of a table's tiles.
fn corners(rows: &[Vec<f64>]) -> Vec<(f64, f64)> {
    rows.iter().map(|row| (row[0], row[1])).collect()
}

#[test]
fn every_subcommand_explains_itself() {
    let place = Workplace::new();
    place.slidestream(["--help"]).code(0).shows(&["run", "tiles", "inspect", "optimize", "compare", "doctor"]);
    place.slidestream(["--version"]).code(0).shows(&["slidestream ", env!("CARGO_PKG_VERSION")]);
    for (command, flag) in
        [("run", "--on-tile-error"), ("tiles", "--profile"), ("inspect", "--json"), ("doctor", "--openslide-library")]
    {
        place.slidestream([command, "--help"]).code(0).shows(&["Usage: slidestream", flag]);
    }
    place.slidestream(["run"]).code(2).says(&["--model"]);
    place.slidestream(["run", "a.svs", "--model", "m", "--nonsense"]).code(2).says(&["--nonsense"]);
    place.slidestream(["fly"]).code(2).says(&["fly"]);
}

#[test]
fn wrong_values_are_told_with_their_flag_and_nothing_is_written() {
    let (place, model, slide) = with_classifier();
    let out = place.at("out");
    for (flag, value, reason) in [
        ("--overlap", "12mm", "--overlap 12mm"),
        ("--overlap", "128px", "no step between tiles"),
        ("--region", "0,0,100", "--region 0,0,100: give X,Y,W,H"),
        ("--threshold", "1.5", "--threshold 1.5: must be between 0 and 1"),
        ("--min-tissue", "-1", "--min-tissue"),
        ("--target-mpp", "0", "--target-mpp 0"),
        ("--emit", "csv,pdf", "--emit pdf: known are csv"),
        ("--emit", "h5", "--emit h5: this model's task has no such output"),
        ("--on-tile-error", "ignore", "--on-tile-error ignore: known are fail and skip"),
        ("--tissue", "everything", "--tissue everything: give otsu, none"),
        ("--max-tiles", "0", "--max-tiles 0"),
        ("--batch-size", "none", "--batch-size none"),
        ("--memory-limit", "lots", "--memory-limit lots: give a size above 0 such as 2GiB"),
        ("--memory-limit", "0", "--memory-limit 0: give a size"),
        ("--readers", "0", "--readers 0"),
        ("--device", "tpu", "--device tpu"),
        ("--mean", "0.5", "--mean 0.5: give three numbers"),
    ] {
        let value = format!("{flag}={value}");
        place.run(&model, &[&slide], &out, &[&value]).code(2).says(&["error: ", reason]);
    }
    assert!(!out.exists());
}

#[cfg(target_os = "linux")]
#[test]
fn memory_is_told_before_the_tiles_and_is_not_exceeded() {
    let (place, _, slide) = with_classifier();
    let model = place.model(Kind::Segmentation);
    let out = place.at("out");
    let finished = place.run(&model, &[&slide], &out, &["--memory-limit", "64GiB", "--log-json"]).code(0);
    finished.says(&["\"event\":\"memory planned\"", "\"expected_bytes\":"]);
    let memory = &Json::of_slide(&out, "a")["memory"];
    let bytes = |name: &str| memory[name].as_u64().unwrap();
    let (expected, peak) = (bytes("expected_bytes"), bytes("peak_bytes"));
    assert!(peak > 10 << 20 && peak * 10 <= expected * 11, "{memory}");
    assert_eq!((bytes("limit_bytes"), &memory["lowered"]), (64 << 30, &json!(false)));
    // 30 tiles at most are on their way, of three channels each way, in 8 bits and in 32.
    let (tiles, part) = (30 * u64::from(TILE * TILE) * 3, |name: &str| memory["parts"][name].as_u64().unwrap());
    assert_eq!((part("tiles"), part("predictions")), (tiles, 4 * tiles));
    let people = place.run(&model, &[&slide], &place.at("people"), &[]).code(0);
    people.says(&["a: memory: up to ", " expected: model "]);
}

#[cfg(target_os = "linux")]
#[test]
fn a_slide_that_needs_more_memory_than_it_may_take_fails() {
    let (place, model, slide) = with_classifier();
    let config = place.write("run.toml", "memory_limit = \"1MiB\"\n");
    let config = format!("--config={}", config.display());
    let out = place.at("out");
    let finished = place.run(&model, &[&slide], &out, &[&config]).code(1);
    finished.says(&["a.svs: ", "of memory", "more than the limit of 1.0 MiB", "help: ", "`memory_limit`"]);
    assert_failed(&out, "a", "more than the limit of 1.0 MiB");
    assert_eq!(Json::of_slide(&out, "a")["memory"]["limit_bytes"], json!(1 << 20));
    place.run(&model, &[&slide], &out, &[&config, "--memory-limit", "64GiB"]).code(0);
}

#[test]
fn a_graph_kept_by_one_run_is_taken_by_the_next_and_changes_nothing() {
    let (place, model, slide) = with_classifier();
    let graphs = place.at("graphs").display().to_string();
    let table = |out: &str, flags: &[&str], says: bool| {
        let out = place.at(out);
        let finished = place.run(&model, &[&slide], &out, flags).code(0);
        assert_eq!(
            finished.stderr.contains("its graph was optimised by an earlier run: "),
            says,
            "{}",
            finished.stderr
        );
        std::fs::read(out.join("model-outputs-csv/a.csv")).unwrap()
    };
    let expected = table("plain", &[], false);
    assert!(table("first", &["--graph-cache", &graphs], false) == expected);
    assert!(table("second", &["--graph-cache", &graphs], true) == expected);
    assert_eq!(std::fs::read_dir(&graphs).unwrap().count(), 1);
}

#[test]
fn two_slides_of_one_name_are_refused_before_any_work() {
    let (place, model, slide) = with_classifier();
    fs::create_dir(place.at("other")).unwrap();
    let other = place.at("other/a.svs");
    fs::copy(&slide, &other).unwrap();
    let out = place.at("out");
    let finished = place.run(&model, &[&slide, &other], &out, &[]).code(2);
    finished.says(&["two slides have the id \"a\"", "a.svs and ", "other/a.svs", "help: ", "column id"]);
    assert!(!out.exists());

    let list = place.write("list.csv", "slide,id\na.svs,first\nother/a.svs,second\n");
    place.run(&model, &[&list], &out, &["--emit", "csv"]).code(0);
    assert_eq!(results(&out).len(), 2);
    assert_eq!(Json::of_slide(&out, "second")["id"], "second");
}

#[test]
fn flags_win_over_the_file_and_the_file_over_the_card() {
    let (place, _, slide) = with_classifier();
    let model = place.model_with(Kind::Classifier, "mpp = 0.5", "mpp = 0.5\noverlap = \"25%\"");
    let config = place.write("run.toml", "overlap = \"32px\"\nthreshold = 0.7\nemit = \"csv\"\ntarget_mpp = 1\n");
    let config = format!("--config={}", config.display());
    let settings = |flags: &[&str]| {
        let out = place.at("out");
        place.run(&model, &[&slide], &out, flags).code(0);
        Json::of_slide(&out, "a")["settings"].clone()
    };
    let of_card = settings(&[]);
    assert_eq!(
        (&of_card["overlap"], &of_card["target_mpp"], &of_card["threshold"]),
        (&json!(32), &json!(0.5), &json!(0.5))
    );
    assert_eq!(of_card["emit"], json!(["csv", "geojson", "tiff", "png"]));
    let of_file = settings(&[&config]);
    assert_eq!((&of_file["target_mpp"], &of_file["threshold"]), (&json!(1.0), &json!(0.7)));
    assert_eq!(of_file["emit"], json!(["csv"]));
    let of_flag = settings(&[&config, "--threshold", "0.25", "--overlap", "64px"]);
    assert_eq!((&of_flag["threshold"], &of_flag["overlap"]), (&json!(0.25), &json!(64)));
    assert_eq!(of_flag["target_mpp"], json!(1.0));
}

#[test]
fn wrong_configuration_files_are_told_with_the_key() {
    let (place, model, slide) = with_classifier();
    let out = place.at("out");
    for (text, reason) in [
        ("treshold = 0.5\n", "run.toml: unknown key \"treshold\""),
        ("threshold = 2\n", "--threshold 2: must be between 0 and 1"),
        ("threshold = [0.5]\n", "run.toml: "),
        ("threshold 0.5\n", "run.toml: "),
        ("icc = \"perhaps\"\n", "run.toml: "),
    ] {
        let config = place.write("run.toml", text);
        let config = format!("--config={}", config.display());
        place.run(&model, &[&slide], &out, &[&config]).code(2).says(&["error: ", reason]);
    }
    place.run(&model, &[&slide], &out, &["--config", "nowhere.toml"]).code(2).says(&["nowhere.toml: "]);
    assert!(!out.exists());
}

#[test]
fn devices_and_providers_that_are_not_there_are_no_run_on_the_cpu() {
    let (place, model, slide) = with_classifier();
    let out = place.at("out");
    for (flag, value) in [("--device", "cuda:63"), ("--provider", "openvino"), ("--provider", "tensorrt")] {
        let doctor = place.slidestream(["doctor"]);
        let has =
            doctor.stdout.lines().any(|line| line.starts_with("ok") && line.contains(&format!("provider {value} ")));
        if has {
            // A library that has it is allowed to use it.
            continue;
        }
        let finished = place.run(&model, &[&slide], &out, &[flag, value]).code(1);
        finished.says(&["error: ", value, "can't be had", "help: "]);
        assert!(!out.exists());
    }
    place.run(&model, &[&slide], &out, &["--device", "cpu", "--provider", "cuda"]).code(1).says(&["cuda"]);
    assert!(!out.exists());
    place.run(&model, &[&slide], &out, &["--device", "cpu"]).code(0);
    assert_eq!(Json::read(out.join("run.json"))["execution"]["device"], "cpu");
}

#[test]
fn a_missing_resolution_is_asked_for_and_taken_from_flag_table_or_list() {
    let (place, model, _) = with_classifier();
    let slide = place.slide("b.svs", &small(), &with_mpp(MppField::Missing));
    let out = |name: &str| place.at(name);
    let finished = place.run(&model, &[&slide], &out("none"), &[]).code(1);
    finished.says(&["b.svs: no resolution (mpp) in the metadata", "help: set `slide_mpp`", "about 0.50 is usual"]);
    assert_failed(&out("none"), "b", "no resolution");

    place.run(&model, &[&slide], &out("flag"), &["--slide-mpp", "0.25"]).code(0);
    place.write("mpp.csv", "slide,mpp\nb.svs,0.25\n");
    place.run(&model, &[&slide], &out("table"), &["--mpp-csv", "mpp.csv"]).code(0);
    let list = place.write("list.csv", "slide,mpp\nb.svs,0.25\n");
    // What stands beside the slide wins over what is said of all.
    place.run(&model, &[&list], &out("list"), &["--slide-mpp", "0.5"]).code(0);
    for name in ["flag", "table", "list"] {
        let record = Json::of_slide(&out(name), "b");
        assert_eq!(record["reading"]["slide_mpp"], json!([0.25, 0.25]), "{name}");
        assert_eq!(record["reading"]["tile_size_level0"], json!([2 * TILE, 2 * TILE]));
        assert_same_results(&out("flag"), &out(name));
    }
    place.write("mpp.csv", "slide,mpp\ntypo.svs,0.25\n");
    let finished = place.run(&model, &[&slide], &out("typo"), &["--mpp-csv", "mpp.csv"]).code(2);
    finished.says(&["mpp.csv: line 2: \"typo.svs\" names none of the slides"]);
}

#[test]
fn regions_samples_and_overlaps_choose_tiles() {
    let (place, model, slide) = with_classifier();
    let run = |name: &str, flags: &[&str]| {
        let out = place.at(name);
        let flags = [&["--emit", "csv"], flags].concat();
        place.run(&model, &[&slide], &out, &flags).code(0);
        (csv_of(&out), Json::of_slide(&out, "a").coverage())
    };
    let (all, coverage) = run("all", &["--tissue", "none"]);
    assert_eq!(coverage, Coverage { grid: 30, inferred: 30, background: 0, unsampled: 0, failed: 0 });
    let expected: Vec<(f64, f64)> =
        (0..5).flat_map(|y| (0..6).map(move |x| (f64::from(x * TILE), f64::from(y * TILE)))).collect();
    assert_eq!(corners(&all), expected);

    let (sampled, coverage) = run("sampled", &["--tissue", "none", "--max-tiles", "7"]);
    assert_eq!((sampled.len(), coverage.unsampled, coverage.grid), (7, 23, 30));
    let even: Vec<&Vec<f64>> = (0..7).map(|index| &all[index * 30 / 7]).collect();
    assert_eq!(sampled.iter().collect::<Vec<_>>(), even);

    let (region, coverage) = run("region", &["--tissue", "none", "--region", "128,256,256,128"]);
    assert_eq!((corners(&region), coverage.grid), (vec![(128.0, 256.0), (256.0, 256.0)], 2));
    assert_eq!(region[0], all[2 * 6 + 1]);

    let (overlapping, _) = run("overlap", &["--tissue", "none", "--overlap", "25%"]);
    let in_a_row = overlapping.windows(2).filter(|pair| pair[0][1] == pair[1][1]);
    let steps: Vec<f64> = in_a_row.map(|pair| pair[1][0] - pair[0][0]).collect();
    assert!(!steps.is_empty() && steps.iter().all(|step| *step == 96.0), "{steps:?}");

    let outside = place.run(&model, &[&slide], &place.at("outside"), &["--region", "5000,0,10,10"]).code(1);
    outside.says(&["a.svs: region", "lies outside the slide", "help: `region` is X,Y,W,H"]);
}

#[test]
fn tissue_comes_from_the_slide_a_picture_or_polygons() {
    let place = Workplace::new();
    let model = place.model(Kind::Classifier);
    let slide = place.slide("a.svs", &two_pieces(), &SvsOptions::default());
    let run = |name: &str, flags: &[&str]| {
        let out = place.at(name);
        let flags = [&["--emit", "csv"], flags].concat();
        place.run(&model, &[&slide], &out, &flags).code(0);
        (csv_of(&out), Json::of_slide(&out, "a").coverage())
    };
    let (_, otsu) = run("otsu", &[]);
    assert!((30..80).contains(&otsu.inferred) && otsu.inferred + otsu.background == 120, "{otsu:?}");
    let (_, strict) = run("strict", &["--min-tissue", "0.9"]);
    let (_, loose) = run("loose", &["--min-tissue", "0"]);
    assert!(strict.inferred < otsu.inferred && otsu.inferred < loose.inferred, "{strict:?} {otsu:?} {loose:?}");

    // The left half, once as a picture of another scale, once as a polygon.
    let picture = image::GrayImage::from_fn(150, 120, |x, _| image::Luma([if x < 75 { 255 } else { 0 }]));
    picture.save_with_format(place.at("mask.png"), image::ImageFormat::Png).unwrap();
    let ring = json!([[[0, 0], [750, 0], [750, 1200], [0, 1200], [0, 0]]]);
    let polygon =
        json!({ "type": "Feature", "properties": {}, "geometry": { "type": "Polygon", "coordinates": ring } });
    let collection = json!({ "type": "FeatureCollection", "features": [polygon] });
    place.write("mask.geojson", collection.to_string());
    let (of_picture, _) = run("picture", &["--tissue", "mask.png"]);
    let (of_polygon, _) = run("polygon", &["--tissue", "mask.geojson"]);
    // 750 px are 5.86 tiles: the sixth column has enough tissue.
    assert_eq!(of_picture.len(), 60);
    assert_eq!(of_picture, of_polygon);
    let list = place.write("list.csv", "slide,mask\na.svs,mask.png\n");
    place.run(&model, &[&list], &place.at("list"), &["--emit", "csv"]).code(0);
    assert_eq!(csv_of(&place.at("list")), of_picture);

    place.write("broken.png", "no picture");
    let finished = place.run(&model, &[&slide], &place.at("broken"), &["--tissue", "broken.png"]).code(1);
    finished.says(&["broken.png"]);
    assert_failed(&place.at("broken"), "a", "broken.png");
}

#[test]
fn tiles_made_before_give_the_same_table_as_a_direct_run() {
    let place = Workplace::new();
    let model = place.model(Kind::Classifier);
    let slide = place.slide("a.svs", &two_pieces(), &SvsOptions::default());
    let direct = place.at("direct");
    place.run(&model, &[&slide], &direct, &["--emit", "csv"]).code(0);
    let coords = |profile: &str| {
        let out = place.at(profile);
        let mut command = place.command(["tiles", "a.svs", "--profile", profile, "--model"]);
        command.arg(&model).arg("--out").arg(&out);
        place.start(&mut command).wait().code(0).shows(&["a  ", " of 120 tiles have tissue"]);
        out.join("coords")
    };
    for (index, file) in
        ["trident", "clam"].map(coords).iter().flat_map(|of| [of.join("a.h5"), of.join("a.csv")]).enumerate()
    {
        let out = place.at(&format!("again{index}"));
        let flag = format!("--coords={}", file.display());
        place.run(&model, &[&slide], &out, &["--emit", "csv", &flag]).code(0);
        let (one, other) = ("model-outputs-csv/a.csv", "model-outputs-csv/a.csv");
        assert_eq!(files(&direct)[one], files(&out)[other], "{}", file.display());
    }

    let other = place.at("other");
    let made = place.slidestream(["tiles", "a.svs", "--tile-size", "256", "--target-mpp", "0.5", "--out", "other"]);
    made.code(0).shows(&["a  "]);
    for file in ["a.h5", "a.csv"] {
        let flag = format!("--coords={}", other.join("coords").join(file).display());
        let out = place.at("wrong");
        let finished = place.run(&model, &[&slide], &out, &[&flag]).code(1);
        finished.says(&[file, "its tiles cover 256 × 256 level-0 px, this model's 128 × 128", "help: "]);
        assert_no_results_of(&out, "a");
    }
    let finished = place.run(&model, &[&slide], &place.at("both"), &["--coords", "a.csv", "--region", "0,0,9,9"]);
    finished.code(2).says(&["--coords names the tiles, so --region can't be set too"]);
    let finished = place.run(&model, &[&slide], &place.at("gone"), &["--coords", "nowhere.csv"]);
    assert_eq!(finished.code, Some(1), "{}", finished.stderr);
    finished.says(&["nowhere.csv: can't be read"]);
}

#[test]
fn a_slide_without_tissue_is_done_with_no_tile() {
    let place = Workplace::new();
    let glass = SyntheticSlide { tissue: Tissue::None, ..small() };
    let slide = place.slide("a.svs", &glass, &SvsOptions::default());
    for kind in [Kind::Classifier, Kind::Segmentation, Kind::Features] {
        let out = place.at(&format!("{kind:?}-out"));
        let finished = place.run(&place.model(kind), &[&slide], &out, &[]).code(0);
        finished.says(&["a: no tile has enough tissue: nothing was inferred"]).shows(&["0 of 30 in the grid"]);
        let record = Json::of_slide(&out, "a");
        assert_eq!((&record["status"], record.coverage().inferred), (&json!("done"), 0));
        assert_eq!(csv_of(&out), Vec::<Vec<f64>>::new());
    }
}

#[test]
fn a_dry_run_writes_nothing() {
    let (place, model, slide) = with_classifier();
    let bad = place.write("bad.svs", "no slide");
    let before: Vec<String> = files(&place.at("")).into_keys().collect();
    let out = place.at("out");
    let good = place.run(&model, &[&slide], &out, &["--dry-run"]).code(0);
    good.shows(&["a  30 of 30 tiles at 0.5000 × 0.5000 µm/px from level 0"]);
    place.run(&model, &[&slide, &bad], &out, &["--dry-run"]).code(3).shows(&["bad  error: ", "a text file"]);
    place.run(&model, &[&bad], &out, &["--dry-run"]).code(1);
    assert!(!out.exists());
    assert_eq!(files(&place.at("")).into_keys().collect::<Vec<_>>(), before);
}

#[test]
fn quiet_is_silent_and_machines_get_json_lines() {
    let (place, model, slide) = with_classifier();
    let quiet = place.run(&model, &[&slide], &place.at("quiet"), &["--quiet"]).code(0);
    assert_eq!(quiet.stderr, "");
    quiet.shows(&["results in "]);

    let bad = place.write("bad.svs", "no slide");
    let loud = place.run(&model, &[&slide, &bad], &place.at("json"), &["--log-json"]).code(3);
    let mut events: Vec<Value> = loud.stderr.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    // Told where the system tells what is taken already; another test looks at it.
    events.retain(|event| event["event"] != "memory planned");
    let names: Vec<&str> = events.iter().map(|event| event["event"].as_str().unwrap()).collect();
    let expected = [
        "run started",
        "slide started",
        "slide planned",
        "cores split",
        "slide finished",
        "slide started",
        "slide finished",
        "run finished",
    ];
    assert_eq!(names, expected);
    assert!(events.iter().all(|event| event["time"].as_str().is_some_and(|time| time.ends_with('Z'))));
    let reason = events[3]["reason"].as_str().unwrap();
    assert!(reason.starts_with("a tile takes a core ") && reason.ends_with(" cores"), "{reason}");
    assert_eq!((&events[4]["status"], &events[4]["tiles"]), (&json!("done"), &json!(30)));
    assert!(events[6]["error"].as_str().unwrap().contains("bad.svs"));
    let logs = files(&place.at("json/logs"));
    let log = std::str::from_utf8(logs.values().next().unwrap()).unwrap();
    assert_eq!(log, loud.stderr);
    place.run(&model, &[&slide], &place.at("x"), &["--quiet", "--log-json"]).code(2).says(&["--log-json"]);
}

#[test]
fn quiet_still_tells_errors() {
    let (place, model, _) = with_classifier();
    let bad = place.write("bad.svs", "no slide");
    place.run(&model, &[&bad], &place.at("out"), &["--quiet"]).code(1).says(&["error: ", "bad.svs", "a text file"]);
}

#[test]
fn inspect_shows_levels_and_resolution() {
    let (place, model, _) = with_classifier();
    place.slide("b.svs", &two_pieces(), &SvsOptions::default());
    let inspect = |arguments: &[&str]| {
        let finished = place.slidestream([&["inspect"], arguments].concat()).code(0);
        serde_json::from_str::<Value>(&finished.stdout).unwrap()
    };
    let slide = inspect(&["b.svs", "--json"]);
    assert_eq!((&slide["vendor"], &slide["mpp"]), (&json!("aperio"), &json!([0.5, 0.5])));
    assert_eq!(slide["dimensions"], json!([1500, 1200]));
    let levels = slide["levels"].as_array().unwrap();
    let sizes: Vec<(&Value, &Value)> = levels.iter().map(|level| (&level["width"], &level["height"])).collect();
    assert_eq!(sizes, [(&json!(1500), &json!(1200)), (&json!(375), &json!(300)), (&json!(93), &json!(75))]);
    assert_eq!(levels[1]["mpp"], json!([2.0, 2.0]));
    assert_eq!(levels[0]["native_tile"], json!([256, 256]));

    let read = inspect(&["b.svs", "--json", "--model", model.to_str().unwrap(), "--target-mpp", "2"]);
    assert_eq!((&read["read_level"], &read["resampled"], &read["grid_tiles"]), (&json!(1), &json!(false), &json!(9)));
    assert!(read["estimated_output_bytes"]["csv"].as_u64().unwrap() > 0);
    place.slidestream(["inspect", "b.svs"]).code(0).shows(&["1500 × 1200 px", "0.5 × 0.5 µm/px", "aperio"]);

    // Without its resolution a slide can still be looked at.
    place.slide("c.svs", &small(), &with_mpp(MppField::Missing));
    assert_eq!(inspect(&["c.svs", "--json"])["mpp"], Value::Null);
    place.slidestream(["inspect", "c.svs"]).code(0).shows(&["slide_mpp"]);
    place.write("d.svs", "no slide");
    place.slidestream(["inspect", "d.svs"]).code(1).says(&["error: d.svs: ", "a text file"]);
}

#[test]
fn the_doctor_finds_what_is_there_and_what_is_broken() {
    let place = Workplace::new();
    place.slidestream(["doctor"]).code(0).shows(&["OpenSlide", "ONNX Runtime", "provider cpu", "device cpu", "memory"]);
    let broken = place.write("libopenslide.so.1", "no library");
    let mut command = place.command(["doctor"]);
    let finished = place.start(command.env("OPENSLIDE_LIBRARY", &broken)).wait().code(1);
    finished.shows(&["BROKEN   OpenSlide", "libopenslide.so.1", "named by the environment", "help: "]);
    let flag = format!("--onnxruntime-library={}", broken.display());
    place.slidestream(["doctor", &flag]).code(1).shows(&["BROKEN   ONNX Runtime", "named by a flag"]);

    let model = place.model(Kind::Classifier);
    let slide = place.slide("a.svs", &small(), &SvsOptions::default());
    let out = place.at("out");
    let mut command = place.run_command(&model, &[&slide], &out, &[]);
    let finished = place.start(command.env("OPENSLIDE_LIBRARY", &broken)).wait().code(1);
    finished.says(&["error: OpenSlide can't be loaded from ", "help: "]);
    assert!(!out.exists());
}

#[test]
fn a_bare_model_needs_what_its_graph_does_not_tell() {
    let (place, folder, slide) = with_classifier();
    let model = folder.join("model.onnx");
    let out = place.at("out");
    let finished = place.run(&model, &[&slide], &out, &[]).code(1);
    finished.says(&[
        "model.onnx: has no card",
        "task",
        "target_mpp",
        "class_names",
        "mean",
        "std",
        "activation",
        "help: ",
    ]);
    assert!(!out.exists());
    let flags = [
        "--task=classification",
        "--target-mpp=0.5",
        "--class-names=pale,deep",
        "--mean=0,0,0",
        "--std=1,1,1",
        "--activation=softmax",
    ];
    place.run(&model, &[&slide], &out, &flags).code(0);
    let with_card = place.at("with-card");
    place.run(&folder, &[&slide], &with_card, &[]).code(0);
    let csv = "model-outputs-csv/a.csv";
    assert_eq!(files(&out)[csv], files(&with_card)[csv]);
    // A card is not overruled by half.
    let finished = place.run(&folder, &[&slide], &place.at("both"), &["--mean=0,0,0"]).code(1);
    finished.says(&["card.toml: has its own mean", "help: "]);
}

#[test]
fn outputs_that_are_no_numbers_fail_or_are_counted() {
    let place = Workplace::new();
    let framed = SyntheticSlide { border: 200, ..small() };
    let slide = place.slide("a.svs", &framed, &SvsOptions::default());
    let model = place.model(Kind::NotFinite);
    let out = place.at("out");
    let finished = place.run(&model, &[&slide], &out, &["--tissue", "none"]).code(1);
    finished.says(&["NaN or infinite", "help: ", "on_nonfinite"]);
    assert_failed(&out, "a", "NaN or infinite");

    let finished = place.run(&model, &[&slide], &out, &["--tissue", "none", "--on-nonfinite", "skip"]).code(3);
    finished.shows(&[" failed"]);
    let record = Json::of_slide(&out, "a");
    let coverage = record.coverage();
    // The frame covers the outermost tiles wholly, and no other tile to more than four fifths.
    assert_eq!((coverage.grid, coverage.failed), (30, 18));
    assert_eq!(csv_of(&out).len(), 12);
    assert!(csv_of(&out).iter().flatten().all(|value| value.is_finite()));
    let reason = record["coverage"]["failed"][0]["reason"].as_str().unwrap();
    assert!(reason.contains("NaN or infinite"), "{reason}");
    // A rerun finds the work done, and still says that tiles are missing.
    place
        .run(&model, &[&slide], &out, &["--tissue", "none", "--on-nonfinite", "skip"])
        .code(3)
        .says(&["was done before"]);
}

#[test]
fn a_damaged_tile_fails_the_slide_or_is_left_out_and_listed() {
    let place = Workplace::new();
    let (sound, broken) =
        (SvsOptions::default(), SvsOptions { damaged_tiles: vec![(0, 1, 1)], ..SvsOptions::default() });
    place.slide("sound/a.svs", &small(), &sound);
    let slide = place.slide("a.svs", &small(), &broken);
    let model = place.model(Kind::Classifier);
    let (out, whole) = (place.at("out"), place.at("whole"));
    let finished = place.run(&model, &[&slide], &out, &[]).code(1);
    finished.says(&["a.svs: level 0, region ", "can't be read", "help: ", "on_tile_error"]);
    assert_failed(&out, "a", "can't be read");

    place.run(&model, &[&slide], &out, &["--on-tile-error", "skip"]).code(3).shows(&["4 failed"]);
    place.run(&model, &[&place.at("sound/a.svs")], &whole, &[]).code(0);
    let record = Json::of_slide(&out, "a");
    assert_eq!(record.coverage(), Coverage { grid: 30, inferred: 26, background: 0, unsampled: 0, failed: 4 });
    let failed = record["coverage"]["failed"].as_array().unwrap();
    let rects: Vec<&Value> = failed.iter().map(|tile| &tile["rect"]).collect();
    // The compression tile of 256 px at (256, 256) holds four of the model's.
    assert_eq!(
        rects,
        [
            &json!([256, 256, 128, 128]),
            &json!([384, 256, 128, 128]),
            &json!([256, 384, 128, 128]),
            &json!([384, 384, 128, 128]),
        ]
    );
    let is_damaged = |row: &&Vec<f64>| [256.0, 384.0].contains(&row[0]) && [256.0, 384.0].contains(&row[1]);
    let others: Vec<Vec<f64>> = csv_of(&whole).iter().filter(|row| !is_damaged(row)).cloned().collect();
    assert_eq!(csv_of(&out), others);
}

#[test]
fn fail_fast_stops_at_the_first_failure() {
    let (place, model, slide) = with_classifier();
    let bad = place.write("bad.svs", "no slide");
    let out = place.at("out");
    let finished = place.run(&model, &[&bad, &slide], &out, &["--fail-fast"]);
    assert_ne!(finished.code, Some(0));
    assert_failed(&out, "bad", "a text file");
    assert!(!out.join("slides/a.json").exists());
    assert_eq!(Json::read(out.join("run.json"))["slides"]["not started"], 1);
    // Without it the other slide is done.
    place.run(&model, &[&bad, &slide], &out, &[]).code(3);
    assert_eq!(Json::of_slide(&out, "a")["status"], "done");
}
