//! Folds `BatchNormalization` into the layer before it.
//!
//! In inference it is a scale and a shift per channel: `y = (x - mean) * k + B` with `k = scale / sqrt(var + epsilon)`
//! (ONNX operator specification), so a layer with weights `W` and bias `b` takes it over as `W * k` and
//! `(b - mean) * k + B`.

use super::PassReport;
use crate::onnx::{ElementType, NodeId, RewriteError, Rewriter, Tensor};

/// The `epsilon` of the operator's specification.
const EPSILON: f32 = 1e-5;

/// Folds each `BatchNormalization` into the `Conv`, `ConvTranspose`, `Gemm`, or `MatMul` with or without `Add` that it
/// follows, with all arithmetic in 64 bits.
///
/// # Errors
/// [`RewriteError`] if the graph has a cycle.
pub fn fold_batch_norm(rewriter: &mut Rewriter) -> Result<PassReport, RewriteError> {
    let mut report = PassReport::new("fold batch norm");
    for id in rewriter.order()?.into_iter().filter(|id| rewriter.is(*id, "BatchNormalization")).collect::<Vec<_>>() {
        match plan(rewriter, id) {
            Ok(fold) => {
                let layer = fold.layer;
                report.apply(
                    rewriter,
                    id,
                    format!("folded into {} {}", rewriter.node(layer).op_type(), rewriter.label(layer)),
                );
                fold.carry_out(rewriter, id);
            }
            Err(reason) => report.keep(rewriter, id, reason),
        }
    }
    Ok(report)
}

/// A node's inputs that get new values.
struct Fold {
    layer: NodeId,
    weight: Tensor,
    /// The node that adds the bias, the index of its input, and the bias.
    bias: (NodeId, usize, Tensor),
    /// The factor of a `Gemm`'s bias becomes part of it.
    resets_beta: bool,
}

impl Fold {
    fn carry_out(self, rewriter: &mut Rewriter, batch_norm: NodeId) {
        rewriter.set_constant_input(self.layer, 1, &self.weight);
        let (id, index, bias) = self.bias;
        rewriter.set_constant_input(id, index, &bias);
        if self.resets_beta {
            rewriter.set_attribute(self.layer, "beta", 1.0f32);
        }
        // Never refused: the batch norm is the only one that knows the name of what the layer gives.
        let _ = rewriter.bypass(batch_norm);
    }
}

/// Scale and shift of a batch norm per channel: `y = x * scale + shift`.
struct Affine {
    scale: Vec<f64>,
    shift: Vec<f64>,
}

fn affine(rewriter: &Rewriter, id: NodeId) -> Result<Affine, String> {
    if rewriter.int(id, "training_mode").unwrap_or(0) != 0 {
        return Err("it is in training mode".to_owned());
    }
    let parameter = |index: usize| {
        let tensor = rewriter.floats(rewriter.input(id, index)).and_then(|tensor| tensor.to_f32());
        tensor.ok_or_else(|| format!("its parameter {:?} is no constant", rewriter.input(id, index)))
    };
    let (gamma, beta, mean, variance) = (parameter(1)?, parameter(2)?, parameter(3)?, parameter(4)?);
    let epsilon = f64::from(rewriter.float(id, "epsilon").unwrap_or(EPSILON));
    let scale: Vec<f64> = gamma
        .iter()
        .zip(&variance)
        .map(|(gamma, variance)| f64::from(*gamma) / (f64::from(*variance) + epsilon).sqrt())
        .collect();
    let shift = beta.iter().zip(&mean).zip(&scale).map(|((beta, mean), k)| f64::from(*beta) - f64::from(*mean) * k);
    let shift: Vec<f64> = shift.collect();
    if scale.iter().chain(&shift).any(|value| !value.is_finite()) {
        return Err("its parameters give no finite scale".to_owned());
    }
    Ok(Affine { scale, shift })
}

fn plan(rewriter: &Rewriter, id: NodeId) -> Result<Fold, String> {
    let affine = affine(rewriter, id)?;
    let input = rewriter.input(id, 0);
    if rewriter.node(id).output.iter().skip(1).any(|output| !output.is_empty()) {
        return Err("its running mean or variance is an output".to_owned());
    }
    let producer = rewriter.producer(input).ok_or("it does not follow a layer with weights")?;
    if rewriter.sole_consumer(input) != Some(id) {
        return Err(format!("{input} is read by other nodes too"));
    }
    match rewriter.node(producer).op_type() {
        "Conv" | "ConvTranspose" => fold_convolution(rewriter, producer, &affine),
        "Gemm" => fold_gemm(rewriter, producer, &affine),
        "Add" => fold_sum(rewriter, producer, &affine),
        op => Err(format!("it follows {op}, which has no weights and bias")),
    }
}

fn fold_convolution(rewriter: &Rewriter, layer: NodeId, affine: &Affine) -> Result<Fold, String> {
    let weight = weight_of(rewriter, layer)?;
    let dims = weight.dims.clone();
    if dims.len() < 3 {
        return Err(format!("the weights of {} have {} dimensions", rewriter.label(layer), dims.len()));
    }
    let weight = if rewriter.is(layer, "Conv") {
        let per_output: usize = dims[1..].iter().product();
        scaled(weight, affine, |index| index / per_output)
    } else {
        // [in, out / groups, ...]: a group of input channels gives a group of output channels.
        let groups = rewriter.int(layer, "group").and_then(|groups| usize::try_from(groups).ok()).unwrap_or(1).max(1);
        let (inputs, outputs, kernel) = ((dims[0] / groups).max(1), dims[1], dims[2..].iter().product::<usize>());
        scaled(weight, affine, |index| {
            let (input, output) = (index / kernel / outputs, index / kernel % outputs);
            input / inputs * outputs + output
        })
    }?;
    let bias = match rewriter.input(layer, 2) {
        "" => vec![0.0; affine.scale.len()],
        name => bias_of(rewriter, name, affine)?,
    };
    Ok(Fold { layer, weight, bias: (layer, 2, shifted(&bias, affine)?), resets_beta: false })
}

fn fold_gemm(rewriter: &Rewriter, layer: NodeId, affine: &Affine) -> Result<Fold, String> {
    let weight = weight_of(rewriter, layer)?;
    let is_transposed = rewriter.int(layer, "transB").unwrap_or(0) != 0;
    let columns = weight.dims.get(1).copied().unwrap_or(1).max(1);
    let weight = scaled(weight, affine, |index| if is_transposed { index / columns } else { index % columns })?;
    let beta = f64::from(rewriter.float(layer, "beta").unwrap_or(1.0));
    let bias: Vec<f64> = match rewriter.input(layer, 2) {
        "" => vec![0.0; affine.scale.len()],
        name => bias_of(rewriter, name, affine)?.iter().map(|value| value * beta).collect(),
    };
    #[expect(clippy::float_cmp, reason = "the exact factor that changes nothing")]
    let resets_beta = beta != 1.0;
    Ok(Fold { layer, weight, bias: (layer, 2, shifted(&bias, affine)?), resets_beta })
}

/// `Add` of a `MatMul` and a constant.
fn fold_sum(rewriter: &Rewriter, sum: NodeId, affine: &Affine) -> Result<Fold, String> {
    let is_product = |index: &usize| rewriter.producer_of(rewriter.input(sum, *index), "MatMul").is_some();
    let index = (0..2).find(is_product).ok_or("it follows an Add of something else than a MatMul")?;
    let (product, bias) = (rewriter.input(sum, index), 1 - index);
    let layer = rewriter.producer(product).ok_or("it follows no MatMul")?;
    if rewriter.sole_consumer(product) != Some(sum) {
        return Err(format!("{product} is read by other nodes too"));
    }
    // Channels are the second axis of a batch norm and the last of a MatMul: the same in a matrix only.
    let is_matrix = |value: &str| {
        let rank = rewriter.declared(value).and_then(|declared| declared.dims).map(|dims| dims.len());
        rank == Some(2) || ["Flatten", "Gemm"].iter().any(|op| rewriter.producer_of(value, op).is_some())
    };
    if ![rewriter.input(layer, 0), product, rewriter.output(sum, 0)].into_iter().any(is_matrix) {
        return Err("the MatMul before it is not known to give a matrix".to_owned());
    }
    let weight = weight_of(rewriter, layer)?;
    let columns = weight.dims.last().copied().unwrap_or(1).max(1);
    let weight = scaled(weight, affine, |index| index % columns)?;
    let values = bias_of(rewriter, rewriter.input(sum, bias), affine)?;
    Ok(Fold { layer, weight, bias: (sum, bias, shifted(&values, affine)?), resets_beta: false })
}

fn weight_of(rewriter: &Rewriter, layer: NodeId) -> Result<Tensor, String> {
    let name = rewriter.input(layer, 1);
    match rewriter.constant_element(name) {
        Some(ElementType::F32) => rewriter.floats(name).ok_or_else(|| format!("the weights {name:?} can't be read")),
        Some(other) => Err(format!("the weights {name:?} are {other}, not float")),
        None => Err(format!("the weights {name:?} are no constant")),
    }
}

/// A bias per channel, or one for all.
fn bias_of(rewriter: &Rewriter, name: &str, affine: &Affine) -> Result<Vec<f64>, String> {
    let channels = affine.scale.len();
    let tensor = rewriter.floats(name).ok_or_else(|| format!("the bias {name:?} is no constant"))?;
    let is_row = tensor.dims.iter().rev().skip(1).all(|dim| *dim == 1);
    match tensor.to_f32() {
        Some(values) if is_row && values.len() == channels => Ok(values.into_iter().map(f64::from).collect()),
        Some(values) if values.len() == 1 => Ok(vec![f64::from(values[0]); channels]),
        _ => Err(format!("the bias {name:?} of dimensions {:?} is not one per channel", tensor.dims)),
    }
}

fn scaled(weight: Tensor, affine: &Affine, channel: impl Fn(usize) -> usize) -> Result<Tensor, String> {
    let values = weight.to_f32().unwrap_or_default();
    let scaled = values.iter().enumerate().map(|(index, value)| {
        let scale = affine.scale.get(channel(index)).ok_or("it has fewer channels than the layer before it")?;
        narrow(f64::from(*value) * scale)
    });
    Ok(Tensor::f32(&weight.dims, scaled.collect::<Result<_, String>>()?))
}

fn shifted(bias: &[f64], affine: &Affine) -> Result<Tensor, String> {
    let values = bias.iter().zip(&affine.scale).zip(&affine.shift).map(|((bias, k), shift)| narrow(bias * k + shift));
    Ok(Tensor::f32(&[bias.len()], values.collect::<Result<_, String>>()?))
}

#[expect(clippy::cast_possible_truncation, reason = "weights are 32-bit; what overflows is refused")]
fn narrow(value: f64) -> Result<f32, String> {
    let narrowed = value as f32;
    if narrowed.is_finite() { Ok(narrowed) } else { Err(format!("the folded weight {value} does not fit 32 bits")) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::Outcome;
    use super::*;
    use crate::inference::evaluate;
    use crate::onnx::Model;
    use crate::onnx::build::{Attribute, Graph, ints};

    /// A batch norm of `channels` after `value`.
    fn batch_norm(graph: &mut Graph, value: &str, channels: usize) -> String {
        let dims = [channels as i64];
        let values = |f: fn(f32) -> f32| (0..channels).map(|channel| f(channel as f32)).collect::<Vec<f32>>();
        let scale = graph.weights("scale", &dims, &values(|c| 0.5 + 0.3 * c));
        let shift = graph.weights("shift", &dims, &values(|c| 0.1 - 0.2 * c));
        let mean = graph.weights("mean", &dims, &values(|c| 0.3 * c - 0.4));
        let variance = graph.weights("variance", &dims, &values(|c| 0.05 + 0.7 * c));
        graph.node("BatchNormalization", &[value, &scale, &shift, &mean, &variance], &[("epsilon", 1e-3f32.into())])
    }

    fn weights(len: usize) -> Vec<f32> {
        (0..len).map(|index| ((index * 37 % 23) as f32 - 11.0) / 16.0).collect()
    }

    fn folded(model: &Model) -> (Model, PassReport) {
        let mut rewriter = Rewriter::new(model.clone()).unwrap();
        let report = fold_batch_norm(&mut rewriter).unwrap();
        assert_eq!(fold_batch_norm(&mut rewriter).unwrap().applied(), 0);
        (rewriter.finish().unwrap(), report)
    }

    fn assert_folds(model: &Model, x: &Tensor) {
        let (after, report) = folded(model);
        assert_eq!(report.applied(), 1, "{report:?}");
        assert!(!after.op_counts().contains_key("BatchNormalization"));
        let run = |model| evaluate(model, &[("x", x.clone())]).unwrap().remove(0).to_f32().unwrap();
        for (before, after) in run(model).iter().zip(run(&after)) {
            // Sums of at most 30 terms below 10, each rounded to 24 bits.
            assert!((before - after).abs() < 30.0 * 10.0 / 16_777_216.0, "{before} {after}");
        }
    }

    fn convolution(op: &str, dims: &[i64], group: i64, bias: bool) -> Model {
        let mut graph = Graph::new("convolution");
        let x = graph.input("x", ElementType::F32, &["n".into(), 4.into(), 5.into(), 5.into()]);
        let weight = graph.weights("w", dims, &weights(dims.iter().product::<i64>() as usize));
        let bias = bias.then(|| graph.weights("b", &[6], &weights(6)));
        let inputs: Vec<&str> = [x.as_str(), &weight].into_iter().chain(bias.as_deref()).collect();
        let value = graph.node(op, &inputs, &[("group", group.into()), ("pads", ints(&[1, 1, 1, 1]))]);
        let value = batch_norm(&mut graph, &value, 6);
        graph.output("y", &value, ElementType::F32, &["n".into(), 6.into(), 5.into(), 5.into()]);
        graph.finish()
    }

    #[test]
    fn convolutions_take_it_over_in_groups_too() {
        let x = Tensor::f32(&[2, 4, 5, 5], weights(200));
        for bias in [false, true] {
            assert_folds(&convolution("Conv", &[6, 4, 3, 3], 1, bias), &x);
            assert_folds(&convolution("Conv", &[6, 2, 3, 3], 2, bias), &x);
            assert_folds(&convolution("ConvTranspose", &[4, 6, 3, 3], 1, bias), &x);
            assert_folds(&convolution("ConvTranspose", &[4, 3, 3, 3], 2, bias), &x);
        }
    }

    fn matrix(gemm: &[(&str, Attribute)], transposed: bool) -> Model {
        let mut graph = Graph::new("matrix");
        let x = graph.input("x", ElementType::F32, &["n".into(), 5.into()]);
        let weight = graph.weights("w", if transposed { &[6, 5] } else { &[5, 6] }, &weights(30));
        let bias = graph.weights("b", &[1, 6], &weights(6));
        let value = if gemm.is_empty() {
            let product = graph.node("MatMul", &[&x, &weight], &[]);
            graph.node("Add", &[&bias, &product], &[])
        } else {
            graph.node("Gemm", &[&x, &weight, &bias], gemm)
        };
        let value = batch_norm(&mut graph, &value, 6);
        graph.output("y", &value, ElementType::F32, &["n".into(), 6.into()]);
        graph.finish()
    }

    #[test]
    fn matrix_products_take_it_over() {
        let x = Tensor::f32(&[3, 5], weights(15));
        assert_folds(&matrix(&[], false), &x);
        assert_folds(&matrix(&[("alpha", 0.5f32.into()), ("beta", 2.0f32.into())], false), &x);
        assert_folds(&matrix(&[("transB", 1.into())], true), &x);
    }

    #[test]
    fn shared_weights_are_not_changed_for_others() {
        let mut graph = Graph::new("shared");
        let x = graph.input("x", ElementType::F32, &[1.into(), 6.into(), 3.into(), 3.into()]);
        let weight = graph.weights("w", &[6, 6, 1, 1], &weights(36));
        let first = graph.node("Conv", &[&x, &weight], &[]);
        let normed = batch_norm(&mut graph, &first, 6);
        let second = graph.node("Conv", &[&normed, &weight], &[]);
        graph.output("y", &second, ElementType::F32, &[1.into(), 6.into(), 3.into(), 3.into()]);
        assert_folds(&graph.finish(), &Tensor::f32(&[1, 6, 3, 3], weights(54)));
    }

    fn kept(model: &Model) -> String {
        let (after, report) = folded(model);
        assert_eq!(after.op_counts(), model.op_counts());
        match &report.findings[..] {
            [super::super::Finding { outcome: Outcome::Kept(why), .. }] => why.clone(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_can_not_be_folded_is_told() {
        let mut model = convolution("Conv", &[6, 4, 3, 3], 1, true);
        let node = &mut model.proto_mut().graph.as_mut().unwrap().node[1];
        node.attribute.push(Attribute::from(1).named("training_mode"));
        assert_eq!(kept(&model), "it is in training mode");

        let mut graph = Graph::new("two readers");
        let x = graph.input("x", ElementType::F32, &[1.into(), 6.into(), 3.into(), 3.into()]);
        let weight = graph.weights("w", &[6, 6, 1, 1], &weights(36));
        let first = graph.node("Conv", &[&x, &weight], &[]);
        let normed = batch_norm(&mut graph, &first, 6);
        let sum = graph.node("Add", &[&first, &normed], &[]);
        graph.output("y", &sum, ElementType::F32, &[1.into(), 6.into(), 3.into(), 3.into()]);
        assert_eq!(kept(&graph.finish()), "conv_0 is read by other nodes too");

        let mut graph = Graph::new("no layer");
        let x = graph.input("x", ElementType::F32, &[1.into(), 6.into(), 3.into(), 3.into()]);
        let relu = graph.node("Relu", &[&x], &[]);
        let normed = batch_norm(&mut graph, &relu, 6);
        graph.output("y", &normed, ElementType::F32, &[1.into(), 6.into(), 3.into(), 3.into()]);
        assert_eq!(kept(&graph.finish()), "it follows Relu, which has no weights and bias");

        // Tokens [batch, 6, 6]: the channels of the batch norm are not those of the product.
        let mut graph = Graph::new("tokens");
        let x = graph.input("x", ElementType::F32, &[1.into(), 6.into(), 3.into()]);
        let weight = graph.weights("w", &[3, 6], &weights(18));
        let bias = graph.weights("b", &[6], &weights(6));
        let product = graph.node("MatMul", &[&x, &weight], &[]);
        let sum = graph.node("Add", &[&product, &bias], &[]);
        let normed = batch_norm(&mut graph, &sum, 6);
        graph.output("y", &normed, ElementType::F32, &[1.into(), 6.into(), 6.into()]);
        assert_eq!(kept(&graph.finish()), "the MatMul before it is not known to give a matrix");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        /// `W * k` is rounded once, so the result is off by one rounding of each product and of the bias.
        #[test]
        fn weights_are_rounded_once(weight in -2.0f32..2.0, bias in -2.0f32..2.0, gamma in 0.1f32..3.0, variance in 1e-3f32..4.0) {
            let mut graph = Graph::new("one");
            let x = graph.input("x", ElementType::F32, &[1.into(), 1.into(), 1.into(), 1.into()]);
            let w = graph.weights("w", &[1, 1, 1, 1], &[weight]);
            let b = graph.weights("b", &[1], &[bias]);
            let parameters: Vec<String> = [("gamma", gamma), ("beta", 0.5), ("mean", 0.25), ("variance", variance)]
                .map(|(name, value)| graph.weights(name, &[1], &[value])).to_vec();
            let value = graph.node("Conv", &[&x, &w, &b], &[]);
            let inputs = [&value, &parameters[0], &parameters[1], &parameters[2], &parameters[3]].map(String::as_str);
            let value = graph.node("BatchNormalization", &inputs, &[]);
            graph.output("y", &value, ElementType::F32, &[1.into(), 1.into(), 1.into(), 1.into()]);
            let (after, _) = folded(&graph.finish());
            let rewriter = Rewriter::new(after).unwrap();
            let k = f64::from(gamma) / (f64::from(variance) + f64::from(EPSILON)).sqrt();
            let close = |found: f32, exact: f64| (f64::from(found) - exact).abs() <= exact.abs() * 2f64.powi(-24);
            prop_assert!(close(rewriter.scalar("w").unwrap(), f64::from(weight) * k));
            prop_assert!(close(rewriter.scalar("b").unwrap(), (f64::from(bias) - 0.25) * k + 0.5));
        }
    }
}
