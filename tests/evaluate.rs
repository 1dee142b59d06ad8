//! `slidestream evaluate` on tiny labelled images: figures against hand-computed ones, and what it says of bad input.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::fs;
use std::path::{Path, PathBuf};

use image::{GrayImage, Luma, Rgb, RgbImage};
use slidestream::onnx::build::Graph;
use slidestream::onnx::{Dim, ElementType};

use support::{Finished, Json, Kind, TILE, Workplace, assert_no_partial_files, classify, sha256};

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

/// A model of the one class `red`, of tiles or pixels, whose logit is 20 · red − 10 with red from 0 to 1.
fn red(place: &Workplace, task: &str) -> PathBuf {
    let mut graph = Graph::new("red");
    let (batch, side) = (Dim::Symbolic("n".to_owned()), Dim::Fixed(TILE as usize));
    let image = graph.input("image", ElementType::F32, &[batch.clone(), Dim::Fixed(3), side.clone(), side.clone()]);
    let bias = graph.weights("bias", &[1], &[-10.0]);
    if task == "segmentation" {
        let kernel = graph.weights("kernel", &[1, 3, 1, 1], &[20.0, 0.0, 0.0]);
        let map = graph.node("Conv", &[&image, &kernel, &bias], &[]);
        graph.output("map", &map, ElementType::F32, &[batch, Dim::Fixed(1), side.clone(), side]);
    } else {
        let axes = graph.indices("axes", &[2, 3]);
        let means = graph.node("ReduceMean", &[&image, &axes], &[("keepdims", 0.into())]);
        let weights = graph.weights("weights", &[3, 1], &[20.0, 0.0, 0.0]);
        let logit = graph.node("Gemm", &[&means, &weights, &bias], &[]);
        graph.output("logit", &logit, ElementType::F32, &[batch, Dim::Fixed(1)]);
    }
    let bytes = graph.finish().to_bytes();
    let card = format!(
        "schema = 1\nname = \"red\"\ntask = \"{task}\"\ntile_size = {TILE}\nmpp = 0.5\nmean = [0.0, 0.0, 0.0]\n\
         std = [1.0, 1.0, 1.0]\nactivation = \"sigmoid\"\nclasses = [{{ name = \"red\", color = \"#ff0000\" }}]\n\
         [variants.fp32]\nfile = \"model.onnx\"\nsha256 = \"{}\"\n",
        sha256(&bytes)
    );
    place.write("red/model.onnx", &bytes);
    place.write("red/card.toml", card).parent().unwrap().to_owned()
}

/// What [`red`] says of a tile or pixel.
fn probability(red: u8) -> f64 {
    1.0 / (1.0 + (10.0 - 20.0 * f64::from(red) / 255.0).exp())
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
fn one_class_is_held_against_what_is_not_it() {
    let place = Workplace::new();
    let tiles = [("red", [230, 140, 90].as_slice()), ("plain", &[150, 100, 60, 20])];
    for (folder, reds) in tiles {
        reds.iter().for_each(|red| tile(&place, &format!("data/{folder}/{red}.png"), [*red, 100, 100]));
    }
    let (data, model) = (place.at("data"), red(&place, "classification"));
    evaluate(&place, &data, &model, &[])
        .code(0)
        .shows(&["not red", "The model has one class: from a probability of 0.5"])
        .shows(&["Labels and folders named plain stand for not red."]);
    let record = Json::read(place.at("out/evaluate.json"));
    // From 128 on a tile is red: 90 is missed, 150 taken for it.
    assert_eq!(record["confusion"], serde_json::json!([[2, 1, 0], [1, 3, 0]]));
    assert_eq!((&record["classes"][0]["class"], &record["classes"][1]["class"]), (&"red".into(), &"not red".into()));
    // Surer than 14/15: 230, 90, 60 and 20, of which 90 is wrong; each of the others has a bin of its own.
    let alone = [probability(150), probability(100), 1.0 - probability(140)];
    let surest = 3.0 - (probability(230) + 3.0 - probability(90) - probability(60) - probability(20));
    for (figure, expected) in [
        ("/figures/top1/value", 5.0 / 7.0),
        ("/figures/balanced_accuracy/value", (2.0 / 3.0 + 3.0 / 4.0) / 2.0),
        // Of 12 pairs 230 wins 4, 140 wins 3 and 90 wins 2.
        ("/figures/auc/value", 9.0 / 12.0),
        // pₑ = (3·3 + 4·4) / 49.
        ("/figures/kappa/value", 10.0 / 24.0),
        ("/figures/macro_f1/value", (2.0 / 3.0 + 3.0 / 4.0) / 2.0),
        ("/figures/ece/value", (alone.iter().sum::<f64>() + surest.abs()) / 7.0),
        ("/classes/0/precision/value", 2.0 / 3.0),
        ("/classes/0/auc/value", 9.0 / 12.0),
        ("/classes/1/recall/value", 3.0 / 4.0),
    ] {
        assert!((value(&record, figure) - expected).abs() < 1e-5, "{figure}: {} of {expected}", value(&record, figure));
    }
    // The table has what the model says, which is of its class alone.
    let mut reader = csv::Reader::from_path(place.at("out/predictions.csv")).unwrap();
    assert_eq!(
        reader.headers().unwrap(),
        &csv::StringRecord::from(vec!["path", "group", "label", "predicted", "prob_red"])
    );
    let rows: Vec<csv::StringRecord> = reader.records().map(Result::unwrap).collect();
    // Folders and files are in the order of their names: plain/100 comes first.
    assert_eq!((rows.len(), &rows[0][2], &rows[0][3]), (7, "not red", "not red"));
    assert!((rows[0][4].parse::<f64>().unwrap() - probability(100)).abs() < 1e-5, "{:?}", rows[0]);

    let mut table = "path,label\n".to_owned();
    for (folder, reds) in tiles {
        reds.iter().for_each(|red| table += &format!("data/{folder}/{red}.png,{}\n", u8::from(folder == "red")));
    }
    let labels = place.write("labels.csv", table);
    evaluate(&place, &labels, &model, &["--quiet"]).code(0);
    assert_eq!(Json::read(place.at("out/evaluate.json"))["confusion"], record["confusion"]);
    let mut command = place.command(["compare", "--tiles", "4", "--seconds", "0.2", "--device", "cpu", "--data"]);
    command.arg(&labels).arg("--model").arg(&model).arg("--out").arg(place.at("compared"));
    place.start(&mut command).wait().code(0);
    let row = &Json::read(place.at("compared/compare.json"))["accuracy"]["rows"][0];
    for (metric, expected) in [("accuracy", 5.0 / 7.0), ("balanced_accuracy", 17.0 / 24.0), ("auc", 0.75)] {
        assert!((value(row, &format!("/{metric}/value/value")) - expected).abs() < 1e-9, "{metric}: {row}");
    }
    fs::rename(data.join("plain"), data.join("Red")).unwrap();
    evaluate(&place, &data, &model, &[]).code(2).says(&["\"Red\" differs from \"red\"", "by case alone"]);
    fs::rename(data.join("Red"), data.join("plain")).unwrap();
    fs::create_dir(data.join("blood")).unwrap();
    evaluate(&place, &data, &model, &[]).code(2).says(&["can't both be what is not \"red\", the model's only class"]);
}

#[test]
fn masks_of_one_class_are_0_elsewhere() {
    let place = Workplace::new();
    let (width, height) = (TILE + 40, TILE);
    let (half, three_quarters) = (width / 2, 3 * width / 4);
    RgbImage::from_fn(width, height, |x, _| Rgb([if x < half { 250 } else { 5 }, 90, 90]))
        .save(place.at("a.png"))
        .unwrap();
    GrayImage::from_fn(width, height, |x, _| Luma([if x < three_quarters { 255 } else { 0 }]))
        .save(place.at("m.png"))
        .unwrap();
    let labels = place.write("labels.csv", "path,mask\na.png,m.png\n");
    let model = red(&place, "segmentation");
    evaluate(&place, &labels, &model, &[]).code(0).shows(&["mean Dice", "0.8000", "not red"]);
    let record = Json::read(place.at("out/evaluate.json"));
    assert_eq!(record["items"].as_u64(), Some(u64::from(width * height)));
    // Of 4 columns: red 3 labelled, 2 predicted, 2 both; not red 1 labelled, 2 predicted, 1 both.
    for (figure, expected) in [
        ("/classes/0/f1/value", 4.0 / 5.0),
        ("/classes/0/iou/value", 2.0 / 3.0),
        ("/classes/1/f1/value", 2.0 / 3.0),
        ("/figures/mean_dice/value", 4.0 / 5.0),
        ("/figures/mean_iou/value", 2.0 / 3.0),
        ("/figures/top1/value", 3.0 / 4.0),
    ] {
        assert!((value(&record, figure) - expected).abs() < 1e-12, "{figure}: {}", value(&record, figure));
    }
    let predictions = fs::read_to_string(place.at("out/predictions.csv")).unwrap();
    assert!(predictions.starts_with("path,group,mask,dice_red\n") && predictions.trim_end().ends_with(",0.8"));

    // What predict writes is a mask too, and of the model itself nothing differs; b.png is smaller than a tile.
    RgbImage::from_fn(60, 40, |_, y| Rgb([if y < 10 { 250 } else { 5 }, 90, 90])).save(place.at("b.png")).unwrap();
    let mut command = place.command(["predict", "a.png", "b.png", "--device", "cpu", "--out", "masks", "--model"]);
    place.start(command.arg(&model)).wait().code(0);
    let mask = image::open(place.at("masks/b.mask.png")).unwrap().into_luma8();
    assert!(mask.enumerate_pixels().all(|(_, y, value)| value.0 == [u8::from(y < 10)]));
    let own = place.write("own.csv", "path,mask\na.png,masks/a.mask.png\nb.png,masks/b.mask.png\n");
    evaluate(&place, &own, &model, &[]).code(0).shows(&["were filled up with white", "b.png"]);
    assert_eq!(value(&Json::read(place.at("out/evaluate.json")), "/figures/mean_dice/value"), 1.0);
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
    evaluate(&place, &data, &place.model(Kind::Segmentation), &[]).code(2).says(&["path,mask"]);
    evaluate(&place, &place.at("none.csv"), &model, &[]).code(1).says(&["none.csv"]);
    let broken = place.write("other/pale/a.png", "no picture");
    evaluate(&place, broken.parent().unwrap().parent().unwrap(), &model, &[])
        .code(2)
        .says(&["none of its images can be read"]);
    RgbImage::new(200, 150).save(&broken).unwrap();
    evaluate(&place, broken.parent().unwrap().parent().unwrap(), &model, &[]).code(2).says(&[
        "none of its images can be read",
        "help: cut tiles of the model's size, or use `evaluate --fit resize`",
    ]);
    evaluate(&place, &broken, &model, &[]).code(2).says(&["is neither a folder nor a CSV", "help: give a folder"]);
}

#[test]
fn no_result_is_written_over_an_input() {
    let place = Workplace::new();
    class_folders(&place);
    let rows: String = (0..4).map(|index| format!("../data/pale/{index}.png,pale\n")).collect();
    let labels = place.write("out/predictions.csv", format!("path,label\n{rows}"));
    let (before, model) = (fs::read(&labels).unwrap(), place.model(Kind::Classifier));
    evaluate(&place, &labels, &model, &[])
        .code(2)
        .says(&["predictions.csv: is an input, and a result would be written over it"]);
    assert_eq!(fs::read(&labels).unwrap(), before);
    fs::rename(&labels, place.at("out/labels.csv")).unwrap();
    for _ in 0..2 {
        evaluate(&place, &place.at("out/labels.csv"), &model, &[]).code(0);
    }
}

#[test]
fn a_folder_that_takes_no_results_is_found_before_the_work() {
    let place = Workplace::new();
    class_folders(&place);
    place.write("out", "");
    let refused = evaluate(&place, &place.at("data"), &place.model(Kind::Classifier), &[]).code(1);
    assert!(!refused.stderr.contains("predicting"), "{}", refused.stderr);
    refused.says(&["out: can't be written", "is in the way"]);
}

#[cfg(unix)]
#[test]
fn links_to_nothing_are_listed_and_other_files_counted() {
    let place = Workplace::new();
    class_folders(&place);
    std::os::unix::fs::symlink("none", place.at("data/pale/gone.png")).unwrap();
    place.write("data/pale/notes.txt", "");
    evaluate(&place, &place.at("data"), &place.model(Kind::Classifier), &[])
        .code(3)
        .shows(&["8 predicted, 1 not read", "or webp were left out: 1 (1 txt)."])
        .says(&["gone.png: is a link to a file that is not there"]);
    assert_eq!(Json::read(place.at("out/evaluate.json"))["skipped"], serde_json::json!({ "txt": 1 }));
}
