//! Layer scale: factors per channel after a linear layer become part of its weights and its bias.

use super::PassReport;
use crate::onnx::{NodeId, RewriteError, Rewriter, Tensor, Values};

/// Folds `Mul` by a constant vector after MatMul, MatMul + Add or Gemm with constant weights into these, as LayerScale
/// (Touvron et al. 2021, "Going deeper with image transformers") has them. Weights that other nodes read stay as they
/// are; the layer gets its own.
///
/// # Errors
/// [`RewriteError::Tensor`] if a constant can't be read.
pub fn fold_layer_scale(rewriter: &mut Rewriter) -> Result<PassReport, RewriteError> {
    let mut report = PassReport::new("layer scale");
    for id in rewriter.ids_of("Mul") {
        let Some((value, factors)) = scaling(rewriter, id) else { continue };
        match linear(rewriter, &value, &factors) {
            Ok(linear) => {
                report.apply(rewriter, id, format!("part of the weights {:?}", rewriter.input(linear.layer, 1)));
                linear.fold(rewriter, id, &factors)?;
            }
            Err(why) => report.keep(rewriter, id, why),
        }
    }
    Ok(report)
}

/// What a `Mul` multiplies, and its factors; `None` if they are no vector.
fn scaling(rewriter: &Rewriter, id: NodeId) -> Option<(String, Tensor)> {
    let factors = |value: &str| {
        let dims = rewriter.constant_dims(value)?;
        let (width, leading) = dims.split_last()?;
        // The scale of attention and the like is one number, which is for other passes.
        let is_vector = *width > 1 && leading.iter().all(|size| *size == 1);
        rewriter.floats(value).filter(|_| is_vector)
    };
    let (a, b) = (rewriter.input(id, 0), rewriter.input(id, 1));
    factors(b).map(|factors| (a.to_owned(), factors)).or_else(|| factors(a).map(|factors| (b.to_owned(), factors)))
}

/// A linear layer: a MatMul or Gemm, maybe with a sum that adds its bias.
struct Linear {
    layer: NodeId,
    /// The sum, and which of its inputs is the bias.
    sum: Option<(NodeId, usize)>,
    /// The value that is scaled.
    result: String,
    /// Weights are `[out, in]`, not `[in, out]`.
    is_transposed: bool,
}

/// The linear layer that gives `value` and that `factors` can be folded into; else why there is none.
fn linear(rewriter: &Rewriter, value: &str, factors: &Tensor) -> Result<Linear, String> {
    let no_layer = || format!("{value:?} comes from no linear layer with constant weights");
    let width = factors.values.len();
    let is_layer = |id: &NodeId| {
        let weights = rewriter.constant_dims(rewriter.input(*id, 1));
        (rewriter.is(*id, "MatMul") || rewriter.is(*id, "Gemm")) && weights.is_some_and(|dims| dims.len() == 2)
    };
    let of_sum = |sum: NodeId| {
        [(0, 1), (1, 0)].into_iter().find_map(|(x, bias)| {
            let layer = rewriter.producer_of(rewriter.input(sum, x), "MatMul").filter(is_layer)?;
            rewriter.is_constant(rewriter.input(sum, bias)).then_some((layer, Some((sum, bias))))
        })
    };
    let producer = rewriter.producer(value).ok_or_else(no_layer)?;
    let layer = if rewriter.is(producer, "Add") { of_sum(producer) } else { Some((producer, None)) };
    let (layer, sum) = layer.filter(|(layer, _)| is_layer(layer)).ok_or_else(no_layer)?;
    let is_transposed = rewriter.is(layer, "Gemm") && rewriter.int(layer, "transB").unwrap_or(0) != 0;
    let linear = Linear { layer, sum, result: value.to_owned(), is_transposed };

    let weights = linear.weights(rewriter);
    let dims = rewriter.constant_dims(weights).unwrap_or_default();
    let columns = if is_transposed { dims[0] } else { dims[1] };
    if columns != width {
        return Err(format!("{width} factors do not fit the weights {weights:?} of dimensions {dims:?}"));
    }
    if factors.dims.len() > 1 && rewriter.rank(value).is_none_or(|rank| rank < factors.dims.len()) {
        return Err(format!("factors of dimensions {:?} may give {value:?} further axes", factors.dims));
    }
    let bias = linear.bias(rewriter);
    if !bias.is_empty() {
        let dims = rewriter.constant_dims(bias);
        if !dims.as_ref().is_some_and(|dims| matches!(dims[..], [last] | [1, last] if last == width)) {
            return Err(format!("the bias {bias:?} is not one constant per channel"));
        }
    }
    for constant in [weights, bias].into_iter().filter(|name| !name.is_empty()) {
        let stored = rewriter.constant(constant).map_err(|error| error.to_string())?;
        if !stored.is_some_and(|tensor| matches!(tensor.values, Values::F32(_) | Values::F16(_))) {
            return Err(format!("{constant:?} holds neither 32-bit nor 16-bit floats"));
        }
    }
    let inner = (sum.is_some()).then(|| rewriter.output(layer, 0)).into_iter().chain([value]);
    match { inner }.find(|value| rewriter.sole_consumer(value).is_none()) {
        Some(value) => Err(format!("{value:?} is read elsewhere too")),
        None => Ok(linear),
    }
}

impl Linear {
    fn weights<'a>(&self, rewriter: &'a Rewriter) -> &'a str {
        rewriter.input(self.layer, 1)
    }

    /// `""` if it has none.
    fn bias<'a>(&self, rewriter: &'a Rewriter) -> &'a str {
        match self.sum {
            Some((sum, place)) => rewriter.input(sum, place),
            None => rewriter.input(self.layer, 2),
        }
    }

    /// Multiplies weights and bias, and takes the node `scaling` out.
    fn fold(&self, rewriter: &mut Rewriter, scaling: NodeId, factors: &Tensor) -> Result<(), RewriteError> {
        let factors = factors.to_f32().unwrap_or_default();
        let columns = factors.len();
        let weights = self.weights(rewriter).to_owned();
        let rows = rewriter.constant_dims(&weights).map_or(1, |dims| dims.iter().product::<usize>() / columns);
        let channel = |at: usize| if self.is_transposed { at / rows } else { at % columns };
        scale(rewriter, self.layer, 1, |at| factors[channel(at)])?;
        match self.sum {
            Some((sum, place)) => scale(rewriter, sum, place, |at| factors[at])?,
            None if !self.bias(rewriter).is_empty() => scale(rewriter, self.layer, 2, |at| factors[at])?,
            None => {}
        }
        // The last node of the layer now gives what the factors gave, under the name that others know.
        let last = self.sum.map_or(self.layer, |(sum, _)| sum);
        let scaled = rewriter.output(scaling, 0).to_owned();
        rewriter.remove(scaling);
        if let Some(mut node) = rewriter.remove(last) {
            node.output.iter_mut().filter(|value| **value == self.result).for_each(|value| scaled.clone_into(value));
            rewriter.insert(node);
        }
        Ok(())
    }
}

/// Multiplies the constant that a node reads by `factor` of each place in it; others who read it keep theirs.
fn scale(rewriter: &mut Rewriter, id: NodeId, index: usize, factor: impl Fn(usize) -> f32) -> Result<(), RewriteError> {
    let name = rewriter.input(id, index).to_owned();
    let Some(mut tensor) = rewriter.constant(&name)? else { return Ok(()) };
    match &mut tensor.values {
        Values::F32(values) => values.iter_mut().enumerate().for_each(|(at, value)| *value *= factor(at)),
        Values::F16(values) => {
            values
                .iter_mut()
                .enumerate()
                .for_each(|(at, value)| *value = half::f16::from_f32(value.to_f32() * factor(at)));
        }
        _ => {}
    }
    if rewriter.sole_consumer(&name).is_some() {
        rewriter.set_constant(&name, &tensor);
    } else {
        let own = rewriter.add_constant(&format!("{name}_scaled"), &tensor);
        rewriter.set_input(id, index, &own);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::fixtures::{difference, model, noise};
    use super::*;
    use crate::onnx::build::Graph;
    use crate::onnx::{ElementType, Model};

    /// One product more or less per value.
    const CLOSE: f32 = 2e-6;

    /// A layer of the named kind from 4 to 6 channels, scaled by factors of these dimensions.
    fn scaled(kind: &str, factors: &[i64], shared: bool) -> Model {
        let mut graph = Graph::new("scaled");
        let tokens = if kind.starts_with("gemm") { vec!["n".into()] } else { vec!["n".into(), 3.into()] };
        let dims = |width: usize| [&tokens[..], &[width.into()]].concat();
        let x = graph.input("x", ElementType::F32, &dims(4));
        let weights: Vec<f32> = (0..24_u8).map(|i| f32::from(i % 7) - 3.0).collect();
        let shape: [i64; 2] = if kind == "gemm transposed" { [6, 4] } else { [4, 6] };
        let w = graph.weights("w", &shape, &weights);
        let b = graph.weights("b", &[6], &[1.0, -1.0, 2.0, -2.0, 0.5, 3.0]);
        let len = usize::try_from(factors.iter().product::<i64>()).unwrap();
        let c = graph.weights("c", factors, &[0.5, 2.0, -1.0, 4.0, 0.25, 1.5][..len]);
        let layer = match kind {
            "gemm" => graph.node("Gemm", &[&x, &w, &b], &[("alpha", 0.5_f32.into())]),
            "gemm transposed" => graph.node("Gemm", &[&x, &w, &b], &[("transB", 1.into()), ("beta", 2.0_f32.into())]),
            "matmul" => graph.node("MatMul", &[&x, &w], &[]),
            _ => {
                let product = graph.node("MatMul", &[&x, &w], &[]);
                graph.node("Add", &[&b, &product], &[])
            }
        };
        let mut y = graph.node("Mul", &[&layer, &c], &[]);
        if shared {
            let product = graph.node("MatMul", &[&x, &w], &[]);
            let sum = graph.node("Add", &[&product, &b], &[]);
            y = graph.node("Sub", &[&y, &sum], &[]);
        }
        graph.output("y", &y, ElementType::F32, &dims(6));
        graph.finish()
    }

    fn fold(before: &Model) -> (Model, PassReport) {
        let mut rewriter = Rewriter::new(before.clone()).unwrap();
        let report = fold_layer_scale(&mut rewriter).unwrap();
        assert_eq!(fold_layer_scale(&mut rewriter).unwrap().applied(), 0);
        (rewriter.finish().unwrap(), report)
    }

    #[test]
    fn every_kind_of_layer_takes_the_factors_in() {
        for kind in ["gemm", "gemm transposed", "matmul", "linear"] {
            let before = scaled(kind, &[6], false);
            let (after, report) = fold(&before);
            assert_eq!((report.applied(), after.op_counts().contains_key("Mul")), (1, false), "{kind}");
            let x = noise(if kind.starts_with("gemm") { &[5, 4] } else { &[2, 3, 4] });
            assert!(difference(&before, &after, &[("x", x)]) < CLOSE, "{kind}");
        }
    }

    #[test]
    fn shared_weights_stay_as_they_are_for_others() {
        let before = scaled("linear", &[6], true);
        let (after, report) = fold(&before);
        assert_eq!(report.applied(), 1);
        assert_eq!(after.proto().graph.as_ref().unwrap().initializer.len(), 4);
        assert!(difference(&before, &after, &[("x", noise(&[2, 3, 4]))]) < CLOSE);
    }

    #[test]
    fn what_can_not_be_folded_is_told() {
        let (_, report) = fold(&scaled("linear", &[1], false));
        assert_eq!(report.findings, [], "one number is not layer scale");
        let (_, report) = fold(&scaled("linear", &[1, 1, 6], false));
        assert!(report.findings[0].to_string().ends_with("may give \"add_1\" further axes"), "{:?}", report.findings);
        let mut graph = Graph::new("no layer");
        let x = graph.input("x", ElementType::F32, &[2.into()]);
        let c = graph.weights("c", &[2], &[1.0, 2.0]);
        let y = graph.node("Mul", &[&x, &c], &[]);
        graph.output("y", &y, ElementType::F32, &[2.into()]);
        let (_, report) = fold(&graph.finish());
        assert!(report.findings[0].to_string().ends_with("\"x\" comes from no linear layer with constant weights"));
    }

    #[test]
    fn exported_layer_scale_is_folded() {
        for (name, prefix) in [("timm_swiglu.onnx", 4), ("hf_dinov2_eager.onnx", 4), ("hf_dinov2_sdpa.onnx", 4)] {
            let before = model(name);
            let (after, report) = fold(&before);
            assert_eq!(report.applied(), prefix, "{name} {:?}", report.findings);
            // Weights of about 1 are rounded once more, through two blocks.
            let difference = difference(&before, &after, &[("input", noise(&[2, 3, 32, 32]))]);
            assert!(difference < 1e-5, "{name} {difference}");
        }
    }
}
