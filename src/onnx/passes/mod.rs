//! Rewrites of a model, one file each, and what each of them did.
//!
//! A pass takes a [`Rewriter`], changes what it can, and tells for every node that it is about whether
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
