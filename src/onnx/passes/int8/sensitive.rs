//! Which nodes to leave in float: ranks them by what bytes lose there, and leaves the worst until the error is small.

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
    let mut plan = Plan::new(rewriter, &options.exclude, options.form);
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

#[cfg(test)]
mod tests {
    use super::super::{RangeCollector, RangeMethod};
    use super::*;
    use crate::onnx::build::Graph;
    use crate::onnx::{ElementType, Tensor};

    /// Three convolutions in a row; the middle one's weights differ so much that bytes hold few of them.
    fn uneven() -> (Rewriter, ActivationRanges) {
        let mut graph = Graph::new("uneven");
        let mut value = graph.input("x", ElementType::F32, &["n".into(), 4.into(), 1.into(), 1.into()]);
        let mut collector = RangeCollector::default();
        let even: Vec<f32> = (0..=255_u8).map(|step| f32::from(step) / 255.0).collect();
        for number in 0..3 {
            let weights: Vec<f32> =
                (0..16_u8).map(|i| if number == 1 && i % 4 == 0 { 200.0 } else { f32::from(i) / 16.0 }).collect();
            let w = graph.weights(&format!("w{number}"), &[4, 4, 1, 1], &weights);
            collector.observe(&value, &Tensor::f32(&[256], even.clone()));
            value = graph.node("Conv", &[&value, &w], &[]);
        }
        collector.observe(&value, &Tensor::f32(&[256], even));
        graph.output("y", &value, ElementType::F32, &["n".into(), 4.into(), 1.into(), 1.into()]);
        (Rewriter::new(graph.finish()).unwrap(), collector.ranges(RangeMethod::MinMax))
    }

    /// Counts the INT8 convolutions of a model, each an error of 1.
    fn count(model: &Model) -> Result<f64, std::io::Error> {
        let graph = model.proto().graph.as_ref().unwrap();
        let int8 = graph
            .initializer
            .iter()
            .filter(|tensor| tensor.name().starts_with('w') && tensor.name().ends_with("/bytes"));
        Ok(int8.count() as f64)
    }

    #[test]
    fn outliers_among_activations_make_a_node_worse() {
        let (rewriter, _) = uneven();
        let labels: Vec<String> = rewriter.ids_of("Conv").iter().map(|id| rewriter.label(*id)).collect();
        let middle = rewriter.input(rewriter.ids_of("Conv")[2], 0).to_owned();
        let mut collector = RangeCollector::default();
        for value in super::super::observed(&rewriter) {
            let mut values: Vec<f32> = (0..=255_u8).map(|step| f32::from(step) / 255.0).collect();
            if value == middle {
                values = vec![0.01; 4096];
                values.push(1.0);
            }
            collector.observe(&value, &Tensor::f32(&[values.len()], values));
        }
        let ranked = sensitivities(&rewriter, &collector.ranges(RangeMethod::MinMax), &StaticOptions::default());
        let noises: Vec<f64> = ranked.iter().map(|rated| rated.noise).collect();
        assert!(noises.is_sorted_by(|a, b| a >= b) && noises.len() == 3);
        // The value lies between the second and the third.
        assert_eq!(ranked[2].node, labels[0]);
    }

    #[test]
    fn as_few_nodes_as_possible_stay_in_float() {
        let (rewriter, ranges) = uneven();
        for (gate, int8) in [(3.0, 3), (2.5, 2), (1.0, 1), (0.5, 0)] {
            let found = quantize_within(&rewriter, &ranges, &StaticOptions::default(), gate, count).unwrap();
            assert_eq!((found.error, found.report.applied()), (f64::from(int8), usize::try_from(int8).unwrap()));
            assert!(found.error <= gate && found.measured <= 4);
        }
    }

    #[test]
    fn a_gate_that_floats_miss_is_an_error() {
        let (rewriter, ranges) = uneven();
        let options = StaticOptions::default();
        let nan = |_: &Model| Ok::<f64, std::io::Error>(f64::NAN);
        let error = quantize_within(&rewriter, &ranges, &options, 0.1, nan).unwrap_err();
        assert!(matches!(error, SearchError::Gate { .. }), "{error}");
        let broken = |_: &Model| Err(std::io::Error::other("no tiles"));
        let error = quantize_within(&rewriter, &ranges, &options, 0.1, broken).unwrap_err();
        assert!(matches!(error, SearchError::Measure(_)), "{error}");
    }
}
