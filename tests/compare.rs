//! `slidestream compare` on a tiny slide: its files, its gates, and what it says of bad input.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::fs;
use std::path::{Path, PathBuf};

use slidestream::slide::synthetic::SvsOptions;

use support::{Finished, Json, Kind, TILE, Workplace, assert_no_partial_files, sha256, small};

/// A workplace with a slide and a classifier whose variant `int8` gives other scores.
fn with_variants() -> (Workplace, PathBuf, PathBuf) {
    let place = Workplace::new();
    let slide = place.slide("a.svs", &small(), &SvsOptions::default());
    let model = place.model(Kind::Classifier);
    let other = fs::read(place.model(Kind::NotFinite).join("model.onnx")).unwrap();
    fs::write(model.join("other.onnx"), &other).unwrap();
    let card = fs::read_to_string(model.join("card.toml")).unwrap();
    let variant = format!("[variants.int8]\nfile = \"other.onnx\"\nsha256 = \"{}\"\n", sha256(&other));
    fs::write(model.join("card.toml"), card + &variant).unwrap();
    (place, model, slide)
}

fn compare(place: &Workplace, model: &Path, flags: &[&str]) -> Finished {
    let mut command = place.command(["compare", "--tiles", "12", "--device", "cpu", "--model"]);
    command.arg(model).args(flags);
    if !flags.contains(&"--seconds") {
        command.args(["--seconds", "0.3"]);
    }
    place.start(&mut command).wait()
}

/// Labelled tiles: what is pale, and what is deep, of two patients.
fn labels(place: &Workplace) -> PathBuf {
    let mut table = "image,label,group\n".to_owned();
    for (index, (label, level)) in [("pale", 230), ("deep", 60), ("pale", 200), ("deep", 90)].into_iter().enumerate() {
        let name = format!("{index}.png");
        image::RgbImage::from_pixel(TILE, TILE, image::Rgb([level, level / 2, level])).save(place.at(&name)).unwrap();
        table += &format!("{name},{label},patient {}\n", index / 2);
    }
    place.write("labels.csv", table)
}

#[test]
fn everything_is_measured_and_written() {
    let (place, model, slide) = with_variants();
    let (out, labels) = (place.at("out"), labels(&place));
    let [slide, out_flag, labels] = [&slide, &out, &labels].map(|path| path.to_str().unwrap());
    compare(&place, &model, &["--slide", slide, "--data", labels, "--out", out_flag])
        .code(0)
        .says(&["comparing outputs", "end to end"])
        .shows(&["original", "+ INT8", "everything", "compare.html"]);
    let record = Json::read(out.join("compare.json"));
    let ladder = record["ladder"].as_array().unwrap();
    let names: Vec<&str> = ladder.iter().map(|row| row["name"].as_str().unwrap()).collect();
    assert_eq!(names[1..], ["+ batching", "+ overlapped stages", "+ INT8", "everything"]);
    for row in ladder {
        for measured in ["model_only", "end_to_end"] {
            assert!(row[measured]["samples_ms"].as_array().unwrap().len() >= 6, "{measured} of {}", row["name"]);
            assert!(row[measured]["speedup"]["value"].as_f64().unwrap() > 0.0);
        }
        assert!(row["projected"].as_array().unwrap().iter().any(|projected| projected["name"] == "this slide"));
        assert!(cfg!(not(target_os = "linux")) || row["peak_host_bytes"].as_u64().unwrap() > 1 << 20);
        assert!(row["bottleneck"].as_str().unwrap().contains('%'));
    }
    assert_eq!(record["input"]["slide_tiles"], 30);
    assert_eq!(record["agreement"][0]["variant"], "int8");
    assert!(record["agreement"][0]["cosine"]["mean"].as_f64().unwrap() < 1.0);
    let accuracy = &record["accuracy"];
    assert_eq!((accuracy["items"].as_u64(), accuracy["unit"].as_str()), (Some(4), Some("tiles of 2 groups")));
    assert!(accuracy["rows"][1]["balanced_accuracy"]["difference"]["value"].is_f64());
    assert_eq!(record["pictures"].as_array().unwrap().len(), 3);
    assert!(fs::read_to_string(out.join("compare.html")).unwrap().contains("data:image/png;base64,"));
    assert_eq!(csv::Reader::from_path(out.join("compare.csv")).unwrap().records().count(), 2 * ladder.len());
    assert_no_partial_files(&out);
}

#[test]
fn a_gate_that_fails_is_told_and_has_its_code() {
    let (place, model, _) = with_variants();
    compare(&place, &model, &["--min-cosine", "1", "--max-flips", "12", "--quiet"])
        .code(4)
        .shows(&["gate failed: int8: mean cosine", "gate passed: int8: tiles changing side"]);
    let record = Json::read(place.at("Classifier-compare").join("compare.json"));
    assert_eq!((&record["gates"][0]["passed"], &record["gates"][1]["passed"]), (&false.into(), &true.into()));
    // Without a slide there is nothing to read, and nothing to overlap.
    assert!(record["ladder"].as_array().unwrap().iter().all(|row| row["end_to_end"].is_null()));
    compare(&place, &model, &["--variants", "fp32", "--min-cosine", "1", "--quiet"])
        .code(2)
        .says(&["no variant beside the original"]);
}

#[test]
fn several_models_have_names_of_their_own() {
    let (place, model, _) = with_variants();
    for name in ["a", "b"] {
        fs::copy(model.join("model.onnx"), place.at(&format!("{name}.onnx"))).unwrap();
    }
    let other = place.at("b.onnx");
    let flags = ["--task", "classification", "--class-names", "pale,deep", "--mean", "0,0,0", "--std", "1,1,1"];
    let mut flags: Vec<&str> = [other.to_str().unwrap()].into_iter().chain(flags).collect();
    flags.extend(["--activation", "softmax", "--target-mpp", "0.5", "--min-cosine", "1", "--max-flips", "0"]);
    compare(&place, &place.at("a.onnx"), &flags).code(0).shows(&["a", "+ b", "exactly the original's outputs"]);
    let record = Json::read(place.at("a-compare").join("compare.json"));
    assert_eq!((&record["ladder"][0]["variant"], &record["ladder"][2]["variant"]), (&"a".into(), &"b".into()));
}

#[test]
fn bad_input_is_told() {
    let (place, model, _) = with_variants();
    for (flags, reason) in [
        (&["--min-cosine", "1.1"][..], "--min-cosine 1.1: must be between 0 and 1"),
        (&["--max-flips", "1.5"], "neither a number of tiles nor a share"),
        (&["--max-metric-loss", "0.1"], "--data"),
        (&["--seconds", "0"], "--seconds 0: must be above 0"),
        (&["--variants", "fp64"], "fp64"),
        (&["--slide", "none.svs"], "none.svs"),
        (&["--data", "none.csv"], "none.csv"),
        (&["--task", "features"], "task"),
    ] {
        let finished = compare(&place, &model, flags).says(&[reason]);
        assert!(matches!(finished.code, Some(1 | 2)), "{flags:?}: {:?}", finished.code);
    }
    let table = place.write("wrong.csv", "image,class\na.png,pale\n");
    compare(&place, &model, &["--data", table.to_str().unwrap()])
        .code(2)
        .says(&["needs the columns path and label", "help: "]);
    let other = place.model(Kind::Features);
    compare(&place, &model, &[other.to_str().unwrap()]).code(2).says(&["its task is features, not classification"]);
    assert!(!place.at("Classifier-compare").exists());
}
