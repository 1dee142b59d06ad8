//! Static INT8: writes a model whose activations are bytes with scales known beforehand.
//!
//! Between `DequantizeLinear` and `QuantizeLinear`, ONNX Runtime runs products, sums and pools on bytes; what only
//! moves values is put on the bytes themselves here, unless the [`Form`] is plain.

use std::collections::{BTreeSet, HashMap};

use super::ActivationRanges;
use super::affine::{Affine, ByteWeights, Magnitude, quantize_bias, quantize_weights};
use super::channels_last::enlarge;
use super::plan::{Form, Plan, Role, inputs};
use super::product::{Bytes, multiply};
use crate::onnx::passes::PassReport;
use crate::onnx::{NodeId, RewriteError, Rewriter, Tensor, Values};

/// Weights per output channel from which ONNX Runtime multiplies any number of input channels fast.
const LARGE_WINDOW: usize = 192;

/// How to quantise with measured ranges.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StaticOptions {
    /// Leave weights 7 bits, for x86 CPUs without VNNI, whose sums of two products would else saturate.
    pub reduce_range: bool,
    /// Names of nodes to leave in float, as [`Finding`](crate::onnx::passes::Finding) has them.
    pub exclude: BTreeSet<String>,
    /// Whom the model is written for.
    pub form: Form,
}

/// The values whose ranges [`quantize_static`] asks for in any [`Form`], each once.
#[must_use]
pub fn observed(rewriter: &Rewriter) -> Vec<String> {
    let mut seen = BTreeSet::new();
    let mut values = Vec::new();
    for form in [Form::Kernels, Form::Plain] {
        let plan = Plan::new(rewriter, &BTreeSet::new(), form);
        for (id, _) in plan.nodes() {
            // A node left in float on request splits it from its rectifier: both may be asked for.
            let own = Some(rewriter.output(id, 0).to_owned());
            for value in inputs(rewriter, id).into_iter().chain(plan.output(rewriter, id)).chain(own) {
                let root = plan.root(rewriter, &value);
                if seen.insert(root.clone()) {
                    values.push(root);
                }
            }
        }
    }
    values
}

/// Turns convolutions and products with constant weights to INT8, and what lies between them.
///
/// Nodes whose values have no usable range stay in float, and the report says so.
///
/// # Errors
/// [`RewriteError`] if the graph is not sound.
pub fn quantize_static(
    rewriter: &mut Rewriter,
    ranges: &ActivationRanges,
    options: &StaticOptions,
) -> Result<PassReport, RewriteError> {
    let form = options.form;
    let mut plan = Plan::new(rewriter, &options.exclude, form);
    plan.restrict(rewriter, ranges);
    let mut report = PassReport::new("int8 static");
    let order = rewriter.order()?;
    let mut affines = HashMap::new();
    for (id, _) in plan.nodes() {
        for value in inputs(rewriter, id).into_iter().chain(plan.output(rewriter, id)) {
            if let Ok(affine) = plan.affine(rewriter, ranges, &value) {
                affines.insert(value, affine);
            }
        }
    }
    let outputs: HashMap<NodeId, (String, Option<NodeId>)> = plan
        .nodes()
        // In the plain form those who read a value make bytes of it.
        .filter(|_| form == Form::Kernels)
        .filter_map(|(id, _)| Some((id, (plan.output(rewriter, id)?, plan.rectifier(rewriter, id)))))
        .collect();
    // Ranges may come from elsewhere than from behind the rectifier.
    let cuts = |value: &str, rectifier: NodeId| {
        let affine = affines.get(value).map(|(_, affine): &(String, Affine)| *affine);
        let bound = rewriter.scalar(rewriter.input(rectifier, 2)).unwrap_or(f32::INFINITY);
        affine.is_some_and(|affine| affine.zero_point == 0 && affine.scale * 254.5 <= bound)
    };
    let kept: BTreeSet<NodeId> = outputs
        .values()
        .filter_map(|(value, rectifier)| rectifier.filter(|rectifier| !cuts(value, *rectifier)))
        .collect();
    let magnitude = Magnitude::of(options.reduce_range);
    let mut writer = Writer { rewriter, form, affines, magnitude, scales: HashMap::new(), lanes: HashMap::new() };
    for id in order {
        if let Some(why) = plan.kept.get(&id) {
            report.keep(writer.rewriter, id, why);
            continue;
        }
        let Some(role) = plan.role(id) else { continue };
        let output = outputs.get(&id);
        match role {
            Role::Carrier => {
                report.apply(writer.rewriter, id, "moves bytes");
                match form {
                    Form::Kernels => writer.carry(id),
                    Form::Plain => writer.read(id),
                }
                continue;
            }
            Role::Rescaling => {
                report.apply(writer.rewriter, id, "computes with bytes");
                writer.read(id);
            }
            Role::Weighted => {
                let noted = report.findings.len();
                report.apply(writer.rewriter, id, "INT8");
                if let Err(why) = writer.weigh(id, form == Form::Plain || output.is_some()) {
                    report.findings.truncate(noted);
                    report.keep(writer.rewriter, id, why);
                }
            }
        }
        if let Some((value, rectifier)) = output {
            match rectifier.filter(|rectifier| kept.contains(rectifier)) {
                Some(rectifier) => writer.give(rectifier, value, None),
                None => writer.give(id, value, *rectifier),
            }
        }
    }
    Ok(report)
}

/// A value as bytes, and as the floats that these bytes mean.
#[derive(Clone, Debug)]
struct Lane {
    bytes: String,
    floats: String,
}

/// Writes the nodes of the new graph.
struct Writer<'a> {
    rewriter: &'a mut Rewriter,
    form: Form,
    /// The bytes of each value, and the value from whose range they were taken.
    affines: HashMap<String, (String, Affine)>,
    magnitude: Magnitude,
    /// Names of scale and zero point, by the value from whose range they were taken.
    scales: HashMap<String, [String; 2]>,
    lanes: HashMap<String, Lane>,
}

impl Writer<'_> {
    /// The constants that hold a value's scale and zero point.
    fn scale(&mut self, value: &str) -> [String; 2] {
        let (root, affine) = self.affines[value].clone();
        if let Some(names) = self.scales.get(&root) {
            return names.clone();
        }
        let zero = Tensor { dims: Vec::new(), values: Values::U8(vec![affine.zero_point]) };
        let names = [
            self.rewriter.add_constant(&format!("{root}/scale"), &Tensor::scalar(affine.scale)),
            self.rewriter.add_constant(&format!("{root}/zero_point"), &zero),
        ];
        self.scales.insert(root, names.clone());
        names
    }

    fn node(&mut self, op: &str, inputs: &[&str], output: &str) -> NodeId {
        let node = self.rewriter.new_node("", op, inputs, &[output]);
        self.rewriter.insert(node)
    }

    /// Adds the node from floats to bytes; returns the bytes' name.
    fn quantize(&mut self, floats: &str, value: &str) -> String {
        let [scale, zero] = self.scale(value);
        let bytes = self.rewriter.fresh(&format!("{value}/bytes"));
        self.node("QuantizeLinear", &[floats, &scale, &zero], &bytes);
        bytes
    }

    fn dequantize(&mut self, bytes: &str, value: &str, floats: &str) {
        let [scale, zero] = self.scale(value);
        self.node("DequantizeLinear", &[bytes, &scale, &zero], floats);
    }

    /// A value to be read by a quantised node; one that comes as floats is quantised once for all of these.
    fn lane(&mut self, value: &str) -> Lane {
        if let Some(lane) = self.lanes.get(value) {
            return lane.clone();
        }
        let bytes = self.quantize(value, value);
        let floats = self.rewriter.fresh(&format!("{value}/floats"));
        self.dequantize(&bytes, value, &floats);
        let lane = Lane { bytes, floats };
        self.lanes.insert(value.to_owned(), lane.clone());
        lane
    }

    /// Makes a node read what its activations' bytes mean.
    fn read(&mut self, id: NodeId) {
        for (index, value) in inputs(self.rewriter, id).iter().enumerate() {
            let lane = self.lane(value);
            self.rewriter.set_input(id, index, &lane.floats);
        }
    }

    /// Makes a quantised node's output bytes; whoever read the value reads what they mean.
    fn give(&mut self, id: NodeId, value: &str, rectifier: Option<NodeId>) {
        let raw = match rectifier {
            Some(rectifier) => {
                self.rewriter.remove(rectifier);
                self.rewriter.output(id, 0).to_owned()
            }
            None => {
                let raw = self.rewriter.rename_output(value, &format!("{value}/raw"));
                self.rewriter.redirect(&raw, value);
                raw
            }
        };
        let bytes = self.quantize(&raw, value);
        self.dequantize(&bytes, value, value);
        self.lanes.insert(value.to_owned(), Lane { bytes, floats: value.to_owned() });
    }

    /// Puts a node that moves values on the bytes.
    fn carry(&mut self, id: NodeId) {
        let (from, value) = (self.rewriter.input(id, 0).to_owned(), self.rewriter.output(id, 0).to_owned());
        let from = self.lane(&from).bytes;
        let bytes = self.rewriter.fresh(&format!("{value}/bytes"));
        if !enlarge(self.rewriter, id, &from, &bytes)
            && let Some(mut node) = self.rewriter.remove(id)
        {
            node.input[0] = from;
            node.output[0].clone_from(&bytes);
            self.rewriter.insert(node);
        }
        self.dequantize(&bytes, &value, &value);
        self.lanes.insert(value.clone(), Lane { bytes, floats: value });
    }

    /// Gives a node bytes for its activation, weights and bias; one not `between` `QuantizeLinear` and
    /// `DequantizeLinear` becomes an operator of ONNX Runtime's that gives floats.
    ///
    /// # Errors
    /// Why its weights can't be bytes; the node is as it was then.
    fn weigh(&mut self, id: NodeId, between: bool) -> Result<(), String> {
        let [x, w, b] = [0, 1, 2].map(|index| self.rewriter.input(id, index).to_owned());
        if !between {
            let values = self.lane(&x).bytes;
            let [scale, zero_point] = self.scale(&x);
            return multiply(self.rewriter, id, &Bytes { values, scale, zero_point }, self.magnitude);
        }
        let conv = self.rewriter.is(id, "Conv");
        let by_rows = conv || self.rewriter.int(id, "transB").unwrap_or(0) != 0;
        let axis = usize::from(!by_rows);
        let mut weights = self.rewriter.floats(&w).ok_or("its weights can't be read")?;
        let bias = self.rewriter.floats(&b).and_then(|bias| bias.to_f32());
        let x_scale = self.affines[&x].1.scale;
        let padding = if conv && self.form == Form::Kernels { self.missing_channels(id, &x, &weights.dims) } else { 0 };
        if padding > 0 {
            weights = with_channels(&weights, padding);
        }
        let ByteWeights { bytes, scales } =
            quantize_weights(&weights, axis, self.magnitude, bias.as_deref().map(|bias| (bias, x_scale)))?;
        let zeros = Tensor { dims: vec![scales.len()], values: Values::I8(vec![0; scales.len()]) };
        let floats = self.constant_lane(&w, &bytes, scales.clone(), &zeros, axis);
        self.rewriter.set_input(id, 1, &floats);
        if let Some(bias) = bias {
            let (steps, scales) = quantize_bias(&bias, x_scale, &scales);
            let zeros = Tensor { dims: vec![scales.len()], values: Values::I32(vec![0; scales.len()]) };
            let floats = self.constant_lane(&b, &steps, scales, &zeros, 0);
            self.rewriter.set_input(id, 2, &floats);
        }
        let lane = if padding > 0 { self.padded_lane(&x, padding) } else { self.lane(&x) };
        self.rewriter.set_input(id, 0, &lane.floats);
        Ok(())
    }

    /// A constant that is stored as integers and read as floats; returns the floats' name.
    fn constant_lane(&mut self, name: &str, bytes: &Tensor, scales: Vec<f32>, zeros: &Tensor, axis: usize) -> String {
        let stored = self.rewriter.add_constant(&format!("{name}/bytes"), bytes);
        let scale = self.rewriter.add_constant(&format!("{name}/scale"), &Tensor::f32(&[scales.len()], scales));
        let zero = self.rewriter.add_constant(&format!("{name}/zero_point"), zeros);
        let floats = self.rewriter.fresh(&format!("{name}/floats"));
        let id = self.node("DequantizeLinear", &[&stored, &scale, &zero], &floats);
        self.rewriter.set_attribute(id, "axis", i64::from(axis == 1));
        floats
    }

    /// How many channels an image lacks of a multiple of 4, which ONNX Runtime's fast INT8 kernels want: a first layer
    /// of 3 channels and 3×3 weights is 2.5 times faster with a fourth of zeros.
    fn missing_channels(&self, id: NodeId, x: &str, weights: &[usize]) -> usize {
        let plain = self.rewriter.int(id, "group").unwrap_or(1) == 1;
        // Larger weights, as of 8×8 patches, are multiplied as fast without.
        let small = weights[1..].iter().product::<usize>() < LARGE_WINDOW;
        // Bytes that other INT8 nodes made are not copied for it.
        if plain && small && !self.lanes.contains_key(x) { weights[1].next_multiple_of(4) - weights[1] } else { 0 }
    }

    /// A value with channels of zeros behind its own.
    fn padded_lane(&mut self, x: &str, channels: usize) -> Lane {
        let count = i64::try_from(channels).unwrap_or(0);
        let pads = self.rewriter.add_constant(&format!("{x}/pads"), &Tensor::indices(&[0, 0, 0, 0, 0, count, 0, 0]));
        let padded = self.rewriter.fresh(&format!("{x}/padded"));
        self.node("Pad", &[x, &pads], &padded);
        let affine = self.affines[x].clone();
        self.affines.insert(padded.clone(), affine);
        self.lane(&padded)
    }
}

/// Weights `[out, in, h, w]` with `count` more inputs, all of weight 0.
fn with_channels(weights: &Tensor, count: usize) -> Tensor {
    let mut dims = weights.dims.clone();
    let own: usize = dims[1..].iter().product();
    let added = count * dims[2..].iter().product::<usize>();
    dims[1] += count;
    let floats = weights.to_f32().unwrap_or_default();
    let rows = floats.chunks(own.max(1)).flat_map(|row| row.iter().copied().chain(std::iter::repeat_n(0.0, added)));
    Tensor::f32(&dims, rows.collect())
}

#[cfg(test)]
mod tests {
    use super::super::{Range, RangeCollector, RangeMethod};
    use super::*;
    use crate::inference::evaluate;
    use crate::onnx::build::{Attribute, Graph, ints};
    use crate::onnx::passes::fixtures::{difference, model as fixture, noise};
    use crate::onnx::{ElementType, Model};

    /// What `observed` values took on in two runs.
    fn measured(model: &Model, dims: &[usize]) -> ActivationRanges {
        let values = observed(&Rewriter::new(model.clone()).unwrap());
        let probe = model.with_outputs(&values);
        let input = model.inputs().swap_remove(0).name;
        let mut collector = RangeCollector::default();
        let x = noise(dims);
        collector.observe(&input, &x);
        for (output, tensor) in probe.outputs().iter().zip(evaluate(&probe, &[(&input, x.clone())]).unwrap()) {
            collector.observe(&output.name, &tensor);
        }
        collector.ranges(RangeMethod::MinMax)
    }

    fn quantized(model: &Model, ranges: &ActivationRanges, options: &StaticOptions) -> (Model, PassReport) {
        let mut rewriter = Rewriter::new(model.clone()).unwrap();
        let report = quantize_static(&mut rewriter, ranges, options).unwrap();
        (rewriter.finish().unwrap(), report)
    }

    fn reasons(report: &PassReport) -> String {
        report.findings.iter().map(|finding| format!("{finding}\n")).collect()
    }

    fn weights(graph: &mut Graph, name: &str, dims: &[usize]) -> String {
        let sizes: Vec<i64> = dims.iter().map(|dim| i64::try_from(*dim).unwrap()).collect();
        graph.weights(name, &sizes, &noise(dims).to_f32().unwrap())
    }

    fn image(graph: &mut Graph, channels: usize) -> String {
        graph.input("x", ElementType::F32, &["n".into(), channels.into(), "h".into(), "w".into()])
    }

    fn finish(mut graph: Graph, value: &str) -> Model {
        graph.output("y", value, ElementType::F32, &["n".into(), "c".into(), "h".into(), "w".into()]);
        graph.finish()
    }

    /// One convolution of 3×3 with a bias, and what comes behind it.
    fn convolution(groups: usize, rectifier: Option<&str>) -> Model {
        let mut graph = Graph::new("convolution");
        let x = image(&mut graph, 6);
        let (w, b) = (weights(&mut graph, "w", &[6, 6 / groups, 3, 3]), weights(&mut graph, "b", &[6]));
        let group = Attribute::from(i64::try_from(groups).unwrap());
        let conv = graph.node("Conv", &[&x, &w, &b], &[("pads", ints(&[1, 1, 1, 1])), ("group", group)]);
        let bounds = [0.0, 6.0].map(|bound: f32| graph.weights(&format!("bound{bound}"), &[], &[bound]));
        let y = match rectifier {
            Some("Clip") => graph.node("Clip", &[&conv, &bounds[0], &bounds[1]], &[]),
            Some(op) => graph.node(op, &[&conv], &[]),
            None => conv,
        };
        finish(graph, &y)
    }

    /// A small UNet's parts: rectified convolutions, a pool, an enlargement, a concat, a sum.
    fn net() -> Model {
        let mut graph = Graph::new("net");
        let x = image(&mut graph, 3);
        let pads = || [("pads", ints(&[1, 1, 1, 1]))];
        let (w0, b0) = (weights(&mut graph, "w0", &[8, 3, 3, 3]), weights(&mut graph, "b0", &[8]));
        let (w1, w2) = (weights(&mut graph, "w1", &[16, 8, 1, 1]), weights(&mut graph, "w2", &[4, 12, 3, 3]));
        let w3 = weights(&mut graph, "w3", &[4, 4, 3, 3]);
        let conv = graph.node("Conv", &[&x, &w0, &b0], &pads());
        let skip = graph.node("Relu", &[&conv], &[]);
        let pool = graph.node("MaxPool", &[&skip], &[("kernel_shape", ints(&[2, 2])), ("strides", ints(&[2, 2]))]);
        let wide = graph.node("Conv", &[&pool, &w1], &[]);
        let up = graph.node("DepthToSpace", &[&wide], &[("blocksize", 2.into())]);
        let both = graph.node("Concat", &[&skip, &up], &[("axis", 1.into())]);
        let first = graph.node("Conv", &[&both, &w2], &pads());
        let second = graph.node("Conv", &[&first, &w3], &pads());
        let sum = graph.node("Add", &[&first, &second], &[]);
        let relu = graph.node("Relu", &[&sum], &[]);
        let last = graph.node("Conv", &[&relu, &w3], &pads());
        finish(graph, &last)
    }

    #[test]
    fn an_error_is_bounded_by_the_scales() {
        for (groups, rectifier) in [(1, None), (1, Some("Relu")), (2, Some("Clip")), (6, Some("Relu"))] {
            for reduce_range in [false, true] {
                let model = convolution(groups, rectifier);
                let ranges = measured(&model, &[2, 6, 5, 7]);
                let options = StaticOptions { reduce_range, ..Default::default() };
                let (after, report) = quantized(&model, &ranges, &options);
                assert_eq!(report.applied(), 1, "{}", reasons(&report));
                let x = noise(&[2, 6, 5, 7]);
                let [expected, found] =
                    [&model, &after].map(|model| evaluate(model, &[("x", x.clone())]).unwrap().swap_remove(0));
                let (expected, found) = (expected.to_f32().unwrap(), found.to_f32().unwrap());
                let width = |values: &[f32]| {
                    let (min, max) = values.iter().fold((0.0_f32, 0.0_f32), |(a, b), v| (a.min(*v), b.max(*v)));
                    (max - min) / 255.0
                };
                // Half a step of rounding, and half of it where the zero point was rounded.
                let (x_error, y_error) = (width(&x.to_f32().unwrap()), width(&expected));
                let w_error = 2.0 / if reduce_range { 64.0 } else { 127.0 } / 2.0;
                let products = (6 / groups * 9) as f32;
                let bound = products * (2.0 * x_error + 2.0 * w_error + x_error * w_error) + y_error + 1e-3;
                for (a, b) in expected.iter().zip(&found) {
                    assert!((a - b).abs() <= bound, "{groups} {rectifier:?}: {a} {b}, bound {bound}");
                }
            }
        }
    }

    #[test]
    fn bytes_flow_through_a_whole_net() {
        let model = net();
        let ranges = measured(&model, &[2, 3, 8, 12]);
        let (after, report) = quantized(&model, &ranges, &StaticOptions::default());
        assert_eq!(report.applied(), 9, "{}", reasons(&report));
        let counts = after.op_counts();
        // One from floats to bytes each for input, five convolutions, concat and sum; rectifiers are no nodes any more.
        assert_eq!((counts["QuantizeLinear"], counts.get("Relu"), counts.get("DepthToSpace")), (8, None, None));
        assert_eq!((after.inputs(), after.outputs()), (model.inputs(), model.outputs()));
        // 0.03: some dozens of steps of a 255th, as independent errors add.
        for dims in [[2, 3, 8, 12], [1, 3, 8, 12]] {
            let error = difference(&model, &after, &[("x", noise(&dims))]);
            assert!(error < 0.03, "{dims:?}: {error}");
        }
    }

    #[test]
    fn a_first_layer_gets_a_fourth_channel() {
        let (after, _) = quantized(&net(), &measured(&net(), &[1, 3, 8, 8]), &StaticOptions::default());
        let graph = after.proto().graph.as_ref().unwrap();
        assert_eq!(after.op_counts()["Pad"], 1);
        assert!(graph.initializer.iter().any(|tensor| tensor.dims == [8, 4, 3, 3]));
    }

    #[test]
    fn a_second_run_changes_nothing() {
        let ranges = measured(&net(), &[1, 3, 8, 8]);
        let (once, _) = quantized(&net(), &ranges, &StaticOptions::default());
        let (twice, report) = quantized(&once, &ranges, &StaticOptions::default());
        assert_eq!((twice, report.applied()), (once, 0));
        assert!(reasons(&report).contains("is INT8 already"));
        assert!(observed(&Rewriter::new(quantized(&net(), &ranges, &StaticOptions::default()).0).unwrap()).is_empty());
    }

    #[test]
    fn nodes_can_be_left_in_float() {
        let model = net();
        let ranges = measured(&model, &[1, 3, 8, 8]);
        let labels: Vec<String> = {
            let rewriter = Rewriter::new(model.clone()).unwrap();
            rewriter.ids_of("Conv").iter().map(|id| rewriter.label(*id)).collect()
        };
        for label in &labels {
            let options = StaticOptions { exclude: [label.clone()].into(), ..Default::default() };
            let (after, report) = quantized(&model, &ranges, &options);
            assert!(reasons(&report).contains(&format!("Conv {label}: kept, left in float on request")));
            assert!(difference(&model, &after, &[("x", noise(&[1, 3, 8, 8]))]) < 0.03, "{label}");
        }
        let options = StaticOptions { exclude: labels.into_iter().collect(), ..Default::default() };
        let (after, report) = quantized(&model, &ranges, &options);
        assert_eq!((report.applied(), after.op_counts()), (0, model.op_counts()));
    }

    #[test]
    fn values_without_a_range_stay_in_float() {
        let model = convolution(1, None);
        let rewriter = Rewriter::new(model.clone()).unwrap();
        let y = rewriter.output(rewriter.ids_of("Conv")[0], 0).to_owned();
        let range = |min, max| Range { min, max };
        for (bad, reason) in [
            (range(f32::NAN, 1.0), "held NaN or infinity on a calibration tile"),
            (range(0.0, f32::INFINITY), "held NaN or infinity on a calibration tile"),
            (range(0.0, 0.0), "was zero on every calibration tile"),
        ] {
            for value in ["x", &y] {
                let mut ranges = ActivationRanges::default();
                ranges.insert("x", range(-1.0, 1.0));
                ranges.insert(&y, range(-1.0, 1.0));
                ranges.insert(value, bad);
                let (after, report) = quantized(&model, &ranges, &StaticOptions::default());
                assert!(reasons(&report).contains(&format!("{value:?} {reason}")), "{}", reasons(&report));
                assert_eq!(after.op_counts(), model.op_counts());
            }
        }
        let (_, report) = quantized(&model, &ActivationRanges::default(), &StaticOptions::default());
        assert!(reasons(&report).contains("was not measured"));
    }

    #[test]
    fn a_rectifier_stays_where_bytes_do_not_cut_what_it_cuts() {
        let model = convolution(1, Some("Clip"));
        let mut ranges = measured(&model, &[1, 6, 5, 5]);
        let clipped = {
            let rewriter = Rewriter::new(model.clone()).unwrap();
            rewriter.output(rewriter.ids_of("Clip")[0], 0).to_owned()
        };
        let (after, _) = quantized(&model, &ranges, &StaticOptions::default());
        assert!(!after.op_counts().contains_key("Clip"));
        for (min, max) in [(-1.0, 6.0), (0.0, 9.0)] {
            ranges.insert(&clipped, Range { min, max });
            let (after, _) = quantized(&model, &ranges, &StaticOptions::default());
            assert_eq!(after.op_counts()["Clip"], 1);
            assert!(difference(&model, &after, &[("x", noise(&[1, 6, 5, 5]))]) < 0.05);
        }
    }

    #[test]
    fn products_give_floats_to_floats_and_bytes_to_bytes() {
        let mut graph = Graph::new("perceptron");
        let x = graph.input("x", ElementType::F32, &["n".into(), 128.into()]);
        let (w, b) = (weights(&mut graph, "w", &[128, 160]), weights(&mut graph, "b", &[160]));
        let (v, c) = (weights(&mut graph, "v", &[128, 160]), weights(&mut graph, "c", &[1, 128]));
        let hidden = graph.node("Gemm", &[&x, &w, &b], &[]);
        let relu = graph.node("Relu", &[&hidden], &[]);
        let result = graph.node("Gemm", &[&relu, &v, &c], &[("transB", 1.into())]);
        graph.output("y", &result, ElementType::F32, &["n".into(), 128.into()]);
        let model = graph.finish();
        let (after, report) = quantized(&model, &measured(&model, &[3, 128]), &StaticOptions::default());
        assert_eq!(report.applied(), 2, "{}", reasons(&report));
        let counts = after.op_counts();
        assert_eq!((counts["Gemm"], counts["com.microsoft.MatMulIntegerToFloat"]), (1, 1));
        assert!(difference(&model, &after, &[("x", noise(&[3, 128]))]) < 0.05);
    }

    #[test]
    fn what_would_not_gain_or_would_lose_stays() {
        let mut graph = Graph::new("stays");
        let x = graph.input("x", ElementType::F32, &["n".into(), 4.into(), 4.into()]);
        let small = weights(&mut graph, "small", &[4, 4]);
        let cube = weights(&mut graph, "cube", &[1, 4, 4]);
        let a = graph.node("MatMul", &[&x, &small], &[]);
        let b = graph.node("MatMul", &[&a, &x], &[]);
        let c = graph.node("MatMul", &[&small, &b], &[]);
        let d = graph.node("MatMul", &[&c, &cube], &[]);
        graph.output("y", &d, ElementType::F32, &["n".into(), 4.into(), 4.into()]);
        let model = graph.finish();
        let (after, report) = quantized(&model, &ActivationRanges::default(), &StaticOptions::default());
        for reason in ["has 16 weights, too few", "two activations", "first input is the constant", "have 3 dimensions"]
        {
            assert!(reasons(&report).contains(reason), "{reason}: {}", reasons(&report));
        }
        assert_eq!((report.applied(), after.op_counts()), (0, model.op_counts()));
    }

    #[test]
    fn exported_models_load_and_compute_nearly_the_same() {
        for name in ["unet.onnx", "timm_unfused.onnx", "hf_dinov2_eager.onnx", "torchvision_vit.onnx"] {
            let model = fixture(name);
            let input = model.inputs().swap_remove(0);
            let dims: Vec<usize> = input.dims.unwrap().iter().map(|dim| dim.fixed().unwrap_or(2)).collect();
            let (after, report) = quantized(&model, &measured(&model, &dims), &StaticOptions::default());
            assert!(report.applied() > 0, "{name}");
            let error = difference(&model, &after, &[(&input.name, noise(&dims))]);
            assert!(error < 0.05, "{name}: {error}");
        }
    }

    fn plain() -> StaticOptions {
        StaticOptions { form: Form::Plain, ..Default::default() }
    }

    /// The net with the `ConvTranspose` that its enlargement was before.
    fn net_with_conv_transpose(groups: usize) -> Model {
        let mut graph = Graph::new("transposed");
        let x = image(&mut graph, 3);
        let pads = || [("pads", ints(&[1, 1, 1, 1]))];
        let (w0, b0) = (weights(&mut graph, "w0", &[8, 3, 3, 3]), weights(&mut graph, "b0", &[8]));
        let (w1, b1) = (weights(&mut graph, "w1", &[8, 4 / groups, 2, 2]), weights(&mut graph, "b1", &[4]));
        let w2 = weights(&mut graph, "w2", &[4, 12, 3, 3]);
        let conv = graph.node("Conv", &[&x, &w0, &b0], &pads());
        let skip = graph.node("Relu", &[&conv], &[]);
        let pool = graph.node("MaxPool", &[&skip], &[("kernel_shape", ints(&[2, 2])), ("strides", ints(&[2, 2]))]);
        let group = Attribute::from(i64::try_from(groups).unwrap());
        let up = graph.node("ConvTranspose", &[&pool, &w1, &b1], &[("strides", ints(&[2, 2])), ("group", group)]);
        let both = graph.node("Concat", &[&skip, &up], &[("axis", 1.into())]);
        let last = graph.node("Conv", &[&both, &w2], &pads());
        finish(graph, &last)
    }

    /// Operators of a model that are not there to turn floats to bytes and back.
    fn operators(model: &Model) -> BTreeSet<(String, usize)> {
        let counts = model.op_counts().into_iter();
        counts.filter(|(op, _)| !op.ends_with("quantizeLinear") && !op.ends_with("QuantizeLinear")).collect()
    }

    #[test]
    fn the_plain_form_changes_no_operator() {
        // One from floats to bytes for each value that INT8 nodes read, and not for the result.
        for (model, applied, quantized_values) in [(net(), 9, 9), (net_with_conv_transpose(1), 5, 5)] {
            let ranges = measured(&model, &[2, 3, 8, 12]);
            let (after, report) = quantized(&model, &ranges, &plain());
            assert_eq!(report.applied(), applied, "{}", reasons(&report));
            assert_eq!(operators(&after), operators(&model));
            assert_eq!(after.op_counts()["QuantizeLinear"], quantized_values);
            assert_eq!((after.inputs(), after.outputs()), (model.inputs(), model.outputs()));
            let graph = after.proto().graph.as_ref().unwrap();
            for node in &graph.node {
                let reads_floats = |value: &String| after.producer(value) != Some("QuantizeLinear");
                assert!(node.op_type() == "DequantizeLinear" || node.input.iter().all(reads_floats), "{node:?}");
            }
            for dims in [[2, 3, 8, 12], [1, 3, 8, 12]] {
                let error = difference(&model, &after, &[("x", noise(&dims))]);
                assert!(error < 0.03, "{dims:?}: {error}");
            }
            let (twice, report) = quantized(&after, &ranges, &plain());
            assert_eq!((report.applied(), observed(&Rewriter::new(after.clone()).unwrap()).len()), (0, 0));
            assert_eq!(twice, after);
        }
    }

    #[test]
    fn a_transposed_convolution_has_a_scale_per_output_channel() {
        let model = net_with_conv_transpose(1);
        let ranges = measured(&model, &[1, 3, 8, 8]);
        let (after, _) = quantized(&model, &ranges, &plain());
        let rewriter = Rewriter::new(after).unwrap();
        let weights = rewriter.input(rewriter.ids_of("ConvTranspose")[0], 1);
        let lane = rewriter.producer_of(weights, "DequantizeLinear").unwrap();
        assert_eq!(rewriter.int(lane, "axis"), Some(1));
        assert_eq!(rewriter.constant_dims(rewriter.input(lane, 1)), Some(vec![4]));
        let (_, report) = quantized(&model, &ranges, &StaticOptions::default());
        assert!(reasons(&report).contains("no INT8 kernel for it"));
        let grouped = net_with_conv_transpose(2);
        let (_, report) = quantized(&grouped, &measured(&grouped, &[1, 3, 8, 8]), &plain());
        assert!(reasons(&report).contains("has groups"), "{}", reasons(&report));
    }

    #[test]
    fn who_wants_floats_gets_them_as_they_were() {
        let mut graph = Graph::new("floats");
        let x = image(&mut graph, 4);
        let (w, v) = (weights(&mut graph, "w", &[4, 4, 1, 1]), weights(&mut graph, "v", &[4, 4, 1, 1]));
        let first = graph.node("Conv", &[&x, &w], &[]);
        let second = graph.node("Conv", &[&first, &v], &[]);
        let tanh = graph.node("Tanh", &[&first], &[]);
        let sum = graph.node("Sub", &[&second, &tanh], &[]);
        let model = finish(graph, &sum);
        let (after, report) = quantized(&model, &measured(&model, &[1, 4, 8, 8]), &plain());
        assert_eq!(report.applied(), 2, "{}", reasons(&report));
        let rewriter = Rewriter::new(after).unwrap();
        let read = rewriter.input(rewriter.ids_of("Tanh")[0], 0);
        assert!(rewriter.producer_of(read, "Conv").is_some());
    }

    #[test]
    fn nodes_can_be_left_in_float_in_the_plain_form() {
        let model = net_with_conv_transpose(1);
        let ranges = measured(&model, &[1, 3, 8, 8]);
        let rewriter = Rewriter::new(model.clone()).unwrap();
        for id in rewriter.ids().filter(|id| rewriter.node(*id).op_type().starts_with("Conv")) {
            let options = StaticOptions { exclude: [rewriter.label(id)].into(), ..plain() };
            let (after, _) = quantized(&model, &ranges, &options);
            assert_eq!(operators(&after), operators(&model));
            assert!(difference(&model, &after, &[("x", noise(&[1, 3, 8, 8]))]) < 0.03, "{}", rewriter.label(id));
        }
    }

    #[test]
    fn exported_models_load_in_the_plain_form() {
        for name in ["unet.onnx", "timm_unfused.onnx", "hf_dinov2_eager.onnx", "torchvision_vit.onnx"] {
            let model = fixture(name);
            let input = model.inputs().swap_remove(0);
            let dims: Vec<usize> = input.dims.unwrap().iter().map(|dim| dim.fixed().unwrap_or(2)).collect();
            let (after, report) = quantized(&model, &measured(&model, &dims), &plain());
            assert!(report.applied() > 0, "{name}");
            assert!(!after.op_counts().keys().any(|op| op.starts_with("com.microsoft")), "{name}");
            let error = difference(&model, &after, &[(&input.name, noise(&dims))]);
            assert!(error < 0.05, "{name}: {error}");
        }
    }
}
