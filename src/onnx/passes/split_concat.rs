//! Turns a `Conv` over a `Concat` of channels into the sum of one `Conv` per part.
//!
//! A convolution is linear in its channels, so `Conv([a, b])` with weights `[Wa, Wb]` is `Conv(a, Wa) + Conv(b, Wb)`.
//! The `Concat` and its copies go; the `Add` is fused into the second `Conv` by ONNX Runtime's CUDA provider. On the CPU
//! nothing is gained, so it is up to the caller whether to run this pass.

use super::PassReport;
use crate::onnx::build::ints;
use crate::onnx::{ElementType, NodeId, RewriteError, Rewriter, Tensor};

/// Splits each `Conv` that alone reads a `Concat` of its input channels.
///
/// # Errors
/// [`RewriteError`] if the graph has a cycle.
pub fn split_concat(rewriter: &mut Rewriter) -> Result<PassReport, RewriteError> {
    let mut report = PassReport::new("split concat");
    for id in rewriter.order()? {
        if !rewriter.is(id, "Conv") {
            continue;
        }
        let Some(concat) = rewriter.producer_of(rewriter.input(id, 0), "Concat") else { continue };
        match plan(rewriter, id, concat) {
            Ok(split) => {
                report.apply(rewriter, id, format!("the sum of Convs over {:?} channels", split.channels));
                split.carry_out(rewriter, id, concat);
            }
            Err(reason) => report.keep(rewriter, id, reason),
        }
    }
    Ok(report)
}

struct Split {
    /// Of the `Conv`: `[out, in, ...]`.
    weight: Tensor,
    /// How many each part of the `Concat` has.
    channels: Vec<usize>,
}

fn plan(rewriter: &Rewriter, id: NodeId, concat: NodeId) -> Result<Split, String> {
    let name = rewriter.input(id, 1);
    match rewriter.constant_element(name) {
        Some(ElementType::F32) => {}
        Some(element) => return Err(format!("its weights are {element}, not float")),
        None => return Err("its weights are no constant".to_owned()),
    }
    let weight = rewriter.floats(name).ok_or("its weights can't be read")?;
    let rank = i64::try_from(weight.dims.len()).unwrap_or_default();
    let axis = rewriter.int(concat, "axis").unwrap_or_default();
    if axis != 1 && axis + rank != 1 {
        return Err(format!("the Concat before it is along axis {axis}, not the channels"));
    }
    let groups = rewriter.int(id, "group").unwrap_or(1);
    if groups != 1 {
        return Err(format!("it has {groups} groups"));
    }
    if rewriter.sole_consumer(rewriter.output(concat, 0)) != Some(id) {
        return Err(format!("{} is read by other nodes too", rewriter.output(concat, 0)));
    }
    let parts = &rewriter.node(concat).input;
    let known: Vec<Option<usize>> = parts.iter().map(|part| channels(rewriter, part, weight.dims.len())).collect();
    let total = weight.dims[1];
    let sum: usize = known.iter().flatten().sum();
    let unknown: Vec<&String> =
        parts.iter().zip(&known).filter(|(_, known)| known.is_none()).map(|(part, _)| part).collect();
    match unknown[..] {
        [] if sum == total => {}
        // What one part has follows from the weights and the others.
        [_] if sum < total => {}
        [] | [_] => return Err(format!("its weights are for {total} channels, its inputs have {sum}")),
        [first, second, ..] => return Err(format!("how many channels {first} and {second} have is not known")),
    }
    Ok(Split { channels: known.into_iter().map(|known| known.unwrap_or(total - sum)).collect(), weight })
}

impl Split {
    fn carry_out(self, rewriter: &mut Rewriter, id: NodeId, concat: NodeId) {
        let parts = rewriter.node(concat).input.clone();
        let (name, output, weight) =
            (rewriter.label(id), rewriter.output(id, 0).to_owned(), rewriter.input(id, 1).to_owned());
        let bias = rewriter.input(id, 2).to_owned();
        let Some(conv) = rewriter.remove(id) else { return };
        rewriter.remove(concat);
        let mut start = 0;
        let mut sum = String::new();
        let last = parts.len() - 1;
        for (index, (part, channels)) in parts.iter().zip(&self.channels).enumerate() {
            let slice = rewriter.add_constant(&format!("{weight}_{index}"), &self.slice(start, *channels));
            start += channels;
            let product = if last == 0 { output.clone() } else { rewriter.fresh(&format!("{output}_{index}")) };
            // The bias is added once.
            let has_bias = index == 0 && !bias.is_empty();
            let inputs: Vec<&str> =
                [part.as_str(), &slice].into_iter().chain(has_bias.then_some(bias.as_str())).collect();
            let mut node = rewriter.new_node("", "Conv", &inputs, &[&product]);
            node.name = Some(format!("{name}_{index}"));
            node.attribute.clone_from(&conv.attribute);
            rewriter.insert(node);
            if index == 0 {
                sum = product;
                continue;
            }
            let total = if index == last { output.clone() } else { rewriter.fresh(&format!("{output}_sum")) };
            let node = rewriter.new_node("", "Add", &[&sum, &product], &[&total]);
            rewriter.insert(node);
            sum = total;
        }
    }

    /// The weights for `count` channels from `start`.
    fn slice(&self, start: usize, count: usize) -> Tensor {
        let mut dims = self.weight.dims.clone();
        let kernel: usize = dims[2..].iter().product();
        let values = self.weight.to_f32().unwrap_or_default();
        let rows = values.chunks((dims[1] * kernel).max(1));
        let slice = rows.flat_map(|row| &row[start * kernel..(start + count) * kernel]).copied().collect();
        dims[1] = count;
        Tensor::f32(&dims, slice)
    }
}

/// The size of axis 1 of a value of `rank` dimensions, if what gives it tells.
fn channels(rewriter: &Rewriter, value: &str, rank: usize) -> Option<usize> {
    let declared = rewriter.declared(value).and_then(|declared| declared.dims?.get(1)?.fixed());
    if declared.is_some() {
        return declared;
    }
    if let Some(dims) = rewriter.constant_dims(value) {
        // Of fewer dimensions, it is repeated along the first ones.
        return if dims.len() + 1 < rank { Some(1) } else { dims.get((dims.len() + 1).checked_sub(rank)?).copied() };
    }
    let id = rewriter.producer(value)?;
    if !matches!(rewriter.node(id).domain(), "" | "ai.onnx") {
        return None;
    }
    let of = |index: usize| channels(rewriter, rewriter.input(id, index), rank);
    let weight = |axis: usize| rewriter.constant_dims(rewriter.input(id, 1))?.get(axis).copied();
    let int = |name: &str, default: i64| usize::try_from(rewriter.int(id, name).unwrap_or(default)).ok();
    match rewriter.node(id).op_type() {
        "Conv" => weight(0),
        "ConvTranspose" => Some(weight(1)? * int("group", 1)?),
        "BatchNormalization" | "InstanceNormalization" => weight(0).or_else(|| of(0)),
        "Relu" | "LeakyRelu" | "PRelu" | "Elu" | "Selu" | "Celu" | "Gelu" | "Sigmoid" | "HardSigmoid" | "HardSwish"
        | "Mish" | "Softplus" | "Tanh" | "Clip" | "Dropout" | "Identity" | "Cast" | "MaxPool" | "AveragePool"
        | "GlobalAveragePool" | "GlobalMaxPool" | "LRN" | "GroupNormalization" | "Softmax" | "Neg" | "Abs" => of(0),
        // The other one has as many, or one for all.
        "Add" | "Sub" | "Mul" | "Div" => match of(0) {
            Some(known @ 2..) => Some(known),
            first => of(1).filter(|second| *second > 1 || first.is_some()),
        },
        "DepthToSpace" => Some(of(0)? / int("blocksize", 1)?.checked_pow(2)?.max(1)),
        "SpaceToDepth" => Some(of(0)? * int("blocksize", 1)?.checked_pow(2)?),
        "Concat" if rewriter.int(id, "axis") == Some(1) => {
            rewriter.node(id).input.iter().map(|part| channels(rewriter, part, rank)).sum()
        }
        "Resize" => resized(rewriter, id, of(0)?),
        _ => None,
    }
}

/// The channels that a `Resize` gives.
fn resized(rewriter: &Rewriter, id: NodeId, channels: usize) -> Option<usize> {
    // Over axes 2 and on, the channels are left alone.
    if rewriter.ints(id, "axes").is_some_and(|axes| axes.iter().all(|axis| *axis > 1)) {
        return Some(channels);
    }
    if let Some(sizes) = rewriter.indices(rewriter.input(id, 3)) {
        return usize::try_from(*sizes.get(1)?).ok();
    }
    let scales = rewriter.floats(rewriter.input(id, 2))?.to_f32()?;
    #[expect(clippy::float_cmp, reason = "the exact factor that changes nothing")]
    let is_left_alone = *scales.get(1)? == 1.0;
    is_left_alone.then_some(channels)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::Outcome;
    use super::*;
    use crate::inference::evaluate;
    use crate::onnx::build::Graph;
    use crate::onnx::{Dim, Model};

    fn split(model: &Model) -> (Model, PassReport) {
        let mut rewriter = Rewriter::new(model.clone()).unwrap();
        let report = split_concat(&mut rewriter).unwrap();
        assert_eq!(split_concat(&mut rewriter).unwrap().applied(), 0);
        (rewriter.finish().unwrap(), report)
    }

    fn whole(values: &[i8]) -> Vec<f32> {
        values.iter().map(|value| f32::from(*value)).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        /// Small integers, whose sums are exact in any order: equal bit for bit, with padding and strides too.
        #[test]
        fn the_sum_is_the_same(
            parts in prop::collection::vec(1usize..4, 1..4),
            has_bias: bool,
            stride in 1i64..3,
            values in prop::collection::vec(-4i8..4, 300),
        ) {
            let values = whole(&values);
            let total: usize = parts.iter().sum();
            let mut graph = Graph::new("parts");
            let inputs: Vec<(String, usize)> = parts.iter().enumerate()
                .map(|(index, channels)| (format!("x{index}"), *channels)).collect();
            for (name, channels) in &inputs {
                graph.input(name, ElementType::F32, &[1.into(), (*channels).into(), 4.into(), 5.into()]);
            }
            let names: Vec<&str> = inputs.iter().map(|(name, _)| name.as_str()).collect();
            let concat = graph.node("Concat", &names, &[("axis", (-3).into())]);
            let weight = graph.weights("w", &[2, total as i64, 3, 3], &values[..18 * total]);
            let bias = graph.weights("b", &[2], &values[..2]);
            let operands: Vec<&str> = [concat.as_str(), &weight].into_iter().chain(has_bias.then_some(bias.as_str())).collect();
            let attributes = [("pads", ints(&[1, 0, 2, 1])), ("strides", ints(&[stride, stride]))];
            let value = graph.node("Conv", &operands, &attributes);
            graph.output("y", &value, ElementType::F32, &[1.into(), 2.into(), "h".into(), "w".into()]);
            let before = graph.finish();
            let (after, report) = split(&before);
            prop_assert_eq!(report.applied(), 1);
            prop_assert!(!after.op_counts().contains_key("Concat"));
            let tensors: Vec<(&str, Tensor)> = inputs.iter()
                .map(|(name, channels)| (name.as_str(), Tensor::f32(&[1, *channels, 4, 5], values[7..7 + 20 * channels].to_vec())))
                .collect();
            let run = |model| evaluate(model, &tensors).unwrap();
            prop_assert_eq!(run(&before), run(&after));
        }
    }

    /// A skip connection as UNets have: pooled, upsampled twice as large, and put beside what it came from.
    fn unet(up: &str) -> Graph {
        let mut graph = Graph::new("skip");
        let x = graph.input("x", ElementType::F32, &["n".into(), 2.into(), 4.into(), 4.into()]);
        let values = whole(&(0..64).map(|value| value % 7 - 3).collect::<Vec<i8>>());
        let encode = graph.weights("encode", &[3, 2, 1, 1], &values[..6]);
        let skip = graph.node("Conv", &[&x, &encode], &[]);
        let skip = graph.node("Relu", &[&skip], &[]);
        let pool = [("kernel_shape", ints(&[2, 2])), ("strides", ints(&[2, 2]))];
        let value = graph.node("MaxPool", &[&skip], &pool);
        let value = match up {
            "ConvTranspose" => {
                let up = graph.weights("up", &[3, 4, 2, 2], &values[..48]);
                graph.node("ConvTranspose", &[&value, &up], &[("strides", ints(&[2, 2]))])
            }
            "Resize" => {
                let scales = graph.weights("scales", &[4], &[1.0, 1.0, 2.0, 2.0]);
                let value = graph.node("Resize", &[&value, "", &scales], &[]);
                let one = graph.weights("one", &[1, 1, 1], &[1.0]);
                graph.node("Add", &[&value, &one], &[])
            }
            _ => {
                let deep = graph.weights("deep", &[16, 3, 1, 1], &values[..48]);
                let value = graph.node("Conv", &[&value, &deep], &[]);
                graph.node("DepthToSpace", &[&value], &[("blocksize", 2.into())])
            }
        };
        let channels: i64 = if up == "Resize" { 3 } else { 4 };
        let concat = graph.node("Concat", &[&skip, &value], &[("axis", 1.into())]);
        let decode = graph.weights("decode", &[1, 3 + channels, 1, 1], &values[..3 + channels as usize]);
        let value = graph.node("Conv", &[&concat, &decode], &[]);
        graph.output("y", &value, ElementType::F32, &["n".into(), 1.into(), 4.into(), 4.into()]);
        graph
    }

    #[test]
    fn channels_are_found_through_the_layers_of_a_unet() {
        let x = Tensor::f32(&[2, 2, 4, 4], whole(&(0..64).map(|value| value % 5 - 2).collect::<Vec<i8>>()));
        for (up, channels) in [("ConvTranspose", "[3, 4]"), ("Resize", "[3, 3]"), ("DepthToSpace", "[3, 4]")] {
            let before = unet(up).finish();
            let (after, report) = split(&before);
            assert_eq!(
                report.findings[0].outcome,
                Outcome::Applied(format!("the sum of Convs over {channels} channels"))
            );
            let run = |model| evaluate(model, &[("x", x.clone())]).unwrap();
            assert_eq!(run(&before), run(&after));
        }
    }

    #[test]
    fn a_concat_that_others_read_stays() {
        let mut graph = unet("Resize");
        let value = graph.node("Relu", &["concat_5"], &[]);
        graph.output("z", &value, ElementType::F32, &["n".into(), 6.into(), 4.into(), 4.into()]);
        let before = graph.finish();
        let (after, report) = split(&before);
        assert_eq!(before, after);
        assert_eq!(report.findings[0].outcome, Outcome::Kept("concat_5 is read by other nodes too".to_owned()));
    }

    #[test]
    fn unknown_channels_are_told() {
        let mut graph = Graph::new("unknown");
        let dims = [Dim::Unknown, Dim::Unknown, Dim::Unknown, Dim::Unknown];
        let inputs = ["a", "b"].map(|name| graph.input(name, ElementType::F32, &dims));
        let concat = graph.node("Concat", &[&inputs[0], &inputs[1]], &[("axis", 1.into())]);
        let weight = graph.weights("w", &[1, 3, 1, 1], &[1.0, 2.0, 3.0]);
        let value = graph.node("Conv", &[&concat, &weight], &[]);
        graph.output("y", &value, ElementType::F32, &dims);
        let (_, report) = split(&graph.finish());
        assert_eq!(report.findings[0].outcome, Outcome::Kept("how many channels a and b have is not known".to_owned()));
    }
}
