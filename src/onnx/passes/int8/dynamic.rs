//! Dynamic INT8: products with constant weights whose activations are scaled anew in every run, over the whole batch.

use std::collections::{BTreeSet, HashMap};

use super::affine::Magnitude;
use super::plan::{Form, weighted};
use super::product::{Bytes, multiply};
use crate::onnx::passes::PassReport;
use crate::onnx::{RewriteError, Rewriter};

/// How to quantise without measured ranges.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DynamicOptions {
    /// Leave weights 7 bits, for x86 CPUs without VNNI, whose sums of two products would else saturate.
    pub reduce_range: bool,
    /// Names of nodes to leave in float, as [`Finding`](crate::onnx::passes::Finding) has them.
    pub exclude: BTreeSet<String>,
}

/// Turns products with constant weights, such as a transformer's, to INT8. Needs no calibration, but a tile's result
/// then depends a little on the tiles beside it in the batch.
///
/// # Errors
/// None of its own.
pub fn quantize_dynamic(rewriter: &mut Rewriter, options: &DynamicOptions) -> Result<PassReport, RewriteError> {
    let mut report = PassReport::new("int8 dynamic");
    let magnitude = Magnitude::of(options.reduce_range);
    let mut scaled: HashMap<String, Bytes> = HashMap::new();
    for id in rewriter.ids().collect::<Vec<_>>() {
        let why = match weighted(rewriter, id, Form::Kernels) {
            None => continue,
            _ if rewriter.is(id, "Conv") => "dynamic INT8 makes convolutions about 5 times slower".to_owned(),
            _ if options.exclude.contains(&rewriter.label(id)) => "left in float on request".to_owned(),
            Some(Err(why)) => why,
            Some(Ok(())) => {
                let x = rewriter.input(id, 0).to_owned();
                let bytes = scaled.entry(x.clone()).or_insert_with(|| quantize(rewriter, &x)).clone();
                let noted = report.findings.len();
                report.apply(rewriter, id, "INT8, scaled in every run");
                match multiply(rewriter, id, &bytes, magnitude) {
                    Ok(()) => continue,
                    Err(why) => {
                        report.findings.truncate(noted);
                        why
                    }
                }
            }
        };
        report.keep(rewriter, id, why);
    }
    Ok(report)
}

/// Adds the node that finds a value's scale and makes bytes of it, once for all who read it.
fn quantize(rewriter: &mut Rewriter, value: &str) -> Bytes {
    let mut name = |part: &str| rewriter.fresh(&format!("{value}/{part}"));
    let bytes = Bytes { values: name("bytes"), scale: name("scale"), zero_point: name("zero_point") };
    let outputs = [bytes.values.as_str(), &bytes.scale, &bytes.zero_point];
    let node = rewriter.new_node("", "DynamicQuantizeLinear", &[value], &outputs);
    rewriter.insert(node);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inference::evaluate;
    use crate::onnx::build::{Graph, ints};
    use crate::onnx::passes::fixtures::{difference, model, noise, reduce_range};
    use crate::onnx::{ElementType, Model, Tensor};

    fn dynamic(model: &Model) -> (Model, PassReport) {
        let mut rewriter = Rewriter::new(model.clone()).unwrap();
        let options = DynamicOptions { reduce_range: reduce_range(), ..DynamicOptions::default() };
        let report = quantize_dynamic(&mut rewriter, &options).unwrap();
        (rewriter.finish().unwrap(), report)
    }

    /// Two products of one input: a MatMul with an Add behind, and a Gemm with swapped weights.
    fn two_products() -> Model {
        let mut graph = Graph::new("products");
        let x = graph.input("x", ElementType::F32, &["n".into(), 128.into()]);
        let weights = |graph: &mut Graph, name: &str, dims: &[i64]| {
            let dims_usize: Vec<usize> = dims.iter().map(|dim| usize::try_from(*dim).unwrap()).collect();
            graph.weights(name, dims, &noise(&dims_usize).to_f32().unwrap())
        };
        let w = weights(&mut graph, "w", &[128, 130]);
        let b = weights(&mut graph, "b", &[130]);
        let v = weights(&mut graph, "v", &[130, 128]);
        let c = weights(&mut graph, "c", &[1, 130]);
        let product = graph.node("MatMul", &[&x, &w], &[]);
        let first = graph.node("Add", &[&b, &product], &[]);
        let second = graph.node("Gemm", &[&x, &v, &c], &[("transB", 1.into())]);
        let sum = graph.node("Sub", &[&first, &second], &[]);
        graph.output("y", &sum, ElementType::F32, &["n".into(), 130.into()]);
        graph.finish()
    }

    #[test]
    fn products_and_their_biases_become_one_node_each() {
        let model = two_products();
        let (quantized, report) = dynamic(&model);
        assert_eq!(report.applied(), 2);
        let counts = quantized.op_counts();
        assert_eq!((counts["DynamicQuantizeLinear"], counts["com.microsoft.MatMulIntegerToFloat"]), (1, 2));
        assert!(!counts.contains_key("Add") && !counts.contains_key("Gemm"));
        for batch in [1, 5] {
            let x = noise(&[batch, 128]);
            let [expected, found] =
                [&model, &quantized].map(|model| evaluate(model, &[("x", x.clone())]).unwrap().swap_remove(0));
            // Inputs and weights lie within ±2: a step of 4/255 and of 2/127 (2/64), half of which is lost at most.
            let (x_error, w_error) = (2.0 / 255.0, 1.0 / if reduce_range() { 64.0 } else { 127.0 });
            let bound = 2.0 * 128.0 * (2.0 * x_error + 2.0 * w_error + x_error * w_error);
            for (a, b) in expected.to_f32().unwrap().iter().zip(found.to_f32().unwrap()) {
                assert!((a - b).abs() <= bound, "{a} {b}");
            }
            assert!(difference(&model, &quantized, &[("x", x)]) < if reduce_range() { 0.05 } else { 0.03 });
        }
    }

    #[test]
    fn a_second_run_changes_nothing() {
        let (once, _) = dynamic(&two_products());
        let (twice, report) = dynamic(&once);
        assert_eq!((twice, report.applied()), (once, 0));
    }

    #[test]
    fn convolutions_and_activations_products_stay() {
        let mut graph = Graph::new("conv");
        let x = graph.input("x", ElementType::F32, &["n".into(), 3.into(), 8.into(), 8.into()]);
        let w = graph.weights("w", &[4, 3, 3, 3], &[0.5; 108]);
        let conv = graph.node("Conv", &[&x, &w], &[("pads", ints(&[1, 1, 1, 1]))]);
        let product = graph.node("MatMul", &[&conv, &conv], &[]);
        graph.output("y", &product, ElementType::F32, &["n".into(), 4.into(), 8.into(), 8.into()]);
        let model = graph.finish();
        let (same, report) = dynamic(&model);
        let text: Vec<String> = report.findings.iter().map(ToString::to_string).collect();
        assert_eq!(report.applied(), 0);
        assert!(text[0].ends_with("kept, dynamic INT8 makes convolutions about 5 times slower"), "{text:?}");
        assert!(text[1].contains("multiplies two activations"), "{text:?}");
        assert_eq!(same.op_counts(), model.op_counts());
    }

    #[test]
    fn an_input_of_zeros_gives_the_bias() {
        let (quantized, _) = dynamic(&two_products());
        let zeros = Tensor::f32(&[1, 128], vec![0.0; 128]);
        let expected = evaluate(&two_products(), &[("x", zeros.clone())]).unwrap();
        assert_eq!(evaluate(&quantized, &[("x", zeros)]).unwrap(), expected);
    }

    #[test]
    fn exported_transformers_load_and_compute_nearly_the_same() {
        for name in ["timm_unfused.onnx", "hf_vit_eager.onnx", "torchvision_vit.onnx"] {
            let model = model(name);
            let input = model.inputs().swap_remove(0);
            let dims: Vec<usize> = input.dims.unwrap().iter().map(|dim| dim.fixed().unwrap_or(2)).collect();
            let (quantized, _) = dynamic(&model);
            assert!(difference(&model, &quantized, &[(&input.name, noise(&dims))]) < 0.05, "{name}");
        }
    }
}
