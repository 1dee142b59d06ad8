//! What a pass asks of the graph.

use super::{NodeId, RewriteError, Rewriter, SUPPORTED_OPSETS, bodies, label};
use crate::onnx::proto::{AttributeProto, NodeProto, OperatorSetIdProto};
use crate::onnx::{ElementType, Tensor, Value};

impl Rewriter {
    /// The version of the standard operators.
    #[must_use]
    pub fn opset(&self) -> i64 {
        let imports = &self.model.opset_import;
        let standard = imports.iter().find(|import| matches!(import.domain(), "" | "ai.onnx"));
        standard.map_or(*SUPPORTED_OPSETS.start(), OperatorSetIdProto::version)
    }

    /// All nodes, in the order in which they came.
    pub fn ids(&self) -> impl Iterator<Item = NodeId> + '_ {
        self.nodes.iter().enumerate().filter_map(|(index, node)| node.as_ref().map(|_| NodeId(index)))
    }

    /// All nodes of one standard operator, in the order in which they came.
    #[must_use]
    pub fn ids_of(&self, op: &str) -> Vec<NodeId> {
        self.ids().filter(|id| self.is(*id, op)).collect()
    }

    /// True if the node is there and of this standard operator.
    #[must_use]
    pub fn is(&self, id: NodeId, op: &str) -> bool {
        self.nodes[id.0].as_ref().is_some_and(|node| node.op_type() == op && matches!(node.domain(), "" | "ai.onnx"))
    }

    /// The node; an empty one if it was removed.
    #[must_use]
    pub fn node(&self, id: NodeId) -> &NodeProto {
        static NONE: std::sync::LazyLock<NodeProto> = std::sync::LazyLock::new(NodeProto::default);
        self.nodes[id.0].as_ref().unwrap_or(&NONE)
    }

    /// False once the node was removed.
    #[must_use]
    pub fn contains(&self, id: NodeId) -> bool {
        self.nodes[id.0].is_some()
    }

    /// What people call the node: its name, or the first value it gives.
    #[must_use]
    pub fn label(&self, id: NodeId) -> String {
        label(self.node(id))
    }

    /// The node's input number `index`; `""` if it has none there.
    #[must_use]
    pub fn input(&self, id: NodeId, index: usize) -> &str {
        self.node(id).input.get(index).map_or("", String::as_str)
    }

    /// The node's output number `index`; `""` if it has none there.
    #[must_use]
    pub fn output(&self, id: NodeId, index: usize) -> &str {
        self.node(id).output.get(index).map_or("", String::as_str)
    }

    /// An attribute that is an integer.
    #[must_use]
    pub fn int(&self, id: NodeId, name: &str) -> Option<i64> {
        self.attribute(id, name).map(AttributeProto::i)
    }

    /// An attribute that is a number.
    #[must_use]
    pub fn float(&self, id: NodeId, name: &str) -> Option<f32> {
        self.attribute(id, name).map(AttributeProto::f)
    }

    /// An attribute that is a list of integers.
    #[must_use]
    pub fn ints(&self, id: NodeId, name: &str) -> Option<Vec<i64>> {
        self.attribute(id, name).map(|attribute| attribute.ints.clone())
    }

    /// An attribute that is a text.
    #[must_use]
    pub fn text(&self, id: NodeId, name: &str) -> Option<String> {
        self.attribute(id, name).map(|attribute| String::from_utf8_lossy(attribute.s()).into_owned())
    }

    /// An attribute that is a tensor.
    ///
    /// # Errors
    /// [`RewriteError::Tensor`] if there is one, but it can't be read.
    pub fn tensor(&self, id: NodeId, name: &str) -> Result<Option<Tensor>, RewriteError> {
        let tensor = self.attribute(id, name).and_then(|attribute| attribute.t.as_ref());
        Ok(tensor.map(Tensor::from_proto).transpose()?)
    }

    fn attribute(&self, id: NodeId, name: &str) -> Option<&AttributeProto> {
        self.node(id).attribute.iter().find(|attribute| attribute.name() == name)
    }

    /// The node that gives a value; `None` for inputs and constants.
    #[must_use]
    pub fn producer(&self, value: &str) -> Option<NodeId> {
        self.producers.get(value).copied()
    }

    /// The node that gives a value, if it is of this standard operator.
    #[must_use]
    pub fn producer_of(&self, value: &str, op: &str) -> Option<NodeId> {
        self.producer(value).filter(|id| self.is(*id, op))
    }

    /// The nodes that read a value, once per use.
    #[must_use]
    pub fn consumers(&self, value: &str) -> &[NodeId] {
        self.consumers.get(value).map_or(&[], Vec::as_slice)
    }

    /// The only node that reads a value; `None` if there are more uses, or the value is read outside the graph.
    #[must_use]
    pub fn sole_consumer(&self, value: &str) -> Option<NodeId> {
        match self.consumers(value) {
            [only] if !self.pinned.contains(value) => Some(*only),
            _ => None,
        }
    }

    /// A value that `nodes` give and that something else reads, `result` apart; `None` if they can be replaced by a
    /// node that gives `result`.
    #[must_use]
    pub fn escaping(&self, nodes: &[NodeId], result: &str) -> Option<&str> {
        let inner = nodes.iter().flat_map(|id| &self.node(*id).output).map(String::as_str);
        let mut inner = inner.filter(|value| !value.is_empty() && *value != result);
        inner.find(|value| self.is_pinned(value) || self.consumers(value).iter().any(|id| !nodes.contains(id)))
    }

    /// The number of dimensions that the model declares for a value.
    #[must_use]
    pub fn rank(&self, value: &str) -> Option<usize> {
        if let Some(constant) = self.constants.get(value) {
            return Some(constant.dims.len());
        }
        self.declared(value)?.dims.map(|dims| dims.len())
    }

    /// True if the value is an output of the model.
    #[must_use]
    pub fn is_output(&self, value: &str) -> bool {
        self.outputs.contains(value)
    }

    /// True if the value keeps its name: an input or output of the model, or read by a body of control flow.
    #[must_use]
    pub fn is_pinned(&self, value: &str) -> bool {
        self.pinned.contains(value)
    }

    /// True if the value is a constant.
    #[must_use]
    pub fn is_constant(&self, value: &str) -> bool {
        self.constants.contains_key(value)
    }

    /// A constant's values.
    ///
    /// # Errors
    /// [`RewriteError::Tensor`] if it is one, but can't be read.
    pub fn constant(&self, value: &str) -> Result<Option<Tensor>, RewriteError> {
        Ok(self.constants.get(value).map(Tensor::from_proto).transpose()?)
    }

    /// A constant's values, if they are readable floats.
    #[must_use]
    pub fn floats(&self, value: &str) -> Option<Tensor> {
        let tensor = Tensor::from_proto(self.constants.get(value)?).ok()?;
        let floats = tensor.to_f32()?;
        Some(Tensor::f32(&tensor.dims, floats))
    }

    /// A constant's only value, if it is a readable float.
    #[must_use]
    pub fn scalar(&self, value: &str) -> Option<f32> {
        let dims = self.constant_dims(value)?;
        if dims.iter().product::<usize>() != 1 {
            return None;
        }
        Tensor::from_proto(self.constants.get(value)?).ok()?.to_scalar()
    }

    /// A constant's values, if they are readable integers.
    #[must_use]
    pub fn indices(&self, value: &str) -> Option<Vec<i64>> {
        Tensor::from_proto(self.constants.get(value)?).ok()?.to_i64()
    }

    /// A constant's dimensions; does not read its values.
    #[must_use]
    pub fn constant_dims(&self, value: &str) -> Option<Vec<usize>> {
        self.constants.get(value)?.dims.iter().map(|dim| usize::try_from(*dim).ok()).collect()
    }

    /// A constant's type; does not read its values.
    #[must_use]
    pub fn constant_element(&self, value: &str) -> Option<ElementType> {
        self.constants.get(value).map(|tensor| ElementType::from_number(tensor.data_type()))
    }

    /// What the model says of a value's type and dimensions: of its inputs and outputs always, of others at times.
    #[must_use]
    pub fn declared(&self, value: &str) -> Option<Value> {
        let graph = self.model.graph.as_ref()?;
        let mut infos = graph.input.iter().chain(&graph.output).chain(&graph.value_info);
        infos.find(|info| info.name() == value).map(Value::new)
    }

    /// The first node with a body, such as `If` and `Loop`; what its body reads must keep its name and type.
    #[must_use]
    pub fn control_flow(&self) -> Option<NodeId> {
        self.ids().find(|id| self.node(*id).attribute.iter().any(|attribute| bodies(attribute).next().is_some()))
    }

    /// Names of all constants, in the order in which they came.
    #[must_use]
    pub fn constants(&self) -> Vec<String> {
        self.constant_order.clone()
    }
}
