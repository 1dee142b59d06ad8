//! A model's graph, indexed so that it can be rewritten: every change that a pass makes goes through [`Rewriter`].
//!
//! It keeps the graph sound: a value has one producer, names are never taken twice, the model's inputs and outputs keep
//! their names, and values that the body of an `If` or `Loop` reads are never renamed or removed.

use std::collections::{BTreeSet, HashMap, HashSet};

use super::proto::attribute_proto::AttributeType;
use super::proto::{AttributeProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TensorProto, type_proto};
use super::tensor::{Tensor, TensorError};
use super::{ElementType, Model, Value};

/// The domain of ONNX Runtime's own operators.
pub const MICROSOFT: &str = "com.microsoft";

/// A node of the graph that is being rewritten; stays the same whatever happens to the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(usize);

/// A model that can't be rewritten.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RewriteError {
    /// Nodes wait for each other.
    #[error("node {node:?} depends on itself: the graph has a cycle")]
    Cycle {
        /// One of them.
        node: String,
    },
    /// Two nodes give the same value.
    #[error("value {value:?} has two producers")]
    TwoProducers {
        /// The value.
        value: String,
    },
    /// A node reads what nothing gives.
    #[error("node {node:?} reads {value:?}, which nothing produces")]
    NoProducer {
        /// The node.
        node: String,
        /// The value.
        value: String,
    },
    /// The standard operators are of a version that the passes were not written for.
    #[error("the model uses version {found} of the standard operators; {} to {} are rewritten", SUPPORTED_OPSETS.start(), SUPPORTED_OPSETS.end())]
    Opset {
        /// The model's version.
        found: i64,
    },
    /// A constant can't be read.
    #[error(transparent)]
    Tensor(#[from] TensorError),
}

/// The versions of the standard operators whose meaning the passes know.
pub const SUPPORTED_OPSETS: std::ops::RangeInclusive<i64> = 13..=25;

/// A graph that is being rewritten.
#[derive(Clone, Debug)]
pub struct Rewriter {
    /// Everything but nodes and constants.
    model: ModelProto,
    nodes: Vec<Option<NodeProto>>,
    constants: HashMap<String, TensorProto>,
    /// The order in which constants came, for a file that changes as little as possible.
    constant_order: Vec<String>,
    producers: HashMap<String, NodeId>,
    consumers: HashMap<String, Vec<NodeId>>,
    /// Values that keep their names: the model's inputs and outputs, and what bodies of control flow read.
    pinned: HashSet<String>,
    outputs: HashSet<String>,
    inputs: HashSet<String>,
    names: HashSet<String>,
}

impl Rewriter {
    /// Takes a model apart. `Constant` nodes become constants of the graph.
    ///
    /// # Errors
    /// [`RewriteError`] if the graph is not sound or its operators are of an unknown version.
    pub fn new(model: Model) -> Result<Self, RewriteError> {
        if let Some(found) = model.opset().filter(|version| !SUPPORTED_OPSETS.contains(version)) {
            return Err(RewriteError::Opset { found });
        }
        let mut model = model.proto;
        let graph = model.graph.get_or_insert_default();
        let nodes = std::mem::take(&mut graph.node);
        let initializers = std::mem::take(&mut graph.initializer);
        let mut this = Self {
            nodes: Vec::with_capacity(nodes.len()),
            constants: HashMap::with_capacity(initializers.len()),
            constant_order: Vec::with_capacity(initializers.len()),
            producers: HashMap::new(),
            consumers: HashMap::new(),
            pinned: HashSet::new(),
            outputs: graph.output.iter().map(|output| output.name().to_owned()).collect(),
            inputs: HashSet::new(),
            names: HashSet::new(),
            model,
        };
        for tensor in initializers {
            this.names.insert(tensor.name().to_owned());
            this.constant_order.push(tensor.name().to_owned());
            this.constants.insert(tensor.name().to_owned(), tensor);
        }
        let graph = this.model.graph.get_or_insert_default();
        // Old exporters list constants among the inputs.
        graph.input.retain(|input| !this.constants.contains_key(input.name()));
        this.inputs = graph.input.iter().map(|input| input.name().to_owned()).collect();
        this.names.extend(this.inputs.iter().cloned());
        this.pinned = this.inputs.union(&this.outputs).cloned().collect();
        for node in nodes {
            for name in node.attribute.iter().flat_map(bodies).flat_map(|body| free_names(body, &HashSet::new())) {
                this.pinned.insert(name);
            }
            this.adopt(node)?;
        }
        this.check_inputs()?;
        this.order()?;
        Ok(this)
    }

    /// A node of the model as it came: a `Constant` becomes a constant of the graph.
    fn adopt(&mut self, node: NodeProto) -> Result<(), RewriteError> {
        if let Some(value) = node.output.iter().find(|value| {
            !value.is_empty() && (self.producers.contains_key(*value) || self.names.contains(value.as_str()))
        }) {
            return Err(RewriteError::TwoProducers { value: value.clone() });
        }
        if node.op_type() == "Constant"
            && let Some(tensor) = constant_of(&node)
        {
            let name = node.output[0].clone();
            self.names.insert(name.clone());
            self.constant_order.push(name.clone());
            self.constants.insert(name.clone(), TensorProto { name: Some(name), ..tensor });
            return Ok(());
        }
        self.insert(node);
        Ok(())
    }

    fn check_inputs(&self) -> Result<(), RewriteError> {
        for node in self.nodes.iter().flatten() {
            let is_known = |value: &str| self.constants.contains_key(value) || self.inputs.contains(value);
            let missing =
                |value: &&String| !value.is_empty() && !is_known(value) && !self.producers.contains_key(value.as_str());
            if let Some(value) = node.input.iter().find(missing) {
                return Err(RewriteError::NoProducer { node: label(node), value: value.clone() });
            }
        }
        Ok(())
    }

    /// The model as it is now: nodes in an order in which they can run, without those that lead nowhere.
    ///
    /// # Errors
    /// [`RewriteError::Cycle`] if a pass tied a knot.
    pub fn finish(mut self) -> Result<Model, RewriteError> {
        self.remove_dead();
        let order = self.order()?;
        let mut graph = self.model.graph.take().unwrap_or_default();
        graph.node = order.into_iter().filter_map(|id| self.nodes[id.0].take()).collect();
        graph.initializer = self.constant_order.iter().filter_map(|name| self.constants.remove(name)).collect();
        let known: HashSet<&str> = graph.node.iter().flat_map(|node| &node.output).map(String::as_str).collect();
        graph.value_info.retain(|info| known.contains(info.name()));
        if graph.node.iter().any(|node| node.domain() == MICROSOFT) {
            import(&mut self.model.opset_import, MICROSOFT);
        }
        self.model.graph = Some(graph);
        Ok(Model::from_proto(self.model))
    }

    /// Removes nodes and constants that no output needs; returns the nodes.
    pub fn remove_dead(&mut self) -> Vec<NodeProto> {
        let mut wanted: Vec<String> = self.pinned.iter().cloned().collect();
        let mut alive = HashSet::new();
        let mut used: HashSet<String> = HashSet::new();
        while let Some(value) = wanted.pop() {
            if let Some(id) = self.producers.get(&value).copied()
                && alive.insert(id)
            {
                wanted.extend(self.node(id).input.iter().cloned());
            }
            used.insert(value);
        }
        let dead: Vec<NodeId> = self.ids().filter(|id| !alive.contains(id)).collect();
        let removed = dead.into_iter().filter_map(|id| self.remove(id)).collect();
        self.constants.retain(|name, _| used.contains(name));
        self.constant_order.retain(|name| used.contains(name));
        removed
    }

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
        let graph = self.model.graph.as_ref()?;
        let mut infos = graph.input.iter().chain(&graph.output).chain(&graph.value_info);
        super::Value::new(infos.find(|info| info.name() == value)?).dims.map(|dims| dims.len())
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

    /// Corrects what the model says of values' types, where it says something: `(value, its new type)`.
    pub fn declare(&mut self, elements: &HashMap<String, ElementType>) {
        let graph = self.model.graph.get_or_insert_default();
        for info in graph.input.iter_mut().chain(&mut graph.output).chain(&mut graph.value_info) {
            if let Some(element) = elements.get(info.name())
                && let Some(type_proto::Value::TensorType(tensor)) =
                    info.r#type.as_mut().and_then(|kind| kind.value.as_mut())
            {
                tensor.elem_type = Some(element.number());
            }
        }
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

    /// A name near `hint` that nothing has yet.
    pub fn fresh(&mut self, hint: &str) -> String {
        let mut name = hint.to_owned();
        let mut number = 1;
        while self.names.contains(&name) || self.producers.contains_key(&name) || self.pinned.contains(&name) {
            name = format!("{hint}_{number}");
            number += 1;
        }
        self.names.insert(name.clone());
        name
    }

    /// Adds a constant under a name near `hint`; returns the name.
    pub fn add_constant(&mut self, hint: &str, tensor: &Tensor) -> String {
        let name = self.fresh(hint);
        self.constant_order.push(name.clone());
        self.constants.insert(name.clone(), tensor.to_proto(&name));
        name
    }

    /// Changes a constant's values, for all who read it.
    pub fn set_constant(&mut self, name: &str, tensor: &Tensor) {
        if let Some(stored) = self.constants.get_mut(name) {
            *stored = tensor.to_proto(name);
        }
    }

    /// Makes `tensor` the node's input number `index`: in place of the constant there if nothing else reads that, else
    /// as a new one, with a name near the old one's or the node's.
    pub fn set_constant_input(&mut self, id: NodeId, index: usize, tensor: &Tensor) {
        let old = self.input(id, index).to_owned();
        if self.is_constant(&old) && self.sole_consumer(&old) == Some(id) {
            return self.set_constant(&old, tensor);
        }
        let hint = if old.is_empty() { format!("{}/{index}", self.label(id)) } else { old };
        let name = self.add_constant(&hint, tensor);
        self.set_input(id, index, &name);
    }

    /// Makes a constant of a value that a node gave: the node no longer gives it.
    pub fn freeze(&mut self, value: &str, tensor: &Tensor) {
        if let Some(id) = self.producers.remove(value) {
            let left: Vec<String> = self.node(id).output.clone();
            if let Some(node) = &mut self.nodes[id.0] {
                for (output, name) in node.output.iter_mut().zip(&left) {
                    if name == value {
                        output.clear();
                    }
                }
            }
            if left.iter().all(|name| name.is_empty() || name == value) {
                self.remove(id);
            }
        }
        self.names.insert(value.to_owned());
        self.constant_order.push(value.to_owned());
        self.constants.insert(value.to_owned(), tensor.to_proto(value));
    }

    /// Adds a node; its outputs must be new names, or names that a removed node gave.
    pub fn insert(&mut self, node: NodeProto) -> NodeId {
        let id = NodeId(self.nodes.len());
        for value in node.output.iter().filter(|value| !value.is_empty()) {
            self.producers.insert(value.clone(), id);
            self.names.insert(value.clone());
        }
        for value in node.input.iter().filter(|value| !value.is_empty()) {
            self.consumers.entry(value.clone()).or_default().push(id);
        }
        self.nodes.push(Some(node));
        id
    }

    /// Takes a node out; what it gave has no producer until another node gives it.
    pub fn remove(&mut self, id: NodeId) -> Option<NodeProto> {
        let node = self.nodes[id.0].take()?;
        for value in &node.output {
            if self.producers.get(value) == Some(&id) {
                self.producers.remove(value);
            }
        }
        for value in &node.input {
            self.forget_use(value, id);
        }
        Some(node)
    }

    /// Puts `node` in the place of others; its outputs may carry their names.
    pub fn replace(&mut self, others: &[NodeId], node: NodeProto) -> NodeId {
        for id in others {
            self.remove(*id);
        }
        self.insert(node)
    }

    /// Makes a node read another value as its input number `index`; inputs up to there are filled up with `""`.
    pub fn set_input(&mut self, id: NodeId, index: usize, value: &str) {
        let old = self.input(id, index).to_owned();
        self.forget_use(&old, id);
        if let Some(node) = &mut self.nodes[id.0] {
            if node.input.len() <= index {
                node.input.resize(index + 1, String::new());
            }
            value.clone_into(&mut node.input[index]);
        }
        if !value.is_empty() {
            self.consumers.entry(value.to_owned()).or_default().push(id);
        }
    }

    /// Sets an attribute of a node, whether it had it or not.
    pub fn set_attribute(&mut self, id: NodeId, name: &str, value: impl Into<super::build::Attribute>) {
        if let Some(node) = &mut self.nodes[id.0] {
            node.attribute.retain(|attribute| attribute.name() != name);
            node.attribute.push(value.into().named(name));
        }
    }

    /// Makes all nodes that read `from` read `to`; the model's outputs stay.
    pub fn redirect(&mut self, from: &str, to: &str) {
        for id in self.consumers(from).to_vec() {
            for index in 0..self.node(id).input.len() {
                if self.input(id, index) == from {
                    self.set_input(id, index, to);
                }
            }
        }
    }

    /// Takes out a node that gives its input unchanged.
    ///
    /// # Errors
    /// Why it must stay: both its input and its output have names that can't change.
    pub fn bypass(&mut self, id: NodeId) -> Result<(), &'static str> {
        let (from, to) = (self.output(id, 0).to_owned(), self.input(id, 0).to_owned());
        if !self.pinned.contains(&from) {
            self.remove(id);
            self.redirect(&from, &to);
            return Ok(());
        }
        let Some(producer) = self.producer(&to).filter(|_| !self.pinned.contains(&to)) else {
            return Err("its input and its output have names that the model's user knows");
        };
        self.remove(id);
        if let Some(node) = &mut self.nodes[producer.0] {
            node.output.iter_mut().filter(|output| **output == to).for_each(|output| from.clone_into(output));
        }
        self.producers.remove(&to);
        self.producers.insert(from.clone(), producer);
        self.redirect(&to, &from);
        Ok(())
    }

    /// A new node's proto, to be given to [`Self::insert`]; `domain` is `""` or [`MICROSOFT`].
    pub fn new_node(&mut self, domain: &str, op: &str, inputs: &[&str], outputs: &[&str]) -> NodeProto {
        let name = self.fresh(&format!("{op}/{}", outputs.first().copied().unwrap_or_default()));
        NodeProto {
            name: Some(name),
            op_type: Some(op.to_owned()),
            domain: (!domain.is_empty()).then(|| domain.to_owned()),
            input: inputs.iter().map(|&input| input.to_owned()).collect(),
            output: outputs.iter().map(|&output| output.to_owned()).collect(),
            ..Default::default()
        }
    }

    /// The model without nodes and constants, to be changed: inputs, outputs, metadata.
    pub fn frame(&mut self) -> &mut ModelProto {
        &mut self.model
    }

    /// Renames an input of the model for all who read it, as when a pass puts a node between.
    pub fn redirect_input(&mut self, input: &str, to: &str) {
        self.redirect(input, to);
    }

    /// Gives another name to a value that is an output of the model, for its producer and all who read it, so that a
    /// new node can give the output. Returns the new name.
    pub fn rename_output(&mut self, output: &str, hint: &str) -> String {
        let name = self.fresh(hint);
        if let Some(producer) = self.producers.remove(output) {
            if let Some(node) = &mut self.nodes[producer.0] {
                node.output.iter_mut().filter(|value| **value == output).for_each(|value| name.clone_into(value));
            }
            self.producers.insert(name.clone(), producer);
        }
        self.redirect(output, &name);
        name
    }

    /// Nodes in an order in which they can run; as close to the order in which they came as that allows.
    ///
    /// # Errors
    /// [`RewriteError::Cycle`] if there is none.
    pub fn order(&self) -> Result<Vec<NodeId>, RewriteError> {
        let mut waiting: HashMap<NodeId, usize> = HashMap::new();
        let mut ready = BTreeSet::new();
        for id in self.ids() {
            let count = self.dependencies(id).len();
            waiting.insert(id, count);
            if count == 0 {
                ready.insert(id);
            }
        }
        let mut dependants: HashMap<NodeId, Vec<NodeId>> = HashMap::new();
        for id in self.ids() {
            for dependency in self.dependencies(id) {
                dependants.entry(dependency).or_default().push(id);
            }
        }
        let mut order = Vec::with_capacity(waiting.len());
        while let Some(id) = ready.pop_first() {
            order.push(id);
            for dependant in dependants.get(&id).map_or(&[][..], Vec::as_slice) {
                if let Some(count) = waiting.get_mut(dependant) {
                    *count -= 1;
                    if *count == 0 {
                        ready.insert(*dependant);
                    }
                }
            }
        }
        match self.ids().find(|id| waiting[id] > 0) {
            Some(id) => Err(RewriteError::Cycle { node: self.label(id) }),
            None => Ok(order),
        }
    }

    /// The nodes whose values a node reads, each once; what its bodies read counts too.
    fn dependencies(&self, id: NodeId) -> BTreeSet<NodeId> {
        let node = self.node(id);
        let captured = node.attribute.iter().flat_map(bodies).flat_map(|body| free_names(body, &HashSet::new()));
        node.input.iter().cloned().chain(captured).filter_map(|value| self.producer(&value)).collect()
    }

    fn forget_use(&mut self, value: &str, id: NodeId) {
        if let Some(consumers) = self.consumers.get_mut(value)
            && let Some(place) = consumers.iter().position(|consumer| *consumer == id)
        {
            consumers.swap_remove(place);
        }
    }
}

fn label(node: &NodeProto) -> String {
    let first_output = node.output.first().map_or("", String::as_str);
    node.name.as_deref().filter(|name| !name.is_empty()).unwrap_or(first_output).to_owned()
}

/// The graphs in an attribute: bodies of control flow.
fn bodies(attribute: &AttributeProto) -> impl Iterator<Item = &GraphProto> {
    attribute.g.iter().chain(&attribute.graphs)
}

/// Values that a body reads from the graph around it.
fn free_names(body: &GraphProto, outer: &HashSet<&str>) -> Vec<String> {
    let mut own: HashSet<&str> = outer.clone();
    own.extend(body.input.iter().map(|input| input.name()));
    own.extend(body.initializer.iter().map(|tensor| tensor.name()));
    own.extend(body.node.iter().flat_map(|node| &node.output).map(String::as_str));
    let mut free = Vec::new();
    for node in &body.node {
        free.extend(node.input.iter().filter(|name| !name.is_empty() && !own.contains(name.as_str())).cloned());
        for inner in node.attribute.iter().flat_map(bodies) {
            free.extend(free_names(inner, &own));
        }
    }
    free.extend(body.output.iter().map(|output| output.name()).filter(|name| !own.contains(name)).map(str::to_owned));
    free
}

/// The tensor of a `Constant` node, in whichever attribute it lies; `None` for sparse tensors and texts.
fn constant_of(node: &NodeProto) -> Option<TensorProto> {
    let attribute = node.attribute.first()?;
    let tensor = match (attribute.name(), attribute.r#type()) {
        ("value", AttributeType::Tensor) => return attribute.t.clone(),
        ("value_float", _) => Tensor::scalar(attribute.f()),
        ("value_floats", _) => Tensor::f32(&[attribute.floats.len()], attribute.floats.clone()),
        ("value_int", _) => Tensor { dims: Vec::new(), ..Tensor::indices(&[attribute.i()]) },
        ("value_ints", _) => Tensor::indices(&attribute.ints),
        _ => return None,
    };
    Some(tensor.to_proto(""))
}

fn import(imports: &mut Vec<OperatorSetIdProto>, domain: &str) {
    if !imports.iter().any(|import| import.domain() == domain) {
        imports.push(OperatorSetIdProto { domain: Some(domain.to_owned()), version: Some(1) });
    }
}

#[cfg(test)]
mod tests {
    use super::super::build::Graph;
    use super::*;

    fn chain() -> Model {
        let mut graph = Graph::new("chain");
        let x = graph.input("x", ElementType::F32, &["n".into(), 2.into()]);
        let w = graph.weights("w", &[2], &[1.0, 2.0]);
        let sum = graph.node("Add", &[&x, &w], &[]);
        let relu = graph.node("Relu", &[&sum], &[]);
        graph.node("Neg", &[&sum], &[]);
        graph.output("y", &relu, ElementType::F32, &["n".into(), 2.into()]);
        graph.finish()
    }

    #[test]
    fn a_model_comes_back_as_it_was_but_for_what_is_dead() {
        let model = Rewriter::new(chain()).unwrap().finish().unwrap();
        assert_eq!(model.op_counts().keys().map(String::as_str).collect::<Vec<_>>(), ["Add", "Identity", "Relu"]);
        let again = Rewriter::new(model.clone()).unwrap().finish().unwrap();
        assert_eq!(again, model);
    }

    #[test]
    fn nodes_are_put_in_an_order_in_which_they_run() {
        let mut model = chain();
        model.proto_mut().graph.as_mut().unwrap().node.reverse();
        let model = Rewriter::new(model).unwrap().finish().unwrap();
        let ops: Vec<&str> = model.proto().graph.as_ref().unwrap().node.iter().map(|node| node.op_type()).collect();
        assert_eq!(ops, ["Add", "Relu", "Identity"]);
    }

    #[test]
    fn a_bypassed_output_keeps_its_name() {
        let mut rewriter = Rewriter::new(chain()).unwrap();
        let identity = rewriter.ids_of("Identity")[0];
        rewriter.bypass(identity).unwrap();
        let model = rewriter.finish().unwrap();
        assert_eq!((model.producer("y"), model.outputs()[0].name.as_str()), (Some("Relu"), "y"));
    }

    #[test]
    fn an_unsound_graph_is_told() {
        let change = |edit: &dyn Fn(&mut GraphProto)| {
            let mut model = chain();
            edit(model.proto_mut().graph.as_mut().unwrap());
            Rewriter::new(model).unwrap_err().to_string()
        };
        let cycle = change(&|graph| graph.node[0].input[1] = graph.node[1].output[0].clone());
        assert!(cycle.contains("depends on itself"), "{cycle}");
        let missing = change(&|graph| graph.node[0].input[1] = "nowhere".to_owned());
        assert!(missing.contains("reads \"nowhere\", which nothing produces"), "{missing}");
        let twice = change(&|graph| graph.node[2].output = graph.node[1].output.clone());
        assert!(twice.contains("two producers"), "{twice}");
        let mut old = chain();
        old.proto_mut().opset_import[0].version = Some(9);
        assert_eq!(
            Rewriter::new(old).unwrap_err().to_string(),
            "the model uses version 9 of the standard operators; 13 to 25 are rewritten"
        );
    }
}
