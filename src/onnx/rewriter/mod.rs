//! A model's graph, indexed so that it can be rewritten: every change that a pass makes goes through [`Rewriter`].
//!
//! Here it is taken apart and put together; `query` has what a pass asks of it, `edit` what a pass changes.
//! It keeps the graph sound: a value has one producer, names are never taken twice, the model's inputs and outputs keep
//! their names, and values that the body of an `If` or `Loop` reads are never renamed or removed.

mod edit;
mod query;

use std::collections::{BTreeSet, HashMap, HashSet};

use super::Model;
use super::proto::attribute_proto::AttributeType;
use super::proto::{
    AttributeProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TensorProto, ValueInfoProto,
};
use super::tensor::{Tensor, TensorError};

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
                wanted.extend(reads(self.node(id)));
            }
            used.insert(value);
        }
        let dead: Vec<NodeId> = self.ids().filter(|id| !alive.contains(id)).collect();
        let removed = dead.into_iter().filter_map(|id| self.remove(id)).collect();
        self.constants.retain(|name, _| used.contains(name));
        self.constant_order.retain(|name| used.contains(name));
        removed
    }

    /// The model without nodes and constants, to be changed: inputs, outputs, metadata.
    pub fn frame(&mut self) -> &mut ModelProto {
        &mut self.model
    }

    /// The part of the model that gives `values`, which become its outputs.
    ///
    /// # Errors
    /// [`RewriteError::Cycle`] if a pass tied a knot.
    pub fn extract(&self, values: &[String]) -> Result<Model, RewriteError> {
        let mut part = self.clone();
        let output = |name: &String| ValueInfoProto { name: Some(name.clone()), ..Default::default() };
        part.model.graph.get_or_insert_default().output = values.iter().map(output).collect();
        part.outputs = values.iter().cloned().collect();
        part.pinned = part.outputs.union(&part.inputs).cloned().collect();
        let mut model = part.finish()?;
        let graph = model.proto.graph.get_or_insert_default();
        let read: HashSet<String> = graph.node.iter().flat_map(reads).collect();
        graph.input.retain(|input| read.contains(input.name()));
        Ok(model)
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
        reads(self.node(id)).filter_map(|value| self.producer(&value)).collect()
    }
}

/// The values that a node reads, those that its bodies read from the graph around them included.
fn reads(node: &NodeProto) -> impl Iterator<Item = String> {
    let captured = node.attribute.iter().flat_map(bodies).flat_map(|body| free_names(body, &HashSet::new()));
    node.input.iter().cloned().chain(captured)
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
    use super::super::ElementType;
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
    fn what_a_body_reads_is_alive() {
        let mut model = chain();
        let graph = model.proto_mut().graph.as_mut().unwrap();
        let sum = graph.node[0].output[0].clone();
        let text = |text: &str| Some(text.to_owned());
        let named = |name: &str| ValueInfoProto { name: text(name), ..Default::default() };
        let body = |op: &str| GraphProto {
            node: vec![NodeProto {
                op_type: text(op),
                input: vec![sum.clone()],
                output: vec![format!("{op}_y")],
                ..Default::default()
            }],
            output: vec![named(&format!("{op}_y"))],
            ..Default::default()
        };
        let branch = |name: &str, op| AttributeProto {
            name: text(name),
            r#type: Some(AttributeType::Graph.into()),
            g: Some(body(op)),
            ..Default::default()
        };
        graph.input.push(named("choice"));
        graph.node.push(NodeProto {
            op_type: text("If"),
            input: vec!["choice".to_owned()],
            output: vec!["chosen".to_owned()],
            attribute: vec![branch("then_branch", "Neg"), branch("else_branch", "Abs")],
            ..Default::default()
        });
        let part = Rewriter::new(model).unwrap().extract(&["chosen".to_owned()]).unwrap();
        assert_eq!(part.op_counts().into_iter().collect::<Vec<_>>(), [("Add".to_owned(), 1), ("If".to_owned(), 1)]);
        assert_eq!(part.inputs().len(), 2);
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
