//! Builds models node by node: for tests, probes and models without a file.

use super::proto::attribute_proto::AttributeType;
use super::proto::tensor_shape_proto::{Dimension, dimension};
use super::proto::{
    AttributeProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TensorProto, TensorShapeProto, TypeProto,
    ValueInfoProto, type_proto,
};
use super::{Dim, ElementType, Model, Tensor};

/// The version of the standard operators that built models use; ONNX Runtime reads it since 1.15.
pub const OPSET: i64 = 18;

/// The file format's version that goes with [`OPSET`].
const IR_VERSION: i64 = 8;

/// An attribute of a node, yet without its name.
#[derive(Clone, Debug)]
pub struct Attribute(AttributeProto);

impl From<i64> for Attribute {
    fn from(value: i64) -> Self {
        Self(AttributeProto { r#type: Some(AttributeType::Int.into()), i: Some(value), ..Default::default() })
    }
}

impl From<f32> for Attribute {
    fn from(value: f32) -> Self {
        Self(AttributeProto { r#type: Some(AttributeType::Float.into()), f: Some(value), ..Default::default() })
    }
}

impl From<f64> for Attribute {
    /// ONNX knows 32-bit numbers only.
    fn from(value: f64) -> Self {
        #[expect(clippy::cast_possible_truncation, reason = "said above")]
        let value = value as f32;
        value.into()
    }
}

impl From<&str> for Attribute {
    fn from(value: &str) -> Self {
        let bytes = value.as_bytes().to_vec();
        Self(AttributeProto { r#type: Some(AttributeType::String.into()), s: Some(bytes), ..Default::default() })
    }
}

impl From<&Tensor> for Attribute {
    fn from(value: &Tensor) -> Self {
        let tensor = Some(value.to_proto(""));
        Self(AttributeProto { r#type: Some(AttributeType::Tensor.into()), t: tensor, ..Default::default() })
    }
}

impl Attribute {
    /// The attribute under its name, as a node holds it.
    #[must_use]
    pub fn named(self, name: &str) -> AttributeProto {
        AttributeProto { name: Some(name.to_owned()), ..self.0 }
    }
}

/// An attribute that is a list of integers.
#[must_use]
pub fn ints(values: &[i64]) -> Attribute {
    let values = values.to_vec();
    Attribute(AttributeProto { r#type: Some(AttributeType::Ints.into()), ints: values, ..Default::default() })
}

/// A graph that grows by one input, weight, node or output per call; values are known by name.
#[derive(Clone, Debug)]
pub struct Graph(GraphProto);

impl Graph {
    /// An empty graph.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self(GraphProto { name: Some(name.to_owned()), ..Default::default() })
    }

    /// Adds an input; returns its name.
    pub fn input(&mut self, name: &str, element: ElementType, dims: &[Dim]) -> String {
        self.0.input.push(value_info(name, element, dims));
        name.to_owned()
    }

    /// Adds f32 weights, `values` in row-major order of `dims`; returns their name.
    pub fn weights(&mut self, name: &str, dims: &[i64], values: &[f32]) -> String {
        self.tensor(name, ElementType::F32, dims, values.iter().flat_map(|value| value.to_le_bytes()).collect())
    }

    /// Adds a constant of any type; returns its name.
    pub fn constant(&mut self, name: &str, tensor: &Tensor) -> String {
        self.0.initializer.push(tensor.to_proto(name));
        name.to_owned()
    }

    /// Adds an i64 list such as axes or a shape; returns its name.
    pub fn indices(&mut self, name: &str, values: &[i64]) -> String {
        let dims = [i64::try_from(values.len()).unwrap_or(i64::MAX)];
        self.tensor(name, ElementType::I64, &dims, values.iter().flat_map(|value| value.to_le_bytes()).collect())
    }

    /// Adds a node of a standard operator with one output; returns that output's name.
    pub fn node(&mut self, op: &str, inputs: &[&str], attributes: &[(&str, Attribute)]) -> String {
        let output = format!("{}_{}", op.to_lowercase(), self.0.node.len());
        self.push(op, inputs, &output, attributes);
        output
    }

    /// Makes the value `of` an output called `name`.
    pub fn output(&mut self, name: &str, of: &str, element: ElementType, dims: &[Dim]) {
        self.push("Identity", &[of], name, &[]);
        self.0.output.push(value_info(name, element, dims));
    }

    /// The finished model.
    #[must_use]
    pub fn finish(self) -> Model {
        Model::from_proto(ModelProto {
            ir_version: Some(IR_VERSION),
            opset_import: vec![OperatorSetIdProto { domain: Some(String::new()), version: Some(OPSET) }],
            producer_name: Some("slidestream".to_owned()),
            graph: Some(self.0),
            ..Default::default()
        })
    }

    fn tensor(&mut self, name: &str, element: ElementType, dims: &[i64], bytes: Vec<u8>) -> String {
        self.0.initializer.push(TensorProto {
            name: Some(name.to_owned()),
            data_type: Some(element.number()),
            dims: dims.to_vec(),
            raw_data: Some(bytes),
            ..Default::default()
        });
        name.to_owned()
    }

    fn push(&mut self, op: &str, inputs: &[&str], output: &str, attributes: &[(&str, Attribute)]) {
        self.0.node.push(NodeProto {
            name: Some(format!("{op}_{}", self.0.node.len())),
            op_type: Some(op.to_owned()),
            input: inputs.iter().map(|&input| input.to_owned()).collect(),
            output: vec![output.to_owned()],
            attribute: attributes.iter().map(|(name, attribute)| attribute.clone().named(name)).collect(),
            ..Default::default()
        });
    }
}

/// How a model declares an input or output.
pub(super) fn value_info(name: &str, element: ElementType, dims: &[Dim]) -> ValueInfoProto {
    let dimension = |dim: &Dim| Dimension {
        value: match dim {
            Dim::Fixed(size) => Some(dimension::Value::DimValue(i64::try_from(*size).unwrap_or(i64::MAX))),
            Dim::Symbolic(name) => Some(dimension::Value::DimParam(name.clone())),
            Dim::Unknown => None,
        },
        denotation: None,
    };
    let tensor = type_proto::Tensor {
        elem_type: Some(element.number()),
        shape: Some(TensorShapeProto { dim: dims.iter().map(dimension).collect() }),
    };
    ValueInfoProto {
        name: Some(name.to_owned()),
        r#type: Some(TypeProto { value: Some(type_proto::Value::TensorType(tensor)), ..Default::default() }),
        ..Default::default()
    }
}
