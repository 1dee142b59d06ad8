//! Static INT8: writes a model whose activations are bytes with scales known beforehand.
//!
//! Between `DequantizeLinear` and `QuantizeLinear`, ONNX Runtime runs products, sums and pools on bytes; what only moves
//! values is put on the bytes themselves here.

use std::collections::{BTreeSet, HashMap};

use super::channels_last::enlarge;
use super::affine::{Affine, ByteWeights, Magnitude, quantize_bias, quantize_weights};
use super::plan::{Plan, Role, inputs};
use super::product::{Bytes, multiply};
use super::ActivationRanges;
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
}

/// The values whose ranges [`quantize_static`] asks for, each once, in the graph's order.
#[must_use]
pub fn observed(rewriter: &Rewriter) -> Vec<String> {
    let plan = Plan::new(rewriter, &BTreeSet::new());
    let mut seen = BTreeSet::new();
    let mut values = Vec::new();
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
    let mut plan = Plan::new(rewriter, &options.exclude);
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
        .filter_map(|(id, _)| Some((id, (plan.output(rewriter, id)?, plan.rectifier(rewriter, id)))))
        .collect();
    let magnitude = Magnitude::of(options.reduce_range);
    let mut writer = Writer { rewriter, affines, magnitude, scales: HashMap::new(), lanes: HashMap::new() };
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
                writer.carry(id);
                continue;
            }
            Role::Rescaling if output.is_some_and(|(value, _)| writer.is_copy(id, value)) => {
                report.apply(writer.rewriter, id, "moves bytes");
                writer.carry(id);
                continue;
            }
            Role::Rescaling => {
                report.apply(writer.rewriter, id, "computes with bytes");
                for (index, value) in inputs(writer.rewriter, id).iter().enumerate() {
                    let lane = writer.lane(value);
                    writer.rewriter.set_input(id, index, &lane.floats);
                }
            }
            Role::Weighted => {
                let noted = report.findings.len();
                report.apply(writer.rewriter, id, "INT8");
                if let Err(why) = writer.weigh(id, output.is_some()) {
                    report.findings.truncate(noted);
                    report.keep(writer.rewriter, id, why);
                }
            }
        }
        if let Some((value, rectifier)) = output {
            writer.give(id, value, *rectifier);
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

    /// True for a `Concat` whose inputs and output, `value`, have one scale.
    fn is_copy(&self, id: NodeId, value: &str) -> bool {
        let root = |value: &str| self.affines.get(value).map(|(root, _)| root);
        let own = self.rewriter.output(id, 0) == value && self.rewriter.is(id, "Concat");
        own && inputs(self.rewriter, id).iter().all(|input| root(input) == root(value))
    }

    /// Puts a node that moves values on the bytes.
    fn carry(&mut self, id: NodeId) {
        let value = self.rewriter.output(id, 0).to_owned();
        let from: Vec<String> = inputs(self.rewriter, id).iter().map(|value| self.lane(value).bytes).collect();
        let bytes = self.rewriter.fresh(&format!("{value}/bytes"));
        if !enlarge(self.rewriter, id, &from[0], &bytes)
            && let Some(mut node) = self.rewriter.remove(id)
        {
            node.input.splice(..from.len(), from);
            node.output[0].clone_from(&bytes);
            self.rewriter.insert(node);
        }
        self.dequantize(&bytes, &value, &value);
        self.lanes.insert(value.clone(), Lane { bytes, floats: value });
    }

    /// Gives a node bytes for its activation, weights and bias; `gives_bytes` says what becomes of its result.
    ///
    /// # Errors
    /// Why its weights can't be bytes; the node is as it was then.
    fn weigh(&mut self, id: NodeId, gives_bytes: bool) -> Result<(), String> {
        let [x, w, b] = [0, 1, 2].map(|index| self.rewriter.input(id, index).to_owned());
        if !gives_bytes {
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
        let padding = if conv { self.missing_channels(id, &x, &weights.dims) } else { 0 };
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
