//! The model card: what a model expects and what its outputs mean.
//!
//! A card comes from `card.toml`, from WSInfer's `config.json`, or from a bare `.onnx` file and
//! settings ([`BareModel`]). However it came, it has been checked: no value in it is out of range.
//! [`ModelCard::check`] then holds it against the model's graph.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::device::Provider;
use super::error::ModelError;
use super::{bare, card_file, wsinfer};
use crate::geometry::Mpp;
use crate::onnx::Model;

/// The version of the card's schema that is read.
pub const SCHEMA: u32 = 1;

/// Larger tiles are taken for a typing error.
const MAX_TILE_SIZE: u32 = 16_384;

/// What a model predicts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Task {
    /// One score per class and tile.
    Classification,
    /// One score per class and pixel.
    Segmentation,
    /// A vector per tile.
    Features,
}

impl fmt::Display for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Classification => "classification",
            Self::Segmentation => "segmentation",
            Self::Features => "features",
        })
    }
}

impl FromStr for Task {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        [Self::Classification, Self::Segmentation, Self::Features]
            .into_iter()
            .find(|task| task.to_string() == text)
            .ok_or_else(|| format!("{text:?} is none of classification, segmentation, features"))
    }
}

/// What turns the model's raw outputs into probabilities.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Activation {
    /// Classes exclude each other: their scores sum to 1.
    Softmax,
    /// Each class stands alone; also for a single class, whose one output is its logit.
    Sigmoid,
    /// The outputs are taken as they are.
    None,
}

impl fmt::Display for Activation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Softmax => "softmax",
            Self::Sigmoid => "sigmoid",
            Self::None => "none",
        })
    }
}

impl FromStr for Activation {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        [Self::Softmax, Self::Sigmoid, Self::None]
            .into_iter()
            .find(|activation| activation.to_string() == text)
            .ok_or_else(|| format!("{text:?} is none of softmax, sigmoid, none"))
    }
}

/// How the tokens `[t, d]` of a vision transformer become one vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Pool {
    /// The first token: `[d]`.
    #[serde(rename = "cls")]
    Cls,
    /// The mean of the patch tokens, without the class token and the register tokens: `[d]`.
    #[serde(rename = "mean")]
    Mean,
    /// Both, one after the other: `[2 d]`.
    #[serde(rename = "cls+mean")]
    ClsAndMean,
}

impl fmt::Display for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cls => "cls",
            Self::Mean => "mean",
            Self::ClsAndMean => "cls+mean",
        })
    }
}

impl FromStr for Pool {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        [Self::Cls, Self::Mean, Self::ClsAndMean]
            .into_iter()
            .find(|pool| pool.to_string() == text)
            .ok_or_else(|| format!("{text:?} is none of cls, mean, cls+mean"))
    }
}

/// A class that a model tells apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Class {
    /// Its name; no two classes of a model share one.
    pub name: String,
    /// Its colour, RGB.
    pub color: [u8; 3],
}

/// One file of a model: the same weights at some precision, for some provider.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Variant {
    /// Its name in the card, such as `fp32`.
    pub name: String,
    /// The `.onnx` file.
    pub file: PathBuf,
    /// Hash of the file, lower-case hexadecimal. Where weights lie in further files, of the file followed by those in
    /// the order in which the graph names them.
    pub sha256: String,
    /// The provider that it is best on.
    pub provider: Option<Provider>,
    /// Options that go with that provider.
    pub options: BTreeMap<String, String>,
    /// What its maker says of it: what it needs, what it was measured to be; shown, not interpreted.
    pub note: Option<String>,
}

impl Variant {
    /// A variant of that name in a file that is there, for any provider.
    ///
    /// # Errors
    /// [`ModelError`] if the file can't be read.
    pub fn of_file(name: &str, file: &Path) -> Result<Self, ModelError> {
        let (_, sha256) = load_hashed(file)?;
        let (name, file, options) = (name.to_owned(), file.to_owned(), BTreeMap::new());
        Ok(Self { name, file, sha256, provider: None, options, note: None })
    }

    /// Reads the model and makes sure that it is the one that the card was written for.
    ///
    /// # Errors
    /// [`ModelError::Changed`] if the hash differs, else why the file can't be read.
    pub fn load(&self) -> Result<Model, ModelError> {
        let (model, actual) = load_hashed(&self.file)?;
        if actual != self.sha256 {
            return Err(ModelError::Changed { path: self.file.clone(), expected: self.sha256.clone(), actual });
        }
        Ok(model)
    }
}

/// What a model expects and what its outputs mean.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelCard {
    /// The file that the card came from.
    pub path: PathBuf,
    /// The model's name.
    pub name: String,
    /// One sentence about it.
    pub description: String,
    /// What it predicts.
    pub task: Task,
    /// Side of a tile in pixels at [`Self::mpp`].
    pub tile_size: u32,
    /// The resolution that the model was trained at.
    pub mpp: Mpp,
    /// Per RGB channel, of values in 0 to 1; what the model sees is `(rgb / 255 - mean) / std`.
    pub mean: [f32; 3],
    /// Per RGB channel, of values in 0 to 1; greater than 0.
    pub std: [f32; 3],
    /// Pixels by which neighbouring tiles overlap; less than [`Self::tile_size`].
    pub overlap: u32,
    /// What turns outputs into probabilities.
    pub activation: Activation,
    /// The classes in the order of the outputs; empty for features.
    pub classes: Vec<Class>,
    /// Index of the class that is not drawn.
    pub background: Option<usize>,
    /// How tokens become one vector; `None` if the model gives one vector.
    pub pool: Option<Pool>,
    /// Tokens after the class token that the mean leaves out.
    pub register_tokens: usize,
    /// The side to which a tile is resized before the model sees it; `None` if not at all.
    pub resize: Option<u32>,
    /// Under which terms the weights may be used.
    pub licence: Option<String>,
    /// Where the weights come from.
    pub source: Option<String>,
    /// The model's files, by name.
    pub variants: BTreeMap<String, Variant>,
    /// What was measured of it; shown, not interpreted.
    pub metrics: toml::Table,
}

/// Settings for a model without a card; `None` is taken from the graph where it tells.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BareModel {
    /// What the model predicts.
    pub task: Option<Task>,
    /// Side of a tile in pixels.
    pub tile_size: Option<u32>,
    /// The resolution that the model was trained at. With a card it overrides nothing here: the caller reads its
    /// resolution from the card or its own setting.
    pub target_mpp: Option<Mpp>,
    /// The classes in the order of the outputs.
    pub class_names: Option<Vec<String>>,
    /// Per channel, of values in 0 to 1.
    pub mean: Option<[f32; 3]>,
    /// Per channel, of values in 0 to 1.
    pub std: Option<[f32; 3]>,
    /// What turns outputs into probabilities.
    pub activation: Option<Activation>,
    /// How tokens become one vector.
    pub pool: Option<Pool>,
    /// Tokens after the class token that the mean leaves out; 0 if not given.
    pub register_tokens: Option<usize>,
    /// The side to which a tile is resized before the model sees it.
    pub resize: Option<u32>,
    /// The class that is not drawn.
    pub background: Option<String>,
}

impl BareModel {
    /// The settings that were given and that a card has itself.
    fn given(&self) -> Vec<&'static str> {
        [
            ("task", self.task.is_some()),
            ("tile_size", self.tile_size.is_some()),
            ("class_names", self.class_names.is_some()),
            ("mean", self.mean.is_some()),
            ("std", self.std.is_some()),
            ("activation", self.activation.is_some()),
            ("pool", self.pool.is_some()),
            ("register_tokens", self.register_tokens.is_some()),
            ("resize", self.resize.is_some()),
            ("background", self.background.is_some()),
        ]
        .into_iter()
        .filter_map(|(name, is_given)| is_given.then_some(name))
        .collect()
    }
}

impl ModelCard {
    /// Reads the card at `path`: a folder that holds one, a `card.toml`, a WSInfer `config.json`, or an `.onnx` file
    /// described by `bare`.
    ///
    /// # Errors
    /// [`ModelError`], with the file and the key.
    pub fn load(path: &Path, bare: &BareModel) -> Result<Self, ModelError> {
        let file = if path.is_dir() { find_in(path)? } else { path.to_owned() };
        if file.extension().is_some_and(|extension| extension == "onnx") {
            return bare::card(&file, bare);
        }
        let settings = bare.given();
        if !settings.is_empty() {
            return Err(ModelError::AlreadySet { path: file, settings });
        }
        let text = read_text(&file)?;
        if file.extension().is_some_and(|extension| extension == "json") {
            wsinfer::card(&text, &file)
        } else {
            card_file::from_toml(&text, &file)
        }
    }

    /// The classes' names in the order of the outputs.
    #[must_use]
    pub fn class_names(&self) -> Vec<String> {
        self.classes.iter().map(|class| class.name.clone()).collect()
    }

    /// The variant called `name`.
    ///
    /// # Errors
    /// [`ModelError::UnknownVariant`] with those there are.
    pub fn variant(&self, name: &str) -> Result<&Variant, ModelError> {
        self.variants.get(name).ok_or_else(|| ModelError::UnknownVariant {
            path: self.path.clone(),
            name: name.to_owned(),
            known: self.variants.keys().cloned().collect(),
        })
    }

    /// Whether a place has just one of the classes: not with one output alone, nor with a sigmoid for each, where it may be
    /// of none.
    #[must_use]
    pub fn is_exclusive(&self) -> bool {
        self.activation != Activation::Sigmoid && self.classes.len() > 1
    }

    /// The variant to take where none is named: `fp32`, or the only one.
    ///
    /// # Errors
    /// [`ModelError::UnknownVariant`] if there are several and none is `fp32`.
    pub fn default_variant(&self) -> Result<&Variant, ModelError> {
        match self.variants.values().next() {
            Some(only) if self.variants.len() == 1 => Ok(only),
            _ => self.variant("fp32"),
        }
    }

    /// The side of the image that the model sees, in pixels.
    #[must_use]
    pub fn input_side(&self) -> u32 {
        self.resize.unwrap_or(self.tile_size)
    }

    /// Checks what can be checked without the model.
    pub(super) fn validate(self) -> Result<Self, ModelError> {
        let wrong = |key: &str, problem: String| {
            Err(ModelError::Value { path: self.path.clone(), key: key.to_owned(), problem })
        };
        for (key, side) in [("tile_size", Some(self.tile_size)), ("resize", self.resize)] {
            if side.is_some_and(|side| !(1..=MAX_TILE_SIZE).contains(&side)) {
                return wrong(key, format!("is {}, not 1 to {MAX_TILE_SIZE} pixels", side.unwrap_or(0)));
            }
        }
        if self.mean.iter().any(|mean| !(0.0..=1.0).contains(mean)) {
            return wrong("mean", format!("is {:?}, but is of RGB/255: 0 to 1", self.mean));
        }
        if self.std.iter().any(|&std| !(std > 0.0 && std <= 1.0)) {
            return wrong("std", format!("is {:?}, but is of RGB/255: above 0, up to 1", self.std));
        }
        if self.variants.is_empty() {
            return wrong("variants", "is empty".to_owned());
        }
        if self.overlap >= self.tile_size {
            return wrong("overlap", format!("is {} px, not less than the tile's {}", self.overlap, self.tile_size));
        }
        match self.task {
            Task::Features => self.validate_features(),
            Task::Classification | Task::Segmentation => self.validate_classes(),
        }?;
        Ok(self)
    }

    fn validate_features(&self) -> Result<(), ModelError> {
        if !self.classes.is_empty() {
            return self.wrong("classes", "are named, but features have none");
        }
        if self.activation != Activation::None {
            return self.wrong("activation", "must be none for features");
        }
        if self.register_tokens > 0 && self.pool.is_none() {
            return self.wrong("register_tokens", "is set without `pool`");
        }
        Ok(())
    }

    fn validate_classes(&self) -> Result<(), ModelError> {
        if self.classes.is_empty() {
            return self.wrong("classes", &format!("is empty, but {} needs classes", self.task));
        }
        for (index, class) in self.classes.iter().enumerate() {
            if class.name.trim().is_empty() {
                return self.wrong("classes", &format!("has no name for class {index}"));
            }
            if self.classes[..index].iter().any(|other| other.name == class.name) {
                return self.wrong("classes", &format!("names {:?} twice", class.name));
            }
        }
        if self.classes.len() == 1 && self.activation == Activation::Softmax {
            return self.wrong("activation", "is softmax over one class, which is always 1; sigmoid is meant");
        }
        if self.pool.is_some() || self.register_tokens > 0 {
            return self.wrong("pool", &format!("is for features, not for {}", self.task));
        }
        if self.task == Task::Segmentation && self.resize.is_some() {
            return self.wrong("resize", "would change the size of the map; set `tile_size` and `mpp` instead");
        }
        Ok(())
    }

    fn wrong(&self, key: &str, problem: &str) -> Result<(), ModelError> {
        Err(ModelError::Value { path: self.path.clone(), key: key.to_owned(), problem: problem.to_owned() })
    }
}

/// Reads a model file and its hash (see [`Variant::sha256`]).
pub(super) fn load_hashed(path: &Path) -> Result<(Model, String), ModelError> {
    let read = |path: &Path| std::fs::read(path).map_err(|source| ModelError::Read { path: path.to_owned(), source });
    let bytes = read(path)?;
    let model = Model::from_bytes(&bytes, path)?;
    let mut hash = Sha256::new();
    hash.update(&bytes);
    for file in model.weight_files(path)? {
        hash.update(read(&file)?);
    }
    let hash = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok((model, hash))
}

/// The one variant of a model that has no card of ours.
pub(super) fn only_variant(file: &Path, sha256: String) -> BTreeMap<String, Variant> {
    let name = "fp32".to_owned();
    let variant = Variant {
        name: name.clone(),
        file: file.to_owned(),
        sha256,
        provider: None,
        options: BTreeMap::new(),
        note: None,
    };
    BTreeMap::from([(name, variant)])
}

/// Classes without colours of their own: Okabe and Ito's palette, which colour-blind readers tell apart.
pub(super) fn classes_of(names: &[String]) -> Vec<Class> {
    const PALETTE: [[u8; 3]; 8] = [
        [230, 159, 0],
        [86, 180, 233],
        [0, 158, 115],
        [240, 228, 66],
        [0, 114, 178],
        [213, 94, 0],
        [204, 121, 167],
        [120, 120, 120],
    ];
    let class = |(name, color): (&String, &[u8; 3])| Class { name: name.clone(), color: *color };
    names.iter().zip(PALETTE.iter().cycle()).map(class).collect()
}

fn find_in(folder: &Path) -> Result<PathBuf, ModelError> {
    for name in ["card.toml", "config.json"] {
        let file = folder.join(name);
        if file.is_file() {
            return Ok(file);
        }
    }
    match &onnx_files(folder)?[..] {
        [only] => Ok(only.clone()),
        _ => Err(ModelError::NoCard { path: folder.to_owned() }),
    }
}

/// The `.onnx` files of a folder, by name.
pub(super) fn onnx_files(folder: &Path) -> Result<Vec<PathBuf>, ModelError> {
    let entries = std::fs::read_dir(folder).map_err(|source| ModelError::Read { path: folder.to_owned(), source })?;
    let mut files: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    files.retain(|file| file.extension().is_some_and(|extension| extension == "onnx"));
    files.sort();
    Ok(files)
}

fn read_text(path: &Path) -> Result<String, ModelError> {
    std::fs::read_to_string(path).map_err(|source| match source.kind() {
        std::io::ErrorKind::InvalidData => ModelError::NoText { path: path.to_owned() },
        _ => ModelError::Read { path: path.to_owned(), source },
    })
}

/// The position of the class that is not drawn.
pub(super) fn index_of(name: Option<&str>, classes: &[Class], path: &Path) -> Result<Option<usize>, ModelError> {
    let Some(name) = name else { return Ok(None) };
    match classes.iter().position(|class| class.name == name) {
        Some(index) => Ok(Some(index)),
        None => Err(ModelError::Value {
            path: path.to_owned(),
            key: "background".to_owned(),
            problem: format!("is {name:?}, which is not one of the classes"),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inference::card_file::tests::{CARD, parse};

    #[test]
    fn an_unknown_variant_lists_those_there_are() {
        let error = parse(CARD).unwrap().variant("int8").unwrap_err();
        assert_eq!(error.to_string(), "m/card.toml: has no variant \"int8\"; it has fp32");
    }

    #[test]
    fn settings_beside_a_card_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("card.toml"), CARD).unwrap();
        let bare = BareModel { tile_size: Some(1), mean: Some([0.5; 3]), ..BareModel::default() };
        let error = ModelCard::load(folder.path(), &bare).unwrap_err();
        assert!(error.to_string().ends_with("has its own tile_size, mean, which can't be set as well"), "{error}");
        assert!(ModelCard::load(folder.path(), &BareModel::default()).is_ok());
    }

    #[test]
    fn a_folder_without_a_card_and_a_missing_file_say_so() {
        let folder = tempfile::tempdir().unwrap();
        let load = |path: &Path| ModelCard::load(path, &BareModel::default()).unwrap_err();
        assert!(matches!(load(folder.path()), ModelError::NoCard { .. }));
        assert!(matches!(load(&folder.path().join("card.toml")), ModelError::Read { .. }));
        std::fs::write(folder.path().join("a.png"), [0x89, b'P']).unwrap();
        let told = load(&folder.path().join("a.png")).to_string();
        assert!(told.ends_with("a.png: is neither a model's card nor an .onnx file"), "{told}");
    }

    #[test]
    fn committed_cards_load_and_agree_with_their_models() {
        let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("models");
        for folder in std::fs::read_dir(models).into_iter().flatten().flatten() {
            if !folder.path().join("card.toml").exists() {
                continue;
            }
            let card = ModelCard::load(&folder.path(), &BareModel::default()).unwrap();
            for variant in card.variants.values() {
                card.check(&variant.load().unwrap(), &variant.file).unwrap();
            }
        }
    }
}
