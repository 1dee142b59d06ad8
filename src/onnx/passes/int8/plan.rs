//! Which nodes a static quantisation turns to bytes: those that multiply weights, and between them those that bytes
//! can pass through.

use std::collections::{BTreeMap, BTreeSet};

use super::affine::Affine;
use super::{ActivationRanges, RangeError};
use crate::onnx::{ElementType, MICROSOFT, NodeId, Rewriter};

/// Weights below which a product is too small to gain: quantising its input costs what the bytes save.
const FEWEST_WEIGHTS: usize = 16_384;

/// Whom the INT8 model is written for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Form {
    /// ONNX Runtime's own CPU kernels: what only moves values is put on bytes, and some products are its own operators.
    #[default]
    Kernels,
    /// Providers that fuse for themselves, such as OpenVINO's: standard operators that read floats, each value behind
    /// one `QuantizeLinear` and `DequantizeLinear`, the graph as it was otherwise.
    Plain,
}

/// What a node does with bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// Multiplies constant weights.
    Weighted,
    /// Moves bytes without changing them, so that its output has its input's scale.
    Carrier,
    /// Computes with bytes, and gives bytes with a scale of their own.
    Rescaling,
}

/// The nodes that become INT8.
#[derive(Clone, Debug, Default)]
pub(super) struct Plan {
    form: Form,
    nodes: BTreeMap<NodeId, Role>,
    /// Why a node that multiplies weights, or looks as if it did, stays in float.
    pub(super) kept: BTreeMap<NodeId, String>,
}

impl Plan {
    /// All nodes that can become INT8, as far as can be told without ranges.
    pub(super) fn new(rewriter: &Rewriter, exclude: &BTreeSet<String>, form: Form) -> Self {
        let mut plan = Self { form, ..Self::default() };
        for id in rewriter.ids() {
            let excluded = exclude.contains(&rewriter.label(id));
            match weighted(rewriter, id, form) {
                Some(_) if excluded => {
                    plan.kept.insert(id, "left in float on request".to_owned());
                }
                Some(Ok(())) => {
                    plan.nodes.insert(id, Role::Weighted);
                }
                Some(Err(why)) => {
                    plan.kept.insert(id, why);
                }
                None if excluded => {}
                None => plan.nodes.extend(between(rewriter, id).map(|role| (id, role))),
            }
        }
        plan.prune(rewriter);
        plan
    }

    /// Takes out the nodes whose values have no usable range.
    pub(super) fn restrict(&mut self, rewriter: &Rewriter, ranges: &ActivationRanges) {
        loop {
            let unusable: Vec<(NodeId, RangeError)> = self
                .nodes()
                .filter_map(|(id, _)| {
                    let values = inputs(rewriter, id).into_iter().chain(self.output(rewriter, id));
                    let error = values.into_iter().find_map(|value| self.affine(rewriter, ranges, &value).err())?;
                    Some((id, error))
                })
                .collect();
            if unusable.is_empty() {
                return;
            }
            for (id, error) in unusable {
                if self.nodes.remove(&id) == Some(Role::Weighted) {
                    self.kept.insert(id, error.to_string());
                }
            }
            self.prune(rewriter);
        }
    }

    pub(super) fn nodes(&self) -> impl Iterator<Item = (NodeId, Role)> + '_ {
        self.nodes.iter().map(|(id, role)| (*id, *role))
    }

    /// The nodes that multiply weights.
    pub(super) fn weighted(&self) -> impl Iterator<Item = NodeId> + '_ {
        self.nodes().filter_map(|(id, role)| (role == Role::Weighted).then_some(id))
    }

    pub(super) fn role(&self, id: NodeId) -> Option<Role> {
        self.nodes.get(&id).copied()
    }

    /// The value that a node gives as bytes; `None` if it gives floats.
    pub(super) fn output(&self, rewriter: &Rewriter, id: NodeId) -> Option<String> {
        let role = self.role(id)?;
        let rectifier = self.rectifier(rewriter, id);
        let value = rewriter.output(rectifier.unwrap_or(id), 0).to_owned();
        let readers = rewriter.consumers(&value);
        let reads_bytes = |reader: &NodeId| self.nodes.contains_key(reader);
        let gives_bytes = match self.form {
            // Those who want floats read them as they were before they became bytes.
            Form::Plain => readers.iter().any(reads_bytes),
            // Convolutions have no form that takes bytes and gives floats; products of matrices have, attention no other.
            Form::Kernels if is_attention(rewriter, id) => false,
            Form::Kernels if role == Role::Weighted && !rewriter.is(id, "Conv") => {
                !readers.is_empty() && readers.iter().all(reads_bytes) && !rewriter.is_pinned(&value)
            }
            Form::Kernels => true,
        };
        gives_bytes.then_some(value)
    }

    /// The node after `id` that only cuts off what bytes cut off anyway: their zero point is its lower bound.
    pub(super) fn rectifier(&self, rewriter: &Rewriter, id: NodeId) -> Option<NodeId> {
        if self.role(id)? == Role::Carrier {
            return None;
        }
        let next = rewriter.sole_consumer(rewriter.output(id, 0))?;
        // An upper bound holds too: no byte means more than what calibration saw behind it.
        let from_zero = || rewriter.scalar(rewriter.input(next, 1)) == Some(0.0);
        let bounded = || matches!(rewriter.input(next, 2), "") || rewriter.scalar(rewriter.input(next, 2)).is_some();
        (rewriter.is(next, "Relu") || rewriter.is(next, "Clip") && from_zero() && bounded()).then_some(next)
    }

    /// The value from whose range a value's scale is taken: carriers keep the scale of what they carry.
    pub(super) fn root(&self, rewriter: &Rewriter, value: &str) -> String {
        let mut value = value;
        while let Some(id) = rewriter.producer(value).filter(|id| self.role(*id) == Some(Role::Carrier)) {
            value = rewriter.input(id, 0);
        }
        value.to_owned()
    }

    /// The value from whose range a value's scale is taken, and what its bytes mean.
    pub(super) fn affine(
        &self,
        rewriter: &Rewriter,
        ranges: &ActivationRanges,
        value: &str,
    ) -> Result<(String, Affine), RangeError> {
        let root = self.root(rewriter, value);
        let affine = Affine::covering(ranges.get(&root)?, &root)?;
        Ok((root, affine))
    }

    /// Takes out nodes between that would turn floats to bytes, or bytes to floats, for themselves alone.
    fn prune(&mut self, rewriter: &Rewriter) {
        loop {
            let given: BTreeSet<String> = self.nodes().filter_map(|(id, _)| self.output(rewriter, id)).collect();
            let read: BTreeSet<String> = self.nodes().flat_map(|(id, _)| inputs(rewriter, id)).collect();
            let idle = |(id, role): (NodeId, Role)| {
                let gives_to_some = || self.output(rewriter, id).is_some_and(|value| read.contains(&value));
                let takes_from_some = || inputs(rewriter, id).iter().any(|value| given.contains(value));
                (role != Role::Weighted && !(gives_to_some() && takes_from_some())).then_some(id)
            };
            let idle: Vec<NodeId> = self.nodes().filter_map(idle).collect();
            if idle.is_empty() {
                return;
            }
            for id in idle {
                self.nodes.remove(&id);
            }
        }
    }
}

/// The inputs of a node that hold activations.
pub(super) fn inputs(rewriter: &Rewriter, id: NodeId) -> Vec<String> {
    let all = &rewriter.node(id).input;
    let count = match rewriter.node(id).op_type() {
        "Concat" => all.len(),
        "Add" | "Mul" => 2,
        _ => 1,
    };
    all.iter().take(count).cloned().collect()
}

/// Whether a node that multiplies weights can be quantised, and why not; `None` for other nodes.
pub(super) fn weighted(rewriter: &Rewriter, id: NodeId, form: Form) -> Option<Result<(), String>> {
    let node = rewriter.node(id);
    let why = match (node.domain(), node.op_type()) {
        (MICROSOFT, "Attention") if form == Form::Kernels => match attention_obstacle(rewriter, id) {
            Some(why) => why,
            None => return Some(Ok(())),
        },
        (MICROSOFT, "Attention" | "FusedMatMul" | "FusedConv" | "FusedGemm") => {
            "is fused already: quantisation comes before fusion into ONNX Runtime's operators".to_owned()
        }
        ("" | "ai.onnx", "ConvTranspose") if form == Form::Kernels => {
            "ONNX Runtime has no INT8 kernel for it; one of kernel 2 and stride 2 can first become a Conv".to_owned()
        }
        ("" | "ai.onnx", "Conv" | "ConvTranspose" | "MatMul" | "Gemm") => match obstacle(rewriter, id) {
            Some(why) => why,
            None => return Some(Ok(())),
        },
        _ => return None,
    };
    Some(Err(why))
}

/// Why an attention's packed projections can't be bytes.
fn attention_obstacle(rewriter: &Rewriter, id: NodeId) -> Option<String> {
    let node = rewriter.node(id);
    if node.input.len() > 3 || node.output.len() > 1 {
        return Some("has a mask or a past, with which its projections are not quantised".to_owned());
    }
    if let Some(name) =
        node.attribute.iter().map(|attribute| attribute.name()).find(|name| !matches!(*name, "num_heads" | "scale"))
    {
        return Some(format!("has the attribute {name:?}, with which its projections are not quantised"));
    }
    let is_float =
        |value: &str| rewriter.constant_element(value) == Some(ElementType::F32) && rewriter.floats(value).is_some();
    (![1, 2].iter().all(|index| is_float(rewriter.input(id, *index))))
        .then(|| "its weights or its bias are no constant floats in the model file".to_owned())
}

/// True for `com.microsoft.Attention`, whose projections are packed.
pub(super) fn is_attention(rewriter: &Rewriter, id: NodeId) -> bool {
    let node = rewriter.node(id);
    (node.domain(), node.op_type()) == (MICROSOFT, "Attention")
}

fn obstacle(rewriter: &Rewriter, id: NodeId) -> Option<String> {
    let (x, weights, bias) = (rewriter.input(id, 0), rewriter.input(id, 1), rewriter.input(id, 2));
    if rewriter.producer_of(weights, "DequantizeLinear").is_some() {
        return Some("is INT8 already".to_owned());
    }
    if rewriter.is_constant(x) {
        return Some("its first input is the constant".to_owned());
    }
    let Some(dims) = rewriter.constant_dims(weights) else {
        return Some("multiplies two activations, which as bytes lose too much (cosine 0.88 on a ViT-S/16)".to_owned());
    };
    let element = rewriter.constant_element(weights).unwrap_or(ElementType::Other(0));
    if element != ElementType::F32 {
        return Some(format!("its weights are of type {element}, not float"));
    }
    if !bias.is_empty() && !rewriter.is_constant(bias) {
        return Some("its bias is no constant".to_owned());
    }
    if [weights, bias].iter().any(|value| !value.is_empty() && rewriter.floats(value).is_none()) {
        return Some("its weights lie outside the model file".to_owned());
    }
    if rewriter.is(id, "ConvTranspose") && rewriter.int(id, "group").unwrap_or(1) != 1 {
        return Some("has groups, so that no axis of its weights has its output channels".to_owned());
    }
    if rewriter.is(id, "Conv") || rewriter.is(id, "ConvTranspose") {
        return (dims.len() != 4).then(|| "is not two-dimensional".to_owned());
    }
    if dims.len() != 2 {
        return Some(format!("its weights have {} dimensions, not 2", dims.len()));
    }
    if dims[0] * dims[1] < FEWEST_WEIGHTS {
        return Some(format!("has {} weights, too few to gain", dims[0] * dims[1]));
    }
    if rewriter.is(id, "Gemm") {
        let plain = rewriter.float(id, "alpha").unwrap_or(1.0) == 1.0
            && rewriter.float(id, "beta").unwrap_or(1.0) == 1.0
            && rewriter.int(id, "transA").unwrap_or(0) == 0;
        let columns = dims[usize::from(rewriter.int(id, "transB").unwrap_or(0) == 0)];
        let fits = bias.is_empty()
            || rewriter.constant_dims(bias).is_some_and(|dims| dims.iter().product::<usize>() == columns);
        if !plain || !fits {
            return Some("scales or transposes what INT8 products can't".to_owned());
        }
    }
    None
}

/// What a node that multiplies no weights could do with bytes.
fn between(rewriter: &Rewriter, id: NodeId) -> Option<Role> {
    let node = rewriter.node(id);
    if !matches!(node.domain(), "" | "ai.onnx") {
        return None;
    }
    match node.op_type() {
        "Reshape" | "Flatten" | "Transpose" | "Squeeze" | "Unsqueeze" | "DepthToSpace" => Some(Role::Carrier),
        "MaxPool" if node.output.len() == 1 => Some(Role::Carrier),
        "Resize" if rewriter.text(id, "mode").is_none_or(|mode| matches!(mode.as_str(), "nearest" | "linear")) => {
            Some(Role::Carrier)
        }
        "Add" | "Mul" if node.input.iter().any(|value| rewriter.is_constant(value)) => None,
        "Concat" | "Add" | "Mul" | "AveragePool" | "GlobalAveragePool" | "Sigmoid" | "LeakyRelu" => {
            Some(Role::Rescaling)
        }
        _ => None,
    }
}
