//! What a pass changes in the graph.

use std::collections::HashMap;

use super::{NodeId, Rewriter};
use crate::onnx::build::Attribute;
use crate::onnx::proto::{NodeProto, type_proto};
use crate::onnx::{ElementType, Tensor};

impl Rewriter {
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
    pub fn set_attribute(&mut self, id: NodeId, name: &str, value: impl Into<Attribute>) {
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

    /// A new node's proto, to be given to [`Self::insert`]; `domain` is `""` or [`MICROSOFT`](super::MICROSOFT).
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

    fn forget_use(&mut self, value: &str, id: NodeId) {
        if let Some(consumers) = self.consumers.get_mut(value)
            && let Some(place) = consumers.iter().position(|consumer| *consumer == id)
        {
            consumers.swap_remove(place);
        }
    }
}
