//! Rewrites of a model, one file each, and what each of them did.
//!
//! A pass takes a [`Rewriter`](super::Rewriter), changes what it can, and tells for every node that it is about whether
//! it was applied and why not. Running a pass twice changes nothing the second time.

pub mod attention;
pub mod batch_norm;
pub mod clean;
pub mod conv_transpose;
mod element_types;
#[cfg(test)]
pub(crate) mod fixtures;
pub mod fp16;
pub mod freeze;
pub mod gelu;
pub mod image_input;
pub mod int8;
pub mod layer_norm;
pub mod layer_scale;
pub mod skip_layer_norm;
pub mod split_concat;

use std::error::Error;
use std::fmt;

use super::{NodeId, RewriteError, Rewriter};

/// A model that a pass wanted to know values of, and that did not run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EvaluateError {
    /// The model could not be run.
    #[error("the model does not run")]
    Run(#[source] Box<dyn Error + Send + Sync>),
    /// Its graph is not sound.
    #[error(transparent)]
    Rewrite(#[from] RewriteError),
}

/// What a pass did with one node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The node's name in the model as it came to the pass.
    pub node: String,
    /// Its operator.
    pub op: String,
    /// What was done, or why nothing was.
    pub outcome: Outcome,
}

/// Whether a pass applied to a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Done: what it became.
    Applied(String),
    /// Left as it was: why.
    Kept(String),
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { node, op, outcome } = self;
        match outcome {
            Outcome::Applied(what) => write!(f, "{op} {node}: {what}"),
            Outcome::Kept(why) => write!(f, "{op} {node}: kept, {why}"),
        }
    }
}

/// What a pass did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PassReport {
    /// The pass.
    pub pass: &'static str,
    /// One per node that the pass is about, in the graph's order.
    pub findings: Vec<Finding>,
}

impl PassReport {
    pub(crate) fn new(pass: &'static str) -> Self {
        Self { pass, findings: Vec::new() }
    }

    /// How many nodes it was applied to.
    #[must_use]
    pub fn applied(&self) -> usize {
        self.findings.iter().filter(|finding| matches!(finding.outcome, Outcome::Applied(_))).count()
    }

    /// Notes that it was done; call it while the node is still there.
    pub(crate) fn apply(&mut self, rewriter: &Rewriter, id: NodeId, what: impl Into<String>) {
        self.note(rewriter, id, Outcome::Applied(what.into()));
    }

    /// Notes that it was not done.
    pub(crate) fn keep(&mut self, rewriter: &Rewriter, id: NodeId, why: impl Into<String>) {
        self.note(rewriter, id, Outcome::Kept(why.into()));
    }

    fn note(&mut self, rewriter: &Rewriter, id: NodeId, outcome: Outcome) {
        let op = rewriter.node(id).op_type().to_owned();
        self.findings.push(Finding { node: rewriter.label(id), op, outcome });
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::freeze::Case;
    use super::*;
    use crate::onnx::{Dim, Model, Shapes, Tensor};

    /// Runs a model with one image input on made-up images; symbolic sides are 8, or 12 for the other side.
    pub(crate) fn evaluate_images(model: &Model, case: Case) -> Result<Option<Vec<Tensor>>, EvaluateError> {
        let (batch, side) = match case {
            Case::Batch(batch) => (batch, 8),
            Case::OtherSide => (1, 12),
        };
        let inputs = model.inputs();
        let is_open = |index: usize| !inputs.is_empty() && inputs[0].dims.as_ref().unwrap()[index].fixed().is_none();
        if case == Case::OtherSide && !(is_open(2) || is_open(3)) {
            return Ok(None);
        }
        let inputs: Vec<(&str, Tensor)> = inputs
            .iter()
            .map(|input| {
                let dims = input.dims.as_ref().unwrap().iter().enumerate();
                let size = |(index, dim): (usize, &Dim)| dim.fixed().unwrap_or(if index == 0 { batch } else { side });
                let dims: Vec<usize> = dims.map(size).collect();
                (input.name.as_str(), noise(&dims, 1))
            })
            .collect();
        let outputs = crate::inference::evaluate(model, &inputs);
        outputs.map(Some).map_err(|error| EvaluateError::Run(Box::new(error)))
    }

    /// A model of `tests/fixtures/onnx`.
    pub(crate) fn fixture(name: &str) -> Model {
        let folder = std::path::Path::new(file!()).ancestors().nth(4).unwrap().join("tests/fixtures/onnx");
        Model::load(&folder.join(format!("{name}.onnx"))).unwrap()
    }

    /// The dimensions of all values for two images.
    pub(crate) fn shapes_of(rewriter: &Rewriter) -> Shapes {
        let (question, values) = Shapes::question(rewriter).unwrap();
        let answer = evaluate_images(&question, Case::Batch(2)).unwrap().unwrap();
        Shapes::from_answer(values, &answer)
    }

    /// Numbers between -1 and 1 that look random.
    pub(crate) fn noise(dims: &[usize], seed: u32) -> Tensor {
        let mut state = seed.wrapping_mul(2_654_435_761) | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            (state >> 8) as f32 / 8_388_608.0 - 1.0
        };
        Tensor::f32(dims, (0..dims.iter().product()).map(|_| next()).collect())
    }

    /// Greatest difference of two outputs, in units of the first one's greatest value.
    pub(crate) fn relative_difference(a: &Tensor, b: &Tensor) -> f32 {
        assert_eq!(a.dims, b.dims);
        let (a, b) = (a.to_f32().unwrap(), b.to_f32().unwrap());
        let scale = a.iter().fold(f32::MIN_POSITIVE, |scale, value| scale.max(value.abs()));
        a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / scale
    }
}
