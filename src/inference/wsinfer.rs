//! WSInfer's `config.json` read as a model card.
//!
//! Weights beside it are taken if they are ONNX. The activation is WSInfer's own rule: softmax, or sigmoid where
//! there is one class.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::card::{self, Activation, ModelCard, Task};
use super::error::ModelError;
use crate::geometry::Mpp;

/// The keys that matter; WSInfer's zoo has others, such as `spec_version` and `architecture`.
#[derive(Deserialize)]
struct Config {
    num_classes: usize,
    patch_size_pixels: u32,
    spacing_um_px: f64,
    class_names: Vec<String>,
    transform: Vec<Transform>,
}

#[derive(Deserialize)]
struct Transform {
    name: String,
    arguments: Option<Map<String, Value>>,
}

pub(super) fn card(text: &str, path: &Path) -> Result<ModelCard, ModelError> {
    let config: Config =
        serde_json::from_str(text).map_err(|source| ModelError::Json { path: path.to_owned(), source })?;
    let value = |key: &str, problem: String| ModelError::Value { path: path.to_owned(), key: key.to_owned(), problem };
    if config.num_classes != config.class_names.len() {
        let problem = format!("is {}, but {} class names are given", config.num_classes, config.class_names.len());
        return Err(value("num_classes", problem));
    }
    let mpp = Mpp::new(config.spacing_um_px).map_err(|error| value("spacing_um_px", format!("is {error}")))?;
    let preparation = Preparation::new(&config.transform, path)?;
    let folder = path.parent().unwrap_or(Path::new(""));
    let weights = weights(folder)?;
    let (_, sha256) = card::load_hashed(&weights)?;
    let name =
        path.canonicalize().ok().and_then(|path| Some(path.parent()?.file_name()?.to_string_lossy().into_owned()));
    ModelCard {
        path: path.to_owned(),
        name: name.unwrap_or_else(|| "wsinfer".to_owned()),
        description: String::new(),
        task: Task::Classification,
        tile_size: config.patch_size_pixels,
        mpp,
        mean: preparation.mean,
        std: preparation.std,
        overlap: 0,
        activation: if config.num_classes == 1 { Activation::Sigmoid } else { Activation::Softmax },
        classes: card::classes_of(&config.class_names),
        background: None,
        pool: None,
        register_tokens: 0,
        resize: preparation.resize.filter(|&side| side != config.patch_size_pixels),
        licence: None,
        source: None,
        variants: card::only_variant(&weights, sha256),
        metrics: toml::Table::new(),
    }
    .validate()
}

fn weights(folder: &Path) -> Result<std::path::PathBuf, ModelError> {
    let torch_script = folder.join("torchscript_model.pt");
    let mut files = card::onnx_files(folder)?;
    match files.len() {
        1 => Ok(files.remove(0)),
        0 if torch_script.is_file() => Err(ModelError::TorchScript { path: torch_script }),
        _ => Err(ModelError::NoCard { path: folder.to_owned() }),
    }
}

/// What the transforms do to a tile.
struct Preparation {
    resize: Option<u32>,
    mean: [f32; 3],
    std: [f32; 3],
}

impl Preparation {
    fn new(transforms: &[Transform], path: &Path) -> Result<Self, ModelError> {
        const ORDER: [&str; 3] = ["Resize", "ToTensor", "Normalize"];
        let unknown = |name: String| ModelError::Transform { path: path.to_owned(), name };
        let mut preparation = Self { resize: None, mean: [0.0; 3], std: [1.0; 3] };
        let mut next = 0;
        for Transform { name, arguments } in transforms {
            // Each at most once and in this order: Normalize before ToTensor would mean something else.
            let step = ORDER[next..].iter().position(|known| known == name);
            next += step.ok_or_else(|| unknown(name.clone()))? + 1;
            for (key, argument) in arguments.iter().flatten() {
                let wrong = || unknown(format!("{name} with {key} = {argument}"));
                match (name.as_str(), key.as_str()) {
                    ("Resize", "size") => preparation.resize = Some(side(argument).ok_or_else(wrong)?),
                    ("Resize", "antialias") if argument == &Value::Bool(true) => {}
                    ("Resize", "interpolation") if argument == "bilinear" => {}
                    ("Normalize", "mean") => preparation.mean = triple(argument).ok_or_else(wrong)?,
                    ("Normalize", "std") => preparation.std = triple(argument).ok_or_else(wrong)?,
                    _ => return Err(wrong()),
                }
            }
        }
        match next {
            // Without ToTensor the model would be given bytes.
            0 | 1 => Err(unknown("no ToTensor".to_owned())),
            _ => Ok(preparation),
        }
    }
}

/// `224`, `[224]` or `[224, 224]`.
fn side(argument: &Value) -> Option<u32> {
    let single = |value: &Value| u32::try_from(value.as_u64()?).ok();
    match argument.as_array().map(Vec::as_slice) {
        None => single(argument),
        Some([side]) => single(side),
        Some([height, width]) if height == width => single(height),
        Some(_) => None,
    }
}

fn triple(argument: &Value) -> Option<[f32; 3]> {
    let values = argument.as_array()?.iter().map(|value| {
        #[expect(clippy::cast_possible_truncation, reason = "a mean or deviation of 0 to 1")]
        value.as_f64().map(|value| value as f32)
    });
    values.collect::<Option<Vec<_>>>()?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inference::card::BareModel;
    use crate::onnx::{ElementType, build::Graph};

    const CONFIG: &str = r#"{
        "spec_version": "1.0", "architecture": "resnet34", "num_classes": 2,
        "patch_size_pixels": 350, "spacing_um_px": 0.25, "class_names": ["Other", "Tumor"],
        "transform": [
            {"name": "Resize", "arguments": {"size": 224}},
            {"name": "ToTensor"},
            {"name": "Normalize", "arguments": {"mean": [0.7, 0.6, 0.5], "std": [0.2, 0.25, 0.3]}}
        ]}"#;

    fn load(config: &str, weights: &[&str]) -> Result<ModelCard, ModelError> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("config.json"), config).unwrap();
        let mut graph = Graph::new("any");
        let input = graph.input("x", ElementType::F32, &[1.into()]);
        graph.output("y", &input, ElementType::F32, &[1.into()]);
        for file in weights {
            std::fs::write(folder.path().join(file), graph.clone().finish().to_bytes()).unwrap();
        }
        ModelCard::load(folder.path(), &BareModel::default())
    }

    #[test]
    fn a_configuration_becomes_a_card() {
        let card = load(CONFIG, &["model.onnx", "torchscript_model.pt"]).unwrap();
        assert_eq!((card.task, card.tile_size, card.resize), (Task::Classification, 350, Some(224)));
        assert_eq!((card.mpp.get(), card.mean, card.std), (0.25, [0.7, 0.6, 0.5], [0.2, 0.25, 0.3]));
        assert_eq!(card.activation, Activation::Softmax);
        assert_eq!(card.classes[1].name, "Tumor");
        assert_eq!(card.default_variant().unwrap().sha256.len(), 64);
    }

    #[test]
    fn a_resize_to_the_tile_itself_is_none() {
        let card = load(&CONFIG.replace("{\"size\": 224}", "{\"size\": [350, 350]}"), &["model.onnx"]).unwrap();
        assert_eq!(card.resize, None);
    }

    #[test]
    fn what_is_not_understood_is_named() {
        let cases = [
            ("\"num_classes\": 2", "\"num_classes\": 3", "`num_classes` is 3, but 2 class names"),
            ("\"spacing_um_px\": 0.25,", "", "is no WSInfer configuration"),
            ("{\"size\": 224}", "{\"size\": [224, 112]}", "Resize with size = [224,112]"),
            ("{\"size\": 224}", "{\"size\": 224, \"max_size\": 3}", "Resize with max_size = 3"),
            ("\"ToTensor\"", "\"ColorJitter\"", "`transform` has ColorJitter"),
            ("\"Resize\", \"arguments\": {\"size\": 224}", "\"Normalize\"", "`transform` has ToTensor"),
            ("[0.7, 0.6, 0.5]", "[0.7]", "Normalize with mean = [0.7]"),
            ("[0.2, 0.25, 0.3]", "[51, 64, 77]", "`std` is [51.0, 64.0, 77.0]"),
        ];
        for (from, to, expected) in cases {
            assert!(CONFIG.contains(from), "{from}");
            let error = load(&CONFIG.replacen(from, to, 1), &["model.onnx"]).unwrap_err();
            assert!(error.to_string().contains(expected), "{to}: {error}");
        }
    }

    #[test]
    fn torch_script_weights_point_to_the_converter() {
        let error = load(CONFIG, &["torchscript_model.pt"]).unwrap_err();
        assert!(matches!(error, ModelError::TorchScript { .. }));
        assert!(error.hint().unwrap().contains("models/train/torchscript_to_onnx.py"));
        assert!(matches!(load(CONFIG, &[]).unwrap_err(), ModelError::NoCard { .. }));
    }
}
