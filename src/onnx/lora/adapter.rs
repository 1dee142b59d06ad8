//! A LoRA adapter as PEFT saves it: `adapter_config.json` and `adapter_model.safetensors`, checked and read.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use safetensors::tensor::{Dtype, TensorView};
use safetensors::{SafeTensorError, SafeTensors};
use serde_json::{Map, Value};

/// The files' names in an adapter's folder.
const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";

/// An adapter that can't be read, or that is more than LoRA.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AdapterError {
    /// A file can't be read.
    #[error("{}: can't be read", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The configuration is not what PEFT writes.
    #[error("{}: is no configuration of a LoRA adapter", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        source: serde_json::Error,
    },
    /// The weights are no safetensors file.
    #[error("{}: is no safetensors file", path.display())]
    Weights {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: SafeTensorError,
    },
    /// The adapter does more than add a product of two matrices to weights as they are.
    #[error("{}: {setting} is {value}, which can't be merged", path.display())]
    Unsupported {
        /// The configuration.
        path: PathBuf,
        /// The setting.
        setting: String,
        /// Its value, in JSON.
        value: String,
    },
    /// There are no tensors.
    #[error("{}: holds no tensors", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// A tensor is none that LoRA has for a linear layer.
    #[error("{}: tensor {name:?} {why}", path.display())]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// What is wrong with it.
        why: String,
    },
    /// The two matrices of a module don't fit each other or the configuration.
    #[error(
        "{}: module {module:?} has lora_A of dimensions {a:?} and lora_B of {b:?}, not of one rank r = {rank}",
        path.display()
    )]
    Rank {
        /// The file.
        path: PathBuf,
        /// The module.
        module: String,
        /// Dimensions of `lora_A`, which should be `[r, in]`; empty if it is missing.
        a: Vec<usize>,
        /// Dimensions of `lora_B`, which should be `[out, r]`; empty if it is missing.
        b: Vec<usize>,
        /// The rank that is configured.
        rank: usize,
    },
}

impl AdapterError {
    /// How to put it right.
    #[must_use]
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Read { .. } => {
                Some("give the folder that save_pretrained() of PEFT writes, with safe_serialization on")
            }
            Self::Unsupported { .. } => Some("merge it in Python (merge_and_unload() of PEFT) and export the result"),
            _ => None,
        }
    }
}

/// What an adapter adds to the weights of one linear layer: scale · B · A (Hu et al. 2021).
#[derive(Clone, Debug, PartialEq)]
pub struct Update {
    /// The rank r.
    pub rank: usize,
    /// The layer's number of inputs.
    pub inputs: usize,
    /// The layer's number of outputs.
    pub outputs: usize,
    /// A, `[rank, inputs]` in row-major order.
    pub a: Vec<f32>,
    /// B, `[outputs, rank]` in row-major order.
    pub b: Vec<f32>,
    /// α / r, or α / √r where the adapter is rank-stabilised.
    pub scale: f32,
}

/// A LoRA adapter of linear layers.
#[derive(Clone, Debug, PartialEq)]
pub struct Adapter {
    /// What it adds, by the name of the module in the network.
    pub updates: BTreeMap<String, Update>,
}

/// The settings that decide what is added. The modules are those that have tensors; how a layer stores its weights
/// (`fan_in_fan_out`) is read off the model.
#[derive(serde::Deserialize)]
struct Config {
    peft_type: Value,
    r: usize,
    lora_alpha: f32,
    #[serde(default)]
    use_rslora: bool,
    #[serde(default)]
    rank_pattern: Option<Map<String, Value>>,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

/// Settings that change what an adapter computes, each with the values that change nothing.
fn is_plain(setting: &str, value: &Value) -> bool {
    let is_off = match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(values) => values.is_empty(),
        Value::Object(values) => values.is_empty(),
        _ => false,
    };
    match setting {
        "peft_type" => value == "LORA",
        "bias" => value == "none",
        // Others subtract something from the weights when training begins.
        "init_lora_weights" => is_off || *value == true || matches!(value.as_str(), Some("gaussian" | "eva")),
        "use_dora"
        | "use_qalora"
        | "use_bdlora"
        | "lora_bias"
        | "modules_to_save"
        | "alpha_pattern"
        | "layer_replication"
        | "alora_invocation_tokens"
        | "arrow_config"
        | "kasa_config"
        | "monteclora_config"
        | "target_parameters"
        | "trainable_token_indices" => is_off,
        _ => true,
    }
}

impl Adapter {
    /// Reads the adapter in the folder `path`, or whose weights are the file `path`.
    ///
    /// # Errors
    /// [`AdapterError`] if a file can't be read, or holds something that can't be merged into a linear layer.
    pub fn load(path: &Path) -> Result<Self, AdapterError> {
        let weights = if path.is_dir() { path.join(WEIGHTS) } else { path.to_owned() };
        let config = weights.with_file_name(CONFIG);
        let read =
            |path: &Path| std::fs::read(path).map_err(|source| AdapterError::Read { path: path.to_owned(), source });
        let settings = Config::parse(&read(&config)?, &config)?;
        let bytes = read(&weights)?;
        let tensors = SafeTensors::deserialize(&bytes)
            .map_err(|source| AdapterError::Weights { path: weights.clone(), source })?;
        if tensors.is_empty() {
            return Err(AdapterError::Empty { path: weights });
        }
        Self::from_tensors(&settings, &tensors, &weights)
    }

    fn from_tensors(settings: &Config, tensors: &SafeTensors<'_>, path: &Path) -> Result<Self, AdapterError> {
        let mut sides: BTreeMap<String, [Option<Matrix>; 2]> = BTreeMap::new();
        for (name, tensor) in tensors.tensors() {
            let refuse = |why: String| AdapterError::Tensor { path: path.to_owned(), name: name.clone(), why };
            let (module, side) = place(&name).ok_or_else(|| refuse("is no lora_A or lora_B".to_owned()))?;
            let matrix = Matrix::new(&tensor).map_err(refuse)?;
            sides.entry(module.to_owned()).or_default()[side] = Some(matrix);
        }
        let updates = sides.into_iter().map(|(module, sides)| {
            let update = settings.update(&sides).ok_or_else(|| {
                let [a, b] = sides.map(|side| side.map_or_else(Vec::new, |side| side.dims.to_vec()));
                AdapterError::Rank { path: path.to_owned(), module: module.clone(), a, b, rank: settings.r }
            })?;
            Ok((module, update))
        });
        Ok(Self { updates: updates.collect::<Result<_, _>>()? })
    }
}

impl Config {
    fn parse(bytes: &[u8], path: &Path) -> Result<Self, AdapterError> {
        let parsed = serde_json::from_slice(bytes);
        let config: Self = parsed.map_err(|source| AdapterError::Config { path: path.to_owned(), source })?;
        let mut settings = config.rest.iter().map(|(name, value)| (name.as_str(), value));
        let unsupported = [("peft_type", &config.peft_type)].into_iter().chain(&mut settings);
        if let Some((setting, value)) = { unsupported }.find(|(name, value)| !is_plain(name, value)) {
            let (setting, value) = (setting.to_owned(), value.to_string());
            return Err(AdapterError::Unsupported { path: path.to_owned(), setting, value });
        }
        Ok(config)
    }

    /// The update that A and B make; `None` if one is missing or they don't fit.
    fn update(&self, sides: &[Option<Matrix>; 2]) -> Option<Update> {
        let [Some(a), Some(b)] = sides else { return None };
        let ([rank, inputs], [outputs, columns]) = (a.dims, b.dims);
        // A pattern gives modules ranks of their own.
        let is_configured = rank == self.r || self.rank_pattern.as_ref().is_some_and(|pattern| !pattern.is_empty());
        if rank != columns || rank == 0 || !is_configured {
            return None;
        }
        #[expect(clippy::cast_precision_loss, reason = "ranks are small")]
        let divisor = if self.use_rslora { (rank as f32).sqrt() } else { rank as f32 };
        let scale = self.lora_alpha / divisor;
        Some(Update { rank, inputs, outputs, a: a.values.clone(), b: b.values.clone(), scale })
    }
}

/// The module that a tensor belongs to, and 0 for A, 1 for B.
fn place(name: &str) -> Option<(&str, usize)> {
    let name = name.strip_prefix("base_model.model.").unwrap_or(name);
    [".lora_A.weight", ".lora_B.weight"]
        .iter()
        .enumerate()
        .find_map(|(side, end)| Some((name.strip_suffix(end)?, side)))
}

struct Matrix {
    dims: [usize; 2],
    values: Vec<f32>,
}

impl Matrix {
    fn new(tensor: &TensorView<'_>) -> Result<Self, String> {
        let dims = tensor.shape().try_into();
        let dims = dims.map_err(|_| format!("has dimensions {:?}: not of a linear layer", tensor.shape()))?;
        let values = match tensor.dtype() {
            Dtype::F32 => floats(tensor, f32::from_le_bytes),
            Dtype::F16 => floats(tensor, |bytes| f16::from_le_bytes(bytes).to_f32()),
            Dtype::BF16 => floats(tensor, |bytes| bf16::from_le_bytes(bytes).to_f32()),
            other => return Err(format!("is of type {other:?}, not of 32-bit or 16-bit floats")),
        };
        Ok(Self { dims, values })
    }
}

fn floats<const N: usize>(tensor: &TensorView<'_>, read: impl Fn([u8; N]) -> f32) -> Vec<f32> {
    tensor.data().as_chunks::<N>().0.iter().map(|bytes| read(*bytes)).collect()
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::super::passes::fixtures;
    use super::*;

    /// A folder with an adapter of these tensors and settings.
    pub(in super::super) fn saved(
        tensors: &[(&str, &[usize], Vec<f32>)],
        settings: &[(&str, Value)],
    ) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let bytes: Vec<Vec<u8>> = tensors
            .iter()
            .map(|(_, _, values)| values.iter().flat_map(|value| value.to_le_bytes()).collect())
            .collect();
        let views = tensors
            .iter()
            .zip(&bytes)
            .map(|((name, dims, _), bytes)| (*name, TensorView::new(Dtype::F32, dims.to_vec(), bytes).unwrap()));
        let bytes = safetensors::serialize(views, None).unwrap();
        std::fs::write(folder.path().join(WEIGHTS), bytes).unwrap();
        let mut config = serde_json::json!({"peft_type": "LORA", "r": 2, "lora_alpha": 8});
        settings.iter().for_each(|(name, value)| config[name] = value.clone());
        std::fs::write(folder.path().join(CONFIG), config.to_string()).unwrap();
        folder
    }

    fn pair(a: [usize; 2], b: [usize; 2]) -> [(&'static str, Vec<usize>, Vec<f32>); 2] {
        let values = |dims: [usize; 2]| (0..dims[0] * dims[1]).map(|i| i as f32).collect();
        [
            ("base_model.model.fc.lora_A.weight", a.to_vec(), values(a)),
            ("base_model.model.fc.lora_B.weight", b.to_vec(), values(b)),
        ]
    }

    fn load(tensors: &[(&str, Vec<usize>, Vec<f32>)], settings: &[(&str, Value)]) -> Result<Adapter, AdapterError> {
        let tensors: Vec<_> = tensors.iter().map(|(name, dims, values)| (*name, &dims[..], values.clone())).collect();
        Adapter::load(saved(&tensors, settings).path())
    }

    #[test]
    fn what_peft_saves_is_read() {
        let folder = fixtures::path("lora");
        let adapter = Adapter::load(&folder).unwrap();
        let modules: Vec<&str> = adapter.updates.keys().map(String::as_str).collect();
        assert_eq!(modules[..2], ["blocks.0.attn.proj", "blocks.0.attn.qkv"]);
        assert_eq!(modules.len(), 8);
        let qkv = &adapter.updates["blocks.0.attn.qkv"];
        assert_eq!((qkv.rank, qkv.inputs, qkv.outputs, qkv.scale), (4, 16, 48, 2.0));
        assert_eq!((qkv.a.len(), qkv.b.len()), (64, 192));
        assert_eq!(Adapter::load(&folder.join(WEIGHTS)).unwrap(), adapter);
    }

    #[test]
    fn the_scale_is_as_configured() {
        let scale = |settings: &[(&str, Value)]| load(&pair([2, 3], [4, 2]), settings).unwrap().updates["fc"].scale;
        assert_eq!(scale(&[]), 4.0);
        assert_eq!(scale(&[("use_rslora", true.into())]), 8.0 / 2.0_f32.sqrt());
        let pattern = serde_json::json!({"fc": 2});
        assert_eq!(scale(&[("r", 16.into()), ("rank_pattern", pattern)]), 4.0);
    }

    #[test]
    fn what_is_more_than_lora_is_refused() {
        let cases: [(&str, Value); 6] = [
            ("peft_type", "LOHA".into()),
            ("use_dora", true.into()),
            ("bias", "all".into()),
            ("init_lora_weights", "pissa".into()),
            ("modules_to_save", serde_json::json!(["head"])),
            ("alpha_pattern", serde_json::json!({"fc": 3})),
        ];
        for (name, value) in cases {
            let error = load(&pair([2, 3], [4, 2]), &[(name, value.clone())]).unwrap_err();
            assert!(error.to_string().ends_with(&format!("{name} is {value}, which can't be merged")), "{error}");
            assert!(error.hint().is_some());
        }
        let harmless = [("bias", "none".into()), ("use_dora", false.into()), ("modules_to_save", Value::Null)];
        load(&pair([2, 3], [4, 2]), &harmless).unwrap();
    }

    #[test]
    fn tensors_that_do_not_fit_are_named() {
        let [a, b] = pair([2, 3], [4, 3]);
        let error = load(&[a.clone(), b], &[]).unwrap_err().to_string();
        assert!(error.contains("module \"fc\" has lora_A of dimensions [2, 3] and lora_B of [4, 3]"), "{error}");
        let error = load(std::slice::from_ref(&a), &[]).unwrap_err().to_string();
        assert!(error.contains("lora_B of []"), "{error}");
        assert!(matches!(load(&[], &[]), Err(AdapterError::Empty { .. })));
        let magnitude = ("base_model.model.fc.lora_magnitude_vector", vec![4], vec![0.0; 4]);
        let error = load(&[a, magnitude], &[]).unwrap_err().to_string();
        assert!(error.ends_with("lora_magnitude_vector\" is no lora_A or lora_B"), "{error}");
        let convolution = ("base_model.model.stem.lora_A.weight", vec![2, 3, 1, 1], vec![0.0; 6]);
        let error = load(&[convolution], &[]).unwrap_err().to_string();
        assert!(error.ends_with("has dimensions [2, 3, 1, 1]: not of a linear layer"), "{error}");
    }

    #[test]
    fn a_missing_or_wrong_file_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let error = Adapter::load(folder.path()).unwrap_err();
        assert!(error.to_string().ends_with("adapter_config.json: can't be read"), "{error}");
        std::fs::write(folder.path().join(CONFIG), "{}").unwrap();
        assert!(matches!(Adapter::load(folder.path()), Err(AdapterError::Config { .. })));
        std::fs::write(folder.path().join(CONFIG), r#"{"peft_type": "LORA", "r": 2, "lora_alpha": 8}"#).unwrap();
        std::fs::write(folder.path().join(WEIGHTS), "PK").unwrap();
        assert!(matches!(Adapter::load(folder.path()), Err(AdapterError::Weights { .. })));
    }
}
