//! What `simulate` promises: throughput of the engine without slides, exact counts, and the time of a slide.

mod support;

use slidestream::slide::synthetic::{SvsOptions, SyntheticSlide, Tissue};

use support::{Finished, Json, Workplace};

const SMALL: &str = "image=32,patch=8,dim=64,depth=2,heads=2,mlp=2";
/// Its layers have weights enough that bytes gain.
const WIDE: &str = "image=32,patch=8,dim=128,depth=2,heads=2,mlp=2";
const CELLS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/models/cells-vit");

fn simulate(place: &Workplace, more: &[&str]) -> Finished {
    let mut all = vec!["simulate", "--device", "cpu", "--seconds", "0"];
    all.extend(more);
    place.slidestream(all)
}

#[test]
fn a_described_transformer_is_counted_and_swept() {
    let place = Workplace::new();
    let outcome = simulate(
        &place,
        &["--vit", SMALL, "--batch-sizes", "2,1", "--watts", "100", "--slide-size", "330x160", "--json"],
    );
    let found = outcome.code(0).json();
    assert_eq!(found["schema"], "slidestream/simulate/1");
    // Patches 3·64·64 + 64, class token 64, 17 positions of 64; two blocks of norms 2·128, qkv 64·192 + 192,
    // proj 64·64 + 64, fc1 64·128 + 128, fc2 128·64 + 64; the last norm 128.
    let block = 256 + 64 * 192 + 192 + 64 * 64 + 64 + 64 * 128 + 128 + 128 * 64 + 64;
    let parameters = 3 * 64 * 64 + 64 + 64 + 17 * 64 + 2 * block + 128;
    assert_eq!(found["size"]["parameters"], parameters);
    assert_eq!(found["size"]["formula"]["parameters"], parameters);
    // 16 patches of 192 values; per block qkv, two products of attention, proj, fc1 and fc2 over 17 tokens.
    let (patches, tokens) = (16, 17);
    let block = 2 * tokens * 64 * 192 + 4 * tokens * tokens * 64 + 2 * tokens * 64 * 64 + 4 * tokens * 64 * 128;
    assert_eq!(found["size"]["flops"], 2 * patches * 192 * 64 + 2 * block);
    let points = found["points"].as_array().unwrap();
    assert_eq!(points.iter().map(|point| point["batch_size"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 2]);
    for point in points {
        assert!(point["tiles_per_sec"]["value"].as_f64().unwrap() > 0.0);
        assert!(point["samples_tiles_per_sec"].as_array().unwrap().len() >= 6);
        let stages: Vec<_> = point["stages"].as_array().unwrap().iter().map(|stage| stage["name"].clone()).collect();
        assert_eq!(stages, ["tiles", "batch", "infer", "results"]);
    }
    let slide = &found["slide"];
    // ⌊298 / 32⌋ + 1 = 10 by ⌊128 / 32⌋ + 1 = 5; the grid has one more column for the remainder of 10 px.
    assert_eq!((slide["full_tiles"].as_u64(), slide["grid_tiles"].as_u64()), (Some(50), Some(55)));
    let seconds = 55.0 / slide["tiles_per_sec"].as_f64().unwrap();
    assert!((slide["seconds"].as_f64().unwrap() / seconds - 1.0).abs() < 1e-9);
    assert!((slide["kwh_per_1000_slides"].as_f64().unwrap() / (100.0 * seconds / 3600.0) - 1.0).abs() < 1e-9);
}

#[test]
fn the_usual_count_of_tiles_is_printed() {
    let place = Workplace::new();
    let vit = "image=224,patch=32,dim=32,depth=1,heads=2";
    let slide = ["--slide-size", "100000x80000", "--overlap", "25%", "--tissue-fraction", "0.4"];
    let outcome = simulate(&place, &[&["--vit", vit][..], &slide].concat());
    // ⌊(100,000 − 224) / 168⌋ + 1 = 594 by ⌊(80,000 − 224) / 168⌋ + 1 = 475.
    outcome.code(0).shows(&[
        "100,000 × 80,000 px of 0.5 µm/px at level 0, tiles share 56 px",
        "full_tiles  282,150",
        "113,288 to infer of 283,220 in the grid: 40.0 % have tissue",
        "per day",
    ]);
}

#[test]
fn a_profile_is_a_slide_that_may_be_adjusted() {
    let place = Workplace::new();
    let outcome = simulate(&place, &["--vit", SMALL, "--profile", "prostatectomy"]);
    outcome.code(0).shows(&["whole-mount prostatectomy", "190,000 to infer\n", "per day"]);
    // At 0.5 µm/px 60,000 × 45,000 px: 1,875 by ⌈1,406.25⌉ tiles of 32 px.
    simulate(&place, &["--vit", SMALL, "--profile", "resection"]).code(0).shows(&[
        "resection, 120,000 × 90,000 px of 0.25 µm/px",
        "1,187,156 to infer of 2,638,125 in the grid: 45.0 % have tissue",
    ]);
    // At the model's own resolution 3,750 by ⌈2,812.5⌉.
    let flags = ["--vit", SMALL, "--profile", "resection", "--slide-mpp", "0.5", "--tissue-fraction", "0.2"];
    simulate(&place, &flags).code(0).shows(&[
        "resection, 120,000 × 90,000 px of 0.5 µm/px",
        "2,109,750 to infer of 10,548,750 in the grid: 20.0 % have tissue",
        "full_tiles  10,545,000",
    ]);
    place.slidestream(["simulate", "--help"]).code(0).shows(&["120,000 × 90,000", "15 % tissue", "190,000 tiles"]);
}

#[test]
fn every_precision_is_made_and_run() {
    let place = Workplace::new();
    for precision in ["fp32", "fp16", "int8"] {
        let outcome = simulate(&place, &["--vit", WIDE, "--optimize", precision, "--json"]);
        let found = outcome.code(0).json();
        assert!(found["model"]["variant"].as_str().unwrap().starts_with(precision), "{}", found["model"]);
        assert_eq!(found["ceiling_flops_per_sec"].is_null(), precision == "int8");
        let size = &found["size"];
        assert_eq!(size["parameters"], size["formula"]["parameters"], "scales of bytes are no parameters");
    }
}

#[test]
fn a_real_slide_tells_its_tissue_and_how_fast_it_is_read() {
    let place = Workplace::new();
    let slide = SyntheticSlide { tissue: Tissue::Everywhere, ..SyntheticSlide::new(256, 192, 5) };
    let slide = place.slide("s.svs", &slide, &SvsOptions::default());
    let outcome = simulate(&place, &["--model", CELLS, "--slide", slide.to_str().unwrap(), "--json"]);
    let found = outcome.code(0).json();
    let slide = &found["slide"];
    assert_eq!((slide["width"].as_u64(), slide["height"].as_u64()), (Some(256), Some(192)));
    assert_eq!(slide["tiles"], slide["grid_tiles"]);
    let [reading, inference, both] =
        ["reading_tiles_per_sec", "inference_tiles_per_sec", "tiles_per_sec"].map(|key| slide[key].as_f64().unwrap());
    assert!((1.0 / both - 1.0 / reading - 1.0 / inference).abs() < 1e-9, "both share the cores");
    assert!(slide["bound_by"].as_str().unwrap().contains("cores' time"));
}

#[test]
fn full_tiles_of_a_real_slide_are_counted() {
    let place = Workplace::new();
    let slide = SyntheticSlide { tissue: Tissue::Everywhere, ..SyntheticSlide::new(288, 160, 5) };
    let slide = place.slide("s.svs", &slide, &SvsOptions::default());
    let flags = ["--vit", SMALL, "--slide", slide.to_str().unwrap(), "--overlap", "20%"];
    // Stride 25.6: ⌊256 / 25.6⌋ + 1 = 11 by ⌊128 / 25.6⌋ + 1 = 6.
    let found = simulate(&place, &[&flags[..], &["--json"]].concat()).code(0).json();
    assert_eq!(found["slide"]["full_tiles"], 66);
    simulate(&place, &flags).code(0).shows(&["full_tiles  66 lie wholly", "s.svs, 288 × 160 px of 0.5 µm/px"]);
}

#[test]
fn it_runs_what_a_run_runs() {
    let place = Workplace::new();
    let slide = SyntheticSlide { tissue: Tissue::Everywhere, ..SyntheticSlide::new(300, 200, 5) };
    let slide = place.slide("s.svs", &slide, &SvsOptions::default());
    let (slide, out) = (slide.to_str().unwrap(), place.at("out"));
    let flags = ["--model", CELLS, "--overlap", "25%", "--sessions", "2", "--readers", "1"];
    let found = simulate(&place, &[&flags[..], &["--slide", slide, "--json"]].concat()).code(0).json();
    let run = [&["run", slide, "--device", "cpu", "--out", out.to_str().unwrap()], &flags[..]].concat();
    place.slidestream(run).code(0);
    let (ran, of_slide) = (Json::read(out.join("run.json")), Json::read(out.join("slides/s.json")));
    assert_eq!(found["execution"], ran["execution"]);
    assert_eq!(found["slide"]["tiles"], of_slide["coverage"]["inferred"]);
    assert_eq!(found["model"], ran["model"]);
}

#[test]
fn what_has_no_answer_is_refused() {
    let place = Workplace::new();
    // Before anything is measured.
    let refused = |more: &[&str]| {
        let outcome = simulate(&place, more);
        assert!(!outcome.stderr.contains("measuring"), "{}", outcome.stderr);
        outcome
    };
    refused(&["--vit", SMALL, "--slide-size", "20x1000"]).code(2).says(&["a tile of 32 px is larger than the slide"]);
    refused(&["--vit", SMALL, "--slide-size", "100x100", "--overlap", "32px"]).code(2).says(&["no step"]);
    refused(&["--vit", SMALL, "--slide-size", "100000000x100000000"])
        .code(2)
        .says(&["a slide of that size has 9765625000000 tiles", "help: give a smaller slide_size"]);
    let large = ["--vit", "image=1024,patch=256,dim=64,depth=1,heads=2", "--batch-sizes", "65536", "--sessions", "64"];
    refused(&large).code(2).says(&["batches of 65536 in 64 sessions hold tiles of 50331648 MiB", "help: set smaller"]);
    for overlap in ["100%", "120%", "-10%", "-8px"] {
        refused(&["--vit", SMALL, "--slide-size", "100x100", "--overlap", overlap])
            .code(2)
            .says(&["is no overlap: it must be at least 0 and below the tile"]);
    }
    refused(&["--vit", SMALL, "--slide-size", "100"]).code(2).says(&["100000x80000"]);
    refused(&["--vit", SMALL, "--slide-size", "100x100", "--tissue-fraction", "40"])
        .code(2)
        .says(&["above 0 and at most 1"]);
    refused(&["--vit", SMALL, "--slide-size", "100x100", "--tissue-fraction", "0"]).code(2).says(&["above 0"]);
    refused(&["--vit", SMALL, "--profile", "prostatectomy", "--overlap", "8px"]).code(2).says(&["number of tiles"]);
    refused(&["--vit", SMALL, "--profile", "prostatectomy", "--tissue-fraction", "0.5"])
        .code(2)
        .says(&["number of tiles"]);
    refused(&["--vit", SMALL, "--overlap", "8px"]).code(2).says(&["give --slide, --slide-size or --profile"]);
    refused(&["--vit", SMALL, "--tissue-fraction", "0.5"]).code(2).says(&["give --slide, --slide-size or --profile"]);
    refused(&["--vit", SMALL, "--slide", "none.svs", "--tissue-fraction", "0.5"])
        .code(2)
        .says(&["cannot be used with"]);
    refused(&["--vit", SMALL, "--slide", "none.svs"]).code(1).says(&["none.svs"]);
    refused(&["--vit", SMALL, "--batch-sizes", "18446744073709551615"]).code(2).says(&["from 1 to 65536"]);
    refused(&["--vit", SMALL, "--task", "segmentation"]).code(2).says(&["--vit takes --target-mpp alone"]);
    refused(&["--vit", "dim=8192,depth=128,mlp=16,heads=1"]).code(2).says(&["parameters are more than"]);
    refused(&["--vit", "dim=64,width=3"]).code(2).says(&["width"]);
    refused(&["--vit", "image=33,patch=8"]).code(2).says(&["33"]);
    refused(&["--vit", "vit_base_patch16_225"]).code(2).says(&["image=225 is no multiple of patch=16"]);
    refused(&["--vit", SMALL, "--profile", "toe"]).code(2).says(&["biopsy, resection, prostatectomy"]);
    refused(&[]).code(2).says(&["--model"]);
}
