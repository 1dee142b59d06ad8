//! Which nodes to leave in float: ranks them by what bytes lose there, and leaves the worst until a model is good enough.

use super::affine::{Magnitude, quantize_weights};
use super::plan::{Plan, inputs};
use super::{ActivationRanges, StaticOptions, quantize_static};
use crate::onnx::passes::PassReport;
use crate::onnx::{Model, NodeId, RewriteError, Rewriter, Values};

/// What INT8 is expected to lose at one node.
#[derive(Clone, Debug, PartialEq)]
pub struct Sensitivity {
    /// The node's name.
    pub node: String,
    /// Mean square of the error by mean square of the value, summed over activation, weights and result: independent
    /// errors add up.
    pub noise: f64,
}

/// The nodes that multiply weights, the worst first.
#[must_use]
pub fn sensitivities(rewriter: &Rewriter, ranges: &ActivationRanges, options: &StaticOptions) -> Vec<Sensitivity> {
    let mut plan = Plan::new(rewriter, &options.exclude);
    plan.restrict(rewriter, ranges);
    let magnitude = Magnitude::of(options.reduce_range);
    let rate = |id: NodeId| {
        let values = inputs(rewriter, id).into_iter().chain(plan.output(rewriter, id));
        let activations: f64 = values.map(|value| ranges.noise(&plan.root(rewriter, &value))).sum();
        let noise = activations + weight_noise(rewriter, id, magnitude);
        Sensitivity { node: rewriter.label(id), noise }
    };
    let mut rated: Vec<Sensitivity> = plan.weighted().map(rate).collect();
    rated.sort_by(|a, b| b.noise.total_cmp(&a.noise));
    rated
}

fn weight_noise(rewriter: &Rewriter, id: NodeId, magnitude: Magnitude) -> f64 {
    let by_rows = rewriter.is(id, "Conv") || rewriter.int(id, "transB").unwrap_or(0) != 0;
    let axis = usize::from(!by_rows);
    let Some(weights) = rewriter.floats(rewriter.input(id, 1)) else { return 0.0 };
    let (Some(floats), Ok(quantized)) = (weights.to_f32(), quantize_weights(&weights, axis, magnitude, None)) else {
        return 0.0;
    };
    let Values::I8(bytes) = &quantized.bytes.values else { return 0.0 };
    let inner: usize = weights.dims[axis + 1..].iter().product();
    let (mut lost, mut all) = (0.0, 0.0);
    for (index, (float, byte)) in floats.iter().zip(bytes).enumerate() {
        let scale = quantized.scales[index / inner.max(1) % quantized.scales.len()];
        lost += f64::from(float - f32::from(*byte) * scale).powi(2);
        all += f64::from(*float).powi(2);
    }
    if all > 0.0 { lost / all } else { 0.0 }
}

/// A model that was quantised as far as its error allows.
#[derive(Clone, Debug)]
pub struct Search {
    /// The model.
    pub model: Model,
    /// What was done, and what was left in float.
    pub report: PassReport,
    /// Its error, at most the gate.
    pub error: f64,
    /// How many models were measured.
    pub measured: usize,
}

/// A search that could not go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SearchError<E: std::error::Error + 'static> {
    /// The model can't be rewritten.
    #[error(transparent)]
    Rewrite(#[from] RewriteError),
    /// A model can't be measured.
    #[error("the error of a quantised model can't be measured")]
    Measure(#[source] E),
    /// Even with every node in float the error is above the gate.
    #[error("the error is {error} with every node in float, more than {gate}")]
    Gate {
        /// Without INT8.
        error: f64,
        /// What was asked for.
        gate: f64,
    },
}

/// Quantises a model with as few nodes left in float as make `measure` of it, such as 1 − cosine, at most `gate`:
/// bisects how many of the most sensitive ones are left out.
///
/// # Errors
/// [`SearchError`], with the error of `measure`.
pub fn quantize_within<E: std::error::Error + 'static>(
    rewriter: &Rewriter,
    ranges: &ActivationRanges,
    options: &StaticOptions,
    gate: f64,
    mut measure: impl FnMut(&Model) -> Result<f64, E>,
) -> Result<Search, SearchError<E>> {
    let ranked = sensitivities(rewriter, ranges, options);
    let mut measured = 0;
    let mut attempt = |count: usize| {
        let mut options = options.clone();
        options.exclude.extend(ranked[..count].iter().map(|worst| worst.node.clone()));
        let mut rewriter = rewriter.clone();
        let report = quantize_static(&mut rewriter, ranges, &options)?;
        let model = rewriter.finish()?;
        let error = measure(&model).map_err(SearchError::Measure)?;
        measured += 1;
        Ok::<Search, SearchError<E>>(Search { model, report, error, measured })
    };
    // NaN is no error to accept.
    let holds = |search: &Search| search.error <= gate;
    let all = attempt(0)?;
    if holds(&all) {
        return Ok(all);
    }
    // Invariant: with `few` left out the error is too large, with `best.0` it holds.
    let mut few = 0;
    let mut best = (ranked.len(), attempt(ranked.len())?);
    if !holds(&best.1) {
        return Err(SearchError::Gate { error: best.1.error, gate });
    }
    while best.0 - few > 1 {
        let count = few + (best.0 - few) / 2;
        let search = attempt(count)?;
        if holds(&search) {
            best = (count, search);
        } else {
            few = count;
        }
    }
    Ok(Search { measured, ..best.1 })
}
