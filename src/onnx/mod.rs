//! An ONNX model as a file and a graph: load, inspect, build, save. Knows no slide and no ONNX Runtime.
//!
//! [`Model`] is a thin shell around the protobuf message, so that whatever a model holds survives load and save.

pub mod build;
mod cost;
pub mod lora;
pub mod passes;
pub mod proto;
mod rewriter;
mod shapes;
mod tensor;
mod truncated_normal;
pub mod vit;
mod weights;

use std::collections::BTreeMap;
use std::fmt;
use std::io::Write as _;
use std::path::{Component, Path, PathBuf};

use prost::Message as _;

use proto::tensor_proto::{DataLocation, DataType};
use proto::{GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, type_proto};

pub use cost::{Cost, cost};
pub use rewriter::{MICROSOFT, NodeId, RewriteError, Rewriter, SUPPORTED_OPSETS};
pub use shapes::Shapes;
pub use tensor::{Tensor, TensorError, Values};

/// A model file that can't be read, or is no ONNX model.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OnnxError {
    /// The file can't be read.
    #[error("{}: can't be read", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The file can't be written.
    #[error("{}: can't be written", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The file holds something else.
    #[error("{}: is no ONNX model but {found}", path.display())]
    NotOnnx {
        /// The file.
        path: PathBuf,
        /// What it looks like.
        found: Content,
    },
    /// The file begins like an ONNX model, but its end is missing or its bytes are wrong.
    #[error("{}: is damaged or truncated at {len} bytes", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        len: usize,
        /// What the protobuf decoder met.
        source: prost::DecodeError,
    },
    /// Weights are said to lie in a file outside the model's folder.
    #[error("{}: names weights outside its own folder: {location:?}", path.display())]
    OutsideFolder {
        /// The model file.
        path: PathBuf,
        /// The location as the model gives it.
        location: String,
    },
}

impl OnnxError {
    /// How to put it right.
    #[must_use]
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::NotOnnx { found: Content::LfsPointer, .. } => Some("fetch the file itself: git lfs pull"),
            Self::NotOnnx { found: Content::Html, .. } => Some("download the file itself, not the page about it"),
            Self::NotOnnx { found: Content::Zip, .. } => {
                Some("if it is TorchScript, models/train/torchscript_to_onnx.py makes an ONNX model of it")
            }
            Self::Damaged { .. } => Some("fetch the file again and compare its size and sha256"),
            _ => None,
        }
    }
}

/// What a file that is no ONNX model looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Nothing at all.
    Empty,
    /// The small text that git keeps in place of a large file.
    LfsPointer,
    /// A web page.
    Html,
    /// Some other text.
    Text,
    /// A zip archive, which a PyTorch file is too.
    Zip,
    /// An HDF5 file, as Keras writes.
    Hdf5,
    /// Protobuf without a graph, or unknown bytes.
    Unknown,
}

impl fmt::Display for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Empty => "empty",
            Self::LfsPointer => "a git-lfs pointer",
            Self::Html => "a web page",
            Self::Text => "text",
            Self::Zip => "a zip archive (PyTorch, TorchScript)",
            Self::Hdf5 => "HDF5 (Keras)",
            Self::Unknown => "something else",
        })
    }
}

impl Content {
    /// Recognises what is surely not ONNX; an ONNX file begins with its version, bytes that no text begins with.
    fn of_foreign(bytes: &[u8]) -> Option<Self> {
        let head = &bytes[..bytes.len().min(512)];
        let text = head.iter().all(|&byte| byte.is_ascii_graphic() || byte.is_ascii_whitespace());
        match head {
            [] => Some(Self::Empty),
            _ if head.starts_with(b"version https://git-lfs") => Some(Self::LfsPointer),
            _ if head.trim_ascii_start().starts_with(b"<") => Some(Self::Html),
            _ if head.starts_with(b"PK\x03\x04") => Some(Self::Zip),
            _ if head.starts_with(b"\x89HDF") => Some(Self::Hdf5),
            _ if text => Some(Self::Text),
            _ => None,
        }
    }
}

/// The element type of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ElementType {
    /// 32-bit float.
    F32,
    /// 16-bit IEEE float.
    F16,
    /// 64-bit float.
    F64,
    /// 16-bit float with the exponent of a 32-bit one.
    Bf16,
    /// Unsigned byte.
    U8,
    /// Signed byte.
    I8,
    /// 32-bit integer.
    I32,
    /// 64-bit integer.
    I64,
    /// Truth value.
    Bool,
    /// Any other, by its number in the ONNX schema; 0 is undefined.
    Other(i32),
}

impl ElementType {
    /// Reads a `TensorProto.DataType` number.
    #[must_use]
    pub fn from_number(number: i32) -> Self {
        match DataType::try_from(number) {
            Ok(DataType::Float) => Self::F32,
            Ok(DataType::Float16) => Self::F16,
            Ok(DataType::Double) => Self::F64,
            Ok(DataType::Bfloat16) => Self::Bf16,
            Ok(DataType::Uint8) => Self::U8,
            Ok(DataType::Int8) => Self::I8,
            Ok(DataType::Int32) => Self::I32,
            Ok(DataType::Int64) => Self::I64,
            Ok(DataType::Bool) => Self::Bool,
            _ => Self::Other(number),
        }
    }

    /// The `TensorProto.DataType` number.
    #[must_use]
    pub fn number(self) -> i32 {
        match self {
            Self::F32 => DataType::Float.into(),
            Self::F16 => DataType::Float16.into(),
            Self::F64 => DataType::Double.into(),
            Self::Bf16 => DataType::Bfloat16.into(),
            Self::U8 => DataType::Uint8.into(),
            Self::I8 => DataType::Int8.into(),
            Self::I32 => DataType::Int32.into(),
            Self::I64 => DataType::Int64.into(),
            Self::Bool => DataType::Bool.into(),
            Self::Other(number) => number,
        }
    }
}

impl fmt::Display for ElementType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match DataType::try_from(self.number()) {
            Ok(data_type) => f.write_str(&data_type.as_str_name().to_lowercase()),
            Err(_) => write!(f, "element type {}", self.number()),
        }
    }
}

/// One dimension of an input or output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Dim {
    /// A fixed size.
    Fixed(usize),
    /// Any size, known by a name such as `batch`.
    Symbolic(String),
    /// Any size.
    Unknown,
}

impl Dim {
    /// The size, if it is fixed.
    #[must_use]
    pub fn fixed(&self) -> Option<usize> {
        match self {
            Self::Fixed(size) => Some(*size),
            _ => None,
        }
    }
}

impl From<usize> for Dim {
    fn from(size: usize) -> Self {
        Self::Fixed(size)
    }
}

impl From<&str> for Dim {
    fn from(name: &str) -> Self {
        Self::Symbolic(name.to_owned())
    }
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fixed(size) => size.fmt(f),
            Self::Symbolic(name) => f.write_str(name),
            Self::Unknown => f.write_str("?"),
        }
    }
}

/// An input or output of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Value {
    /// Its name in the graph.
    pub name: String,
    /// The type of its elements.
    pub element: ElementType,
    /// Its dimensions; `None` if not even their number is known.
    pub dims: Option<Vec<Dim>>,
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dims = match &self.dims {
            Some(dims) => dims.iter().map(Dim::to_string).collect::<Vec<_>>().join(", "),
            None => "...".to_owned(),
        };
        write!(f, "{} {} [{dims}]", self.name, self.element)
    }
}

impl Value {
    fn new(info: &ValueInfoProto) -> Self {
        let tensor = info.r#type.as_ref().and_then(|kind| match &kind.value {
            Some(type_proto::Value::TensorType(tensor)) => Some(tensor),
            _ => None,
        });
        let shape = tensor.and_then(|tensor| tensor.shape.as_ref());
        Self {
            name: info.name().to_owned(),
            element: ElementType::from_number(tensor.map_or(0, |tensor| tensor.elem_type())),
            dims: shape.map(|shape| shape.dim.iter().map(|dim| dim_of(dim.value.as_ref())).collect()),
        }
    }
}

fn dim_of(value: Option<&proto::tensor_shape_proto::dimension::Value>) -> Dim {
    use proto::tensor_shape_proto::dimension::Value as DimValue;
    match value {
        Some(DimValue::DimValue(size)) => usize::try_from(*size).map_or(Dim::Unknown, Dim::Fixed),
        Some(DimValue::DimParam(name)) if !name.is_empty() => Dim::Symbolic(name.clone()),
        _ => Dim::Unknown,
    }
}

/// An ONNX model.
#[derive(Clone, Debug, PartialEq)]
pub struct Model {
    proto: ModelProto,
}

impl Model {
    /// Reads the model file at `path`. Weights that lie in files beside it stay there.
    ///
    /// # Errors
    /// [`OnnxError`] if the file can't be read, is something else, or is damaged.
    pub fn load(path: &Path) -> Result<Self, OnnxError> {
        let bytes = std::fs::read(path).map_err(|source| OnnxError::Read { path: path.to_owned(), source })?;
        Self::from_bytes(&bytes, path)
    }

    /// Decodes the content of a model file; `path` is for messages.
    ///
    /// # Errors
    /// [`OnnxError`] if the bytes are something else or damaged.
    pub fn from_bytes(bytes: &[u8], path: &Path) -> Result<Self, OnnxError> {
        let not_onnx = |found| OnnxError::NotOnnx { path: path.to_owned(), found };
        if let Some(found) = Content::of_foreign(bytes) {
            return Err(not_onnx(found));
        }
        match ModelProto::decode(bytes) {
            Ok(proto) if proto.graph.is_some() => Ok(Self { proto }),
            Ok(_) => Err(not_onnx(Content::Unknown)),
            // Every exporter writes the version first: field 1, a small number.
            Err(source) if matches!(bytes, [0x08, 1..=127, ..]) => {
                Err(OnnxError::Damaged { path: path.to_owned(), len: bytes.len(), source })
            }
            Err(_) => Err(not_onnx(Content::Unknown)),
        }
    }

    /// Wraps a protobuf message.
    #[must_use]
    pub fn from_proto(proto: ModelProto) -> Self {
        Self { proto }
    }

    /// The protobuf message.
    #[must_use]
    pub fn proto(&self) -> &ModelProto {
        &self.proto
    }

    /// The protobuf message, to be changed.
    pub fn proto_mut(&mut self) -> &mut ModelProto {
        &mut self.proto
    }

    /// The content of a model file.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        self.proto.encode_to_vec()
    }

    /// Writes the model to `path`: under a temporary name first, then renamed.
    ///
    /// # Errors
    /// [`OnnxError::Write`] with the system's reason.
    pub fn save(&self, path: &Path) -> Result<(), OnnxError> {
        save_atomically(path, |file| file.write_all(&self.to_bytes()))
    }

    /// The inputs that a caller must give, without the weights that old exporters list among them.
    #[must_use]
    pub fn inputs(&self) -> Vec<Value> {
        let graph = self.graph();
        let is_weight =
            |info: &&ValueInfoProto| graph.is_some_and(|graph| graph.initializer.iter().any(|w| w.name == info.name));
        let infos = graph.map_or(&[][..], |graph| &graph.input);
        infos.iter().filter(|info| !is_weight(info)).map(Value::new).collect()
    }

    /// The outputs.
    #[must_use]
    pub fn outputs(&self) -> Vec<Value> {
        self.graph().map_or(&[][..], |graph| &graph.output).iter().map(Value::new).collect()
    }

    /// The model with values of the graph as outputs beside its own, after these; those that no node of the graph
    /// gives, or that are outputs already, are passed over. The types of the new outputs are left to be inferred.
    #[must_use]
    pub fn with_outputs(&self, values: &[String]) -> Self {
        let mut model = self.clone();
        let graph = model.proto.graph.get_or_insert_default();
        for value in values {
            let given = graph.node.iter().any(|node| node.output.contains(value));
            if given && !graph.output.iter().any(|output| output.name() == value) {
                graph.output.push(ValueInfoProto { name: Some(value.clone()), ..Default::default() });
            }
        }
        model
    }

    /// The version of the standard operators; `None` if the model uses none.
    #[must_use]
    pub fn opset(&self) -> Option<i64> {
        let imports = &self.proto.opset_import;
        imports.iter().find(|import| matches!(import.domain(), "" | "ai.onnx")).map(|import| import.version())
    }

    /// How many nodes of each operator the top-level graph has; the key is `Conv`, or `com.microsoft.Attention`
    /// for an operator outside the standard.
    #[must_use]
    pub fn op_counts(&self) -> BTreeMap<String, usize> {
        let mut counts = BTreeMap::new();
        for node in self.graph().map_or(&[][..], |graph| &graph.node) {
            *counts.entry(full_op(node)).or_default() += 1;
        }
        counts
    }

    /// The operator that makes the output `name`, such as `Softmax`.
    #[must_use]
    pub fn producer(&self, name: &str) -> Option<&str> {
        let nodes = &self.graph()?.node;
        nodes.iter().find(|node| node.output.iter().any(|output| output == name)).map(|node| node.op_type())
    }

    /// The files beside the model at `path` that hold its weights, each once, in the order in which the graph names
    /// them; empty if all weights lie in the model file.
    ///
    /// # Errors
    /// [`OnnxError::OutsideFolder`] if one is not in the model's folder or below it.
    pub fn weight_files(&self, path: &Path) -> Result<Vec<PathBuf>, OnnxError> {
        let folder = path.parent().unwrap_or(Path::new(""));
        let mut files = Vec::new();
        for location in self.graph().map_or(&[][..], |graph| &graph.initializer).iter().filter_map(external_location) {
            if !Path::new(location).components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir)) {
                return Err(OnnxError::OutsideFolder { path: path.to_owned(), location: location.to_owned() });
            }
            let file = folder.join(location);
            if !files.contains(&file) {
                files.push(file);
            }
        }
        Ok(files)
    }

    fn graph(&self) -> Option<&GraphProto> {
        self.proto.graph.as_ref()
    }
}

/// A node's operator: `Conv`, or `com.microsoft.Attention` outside the standard.
fn full_op(node: &NodeProto) -> String {
    match node.domain() {
        "" | "ai.onnx" => node.op_type().to_owned(),
        domain => format!("{domain}.{}", node.op_type()),
    }
}

/// Writes a file under a temporary name first, then renames it.
fn save_atomically(
    path: &Path,
    write: impl FnOnce(&mut std::fs::File) -> std::io::Result<()>,
) -> Result<(), OnnxError> {
    let save = || {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let mut builder = tempfile::Builder::new();
        builder.prefix(".onnx-");
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            // A temporary file is private by default, but this one becomes a model that colleagues run.
            builder.permissions(std::fs::Permissions::from_mode(0o666));
        }
        let mut file = builder.tempfile_in(folder)?;
        write(file.as_file_mut())?;
        file.as_file().sync_all()?;
        file.persist(path)?;
        Ok(())
    };
    save().map_err(|source| OnnxError::Write { path: path.to_owned(), source })
}

fn external_location(tensor: &TensorProto) -> Option<&str> {
    let is_external = tensor.data_location() == DataLocation::External;
    let entry = tensor.external_data.iter().find(|entry| is_external && entry.key() == "location")?;
    Some(entry.value())
}

#[cfg(test)]
mod tests {
    use super::build::{Graph, ints};
    use super::*;

    fn model() -> Model {
        let mut graph = Graph::new("two ops");
        let input = graph.input("image", ElementType::F32, &["n".into(), 3.into(), 4.into(), 4.into()]);
        let relu = graph.node("Relu", &[&input], &[]);
        let mean = graph.node("GlobalAveragePool", &[&relu], &[]);
        graph.output("pooled", &mean, ElementType::F32, &["n".into(), 3.into(), Dim::Unknown, 1.into()]);
        graph.finish()
    }

    #[test]
    fn a_model_survives_save_and_load() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.onnx");
        model().save(&path).unwrap();
        let loaded = Model::load(&path).unwrap();
        assert_eq!(loaded, model());
        assert_eq!(loaded.inputs()[0].to_string(), "image float [n, 3, 4, 4]");
        assert_eq!(loaded.outputs()[0].to_string(), "pooled float [n, 3, ?, 1]");
        assert_eq!(loaded.opset(), Some(build::OPSET));
        let counts = loaded.op_counts();
        assert_eq!(counts.iter().map(|(op, n)| format!("{op} {n}")).collect::<Vec<_>>().join(", "), {
            "GlobalAveragePool 1, Identity 1, Relu 1"
        });
        assert_eq!(loaded.producer("pooled"), Some("Identity"));
    }

    #[test]
    fn weights_are_not_inputs() {
        let mut graph = Graph::new("old");
        let input = graph.input("x", ElementType::F32, &[1.into()]);
        let weight = graph.weights("w", &[1], &[2.0]);
        let product = graph.node("Mul", &[&input, &weight], &[]);
        graph.output("y", &product, ElementType::F32, &[1.into()]);
        let mut model = graph.finish();
        let graph = model.proto_mut().graph.as_mut().unwrap();
        graph.input.push(ValueInfoProto { name: Some("w".to_owned()), ..Default::default() });
        assert_eq!(model.inputs().len(), 1);
    }

    #[test]
    fn inner_values_can_be_outputs() {
        let relu = model().proto().graph.as_ref().unwrap().node[0].output[0].clone();
        let probe = model().with_outputs(&[relu.clone(), "pooled".to_owned(), "image".to_owned(), relu.clone()]);
        let names: Vec<String> = probe.outputs().into_iter().map(|output| output.name).collect();
        assert_eq!(names, ["pooled", &relu]);
    }

    #[test]
    fn what_is_no_model_is_named() {
        let lfs = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n";
        let cases: &[(&[u8], Content)] = &[
            (b"", Content::Empty),
            (lfs, Content::LfsPointer),
            (b"<!DOCTYPE html><html>", Content::Html),
            (b"\n <html>", Content::Html),
            (b"{\"error\": 404}", Content::Text),
            (b"PK\x03\x04\x00\x00", Content::Zip),
            (b"\x89HDF\r\n\x1a\n", Content::Hdf5),
            (b"\xff\xfe\x00\x01", Content::Unknown),
            (b"\x08\x0a", Content::Unknown),
        ];
        for (bytes, expected) in cases {
            let error = Model::from_bytes(bytes, Path::new("a.onnx")).unwrap_err();
            assert!(matches!(error, OnnxError::NotOnnx { found, .. } if found == *expected), "{error} {expected:?}");
        }
    }

    #[test]
    fn a_truncated_model_is_damaged_at_any_length() {
        let bytes = model().to_bytes();
        for len in 3..bytes.len() {
            // A cut between two top-level fields leaves a valid message, which may even have its graph.
            if let Err(error) = Model::from_bytes(&bytes[..len], Path::new("a.onnx")) {
                assert!(matches!(error, OnnxError::Damaged { .. } | OnnxError::NotOnnx { .. }), "{error}");
            }
        }
        let error = Model::from_bytes(&bytes[..bytes.len() / 2], Path::new("a.onnx")).unwrap_err();
        assert_eq!(error.to_string(), format!("a.onnx: is damaged or truncated at {} bytes", bytes.len() / 2));
    }

    #[test]
    fn weight_files_stay_in_the_folder() {
        let mut model = model();
        let mut add = |location: &str| {
            let entry =
                proto::StringStringEntryProto { key: Some("location".to_owned()), value: Some(location.to_owned()) };
            let tensor = TensorProto {
                data_location: Some(DataLocation::External.into()),
                external_data: vec![entry],
                ..Default::default()
            };
            model.proto_mut().graph.as_mut().unwrap().initializer.push(tensor);
            model.weight_files(Path::new("/m/a.onnx"))
        };
        assert_eq!(add("a.data").unwrap(), [Path::new("/m/a.data")]);
        assert_eq!(add("a.data").unwrap().len(), 1);
        assert!(matches!(add("../secret"), Err(OnnxError::OutsideFolder { .. })));
    }

    #[test]
    fn attributes_of_every_kind_are_kept() {
        let mut graph = Graph::new("attributes");
        let input = graph.input("x", ElementType::F32, &[1.into()]);
        let node = graph.node("Fancy", &[&input], &[("i", 3.into()), ("f", 0.5_f32.into()), ("l", ints(&[1, 2]))]);
        graph.output("y", &node, ElementType::F32, &[1.into()]);
        let model = graph.finish();
        let attributes = &model.proto().graph.as_ref().unwrap().node[0].attribute;
        assert_eq!((attributes[0].i(), attributes[1].f(), &attributes[2].ints[..]), (3, 0.5, &[1, 2][..]));
    }
}
