//! `slidestream evaluate` on tiny labelled images: figures against hand-computed ones, and what it says of bad input.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::fs;
use std::path::Path;

use image::{GrayImage, Luma, Rgb, RgbImage};

use support::{Finished, Json, Kind, TILE, Workplace, assert_no_partial_files, classify};

/// The classifier takes green for `pale` and magenta for `deep`.
const GREEN: [u8; 3] = [40, 230, 60];
const MAGENTA: [u8; 3] = [220, 30, 200];

fn evaluate(place: &Workplace, labels: &Path, model: &Path, flags: &[&str]) -> Finished {
    let mut command = place.command(["evaluate", "--device", "cpu"]);
    command.arg(labels).arg("--model").arg(model).arg("--out").arg(place.at("out")).args(flags);
    place.start(&mut command).wait()
}

fn tile(place: &Workplace, name: &str, color: [u8; 3]) {
    let path = place.write(name, "");
    RgbImage::from_pixel(TILE, TILE, Rgb(color)).save(path).unwrap();
}

/// Of `pale` three of four are green, of `deep` three of four magenta, each a little different.
fn class_folders(place: &Workplace) {
    for (class, own, other) in [("pale", GREEN, MAGENTA), ("deep", MAGENTA, GREEN)] {
        for index in 0..4_u8 {
            let mut color = if index == 3 { other } else { own };
            color[0] -= index;
            tile(place, &format!("data/{class}/{index}.png"), color);
        }
    }
}

fn value(record: &serde_json::Value, pointer: &str) -> f64 {
    record.pointer(pointer).unwrap_or_else(|| panic!("no {pointer}")).as_f64().unwrap()
}

#[test]
fn folders_of_tiles_give_known_figures() {
    let place = Workplace::new();
    class_folders(&place);
    place.write("data/deep/broken.png", "no picture");
    evaluate(&place, &place.at("data"), &place.model(Kind::Classifier), &[])
        .code(3)
        .shows(&["top-1", "0.7500", "macro F1", "pale", "8 predicted, 1 not read", "Top-5 is not told", "tiles/s"])
        .says(&["predicting 9 labelled images", "not read: ", "broken.png: is no image that can be read"]);
    let record = Json::read(place.at("out/evaluate.json"));
    for (figure, expected) in [("top1", 0.75), ("balanced_accuracy", 0.75), ("kappa", 0.5), ("macro_f1", 0.75)] {
        assert_eq!(value(&record, &format!("/figures/{figure}/value")), expected, "{figure}");
        let interval =
            [value(&record, &format!("/figures/{figure}/low")), value(&record, &format!("/figures/{figure}/high"))];
        assert!(interval[0] < expected && expected < interval[1], "{figure}: {interval:?}");
    }
    assert!(record["figures"]["top5"].is_null() && record["figures"]["mean_dice"].is_null());
    assert_eq!(record["confusion"], serde_json::json!([[3, 1, 0], [1, 3, 0]]));
    assert_eq!((record["images"].as_u64(), record["failed"].as_array().unwrap().len()), (Some(8), 1));
    assert_eq!(record["worst"].as_array().unwrap().len(), 2);

    // The table holds what the model computes by hand, and ECE follows from it.
    let mut reader = csv::Reader::from_path(place.at("out/predictions.csv")).unwrap();
    let heads: Vec<String> = reader.headers().unwrap().iter().map(str::to_owned).collect();
    assert_eq!(heads, ["path", "group", "label", "predicted", "prob_pale", "prob_deep"]);
    let mut gap = 0.0;
    let rows: Vec<csv::StringRecord> = reader.records().map(Result::unwrap).collect();
    assert_eq!(rows.len(), 8);
    for row in &rows {
        let expected = classify(image::open(&row[0]).unwrap().into_rgb8().as_raw());
        for (column, expected) in expected.iter().enumerate() {
            assert!((row[4 + column].parse::<f64>().unwrap() - expected).abs() < 1e-5, "{row:?}");
        }
        // All are surer than 14/15, so that all share one bin.
        let confidence = expected[0].max(expected[1]);
        assert!(confidence > 14.0 / 15.0);
        gap += confidence - f64::from(u8::from(row[2] == row[3]));
    }
    assert!((value(&record, "/figures/ece/value") - gap.abs() / 8.0).abs() < 1e-5);
    let page = fs::read_to_string(place.at("out/evaluate.html")).unwrap();
    assert_eq!(page.matches("data:image/png;base64,").count(), 2);
    assert_no_partial_files(&place.at("out"));
}

#[test]
fn sessions_that_share_batches_predict_the_same() {
    let place = Workplace::new();
    class_folders(&place);
    let table = |flags: &[&str]| {
        evaluate(&place, &place.at("data"), &place.model(Kind::Classifier), flags).code(0);
        fs::read_to_string(place.at("out/predictions.csv")).unwrap()
    };
    let by_one = table(&["--batch-size", "3"]);
    let by_three = table(&["--batch-size", "2", "--sessions", "3"]);
    assert_eq!(by_one, by_three);
    let ran_on = &Json::read(place.at("out/evaluate.json"))["ran_on"];
    let numbers = ["sessions", "batch_size", "total_batch_size"].map(|key| ran_on[key].as_u64().unwrap());
    assert_eq!(numbers, [3, 2, 6]);
    assert!(value(ran_on, "/load_secs") > 0.0 && value(ran_on, "/warm_up_secs") > 0.0);
}

#[test]
fn groups_are_named_in_a_table_and_drawn_together() {
    let place = Workplace::new();
    class_folders(&place);
    let mut table = "path,label,group\n".to_owned();
    for class in ["pale", "deep"] {
        (0..4).for_each(|index| table += &format!("data/{class}/{index}.png,{class},patient {}\n", index / 2));
    }
    let labels = place.write("labels.csv", table);
    let shown =
        evaluate(&place, &labels, &place.model(Kind::Classifier), &["--json", "--quiet", "--batch-size", "3"]).code(0);
    assert_eq!(shown.stderr, "");
    let record: serde_json::Value = serde_json::from_str(&shown.stdout).unwrap();
    assert_eq!((&record["drawn"]["unit"], record["drawn"]["units"].as_u64()), (&"groups".into(), Some(2)));
    // Patient 0 is all right, patient 1 half: draws of two give 1/2, 3/4 or 1.
    assert_eq!(record["figures"]["top1"]["low"], 0.5);
    assert_eq!(record["figures"]["top1"]["high"], 1.0);
    assert_eq!((record["pace"]["batch_size"].as_u64(), record["pace"]["tiles"].as_u64()), (Some(3), Some(5)));
    assert!(fs::read_to_string(place.at("out/predictions.csv")).unwrap().contains(",patient 1,deep,"));
}

#[test]
fn maps_are_held_against_masks() {
    let place = Workplace::new();
    let (width, height) = (TILE + 40, TILE);
    // The model sees red in the left half and green in the right; the mask has red in three quarters, and no label in
    // the first row.
    let half = width / 2;
    RgbImage::from_fn(width, height, |x, _| Rgb(if x < half { [250, 3, 2] } else { [3, 250, 2] }))
        .save(place.at("a.png"))
        .unwrap();
    let label = |x: u32, y: u32| if y == 0 { 255 } else { u8::from(x >= 3 * width / 4) };
    GrayImage::from_fn(width, height, |x, y| Luma([label(x, y)])).save(place.at("m.png")).unwrap();
    place.write("broken.png", "no picture");
    let labels = place.write("labels.csv", "image,mask\na.png,m.png\nbroken.png,m.png\n");
    evaluate(&place, &labels, &place.model(Kind::Segmentation), &["--batch-size", "2"])
        .code(3)
        .shows(&["mean Dice", "mean IoU", "pixel accuracy", "1 predicted, 1 not read", "No label has the class blue"])
        .says(&["broken.png"]);
    let record = Json::read(place.at("out/evaluate.json"));
    assert_eq!(record["items"].as_u64(), Some(u64::from(width * (height - 1))));
    // Of 4 columns: red 3 labelled, 2 predicted, 2 both; green 1 labelled, 2 predicted, 1 both.
    for (figure, expected) in [
        ("/classes/0/f1/value", 4.0 / 5.0),
        ("/classes/1/f1/value", 2.0 / 3.0),
        ("/classes/0/iou/value", 2.0 / 3.0),
        ("/classes/1/iou/value", 1.0 / 2.0),
        ("/classes/0/recall/value", 2.0 / 3.0),
        ("/classes/1/precision/value", 1.0 / 2.0),
        ("/figures/mean_dice/value", (4.0 / 5.0 + 2.0 / 3.0) / 2.0),
        ("/figures/mean_iou/value", (2.0 / 3.0 + 1.0 / 2.0) / 2.0),
        ("/figures/top1/value", 3.0 / 4.0),
        // pₑ = (3·2 + 1·2) / 16.
        ("/figures/kappa/value", 0.5),
    ] {
        assert!((value(&record, figure) - expected).abs() < 1e-12, "{figure}: {}", value(&record, figure));
    }
    // One image is one group, of which there is nothing to draw.
    assert!(record["figures"]["mean_dice"]["low"].is_null());
    let predictions = fs::read_to_string(place.at("out/predictions.csv")).unwrap();
    assert!(predictions.starts_with("path,group,mask,dice_red,dice_green,dice_blue\n"), "{predictions}");
    assert!(predictions.trim_end().ends_with(','), "blue occurs in neither");
}

#[test]
fn no_number_is_wrong_and_told() {
    let place = Workplace::new();
    tile(&place, "data/pale/black.png", [0; 3]);
    tile(&place, "data/pale/white.png", [255; 3]);
    tile(&place, "data/deep/grey.png", [128; 3]);
    evaluate(&place, &place.at("data"), &place.model(Kind::NotFinite), &["--quiet"]).code(0);
    let record = Json::read(place.at("out/evaluate.json"));
    assert_eq!(record["not_a_number"].as_u64(), Some(1));
    assert_eq!(record["confusion"][0][2].as_u64(), Some(1));
    assert!(fs::read_to_string(place.at("out/evaluate.html")).unwrap().contains("gave no number"));
}

#[test]
fn bad_input_is_told() {
    let place = Workplace::new();
    class_folders(&place);
    let (data, model) = (place.at("data"), place.model(Kind::Classifier));
    fs::create_dir(data.join("blood")).unwrap();
    evaluate(&place, &data, &model, &[]).code(2).says(&["blood: \"blood\" is none of the model's classes: pale, deep"]);
    fs::remove_dir(data.join("blood")).unwrap();
    RgbImage::new(200, 150).save(data.join("pale/large.png")).unwrap();
    // The others go on.
    evaluate(&place, &data, &model, &[]).code(3).shows(&["8 predicted, 1 not read"]).says(&[
        "large.png: is 200 × 150 px",
        "help: ",
        "fit",
    ]);
    evaluate(&place, &data, &model, &["--fit", "resize"]).code(0).shows(&["9 predicted"]);
    evaluate(&place, &data, &place.model(Kind::Features), &[]).code(2).says(&["features have no classes"]);
    evaluate(&place, &data, &place.model(Kind::Segmentation), &[]).code(2).says(&["image,mask"]);
    evaluate(&place, &place.at("none.csv"), &model, &[]).code(1).says(&["none.csv"]);
    let broken = place.write("other/pale/a.png", "no picture");
    evaluate(&place, broken.parent().unwrap().parent().unwrap(), &model, &[])
        .code(2)
        .says(&["none of its images can be read"]);
}
