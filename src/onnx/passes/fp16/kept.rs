//! Which nodes stay 32 bits, and why.
//!
//! ONNX Runtime's fused kernels read 16 bits and sum in 32 (on CUDA: `MatMul`, `Conv`, `LayerNormalization`, `Softmax`,
//! `Attention`, pooling and `ReduceMean`), so they are safe. Written out in single operators, the same arithmetic
//! rounds to 16 bits after every step: squares beyond 65504 overflow and small variances vanish.

use std::collections::{BTreeSet, HashMap, HashSet};

use super::super::{Finding, Outcome, PassReport};
use super::{is_float, range};
use crate::onnx::{ElementType, MICROSOFT, NodeId, RewriteError, Rewriter};

/// Operators of ONNX Runtime's own whose kernels take 16 bits and sum in 32.
const MICROSOFT_IN_HALF: [&str; 19] = [
    "Attention",
    "BiasAdd",
    "BiasGelu",
    "BiasSoftmax",
    "BiasSplitGelu",
    "EmbedLayerNormalization",
    "FastGelu",
    "FusedMatMul",
    "Gelu",
    "GroupNorm",
    "GroupQueryAttention",
    "MultiHeadAttention",
    "PackedAttention",
    "PackedMultiHeadAttention",
    "QuickGelu",
    "RotaryEmbedding",
    "SkipGroupNorm",
    "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization",
];

/// The nodes that stay 32 bits, each with its reason; constants that are one are told in the report.
pub(super) fn reasons(
    rewriter: &Rewriter,
    elements: &HashMap<String, ElementType>,
    also_keep: &BTreeSet<String>,
    report: &mut PassReport,
) -> Result<HashMap<NodeId, String>, RewriteError> {
    let order = rewriter.order()?;
    let order: Vec<NodeId> = order.into_iter().filter(|id| is_float(rewriter, *id, elements)).collect();
    let floats = Floats { rewriter, elements, order };
    let mut kept = HashMap::new();
    let objections = floats.objections(report)?;
    for id in &floats.order {
        let by_caller = also_keep.contains(&rewriter.label(*id)).then_some("it was named as sensitive");
        let reason = by_caller.or_else(|| of_operator(rewriter, *id)).map(str::to_owned);
        let by_constant = || {
            let inputs = &rewriter.node(*id).input;
            inputs.iter().find_map(|value| Some(format!("its constant {value} {}", objections.get(value.as_str())?)))
        };
        let by_attribute = || Some(format!("its value {}", objections.get(rewriter.output(*id, 0))?));
        if let Some(reason) = reason.or_else(by_constant).or_else(by_attribute) {
            kept.insert(*id, reason);
        }
    }
    for id in floats.normalizations() {
        kept.entry(id).or_insert_with(|| {
            "it is part of a norm or softmax in single operators, whose squares and sums need 32 bits".to_owned()
        });
    }
    for id in floats.computed_from_integers(&kept) {
        kept.entry(id).or_insert_with(|| {
            "it computes with what was an integer, and 16 bits are exact up to 2048 only".to_owned()
        });
    }
    Ok(kept)
}

/// Why an operator stays 32 bits wherever it stands.
fn of_operator(rewriter: &Rewriter, id: NodeId) -> Option<&'static str> {
    let node = rewriter.node(id);
    match node.domain() {
        "" | "ai.onnx" => {}
        MICROSOFT if MICROSOFT_IN_HALF.contains(&node.op_type()) => return None,
        _ => return Some("whether its kernel sums in 32 bits is not known"),
    }
    match node.op_type() {
        _ if leaves_range(rewriter, id) => Some("its results easily leave the range of 16 bits"),
        "GlobalLpPool" | "LpNormalization" | "LpPool" | "MeanVarianceNormalization" => Some("it squares"),
        // Later it says itself that it computes in 32 bits.
        "GroupNormalization" if rewriter.opset() < 21 => Some("before opset 21 it squares in the type of its input"),
        "QuantizeLinear" | "DequantizeLinear" | "DynamicQuantizeLinear" | "QLinearConv" | "QLinearMatMul" => {
            Some("scales of integers are 32 bits")
        }
        "AffineGrid" | "GridSample" | "MaxRoiPool" | "RoiAlign" => Some("16 bits are too few for coordinates"),
        "IsInf" if rewriter.opset() < 20 => Some("before opset 20 it takes 32 bits only"),
        "Bernoulli" | "BlackmanWindow" | "DFT" | "Det" | "EyeLike" | "HammingWindow" | "HannWindow"
        | "MelWeightMatrix" | "Multinomial" | "NonMaxSuppression" | "RandomNormal" | "RandomNormalLike"
        | "RandomUniform" | "RandomUniformLike" | "Range" | "STFT" => Some("its kernel takes 32 bits only"),
        _ => None,
    }
}

/// Powers, their inverses, and sums over many values: the steps of a variance, norm or softmax.
fn leaves_range(rewriter: &Rewriter, id: NodeId) -> bool {
    let is_square = || rewriter.is(id, "Mul") && rewriter.input(id, 0) == rewriter.input(id, 1);
    const STEPS: [&str; 13] = [
        "CumSum",
        "Exp",
        "Log",
        "Pow",
        "Reciprocal",
        "ReduceL1",
        "ReduceL2",
        "ReduceLogSum",
        "ReduceLogSumExp",
        "ReduceProd",
        "ReduceSum",
        "ReduceSumSquare",
        "Sqrt",
    ];
    STEPS.iter().any(|op| rewriter.is(id, op)) || is_square()
}

/// Moves values without computing.
fn moves(rewriter: &Rewriter, id: NodeId) -> bool {
    const MOVES: [&str; 13] = [
        "Cast",
        "Concat",
        "Expand",
        "Flatten",
        "Gather",
        "Identity",
        "Pad",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
    ];
    MOVES.iter().any(|op| rewriter.is(id, op))
}

/// The nodes that compute with 32-bit floats, in an order in which they run.
struct Floats<'a> {
    rewriter: &'a Rewriter,
    elements: &'a HashMap<String, ElementType>,
    order: Vec<NodeId>,
}

impl Floats<'_> {
    /// What is to be said against converting constants, by name; for a `ConstantOfShape`, by that of its result.
    fn objections(&self, report: &mut PassReport) -> Result<HashMap<String, String>, RewriteError> {
        let mut objections = HashMap::new();
        for name in self.rewriter.constants().into_iter().filter(|name| self.is_f32(name)) {
            // Those that nothing computes with are read by no one here.
            if !self.rewriter.consumers(&name).iter().any(|id| self.order.contains(id)) {
                continue;
            }
            let Some(tensor) = self.rewriter.constant(&name)? else { continue };
            if let Some(why) = range::Loss::of(&tensor).objection() {
                let outcome = Outcome::Kept(format!("it {why}"));
                report.findings.push(Finding { node: name.clone(), op: "constant".to_owned(), outcome });
                objections.insert(name, why);
            }
        }
        for id in self.order.iter().filter(|id| self.rewriter.is(**id, "ConstantOfShape")) {
            if let Some(why) = self.rewriter.tensor(*id, "value")?.and_then(|value| range::Loss::of(&value).objection())
            {
                objections.insert(self.rewriter.output(*id, 0).to_owned(), why);
            }
        }
        Ok(objections)
    }

    fn is_f32(&self, value: &str) -> bool {
        self.elements.get(value) == Some(&ElementType::F32)
    }

    /// The nodes that give the 32-bit floats that a node reads; constants and inputs are given by none.
    fn producers(&self, id: NodeId) -> impl Iterator<Item = NodeId> + '_ {
        let inputs = self.rewriter.node(id).input.iter();
        inputs.filter(|value| self.is_f32(value)).filter_map(|value| self.rewriter.producer(value))
    }

    fn consumers(&self, id: NodeId) -> impl Iterator<Item = NodeId> + '_ {
        self.rewriter.node(id).output.iter().flat_map(|value| self.rewriter.consumers(value)).copied()
    }

    fn is_any(&self, id: NodeId, ops: &[&str]) -> bool {
        ops.iter().any(|op| self.rewriter.is(id, op))
    }

    /// The nodes between the powers and sums of a normalisation that is written out, and those that apply it:
    /// `(x - mean) / sqrt(mean((x - mean)^2) + epsilon)`, `x / max(norm, epsilon)`, `exp(x - max) / sum(exp(x - max))`.
    fn normalizations(&self) -> HashSet<NodeId> {
        let reads_constant =
            |id: NodeId| self.rewriter.node(id).input.iter().any(|value| self.rewriter.is_constant(value));
        let passes_on = |id: NodeId| {
            self.is_any(id, &["ReduceMean", "ReduceMax", "ReduceMin", "Neg", "Abs", "Clip"])
                || moves(self.rewriter, id)
                || (self.is_any(id, &["Add", "Sub", "Mul", "Div", "Max", "Min"]) && reads_constant(id))
        };
        let steps: HashSet<NodeId> = self.order.iter().copied().filter(|id| leaves_range(self.rewriter, *id)).collect();
        let mut after = steps.clone();
        for id in self.order.iter().filter(|id| passes_on(**id)) {
            if self.producers(*id).any(|producer| after.contains(&producer)) {
                after.insert(*id);
            }
        }
        let mut kept = steps;
        for id in self.order.iter().filter(|id| self.is_any(**id, &["Div", "Mul"]) && !reads_constant(**id)) {
            if self.producers(*id).any(|producer| after.contains(&producer)) {
                kept.insert(*id);
            }
        }
        for id in self.order.iter().rev() {
            if passes_on(*id) && after.contains(id) && self.consumers(*id).any(|consumer| kept.contains(&consumer)) {
                kept.insert(*id);
            }
        }
        for id in self.order.iter().filter(|id| self.is_any(**id, &["Sub"])) {
            if self.consumers(*id).any(|consumer| leaves_range(self.rewriter, consumer)) {
                kept.insert(*id);
                kept.extend(self.producers(*id).filter(|mean| self.is_any(*mean, &["ReduceMean", "ReduceMax"])));
            }
        }
        kept
    }

    /// The nodes that compute with what was an integer: sizes, positions, pixels before they are normalised.
    ///
    /// A pixel times `1 / (255 std)` less `mean / std` is off by up to 2⁻¹¹ of each of three terms in 16 bits: with the
    /// constants of ImageNet by 0.3 of the step between two grey levels. In 32 bits only the result is rounded.
    fn computed_from_integers(&self, kept: &HashMap<NodeId, String>) -> HashSet<NodeId> {
        const COMPUTES: [&str; 17] = [
            "Abs", "Add", "Ceil", "Clip", "Cos", "Div", "Floor", "Max", "Min", "Mod", "Mul", "Neg", "Range", "Round",
            "Sin", "Sub", "Sqrt",
        ];
        let is_integer = |value: &str| {
            use ElementType::{I8, I32, I64, Other, U8};
            matches!(self.elements.get(value), Some(U8 | I8 | I32 | I64 | Other(_)))
        };
        let mut exact = HashSet::new();
        for id in &self.order {
            let is_cast = self.rewriter.is(*id, "Cast");
            let begins = is_cast && is_integer(self.rewriter.input(*id, 0)) || self.rewriter.is(*id, "Range");
            let continues = || {
                let mut producers = self.producers(*id).peekable();
                let reads_input = self.rewriter.node(*id).input.iter().any(|value| {
                    self.is_f32(value) && self.rewriter.producer(value).is_none() && !self.rewriter.is_constant(value)
                });
                producers.peek().is_some() && !reads_input && producers.all(|producer| exact.contains(&producer))
            };
            if begins || (self.is_any(*id, &COMPUTES) || moves(self.rewriter, *id)) && continues() {
                exact.insert(*id);
            }
        }
        // What only moves values does so in the type of those who read them.
        let mut stays: HashSet<NodeId> = HashSet::new();
        for id in self.order.iter().rev().filter(|id| exact.contains(id)) {
            let is_needed =
                || self.consumers(*id).any(|consumer| stays.contains(&consumer) || kept.contains_key(&consumer));
            if !moves(self.rewriter, *id) || is_needed() {
                stays.insert(*id);
            }
        }
        stays
    }
}
