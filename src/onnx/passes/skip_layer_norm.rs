//! Residual additions before a LayerNormalization become one operator with it: `SkipLayerNormalization`.

use super::PassReport;
use crate::onnx::{MICROSOFT, NodeId, Rewriter, Shapes};

/// ONNX's default where the attribute is missing.
const DEFAULT_EPSILON: f32 = 1e-5;

/// Fuses what it can. The sum goes on as the operator's fourth output, and a bias that is added to one of the summands
/// becomes its fifth input.
#[must_use]
pub fn fuse_skip_layer_norm(rewriter: &mut Rewriter, shapes: &Shapes) -> PassReport {
    let mut report = PassReport::new("skip layer norm");
    for norm in rewriter.ids_of("LayerNormalization") {
        match find(rewriter, shapes, norm) {
            Err(why) => report.keep(rewriter, norm, why),
            Ok(skip) => {
                let bias = if skip.bias.is_some() { " with bias" } else { "" };
                report.apply(rewriter, norm, format!("SkipLayerNormalization{bias}"));
                skip.insert(rewriter, norm);
            }
        }
    }
    rewriter.remove_dead();
    report
}

struct Skip {
    add: NodeId,
    summands: [String; 2],
    bias: Option<String>,
}

fn find(rewriter: &Rewriter, shapes: &Shapes, norm: NodeId) -> Result<Skip, String> {
    let sum = rewriter.input(norm, 0);
    let dims = shapes.of(sum).ok_or("its input has no known dimensions")?;
    if dims.len() != 3 {
        return Err(format!("its input has {} dimensions, not batch, tokens and width", dims.len()));
    }
    let axis = rewriter.int(norm, "axis").unwrap_or(-1);
    if axis != -1 && axis != 2 {
        return Err("it normalises over more than the last axis".to_owned());
    }
    if rewriter.node(norm).output.iter().skip(1).any(|output| !output.is_empty()) {
        return Err("its mean or deviation is used".to_owned());
    }
    let add = rewriter.producer_of(sum, "Add").ok_or("its input is no sum")?;
    let summands = [rewriter.input(add, 0).to_owned(), rewriter.input(add, 1).to_owned()];
    if summands.iter().any(|value| rewriter.is_constant(value)) {
        return Err("what is added is a constant, such as a position".to_owned());
    }
    if summands.iter().any(|value| shapes.of(value) != Some(dims)) {
        return Err("the summands differ in size".to_owned());
    }
    // The bias of the layer that gives one of the summands.
    for (own, other) in [(0, 1), (1, 0)] {
        let Some(inner) = rewriter.producer_of(&summands[own], "Add") else { continue };
        let (first, second) = (rewriter.input(inner, 0), rewriter.input(inner, 1));
        let (value, bias) = if rewriter.is_constant(first) { (second, first) } else { (first, second) };
        let is_bias = rewriter.constant_dims(bias).is_some_and(|bias| bias == dims[2..]);
        if is_bias && rewriter.sole_consumer(&summands[own]).is_some() && shapes.of(value) == Some(dims) {
            let summands = [value.to_owned(), summands[other].clone()];
            return Ok(Skip { add, summands, bias: Some(bias.to_owned()) });
        }
    }
    Ok(Skip { add, summands, bias: None })
}

impl Skip {
    fn insert(self, rewriter: &mut Rewriter, norm: NodeId) {
        let Self { add, summands, bias } = self;
        let sum = rewriter.output(add, 0).to_owned();
        let output = rewriter.output(norm, 0).to_owned();
        let (gamma, beta) = (rewriter.input(norm, 1).to_owned(), rewriter.input(norm, 2).to_owned());
        let epsilon = rewriter.float(norm, "epsilon").unwrap_or(DEFAULT_EPSILON);
        rewriter.remove(norm);
        rewriter.remove(add);
        let is_used = !rewriter.consumers(&sum).is_empty() || rewriter.is_pinned(&sum);
        let mut inputs = vec![summands[0].as_str(), &summands[1], &gamma];
        inputs.extend((!beta.is_empty() || bias.is_some()).then_some(beta.as_str()));
        inputs.extend(bias.as_deref());
        let outputs = [output.as_str(), "", "", &sum];
        let outputs = if is_used { &outputs[..] } else { &outputs[..1] };
        let node = rewriter.new_node(MICROSOFT, "SkipLayerNormalization", &inputs, outputs);
        let id = rewriter.insert(node);
        rewriter.set_attribute(id, "epsilon", epsilon);
    }
}
