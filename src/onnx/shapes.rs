//! The dimensions that every value of a model has for one batch size, as the model itself computes them.
//!
//! They are observed, not inferred: each value's `Shape` becomes an output of the model, which is then run once. So they
//! hold for every operator there is, and cost no table of rules.

use std::collections::HashMap;

use super::proto::NodeProto;
use super::{Model, RewriteError, Rewriter, Tensor, Values};

/// The dimensions of values, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Shapes {
    dims: HashMap<String, Vec<usize>>,
    batch: usize,
}

impl Shapes {
    /// The model whose outputs are the dimensions of all values that nodes of `rewriter` give, and the values' names in
    /// that order.
    ///
    /// # Errors
    /// [`RewriteError`] if the graph is not sound.
    pub fn question(rewriter: &Rewriter) -> Result<(Model, Vec<String>), RewriteError> {
        let mut asking = rewriter.clone();
        let ids: Vec<_> = asking.ids().collect();
        let is_tensor = |node: &NodeProto| {
            let op = node.op_type();
            !op.contains("Sequence") && !op.starts_with("Optional") && op != "If" && op != "Loop"
        };
        let nodes = ids.into_iter().map(|id| rewriter.node(id)).filter(|node| is_tensor(node));
        let values: Vec<String> =
            nodes.flat_map(|node| &node.output).filter(|value| !value.is_empty()).cloned().collect();
        let mut questions = Vec::with_capacity(values.len());
        for value in &values {
            let answer = asking.fresh(&format!("{value}/dims"));
            let node = asking.new_node("", "Shape", &[value], &[&answer]);
            asking.insert(node);
            questions.push(answer);
        }
        Ok((asking.extract(&questions)?, values))
    }

    /// Reads the answer to [`Self::question`] for a batch of that size.
    #[must_use]
    pub fn from_answer(values: Vec<String>, answer: &[Tensor], batch: usize) -> Self {
        let dims = |tensor: &Tensor| match &tensor.values {
            Values::I64(dims) => dims.iter().map(|dim| usize::try_from(*dim).unwrap_or(0)).collect(),
            _ => Vec::new(),
        };
        Self { dims: values.into_iter().zip(answer.iter().map(dims)).collect(), batch }
    }

    /// A value's dimensions; `None` if it is a constant, or came into the graph later.
    #[must_use]
    pub fn of(&self, value: &str) -> Option<&[usize]> {
        self.dims.get(value).map(Vec::as_slice)
    }

    /// The size of the batch that they hold for.
    #[must_use]
    pub fn batch(&self) -> usize {
        self.batch
    }
}
