//! `card.toml`: reads model cards, and writes those of models that were made here.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::card::{self, Activation, Class, ModelCard, Pool, SCHEMA, Task, Variant};
use super::error::ModelError;
use crate::geometry::{Mpp, Overlap};

impl ModelCard {
    /// The card as the content of a `card.toml`; the variants' files are named without their folder.
    ///
    /// # Errors
    /// [`ModelError::Unwritable`] if a value has no form in TOML, such as a file name that is no text.
    pub fn to_toml(&self) -> Result<String, ModelError> {
        let unwritable = |problem: String| ModelError::Unwritable { path: self.path.clone(), problem };
        let mut variants = BTreeMap::new();
        for (name, variant) in &self.variants {
            let file = variant.file.file_name().and_then(|file| file.to_str());
            let file = file.ok_or_else(|| unwritable(format!("{:?} is no file name in text", variant.file)))?;
            let entry = VariantEntry {
                file: file.to_owned(),
                sha256: variant.sha256.clone(),
                provider: variant.provider.map(|provider| provider.to_string()),
                note: variant.note.clone(),
                options: variant.options.clone(),
            };
            variants.insert(name.clone(), entry);
        }
        let class = |class: &Class| {
            let [red, green, blue] = class.color;
            ClassEntry { name: class.name.clone(), color: format!("#{red:02x}{green:02x}{blue:02x}") }
        };
        let file = CardFile {
            schema: SCHEMA,
            name: self.name.clone(),
            description: self.description.clone(),
            task: self.task,
            tile_size: self.tile_size,
            mpp: self.mpp.get(),
            mean: self.mean.map(shortest),
            std: self.std.map(shortest),
            overlap: (self.overlap > 0).then(|| format!("{}px", self.overlap)),
            activation: Some(self.activation),
            background: self.background.and_then(|index| Some(self.classes.get(index)?.name.clone())),
            pool: self.pool,
            register_tokens: (self.register_tokens > 0).then_some(self.register_tokens),
            resize: self.resize,
            licence: self.licence.clone(),
            source: self.source.clone(),
            classes: self.classes.iter().map(class).collect(),
            variants,
            metrics: self.metrics.clone(),
        };
        toml::to_string(&file).map_err(|error| unwritable(error.to_string()))
    }
}

/// The 64-bit number whose shortest text is that of the 32-bit one: TOML has only 64 bits, and 0.1 should stay 0.1.
fn shortest(value: f32) -> f64 {
    value.to_string().parse().unwrap_or_else(|_| f64::from(value))
}

/// `card.toml` as it is written.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct CardFile {
    schema: u32,
    name: String,
    #[serde(default)]
    description: String,
    task: Task,
    tile_size: u32,
    mpp: f64,
    mean: [f64; 3],
    std: [f64; 3],
    #[serde(skip_serializing_if = "Option::is_none")]
    overlap: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    activation: Option<Activation>,
    #[serde(skip_serializing_if = "Option::is_none")]
    background: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pool: Option<Pool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    register_tokens: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    resize: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    licence: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    source: Option<String>,
    #[serde(default)]
    classes: Vec<ClassEntry>,
    variants: BTreeMap<String, VariantEntry>,
    #[serde(default)]
    metrics: toml::Table,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ClassEntry {
    name: String,
    color: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct VariantEntry {
    file: String,
    sha256: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    provider: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    note: Option<String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    options: BTreeMap<String, String>,
}

/// The card that `text`, the content of the file at `path`, is.
pub(super) fn from_toml(text: &str, path: &Path) -> Result<ModelCard, ModelError> {
    let toml_error = |source| ModelError::Toml { path: path.to_owned(), source };
    let value = |key: &str, problem: String| ModelError::Value { path: path.to_owned(), key: key.to_owned(), problem };
    // Before anything else, so that a card of a later version isn't called wrong for its new keys.
    let table: toml::Table = text.parse().map_err(toml_error)?;
    match table.get("schema").and_then(toml::Value::as_integer) {
        Some(schema) if schema != i64::from(SCHEMA) => {
            return Err(value("schema", format!("is {schema}, but this program reads {SCHEMA}")));
        }
        _ => {}
    }
    let file: CardFile = toml::from_str(text).map_err(toml_error)?;
    debug_assert_eq!(file.schema, SCHEMA);

    let mpp = Mpp::new(file.mpp).map_err(|error| value("mpp", format!("is {error}")))?;
    // One that is no smaller than the tile is reported with the other values, below.
    let overlap = match &file.overlap {
        Some(text) => {
            let overlap: Overlap = text.parse().map_err(|error| value("overlap", format!("is wrong: {error}")))?;
            overlap.in_pixels(file.tile_size)
        }
        None => 0,
    };
    // Files are named after it.
    if file.name.is_empty() || file.name.starts_with('.') || file.name.contains(['/', '\\', '\0']) {
        return Err(value("name", format!("is {:?}, which can't begin the name of a file", file.name)));
    }
    let mut classes = Vec::with_capacity(file.classes.len());
    for ClassEntry { name, color } in file.classes {
        let wrong = || value("classes", format!("gives {name:?} the colour {color:?}, which is not like #e8e8e8"));
        let color = parse_color(&color).ok_or_else(wrong)?;
        classes.push(Class { name, color });
    }
    let background = card::index_of(file.background.as_deref(), &classes, path)?;
    let folder = path.parent().unwrap_or(Path::new(""));
    let variants = file
        .variants
        .into_iter()
        .map(|(name, entry)| Ok((name.clone(), entry.resolve(name, folder, path)?)))
        .collect::<Result<_, ModelError>>()?;
    let activation = match (file.activation, file.task) {
        (Some(activation), _) => activation,
        (None, Task::Features) => Activation::None,
        (None, _) => return Err(value("activation", "is missing: softmax, sigmoid or none".to_owned())),
    };
    ModelCard {
        path: path.to_owned(),
        name: file.name,
        description: file.description,
        task: file.task,
        tile_size: file.tile_size,
        mpp,
        mean: file.mean.map(narrow),
        std: file.std.map(narrow),
        overlap,
        activation,
        classes,
        background,
        pool: file.pool,
        register_tokens: file.register_tokens.unwrap_or(0),
        resize: file.resize,
        licence: file.licence,
        source: file.source,
        variants,
        metrics: file.metrics,
    }
    .validate()
}

#[expect(clippy::cast_possible_truncation, reason = "the precision that models work in")]
fn narrow(value: f64) -> f32 {
    value as f32
}

impl VariantEntry {
    fn resolve(self, name: String, folder: &Path, card: &Path) -> Result<Variant, ModelError> {
        let wrong = |key: &str, problem: String| ModelError::Value {
            path: card.to_owned(),
            key: format!("variants.{name}.{key}"),
            problem,
        };
        let sha256 = self.sha256.to_lowercase();
        if sha256.len() != 64 || !sha256.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(wrong("sha256", format!("is {sha256:?}, not 64 hexadecimal digits")));
        }
        let provider = self.provider.as_deref().map(str::parse).transpose();
        let provider = provider.map_err(|error: String| wrong("provider", format!("is wrong: {error}")))?;
        if self.options.iter().any(|(key, value)| key.is_empty() || key.contains('\0') || value.contains('\0')) {
            return Err(wrong("options", "has an empty key or a NUL character".to_owned()));
        }
        let Self { file, options, note, .. } = self;
        Ok(Variant { file: folder.join(file), sha256, provider, options, note, name })
    }
}

fn parse_color(text: &str) -> Option<[u8; 3]> {
    let digits = text.strip_prefix('#').filter(|digits| digits.len() == 6 && digits.is_ascii())?;
    let part = |at: usize| u8::from_str_radix(&digits[at..at + 2], 16).ok();
    Some([part(0)?, part(2)?, part(4)?])
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::inference::Provider;

    pub(in crate::inference) const CARD: &str = r##"
schema = 1
name = "cells"
description = "cells or not"
task = "segmentation"
tile_size = 256
mpp = 0.5
mean = [0.5, 0.5, 0.5]
std = [0.5, 0.5, 0.5]
overlap = "25%"
activation = "softmax"
background = "background"
licence = "MIT"
source = "here"
classes = [ { name = "background", color = "#e8e8e8" }, { name = "cell", color = "#FF0010" } ]
[variants.fp32]
file = "cells.onnx"
sha256 = "00000000000000000000000000000000000000000000000000000000000000AA"
provider = "cuda"
[variants.fp32.options]
prefer_nhwc = "1"
[metrics]
dice = 0.8
"##;

    pub(in crate::inference) fn parse(text: &str) -> Result<ModelCard, ModelError> {
        from_toml(text, Path::new("m/card.toml"))
    }

    #[test]
    fn every_key_of_a_card_is_read() {
        let card = parse(CARD).unwrap();
        assert_eq!((card.task, card.tile_size, card.mpp.get(), card.overlap), (Task::Segmentation, 256, 0.5, 64));
        assert_eq!(card.background, Some(0));
        assert_eq!(card.classes[1], Class { name: "cell".to_owned(), color: [255, 0, 16] });
        let variant = card.default_variant().unwrap();
        assert_eq!(variant.file, Path::new("m/cells.onnx"));
        assert!(variant.sha256.ends_with("aa"));
        assert_eq!(variant.provider, Some(Provider::Cuda));
        assert_eq!(variant.options["prefer_nhwc"], "1");
        assert_eq!(card.metrics["dice"].as_float(), Some(0.8));
    }

    #[test]
    fn a_wrong_card_is_told_file_and_key() {
        let features = "task = \"features\"";
        let cases = [
            ("schema = 1", "schema = 2", "m/card.toml: `schema` is 2, but this program reads 1"),
            ("name = \"cells\"", "nome = \"cells\"", "unknown field `nome`"),
            ("tile_size = 256", "", "missing field `tile_size`"),
            ("tile_size = 256", "tile_size = 0", "`tile_size` is 0, not 1 to 16384 pixels"),
            ("tile_size = 256", "tile_size = 99999", "`tile_size` is 99999, not"),
            ("mpp = 0.5", "mpp = 0.0", "`mpp` is \"0\" is no resolution"),
            ("mean = [0.5, 0.5, 0.5]", "mean = [127, 127, 127]", "`mean` is [127.0, 127.0, 127.0], but is of RGB/255"),
            ("std = [0.5, 0.5, 0.5]", "std = [0.5, 0.0, 0.5]", "`std` is"),
            ("std = [0.5, 0.5, 0.5]", "std = [0.5, nan, 0.5]", "`std` is"),
            ("mean = [0.5, 0.5, 0.5]", "mean = [0.5, 0.5]", "invalid length 2"),
            ("\"25%\"", "\"256px\"", "`overlap` is 256 px, not less than the tile's 256"),
            ("\"25%\"", "\"100%\"", "is no overlap"),
            ("\"softmax\"", "\"tanh\"", "unknown variant `tanh`"),
            ("activation = \"softmax\"", "", "`activation` is missing"),
            ("background = \"background\"", "background = \"glass\"", "`background` is \"glass\", which is not one"),
            ("#e8e8e8", "grey", "`classes` gives \"background\" the colour \"grey\""),
            ("#e8e8e8", "#é8e8", "the colour \"#é8e8\""),
            ("name = \"cell\"", "name = \"background\"", "`classes` names \"background\" twice"),
            ("name = \"cell\"", "name = \" \"", "`classes` has no name for class 1"),
            ("task = \"segmentation\"", features, "`classes` are named, but features have none"),
            ("licence = \"MIT\"", "pool = \"cls\"", "`pool` is for features, not for segmentation"),
            ("licence = \"MIT\"", "resize = 224", "`resize` would change the size of the map"),
            ("sha256 = \"00", "sha256 = \"0x", "`variants.fp32.sha256` is"),
            ("provider = \"cuda\"", "provider = \"cudda\"", "`variants.fp32.provider` is wrong"),
            ("prefer_nhwc = \"1\"", "prefer_nhwc = 1", "expected a string"),
        ];
        for (from, to, expected) in cases {
            assert!(CARD.contains(from), "{from}");
            let error = parse(&CARD.replacen(from, to, 1)).unwrap_err();
            let text =
                format!("{error}: {}", std::error::Error::source(&error).map_or(String::new(), |s| s.to_string()));
            assert!(text.contains(expected), "{to}: {text}");
            assert!(text.contains("m/card.toml"), "{text}");
        }
    }

    #[test]
    fn one_class_needs_sigmoid() {
        let one = CARD.replace(", { name = \"cell\", color = \"#FF0010\" }", "");
        assert!(parse(&one).unwrap_err().to_string().contains("sigmoid is meant"));
        assert_eq!(parse(&one.replace("softmax", "sigmoid")).unwrap().classes.len(), 1);
    }

    #[test]
    fn a_written_card_reads_the_same() {
        let card = parse(CARD).unwrap();
        let text = card.to_toml().unwrap();
        assert_eq!(parse(&text).unwrap(), card, "{text}");
        assert!(text.contains("mean = [0.5, 0.5, 0.5]"), "{text}");
    }
}
