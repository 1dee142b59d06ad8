//! `slidestream predict` on made images: classes against hand-computed probabilities, masks, and what is refused.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::fs;
use std::path::Path;

use image::{DynamicImage, Rgb, RgbImage};
use serde_json::Value;

use support::{Finished, Json, Kind, TILE, Workplace, assert_no_partial_files, classify};

const GREEN: [u8; 3] = [40, 230, 60];
const MAGENTA: [u8; 3] = [220, 30, 200];

fn predict(place: &Workplace, paths: &[&str], model: &Path, flags: &[&str]) -> Finished {
    let mut command = place.command(["predict", "--device", "cpu", "--model"]);
    command.arg(model).args(flags).args(paths.iter().map(|path| place.at(path)));
    place.start(&mut command).wait()
}

/// Tiles in `columns` columns, each in its colour, and a margin at the right and the bottom.
fn mosaic(colors: &[[u8; 3]], columns: u32, margin: u32) -> RgbImage {
    let rows = u32::try_from(colors.len()).unwrap() / columns;
    RgbImage::from_fn(columns * TILE + margin, rows * TILE + margin, |x, y| {
        let (column, row) = ((x / TILE).min(columns - 1), (y / TILE).min(rows - 1));
        Rgb(colors[(row * columns + column) as usize])
    })
}

fn of(color: [u8; 3]) -> [f64; 2] {
    classify(&color.repeat((TILE * TILE) as usize))
}

fn json(finished: &Finished) -> Value {
    serde_json::from_str(&finished.stdout).unwrap()
}

fn assert_close(found: &Value, expected: f64) {
    let found = found.as_f64().unwrap();
    assert!((found - expected).abs() < 1e-5, "{found} instead of {expected}");
}

#[test]
fn an_image_is_the_mean_of_its_tiles() {
    let place = Workplace::new();
    let colors = [GREEN, MAGENTA, GREEN, GREEN, [120, 120, 130], GREEN];
    mosaic(&colors, 3, 17).save(place.at("a.png")).unwrap();
    let model = place.model(Kind::Classifier);
    let all = json(&predict(&place, &["a.png"], &model, &["--json", "--quiet"]).code(0));
    let image = &all["images"][0];
    assert_eq!((image["grid_tiles"].as_u64(), image["label"].as_str()), (Some(6), Some("pale")));
    let mean = colors.iter().map(|color| of(*color)[0]).sum::<f64>() / 6.0;
    assert_close(&image["confidence"], mean);
    assert_close(&image["classes"][1]["probability"], 1.0 - mean);
    assert_eq!((image["classes"][0]["count"].as_u64(), image["classes"][1]["count"].as_u64()), (Some(4), Some(2)));
    let (width, height) = (f64::from(3 * TILE + 17), f64::from(2 * TILE + 17));
    assert_close(&image["covered"], 6.0 * f64::from(TILE * TILE) / (width * height));
    for (index, (tile, color)) in image["tiles"].as_array().unwrap().iter().zip(colors).enumerate() {
        assert_close(&tile["probabilities"][0], of(color)[0]);
        let index = u64::try_from(index).unwrap();
        assert_eq!(tile["x"].as_u64(), Some(index % 3 * u64::from(TILE)));
        assert_eq!(tile["y"].as_u64(), Some(index / 3 * u64::from(TILE)));
    }

    // Four of six, evenly: 0, 1, 3 and 4.
    let some = json(&predict(&place, &["a.png"], &model, &["--json", "--max-tiles", "4", "--batch-size", "3"]).code(0));
    let at =
        |tile: &Value| (tile["x"].as_u64().unwrap() / u64::from(TILE), tile["y"].as_u64().unwrap() / u64::from(TILE));
    let places: Vec<_> = some["images"][0]["tiles"].as_array().unwrap().iter().map(at).collect();
    assert_eq!(places, [(0, 0), (1, 0), (0, 1), (1, 1)]);
    let mean = [0, 1, 3, 4].map(|index| of(colors[index])[0]).iter().sum::<f64>() / 4.0;
    assert_close(&some["images"][0]["classes"][0]["probability"], mean);
    predict(&place, &["a.png"], &model, &["--max-tiles", "0"]).code(0).shows(&[
        "a.png",
        "pale",
        "6 of 6",
        "Of 1 of 1 image the edge",
        "in batches of 6;",
    ]);
}

#[test]
fn a_folder_is_the_mean_of_its_images() {
    let place = Workplace::new();
    std::fs::create_dir(place.at("in")).unwrap();
    mosaic(&[GREEN, GREEN, MAGENTA], 3, 0).save(place.at("in/a.bmp")).unwrap();
    mosaic(&[MAGENTA], 1, 0).save(place.at("in/b.tif")).unwrap();
    // With an alpha channel, and opaque.
    DynamicImage::from(mosaic(&[MAGENTA], 1, 0)).into_rgba8().save(place.at("in/c.PNG")).unwrap();
    place.write("in/d.jpg", "no picture");
    RgbImage::new(TILE, TILE - 1).save(place.at("in/e.png")).unwrap();
    place.write("in/notes.txt", "no image, and counted");
    place.write("in/f.gif", "GIF89a");
    let out = place.at("out");
    let finished = predict(&place, &["in"], &place.model(Kind::Classifier), &["--out", out.to_str().unwrap()])
        .code(3)
        .shows(&["a.bmp", "c.PNG", "3 images", "or webp were left out: 2 (1 gif, 1 txt)."])
        .says(&["not predicted: ", "d.jpg: is no image that can be read", "e.png: is 128 × 127 px, less than a tile"]);
    assert!(!finished.stderr.contains("notes.txt"));
    let record = Json::read(out.join("predict.json"));
    assert_eq!(record["skipped"], serde_json::json!({ "gif": 1, "txt": 1 }));
    let names: Vec<_> =
        record["images"].as_array().unwrap().iter().map(|image| image["path"].as_str().unwrap()).collect();
    assert!(names[0].ends_with("a.bmp") && names[1].ends_with("b.tif") && names[2].ends_with("c.PNG"), "{names:?}");
    let [green, magenta] = [of(GREEN)[1], of(MAGENTA)[1]];
    let folder = &record["folders"][0];
    assert_eq!(
        (folder["label"].as_str(), folder["images"].as_u64(), folder["failed"].as_u64()),
        (Some("deep"), Some(3), Some(2))
    );
    assert_close(&folder["confidence"], ((2.0 * green + magenta) / 3.0 + 2.0 * magenta) / 3.0);
    assert_eq!((folder["classes"][0]["count"].as_u64(), folder["classes"][1]["count"].as_u64()), (Some(1), Some(2)));
    assert_no_partial_files(&out);
}

#[test]
fn one_tile_at_a_time_tells_the_latency() {
    let place = Workplace::new();
    mosaic(&[GREEN; 12], 4, 0).save(place.at("a.png")).unwrap();
    let model = place.model(Kind::Classifier);
    predict(&place, &["a.png"], &model, &["--batch-size", "1"])
        .code(0)
        .shows(&["latency of a tile on cpu, warm: p50", "(11 tiles)"]);
    let record = json(&predict(&place, &["a.png"], &model, &["--batch-size", "1", "--json"]).code(0));
    let pace = &record["pace"]["ms_per_tile"];
    assert!(pace["p50"].as_f64().unwrap() > 0.0 && pace["p99"].as_f64() >= pace["p50"].as_f64());
}

#[test]
fn a_segmentation_gives_masks_and_overlays() {
    let place = Workplace::new();
    let (width, height) = (TILE + 50, TILE + 3);
    let color = |x: u32, y: u32| match (x * 3 / width, y < 20) {
        (_, true) => [2, 3, 250],
        (0, _) => [250, 3, 2],
        _ => [3, 250, 2],
    };
    RgbImage::from_fn(width, height, |x, y| Rgb(color(x, y))).save(place.at("a.png")).unwrap();
    let (model, out) = (place.model(Kind::Segmentation), place.at("out"));
    let flags = ["--out", out.to_str().unwrap(), "--batch-size", "2"];
    predict(&place, &["a.png"], &model, &flags).code(0).shows(&["a.mask.png", "a.overlay.png", "blue"]);
    let mask = image::open(out.join("a.mask.png")).unwrap();
    let DynamicImage::ImageLuma8(mask) = mask else { panic!("no grey picture") };
    assert_eq!(mask.dimensions(), (width, height));
    for (x, y, value) in mask.enumerate_pixels() {
        let expected = color(x, y).iter().position(|value| *value == 250).unwrap();
        assert_eq!(usize::from(value.0[0]), expected, "{x}, {y}");
    }
    assert!(image::open(out.join("a.overlay.png")).unwrap().width() > width);
    let record = Json::read(out.join("predict.json"));
    assert_eq!(record["images"][0]["classes"][2]["count"].as_u64(), Some(u64::from(20 * width)));
    predict(&place, &["a.png"], &model, &[]).code(2).says(&["is a segmentation, whose masks need a folder", "set out"]);
    RgbImage::new(width, height).save(place.at("a.jpg")).unwrap();
    predict(&place, &["a.png", "a.jpg"], &model, &flags).code(2).says(&["would have the same mask file as"]);
}

#[test]
fn an_image_smaller_than_a_tile_has_its_mask() {
    let place = Workplace::new();
    let (width, height) = (TILE - 50, TILE - 3);
    let color = |x: u32| if x < 20 { [250, 3, 2] } else { [3, 250, 2] };
    RgbImage::from_fn(width, height, |x, _| Rgb(color(x))).save(place.at("small.png")).unwrap();
    let out = place.at("out");
    let flags = ["--out", out.to_str().unwrap()];
    predict(&place, &["small.png"], &place.model(Kind::Segmentation), &flags)
        .code(0)
        .shows(&["small.mask.png", "were filled up with white for the model: 1, such as"]);
    let mask = image::open(out.join("small.mask.png")).unwrap().into_luma8();
    assert_eq!(mask.dimensions(), (width, height));
    assert!(mask.enumerate_pixels().all(|(x, _, value)| value.0 == [u8::from(x >= 20)]));
    assert!(image::open(out.join("small.overlay.png")).unwrap().width() > width);
    let image = &Json::read(out.join("predict.json"))["images"][0];
    assert_eq!((image["width"].as_u64(), image["grid_tiles"].as_u64()), (Some(u64::from(width)), Some(1)));
    // White beside the image is not counted.
    let counts = [0, 1, 2].map(|class: usize| image["classes"][class]["count"].as_u64().unwrap());
    assert_eq!(counts, [u64::from(20 * height), u64::from((width - 20) * height), 0]);
}

#[test]
fn a_folder_of_maps_is_counted_together() {
    let place = Workplace::new();
    std::fs::create_dir(place.at("in")).unwrap();
    for (name, color) in [("a", [250, 2, 3]), ("b", [2, 3, 250])] {
        RgbImage::from_pixel(TILE, TILE, Rgb(color)).save(place.at(&format!("in/{name}.png"))).unwrap();
    }
    let model = place.model(Kind::Segmentation);
    let (out, inputs) = (place.at("out"), place.at("in"));
    predict(&place, &["in"], &model, &["--out", out.to_str().unwrap()]).code(0).shows(&["2 images"]);
    let record = Json::read(out.join("predict.json"));
    let folder = &record["folders"][0];
    let counts = [0, 1, 2].map(|class: usize| folder["classes"][class]["count"].as_u64().unwrap());
    assert_eq!(counts, [u64::from(TILE * TILE), 0, u64::from(TILE * TILE)]);
    assert!(folder["label"].is_null());
    for file in ["a.mask.png", "b.mask.png", "a.overlay.png", "b.overlay.png"] {
        assert!(out.join(file).is_file(), "{file}");
    }
    // Its masks would be images of the folder.
    let refused = predict(&place, &["in"], &model, &["--out", inputs.to_str().unwrap()]);
    refused.code(2).says(&["is the folder of the images", "choose another folder"]);
}

#[test]
fn what_is_no_image_is_refused() {
    let place = Workplace::new();
    let model = place.model(Kind::Classifier);
    place.slide("a.svs", &support::small(), &support::lossless());
    predict(&place, &["a.svs"], &model, &[]).code(2).says(&["a.svs: is a slide, not an image", "slidestream run"]);
    // Whatever its name says.
    std::fs::rename(place.at("a.svs"), place.at("a.tif")).unwrap();
    predict(&place, &["a.tif"], &model, &[]).code(2).says(&["is a slide"]);
    predict(&place, &["none.png"], &model, &[]).code(1).says(&["not predicted: ", "none.png"]);
    std::fs::create_dir(place.at("empty")).unwrap();
    predict(&place, &["empty"], &model, &[]).code(2).says(&["holds no png, jpg"]);
    let png = place.write("a.png", [0x89]);
    predict(&place, &["a.png"], &png, &[]).code(1).says(&["neither a model's card nor an .onnx file", "help: name a"]);
    RgbImage::new(TILE, TILE).save(place.at("black.png")).unwrap();
    predict(&place, &["black.png"], &place.model(Kind::Features), &[]).code(2).says(&["gives features"]);
    predict(&place, &["black.png"], &place.model(Kind::NotFinite), &[])
        .code(1)
        .says(&["gives no number for its tile at 0, 0"]);
    predict(&place, &["black.png"], &model, &["--variant", "int9"]).code(1).says(&["has no variant \"int9\""]);
}

#[test]
fn no_result_is_written_over_an_input() {
    let place = Workplace::new();
    let model = place.model(Kind::Segmentation);
    for name in ["a.png", "a.mask.png"] {
        RgbImage::from_pixel(TILE, TILE, Rgb([250, 2, 3])).save(place.at(name)).unwrap();
    }
    let before = fs::read(place.at("a.mask.png")).unwrap();
    // Whatever the folder is called.
    for out in [".", "none/.."] {
        predict(&place, &["a.png", "a.mask.png"], &model, &["--out", out])
            .code(2)
            .says(&["a.mask.png: is an input, and a result would be written over it", "choose another folder"]);
    }
    assert_eq!(fs::read(place.at("a.mask.png")).unwrap(), before);
    fs::create_dir(place.at("in")).unwrap();
    fs::rename(place.at("a.png"), place.at("in/a.png")).unwrap();
    predict(&place, &["in"], &model, &["--out", "none/../in"]).code(2).says(&["is the folder of the images"]);
    // What an earlier run left is no input.
    for _ in 0..2 {
        predict(&place, &["in/a.png"], &model, &["--out", "in"]).code(0);
    }
    let names = ["a.png", "a.mask.png", "a.overlay.png"];
    let all: Vec<String> = names.iter().map(|name| format!("in/{name}")).collect();
    let all: Vec<&str> = all.iter().map(String::as_str).collect();
    predict(&place, &all, &model, &["--out", "in"]).code(2).says(&["a.mask.png: is an input"]);
    assert!(!place.at("in/a.mask.mask.png").exists());
    predict(&place, &["in/a.png", "in"], &model, &["--out", "out"]).code(2).says(&["is the same image as"]);
}

#[test]
fn a_folder_that_takes_no_results_is_found_before_the_work() {
    let place = Workplace::new();
    mosaic(&[GREEN], 1, 0).save(place.at("a.png")).unwrap();
    place.write("file", "");
    let refused = predict(&place, &["a.png"], &place.model(Kind::Classifier), &["--out", "file"]).code(1);
    assert!(!refused.stderr.contains("predicting"), "{}", refused.stderr);
    refused.says(&["file: can't be written", "is in the way"]);
}

#[cfg(unix)]
#[test]
fn what_cant_be_written_in_the_end_is_told_nevertheless() {
    let place = Workplace::new();
    mosaic(&[GREEN], 1, 0).save(place.at("a.png")).unwrap();
    // As if the disk were full: files can be made, but not filled.
    let mut command = std::process::Command::new("sh");
    command.current_dir(place.at("")).args(["-c", "trap '' XFSZ; ulimit -f 0; exec \"$0\" \"$@\""]);
    command.arg(env!("CARGO_BIN_EXE_slidestream")).args(["predict", "a.png", "--device", "cpu", "--out", "out"]);
    let output = command.arg("--model").arg(place.model(Kind::Classifier)).output().unwrap();
    let [shown, said] = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned());
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(shown.contains("pale") && said.contains("predict.json: can't be written"), "{shown}{said}");
}

#[test]
fn damaged_images_and_links_to_nothing_are_failed() {
    let place = Workplace::new();
    fs::create_dir(place.at("in")).unwrap();
    let noise = |x: u32, y: u32| Rgb([(x * 7 % 251).to_le_bytes()[0], (y * 5 % 241).to_le_bytes()[0], 90]);
    RgbImage::from_fn(TILE, TILE, noise).save(place.at("in/a.jpg")).unwrap();
    let whole = fs::read(place.at("in/a.jpg")).unwrap();
    place.write("in/b.jpg", &whole[..whole.len() * 9 / 10]);
    let mut listed = 1;
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink("none", place.at("in/c.png")).unwrap();
        listed += 1;
    }
    let finished = predict(&place, &["in"], &place.model(Kind::Classifier), &["--json"]).code(3);
    let record = json(&finished);
    assert_eq!((record["images"].as_array().unwrap().len(), record["failed"].as_array().unwrap().len()), (1, listed));
    finished.says(&["b.jpg: is damaged: its data end early", "c.png: is a link to a file that is not there"]);
}

#[test]
fn transparency_is_white() {
    let place = Workplace::new();
    image::RgbaImage::new(TILE, TILE).save(place.at("a.png")).unwrap();
    mosaic(&[[255; 3]], 1, 0).save(place.at("b.webp")).unwrap();
    let record = json(&predict(&place, &["a.png", "b.webp"], &place.model(Kind::Classifier), &["--json"]).code(0));
    for index in 0..2 {
        assert_close(&record["images"][index]["classes"][0]["probability"], of([255; 3])[0]);
    }
}
