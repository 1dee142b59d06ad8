//! What `bench` and `report` promise: LoRA proven and timed in turns, sweeps that leave out what can't be, gates.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use image::{Rgb, RgbImage};
use serde_json::{Value, json};

use support::{Finished, Json, Kind, TILE, Workplace};

const SMALL: &str = "image=32,patch=8,dim=64,depth=2,heads=2";
/// Has as many parameters, and costs as many operations.
const OF_FOUR_HEADS: &str = "image=32,patch=8,dim=64,depth=2,heads=4";
/// How both are called.
const NAMES: [&str; 2] = ["image=32 patch=8 dim=64 depth=2 heads=2", "image=32 patch=8 dim=64 depth=2 heads=4"];

fn bench(place: &Workplace, what: &str, more: &[&str]) -> Finished {
    place.slidestream([&["bench", what, "--device", "cpu", "--seconds", "0"], more].concat())
}

fn names(record: &Value) -> Vec<&str> {
    record["entries"].as_array().unwrap().iter().map(|entry| entry["name"].as_str().unwrap()).collect()
}

/// Writes `record` without rank 8, with all rates multiplied.
fn write_scaled(place: &Workplace, record: &Value, factor: f64, name: &str) -> String {
    let mut record = record.clone();
    let entries = record["entries"].as_array_mut().unwrap();
    entries.retain(|entry| !entry["name"].as_str().unwrap().starts_with("rank 8"));
    for entry in entries {
        for rate in entry["rounds_samples_per_sec"].as_array_mut().unwrap() {
            *rate = (rate.as_f64().unwrap() * factor).into();
        }
    }
    place.write(name, record.to_string()).to_str().unwrap().to_owned()
}

#[test]
fn lora_is_counted_proven_timed_and_held_against_a_baseline() {
    let place = Workplace::new();
    let out = place.at("out");
    let flags = ["--vit", SMALL, "--ranks", "8,2", "--batch-size", "2", "--sessions", "1", "--quiet"];
    let outcome = bench(&place, "lora", &[&flags[..], &["--out", out.to_str().unwrap()]].concat());
    outcome.code(0).shows(&["Recommendation: ", "rank 8, merged", "bench.html"]);
    let record = Json::read(out.join("bench.json"));
    assert_eq!(record["schema"], "slidestream/bench/1");
    let expected = ["baseline", "rank 2, unmerged", "rank 2, merged", "rank 8, unmerged", "rank 8, merged"];
    assert_eq!(names(&record), expected);
    let of = |index: usize, key: &str| record["entries"][index][key].clone();
    let (parameters, flops) = (of(0, "parameters").as_u64().unwrap(), of(0, "flops").as_u64().unwrap());
    // Two blocks; qkv from 64 to 192 and proj from 64 to 64.
    let added = |rank: u64| 2 * rank * ((64 + 192) + (64 + 64));
    for (index, rank) in [(1, 2), (3, 8)] {
        assert_eq!(of(index, "parameters"), parameters + added(rank));
        // A multiply-add for each of these parameters and each of 17 tokens.
        assert_eq!(of(index, "flops"), flops + 2 * 17 * added(rank));
        assert_eq!((of(index + 1, "parameters"), of(index + 1, "flops")), (of(0, "parameters"), of(0, "flops")));
        let lora = of(index, "lora");
        let share = added(rank) as f64 / (parameters + added(rank)) as f64;
        assert!((lora["share_of_parameters"].as_f64().unwrap() - share).abs() < 1e-12);
        let [difference, bound] = ["max_abs_difference", "difference_bound"].map(|key| lora[key].as_f64().unwrap());
        assert!(difference <= bound && bound < 1e-3, "{lora}");
    }
    for index in 0..expected.len() {
        assert!(of(index, "rounds_samples_per_sec").as_array().unwrap().len() >= 7);
        assert!(of(index, "samples_per_sec")["value"].as_f64().unwrap() > 0.0);
        assert!(of(index, "ratio")["value"].as_f64().unwrap() > 0.0);
        #[cfg(target_os = "linux")]
        assert!(of(index, "peak_host_bytes").as_u64().unwrap() > 1 << 20);
    }
    assert_eq!(of(0, "ratio")["value"], 1.0);
    let table = std::fs::read_to_string(out.join("bench.csv")).unwrap();
    assert_eq!(table.lines().count(), 1 + expected.len());
    let page = std::fs::read_to_string(out.join("bench.html")).unwrap();
    assert!(page.contains("Impact of the rank") && page.contains("Parameter efficiency"));

    let flags = ["--vit", SMALL, "--ranks", "2", "--batch-size", "2", "--sessions", "1", "--quiet"];
    let faster = write_scaled(&place, &record, 100.0, "faster.json");
    let outcome = bench(&place, "lora", &[&flags[..], &["--baseline", &faster, "--max-regression", "0.5"]].concat());
    outcome.code(4).says(&["regression: baseline runs at 0.", "below 0.50×"]);
    let slower = write_scaled(&place, &record, 0.01, "slower.json");
    bench(&place, "lora", &[&flags[..], &["--baseline", &slower]].concat()).code(0);

    let other = [&["--vit", OF_FOUR_HEADS], &flags[2..], &["--baseline", &slower]].concat();
    let why = format!("slower.json: has \"baseline\" of {}, which this command does not measure", NAMES[0]);
    bench(&place, "lora", &other).code(2).says(&[&why, "help: "]);
    let other = ["--vit", SMALL, "--ranks", "4", "--baseline", &slower];
    bench(&place, "lora", &other).code(2).says(&["has \"rank 2, unmerged\""]);

    let own = out.join("bench.json");
    let own = own.to_str().unwrap();
    for (place_of_setting, setting, said) in [
        ("/entries/0/device", json!("cuda:0"), "baseline: not comparable: device cpu, now cuda:0"),
        ("/entries/0/sessions", json!(2), "baseline: not comparable: sessions 1, now 2"),
        ("/entries/2/provider", json!("openvino"), "rank 2, merged: not comparable: provider cpu, now openvino"),
        ("/lora_targets", json!(["fc1"]), "rank 2, merged: not comparable: LoRA's targets proj and qkv, now fc1"),
    ] {
        let mut other = Value::clone(&record);
        *other.pointer_mut(place_of_setting).unwrap() = setting;
        let other = place.write("other.json", other.to_string());
        place.slidestream(["report", "compare", own, other.to_str().unwrap()]).code(0).shows(&[said]);
    }
    let same = place.slidestream(["report", "compare", own, own]).code(0);
    assert_eq!(same.stdout.lines().count(), expected.len());
    assert!(same.stdout.lines().all(|line| line.contains(": no difference, 1.00× [")), "{}", same.stdout);
    place
        .slidestream(["report", "compare", own, &faster])
        .code(0)
        .shows(&["rank 2, merged: faster, 100.00×", "rank 8, merged: only in the earlier one"]);
    place.write("out/other.json", "{}");
    place.write("out/broken.json", "{");
    #[cfg(unix)]
    std::os::unix::fs::symlink(out.join("bench.json"), place.at("link.json")).unwrap();
    let shown = place.slidestream(["report", "show", "nowhere", out.to_str().unwrap(), "link.json"]).code(3);
    let shown = shown.shows(&["bench.json", "broken.json", "damaged", "1 other JSON files", "not read  No such file"]);
    assert_eq!(shown.stdout.matches("5 entries. Recommendation: ").count(), 2, "the file, and the link to it");
}

#[test]
fn lora_on_several_sessions_is_held_against_one() {
    let place = Workplace::new();
    let flags = ["--vit", SMALL, "--ranks", "2", "--batch-size", "2", "--sessions", "2", "--json"];
    let record = bench(&place, "lora", &flags).code(0).json();
    assert_eq!(names(&record).len(), 3);
    for entry in record["entries"].as_array().unwrap() {
        assert_eq!((entry["sessions"].as_u64(), entry["total_batch_size"].as_u64()), (Some(2), Some(4)));
        is_scaled_by_two(&entry["scaling"]);
        let rounds = |of: &Value| of.as_array().unwrap().len();
        assert_eq!(rounds(&entry["scaling"]["rounds_of_one"]), rounds(&entry["rounds_samples_per_sec"]), "in turns");
        let busy = entry["utilisation"].as_f64().unwrap();
        assert!(busy > 0.0 && busy <= 1.0, "{busy}");
    }
}

fn is_scaled_by_two(scaling: &Value) {
    let efficiency = scaling["speedup"]["value"].as_f64().unwrap_or(f64::NAN) / 2.0;
    assert_eq!(scaling["replicas"], 2);
    // JSON may lose a number's last bit.
    assert!((scaling["efficiency"].as_f64().unwrap_or(f64::NAN) - efficiency).abs() < 1e-12, "{scaling}");
}

#[test]
fn a_sweep_measures_what_can_be_and_lists_the_rest() {
    let place = Workplace::new();
    let sizes = ["--image", "32", "--patch", "8,5", "--dim", "64", "--depth", "1,2", "--heads", "2"];
    let more = ["--batch-sizes", "2", "--sessions", "2", "--json"];
    let outcome = bench(&place, "vit", &[&sizes[..], &more].concat()).code(0);
    let record: Value = serde_json::from_str(&outcome.stdout).unwrap();
    let model = |depth: u32| format!("image=32 patch=8 dim=64 depth={depth} heads=2");
    let expected = [1, 2].map(|depth| format!("{}, as built, batch 2", model(depth)));
    assert_eq!(names(&record), expected);
    let skipped = record["skipped"].as_array().unwrap();
    assert_eq!((skipped.len(), skipped[0]["why"].as_str()), (2, Some("image=32 is no multiple of patch=5")));
    for entry in record["entries"].as_array().unwrap() {
        assert_eq!((entry["sessions"].as_u64(), entry["total_batch_size"].as_u64()), (Some(2), Some(4)));
        is_scaled_by_two(&entry["scaling"]);
        assert!(entry["utilisation"].as_f64().unwrap() > 0.0);
    }
    assert!(record["insights"].as_array().unwrap().last().unwrap().as_str().unwrap().starts_with("Recommendation: "));
}

#[test]
fn a_sweep_is_held_against_a_baseline_of_the_same_models() {
    let place = Workplace::new();
    let measured = |vit: &str, more: &[&str]| {
        let flags = ["--vit", vit, "--batch-sizes", "2", "--sessions", "1", "--quiet"];
        bench(&place, "vit", &[&flags[..], more].concat())
    };
    let record = measured(SMALL, &["--json"]).code(0).json();
    let entry = format!("{}, as built, batch 2", NAMES[0]);
    assert_eq!(names(&record), [&entry]);
    let faster = write_scaled(&place, &record, 100.0, "faster.json");
    measured(SMALL, &["--baseline", &faster]).code(4).says(&[&format!("regression: {entry} runs at 0.")]);
    let slower = write_scaled(&place, &record, 0.01, "slower.json");
    measured(SMALL, &["--baseline", &slower]).code(0);
    measured(OF_FOUR_HEADS, &["--baseline", &slower])
        .code(2)
        .says(&[&format!("slower.json: has {entry:?} of {}, which this command does not measure", NAMES[0])]);
    let twice = format!("{SMALL};{SMALL}");
    let flags: Vec<&str> = twice.split(';').flat_map(|vit| ["--vit", vit]).collect();
    let again = bench(&place, "vit", &[&flags[..], &["--batch-sizes", "2,2", "--sessions", "1", "--json"]].concat());
    assert_eq!(names(&again.code(0).json()), [&entry]);
    let mut elsewhere = record;
    elsewhere["entries"][0]["device"] = json!("cuda:0");
    let elsewhere = write_scaled(&place, &elsewhere, 0.01, "elsewhere.json");
    measured(SMALL, &["--baseline", &elsewhere])
        .code(4)
        .says(&[&format!("regression: {entry} can't be held against the baseline: device cuda:0, now cpu")]);
}

#[test]
fn simulations_of_the_same_model_are_held_against_each_other() {
    let place = Workplace::new();
    let simulated = |vit: &str, name: &str| {
        let flags = ["--device", "cpu", "--seconds", "0", "--sessions", "1", "--batch-sizes", "1,2", "--quiet"];
        let outcome = place.slidestream([&["simulate", "--vit", vit, "--json"], &flags[..]].concat()).code(0);
        place.write(name, &outcome.stdout).to_str().unwrap().to_owned()
    };
    let compared = |before: &str, after: &str, code: i32| {
        let shown = place.slidestream(["report", "compare", before, after]).code(code).stdout;
        let lines: Vec<String> = shown.lines().map(str::to_owned).collect();
        assert!(lines.len() == 2 && lines[0].starts_with("batch 1: ") && lines[1].starts_with("batch 2: "), "{shown}");
        lines
    };
    let [before, again] = ["before.json", "again.json"].map(|name| simulated(SMALL, name));
    assert!(compared(&before, &before, 0).iter().all(|line| line.contains(": no difference, 1.00× [")));
    assert!(compared(&before, &again, 0).iter().all(|line| !line.contains("not comparable")));
    let shallow = simulated("image=32,patch=8,dim=64,depth=1,heads=2", "shallow.json");
    assert!(compared(&before, &shallow, 1).iter().all(|line| line.contains(": not comparable: ")));
}

#[test]
fn evaluations_and_predictions_have_a_line() {
    let place = Workplace::new();
    for (name, color) in [("data/pale/a.png", [40, 230, 60]), ("data/deep/b.png", [220, 30, 200])] {
        RgbImage::from_pixel(TILE, TILE, Rgb(color)).save(place.write(name, "")).unwrap();
    }
    let model = place.model(Kind::Classifier);
    let flags = ["--model", model.to_str().unwrap(), "--device", "cpu", "--batch-size", "1", "--out", "out"];
    place.slidestream([&["evaluate", "data"], &flags[..]].concat()).code(0);
    place.slidestream([&["predict", "data/pale"], &flags[..]].concat()).code(0);
    place.slidestream(["report", "show", "out"]).code(0).shows(&[
        "classification for tests fp32 on cpu, 2 images of data; top-1 1.000",
        "AUC 1.000",
        "classification for tests fp32 on cpu, 1 image of data/pale in 1 tile; ",
        " ms a tile p50",
    ]);
}

#[test]
fn what_makes_no_sense_is_refused() {
    let place = Workplace::new();
    bench(&place, "lora", &[]).code(2).says(&["--model"]);
    // The first `--device cpu` is that of all these calls.
    bench(&place, "lora", &["--vit", SMALL, "--device", "cpu"]).code(2).says(&["on one device"]);
    bench(&place, "vit", &["--vit", SMALL, "--device", "cpu"]).code(2).says(&["--device names cpu twice"]);
    let (out, kept) = (place.at("kept"), place.write("kept/bench.json", "{}"));
    let own = ["--vit", SMALL, "--out", out.to_str().unwrap(), "--baseline", kept.to_str().unwrap()];
    bench(&place, "vit", &own).code(2).says(&["--out would replace it"]);
    let file = ["--vit", SMALL, "--out", kept.to_str().unwrap()];
    for what in ["vit", "lora"] {
        let refused = bench(&place, what, &file).code(1).says(&["bench.json: can't be written"]);
        assert!(!refused.stderr.contains("measuring"), "{}", refused.stderr);
    }
    bench(&place, "lora", &["--vit", SMALL, "--targets", "qvk"]).code(1).says(&["target \"qvk\"", "help: "]);
    bench(&place, "lora", &["--vit", SMALL, "--targets", ""]).code(1).says(&["target \"\": none of"]);
    bench(&place, "lora", &["--vit", SMALL, "--ranks", "0"]).code(2);
    bench(&place, "lora", &["--vit", SMALL, "--alpha", "0"]).code(2).says(&["--alpha 0: must be above 0"]);
    bench(&place, "vit", &["--patch", "15"]).code(2).says(&["image=224 is no multiple of patch=15"]);
    bench(&place, "vit", &["--depth", "0"]).code(2).says(&["depth=0"]);
    bench(&place, "vit", &["--vit", SMALL, "--max-regression", "0.1"]).code(2).says(&["--baseline"]);
    let record = place.write("run.json", r#"{"schema": "slidestream/run/1"}"#);
    bench(&place, "vit", &["--vit", SMALL, "--baseline", record.to_str().unwrap()])
        .code(2)
        .says(&["run.json: has schema \"slidestream/run/1\"", "help: name a bench.json"]);
    place.slidestream(["report", "show", "nowhere"]).code(1).shows(&["nowhere  not read  No such file"]);
}

/// Starts a command whose temporary files and caches go to folders of their own, which are returned.
#[cfg(unix)]
fn start_apart(place: &Workplace, args: &[&str]) -> (support::Started, std::path::PathBuf, std::path::PathBuf) {
    let (temporary, home) = (place.at("temporary"), place.at("home"));
    for folder in [&temporary, &home] {
        std::fs::create_dir(folder).unwrap();
    }
    let mut command = place.command(args);
    command.env("TMPDIR", &temporary).env("HOME", &home).env_remove("XDG_CACHE_HOME");
    (place.start(&mut command), temporary, home)
}

#[cfg(unix)]
#[test]
fn an_interrupt_leaves_no_model_and_no_process_behind() {
    for (signal, args) in [
        ("INT", &["bench", "vit", "--vit", "image=224,patch=8,dim=384,depth=4,heads=3", "--quiet"][..]),
        ("TERM", &["bench", "lora", "--vit", "image=224,patch=8,dim=384,depth=4,heads=3", "--quiet"]),
        ("HUP", &["simulate", "--vit", "image=224,patch=8,dim=384,depth=4,heads=3", "--quiet"]),
    ] {
        let place = Workplace::new();
        let (mut started, temporary, _) = start_apart(&place, &[args, &["--device", "cpu"]].concat());
        // Of a child too.
        started.until("a model is built", || support::files(&temporary).keys().any(|name| name.ends_with(".onnx")));
        started.signal(signal);
        let finished = started.wait().code(130);
        assert_eq!((finished.stdout.as_str(), finished.stderr.as_str()), ("", ""), "{args:?}");
        let left = std::fs::read_dir(&temporary).unwrap().count();
        assert_eq!(left, 0, "{args:?} left something");
    }
}

#[cfg(unix)]
#[test]
fn nothing_is_written_beside_the_results() {
    let place = Workplace::new();
    let args = ["simulate", "--vit", SMALL, "--device", "cpu", "--seconds", "0", "--quiet"];
    let (started, temporary, home) = start_apart(&place, &args);
    started.wait().code(0);
    for folder in [temporary, home] {
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 0, "{} is not empty", folder.display());
    }
}
