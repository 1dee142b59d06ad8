//! Turns the `ConvTranspose` that doubles an image into a `Conv` of 1x1 and a `DepthToSpace`.
//!
//! With a kernel as large as the stride every output pixel is one product of one input pixel:
//! `y[o, 2h + i, 2w + j] = sum over c of x[c, h, w] * W[c, o, i, j] + b[o]`. So four times as many channels are computed
//! where the input pixel is, and then spread. ONNX Runtime's CUDA provider fuses a bias into a `Conv` only, and its CPU
//! kernels know 8-bit integers for `Conv` only.

use super::PassReport;
use crate::onnx::build::{Attribute, ints};
use crate::onnx::{ElementType, NodeId, RewriteError, Rewriter, Tensor};

/// Kernel size, stride, and block size of the spreading.
const BLOCK: usize = 2;

/// Rewrites each `ConvTranspose` with a kernel of 2x2, a stride of 2, and neither padding, dilation nor groups.
///
/// # Errors
/// None yet; passes share one signature.
pub fn rewrite_conv_transpose(rewriter: &mut Rewriter) -> Result<PassReport, RewriteError> {
    let mut report = PassReport::new("rewrite conv transpose");
    for id in rewriter.ids_of("ConvTranspose") {
        match parameters(rewriter, id) {
            Ok((weight, bias)) => {
                report.apply(rewriter, id, "a Conv of 1x1 and a DepthToSpace");
                rewrite(rewriter, id, &weight, bias.as_deref());
            }
            Err(reason) => report.keep(rewriter, id, reason),
        }
    }
    Ok(report)
}

/// The node's weights `[in, out, 2, 2]` and bias `[out]`, or why it must stay.
fn parameters(rewriter: &Rewriter, id: NodeId) -> Result<(Tensor, Option<Vec<f32>>), String> {
    let name = rewriter.input(id, 1);
    match rewriter.constant_element(name) {
        Some(ElementType::F32) => {}
        Some(element) => return Err(format!("its weights are {element}, not float")),
        None => return Err("its weights are no constant".to_owned()),
    }
    let weight = rewriter.floats(name).ok_or("its weights can't be read")?;
    if weight.dims.len() != 4 || weight.dims[2..] != [BLOCK; 2] {
        return Err(format!("its kernel is {:?}, not [2, 2]", weight.dims.get(2..).unwrap_or_default()));
    }
    let attribute = |name: &str, default: &[i64], wanted: &[i64]| {
        let found = rewriter.ints(id, name).unwrap_or_else(|| default.to_vec());
        if found == wanted { Ok(()) } else { Err(format!("its {name} is {found:?}, not {wanted:?}")) }
    };
    attribute("strides", &[1, 1], &[2, 2])?;
    attribute("dilations", &[1, 1], &[1, 1])?;
    attribute("pads", &[0; 4], &[0; 4])?;
    attribute("output_padding", &[0; 2], &[0; 2])?;
    attribute("output_shape", &[], &[])?;
    let padding = rewriter.text(id, "auto_pad").unwrap_or_else(|| "NOTSET".to_owned());
    if !matches!(padding.as_str(), "NOTSET" | "VALID") {
        return Err(format!("its auto_pad is {padding}"));
    }
    let groups = rewriter.int(id, "group").unwrap_or(1);
    if groups != 1 {
        return Err(format!("it has {groups} groups"));
    }
    let bias = match rewriter.input(id, 2) {
        "" => None,
        name => Some(rewriter.floats(name).and_then(|bias| bias.to_f32()).ok_or("its bias is no constant")?),
    };
    Ok((weight, bias))
}

fn rewrite(rewriter: &mut Rewriter, id: NodeId, weight: &Tensor, bias: Option<&[f32]>) {
    let values = weight.to_f32().unwrap_or_default();
    let (inputs, outputs) = (weight.dims[0], weight.dims[1]);
    // The pixel of the block is the slow axis of the new channels (mode DCR): with channels last, ONNX Runtime then
    // moves whole rows of channels instead of single values.
    let mut spread = Vec::with_capacity(values.len());
    for pixel in 0..BLOCK * BLOCK {
        for output in 0..outputs {
            spread.extend((0..inputs).map(|input| values[(input * outputs + output) * BLOCK * BLOCK + pixel]));
        }
    }
    let channels = outputs * BLOCK * BLOCK;
    let spread = Tensor::f32(&[channels, inputs, 1, 1], spread);
    let (name, data, output) =
        (rewriter.label(id), rewriter.input(id, 0).to_owned(), rewriter.output(id, 0).to_owned());
    let weight_name = rewriter.add_constant(rewriter.input(id, 1).to_owned().as_str(), &spread);
    let bias_name = bias.map(|bias| {
        let hint = rewriter.input(id, 2).to_owned();
        rewriter.add_constant(&hint, &Tensor::f32(&[channels], bias.repeat(BLOCK * BLOCK)))
    });
    let deep = rewriter.fresh(&format!("{output}_deep"));
    let operands: Vec<&str> = [data.as_str(), &weight_name].into_iter().chain(bias_name.as_deref()).collect();
    let mut conv = rewriter.new_node("", "Conv", &operands, &[&deep]);
    // The layer keeps its name: people know it by that.
    conv.name = Some(name);
    conv.attribute.push(ints(&[1, 1]).named("kernel_shape"));
    let mut shuffle = rewriter.new_node("", "DepthToSpace", &[&deep], &[&output]);
    shuffle.attribute.push(Attribute::from(2).named("blocksize"));
    shuffle.attribute.push(Attribute::from("DCR").named("mode"));
    rewriter.replace(&[id], conv);
    rewriter.insert(shuffle);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::Outcome;
    use super::*;
    use crate::inference::evaluate;
    use crate::onnx::Model;
    use crate::onnx::build::Graph;

    fn model(dims: &[i64], values: &[f32], bias: Option<&[f32]>, attributes: &[(&str, Attribute)]) -> Model {
        let mut graph = Graph::new("up");
        let x = graph.input("x", ElementType::F32, &["n".into(), (dims[0] as usize).into(), 3.into(), 2.into()]);
        let weight = graph.weights("w", dims, values);
        let bias = bias.map(|bias| graph.weights("b", &[bias.len() as i64], bias));
        let inputs: Vec<&str> = [x.as_str(), &weight].into_iter().chain(bias.as_deref()).collect();
        let value = graph.node("ConvTranspose", &inputs, attributes);
        graph.output("y", &value, ElementType::F32, &["n".into(), "c".into(), "h".into(), "w".into()]);
        graph.finish()
    }

    fn rewritten(model: &Model) -> (Model, PassReport) {
        let mut rewriter = Rewriter::new(model.clone()).unwrap();
        let report = rewrite_conv_transpose(&mut rewriter).unwrap();
        assert_eq!(rewrite_conv_transpose(&mut rewriter).unwrap().applied(), 0);
        (rewriter.finish().unwrap(), report)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        /// Small integers, whose sums are exact in any order: equal bit for bit.
        #[test]
        fn it_computes_the_same(
            inputs in 1usize..4,
            outputs in 1usize..5,
            has_bias: bool,
            values in prop::collection::vec(-8i8..8, 100),
        ) {
            let floats: Vec<f32> = values.iter().map(|value| f32::from(*value)).collect();
            let (weight, x) = (&floats[..inputs * outputs * 4], Tensor::f32(&[2, inputs, 3, 2], floats[40..40 + inputs * 12].to_vec()));
            let bias = has_bias.then(|| &floats[..outputs]);
            let before = model(&[inputs as i64, outputs as i64, 2, 2], weight, bias, &[("strides", ints(&[2, 2]))]);
            let (after, report) = rewritten(&before);
            prop_assert_eq!(report.applied(), 1);
            prop_assert!(!after.op_counts().contains_key("ConvTranspose"));
            let run = |model| evaluate(model, &[("x", x.clone())]).unwrap();
            prop_assert_eq!(run(&before), run(&after));
        }
    }

    #[test]
    fn others_stay_and_say_why() {
        let stride = || ("strides", ints(&[2, 2]));
        let cases: [(&[i64], Vec<(&str, Attribute)>, &str); 6] = [
            (&[2, 1, 3, 3], vec![stride()], "its kernel is [3, 3], not [2, 2]"),
            (&[2, 1, 2, 2], vec![], "its strides is [1, 1], not [2, 2]"),
            (
                &[2, 1, 2, 2],
                vec![stride(), ("pads", ints(&[0, 0, 1, 1]))],
                "its pads is [0, 0, 1, 1], not [0, 0, 0, 0]",
            ),
            (&[2, 1, 2, 2], vec![stride(), ("group", 2.into())], "it has 2 groups"),
            (&[2, 1, 2, 2], vec![stride(), ("dilations", ints(&[2, 2]))], "its dilations is [2, 2], not [1, 1]"),
            (
                &[2, 1, 2, 2],
                vec![stride(), ("output_padding", ints(&[1, 1]))],
                "its output_padding is [1, 1], not [0, 0]",
            ),
        ];
        for (dims, attributes, why) in cases {
            let before = model(dims, &vec![1.0; dims.iter().product::<i64>() as usize], None, &attributes);
            let (after, report) = rewritten(&before);
            assert_eq!(before, after);
            assert_eq!(report.findings[0].outcome, Outcome::Kept(why.to_owned()));
        }
    }
}
