//! What `optimize` promises: a model folder that `run` takes, variants that compute the same, and clear refusals.

mod support;

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use slidestream::onnx::Model;
use slidestream::slide::synthetic::{SvsOptions, SyntheticSlide, Tissue};

use support::{Json, Workplace, table};

/// Side of the fixtures' images.
const SIDE: u32 = 32;

/// A model that was exported by PyTorch.
fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/onnx").join(name)
}

/// What can't be known of a bare model of that task.
fn bare(task: &str) -> Vec<String> {
    let classes: &[&str] =
        if task == "segmentation" { &["--class-names", "a,b", "--activation", "softmax"] } else { &[] };
    let common =
        ["--task", task, "--tile-size", "32", "--target-mpp", "0.5", "--mean", "0.5,0.5,0.5", "--std", "0.5,0.5,0.5"];
    common.iter().chain(classes).map(|&word| word.to_owned()).collect()
}

/// A slide of a few tiles, tissue everywhere.
fn slide(place: &Workplace) -> PathBuf {
    let slide = SyntheticSlide { tissue: Tissue::Everywhere, ..SyntheticSlide::new(8 * SIDE, 6 * SIDE, 5) };
    place.slide("s.svs", &slide, &SvsOptions::default())
}

fn arguments(command: &str, model: &Path, more: &[&str], task: &str) -> Vec<String> {
    let mut all = vec![command.to_owned(), model.display().to_string(), "--seconds".to_owned(), "1".to_owned()];
    all.extend(more.iter().map(|&word| word.to_owned()));
    all.extend(bare(task));
    all
}

fn record(out: &Path) -> Value {
    (*Json::read(out.join("optimize.json"))).clone()
}

#[test]
fn a_transformer_for_cuda_is_fused_and_says_what_was_done() {
    let place = Workplace::new();
    let out = place.at("made");
    let more = ["--for", "cuda", "--tiles", "4", "--explain", "--out", out.to_str().unwrap()];
    let model = fixture("timm_sdpa.onnx");
    let before = fs::read(&model).unwrap();
    let done = place.slidestream(arguments("optimize", &model, &more, "features"));
    done.code(0).shows(&["attention: applied to 2 of 2 nodes", "Attention of 2 heads", "fp16", "model folder"]);
    assert_eq!(fs::read(&model).unwrap(), before, "the source is never modified");
    let record = record(&out);
    let names: Vec<&str> = record["variants"].as_array().unwrap().iter().map(|v| v["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["fp32-cuda", "fp16"]);
    for variant in record["variants"].as_array().unwrap() {
        assert_eq!(variant["provider"], "cuda");
        assert!(variant["agreement"]["min_cosine"].as_f64().unwrap() > 0.999, "{variant}");
        // This machine may have no GPU: then nothing is claimed.
        assert!(variant["speed"].is_null() || variant["speed"]["ratio"].as_f64().unwrap() > 0.0);
    }
    let card = fs::read_to_string(out.join("card.toml")).unwrap();
    assert!(card.contains("[variants.fp16]") && card.contains("[variants.fp32]"), "{card}");
}

#[test]
fn a_unet_becomes_int8_and_runs_on_a_slide() {
    let place = Workplace::new();
    let (slide, out) = (slide(&place), place.at("made"));
    let more = [
        "--to",
        "fp32,fp16,int8",
        "--calibrate",
        slide.to_str().unwrap(),
        "--tiles",
        "8",
        "--bytes",
        "--min-cosine",
        "0.99",
        "--out",
        out.to_str().unwrap(),
    ];
    let model = fixture("unet.onnx");
    place.slidestream(arguments("optimize", &model, &more, "segmentation")).code(0).shows(&["int8", "static INT8"]);
    let mut tables = Vec::new();
    for variant in ["fp32", "fp16", "int8"] {
        let results = place.at(variant);
        let run = [
            "run",
            slide.to_str().unwrap(),
            "--model",
            out.to_str().unwrap(),
            "--variant",
            variant,
            "--device",
            "cpu",
            "--emit",
            "csv",
            "--quiet",
            "--out",
            results.to_str().unwrap(),
        ];
        place.slidestream(run).code(0);
        tables.push(table(&results.join("model-outputs-csv/s.csv")));
    }
    let [original, others @ ..] = &tables[..] else { unreachable!() };
    assert_eq!(original.len(), 48);
    for other in others {
        for (a, b) in original.iter().flatten().zip(other.iter().flatten()) {
            // Mean probabilities of a tile; the bytes' rounding averages out.
            assert!((a - b).abs() < 0.03, "{a} {b}");
        }
    }
}

#[test]
fn variants_for_openvino_have_standard_operators_alone() {
    let place = Workplace::new();
    let (slide, out) = (slide(&place), place.at("made"));
    let more = ["--for", "openvino", "--calibrate", slide.to_str().unwrap(), "--tiles", "8", "--min-cosine", "0.99"];
    let more: Vec<&str> = more.into_iter().chain(["--out", out.to_str().unwrap()]).collect();
    let done = place.slidestream(arguments("optimize", &fixture("unet.onnx"), &more, "segmentation"));
    done.code(0).shows(&["fp32-openvino", "int8-openvino"]);
    for variant in record(&out)["variants"].as_array().unwrap() {
        assert_eq!(variant["provider"], "openvino");
        let model = Model::load(&out.join(variant["file"].as_str().unwrap())).unwrap();
        let counts = model.op_counts();
        assert!(counts.keys().all(|op| !op.contains('.')), "{counts:?}");
        // Transposed convolutions are left to OpenVINO, each operand of a quantised one behind its own scale.
        assert!(counts.contains_key("ConvTranspose"), "{counts:?}");
        assert_eq!(counts.contains_key("DequantizeLinear"), variant["name"] == "int8-openvino");
        assert!(variant["speed"].is_null() || variant["speed"]["ratio"].as_f64().unwrap() > 0.0);
    }
    let more = ["--for", "openvino", "--to", "fp16"];
    place.slidestream(arguments("optimize", &fixture("unet.onnx"), &more, "segmentation")).code(2).says(&["FP16"]);
}

#[test]
fn neither_the_model_nor_another_one_is_written_over() {
    let place = Workplace::new();
    let folder = place.at("own");
    fs::create_dir_all(&folder).unwrap();
    let model = folder.join("net.onnx");
    let bytes = fs::read(fixture("unet.onnx")).unwrap();
    fs::write(&model, &bytes).unwrap();
    let optimize = |more: &[&str], out: &Path, classes: &str| {
        let more: Vec<&str> = more.iter().copied().chain(["--tiles", "2", "--out", out.to_str().unwrap()]).collect();
        let mut all = arguments("optimize", &model, &more, "segmentation");
        let place_of = all.iter().position(|word| word == "a,b").unwrap();
        all[place_of] = classes.to_owned();
        place.slidestream(all)
    };
    optimize(&["--to", "fp32"], &folder, "a,b")
        .code(2)
        .says(&["the folder of the model itself", "choose another folder"]);
    assert_eq!((fs::read(&model).unwrap(), fs::read_dir(&folder).unwrap().count()), (bytes, 1));
    let out = place.at("made");
    optimize(&["--to", "fp32"], &out, "a,b").code(0);
    // The same model again is added to; one whose classes mean something else is not.
    optimize(&["--to", "fp16"], &out, "a,b").code(0);
    let card = fs::read_to_string(out.join("card.toml")).unwrap();
    assert!(card.contains("[variants.fp16]") && card.contains("[variants.fp32-rewritten]"), "{card}");
    optimize(&["--to", "fp16"], &out, "b,a").code(1).says(&["holds the model", "choose another folder"]);
    assert_eq!(fs::read_to_string(out.join("card.toml")).unwrap(), card);
    // A name that leads elsewhere.
    fs::write(out.join("card.toml"), card.replacen("name = \"net\"", "name = \"../net\"", 1)).unwrap();
    let more = ["--to", "fp32", "--out", folder.to_str().unwrap()];
    let mut all = vec!["optimize".to_owned(), out.display().to_string()];
    all.extend(more.map(str::to_owned));
    place.slidestream(all).code(1).says(&["\"../net\"", "begin the name of a file"]);
}

#[test]
fn what_makes_no_sense_is_refused_before_any_work() {
    let place = Workplace::new();
    let out = place.at("made");
    let refused = |name: &str, more: &[&str], task: &str| {
        let more: Vec<&str> = more.iter().copied().chain(["--out", out.to_str().unwrap()]).collect();
        place.slidestream(arguments("optimize", &fixture(name), &more, task))
    };
    refused("unet.onnx", &["--to", "int8"], "segmentation").code(2).says(&["tiles to calibrate on", "set calibrate"]);
    refused("unet.onnx", &["--for", "cuda", "--to", "int8"], "segmentation")
        .code(2)
        .says(&["INT8 is not made for CUDA", "TensorRT"]);
    refused("timm_sdpa.onnx", &["--to", "fp8"], "features").code(2).says(&["fp8"]);
    refused("timm_sdpa.onnx", &["--lora", fixture("lora").join("missing").to_str().unwrap()], "features").code(1);
    assert!(!out.join("card.toml").exists());

    let cut = place.write("cut.onnx", &fs::read(fixture("unet.onnx")).unwrap()[..20_000]);
    let more = ["--out", out.to_str().unwrap()];
    place.slidestream(arguments("optimize", &cut, &more, "segmentation")).code(1).says(&["damaged or truncated"]);
    assert!(!out.join("card.toml").exists());
}

#[test]
fn an_adapter_becomes_part_of_the_model() {
    let place = Workplace::new();
    let out = place.at("made");
    let adapter = fixture("lora");
    let more = ["--lora", adapter.to_str().unwrap(), "--tiles", "2", "--out", out.to_str().unwrap(), "--explain"];
    let done = place.slidestream(arguments("optimize", &fixture("timm_sdpa.onnx"), &more, "features"));
    done.code(0).shows(&["lora-unmerged", "the adapter beside the weights"]);
    // Merged and unmerged are the same sums in another order.
    let unmerged = &record(&out)["variants"][0];
    assert_eq!(unmerged["name"], "lora-unmerged");
    assert!(unmerged["agreement"]["max_abs_difference"].as_f64().unwrap() < 1e-4, "{unmerged}");
    // Another network: every module is missing, and the first is named.
    let other = place.at("other");
    let more = ["--lora", adapter.to_str().unwrap(), "--out", other.to_str().unwrap()];
    place
        .slidestream(arguments("optimize", &fixture("torchvision_vit.onnx"), &more, "features"))
        .code(1)
        .says(&["blocks.0"]);
}
