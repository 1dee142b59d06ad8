//! Makes a model compute in 16-bit floats where that is safe: weights, activations, and casts where they meet 32 bits.
//!
//! A node computes in 16 bits unless there is a reason against it (`kept.rs`). Every value then has one type, given by
//! the node that makes it, and a node that needs the other one reads it through a `Cast` that all such readers share.

mod kept;
mod range;

use std::collections::{BTreeSet, HashMap};

use super::element_types::element_types;
use super::{Finding, Outcome, PassReport};
use crate::onnx::build::Attribute;
use crate::onnx::{ElementType, MICROSOFT, NodeId, RewriteError, Rewriter, Tensor, Values};

/// What of a model is to be 16 bits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fp16Options {
    /// The model's inputs and outputs stay 32 bits, so that its callers need not change; casts are inside.
    pub keep_io: bool,
    /// Nodes that stay 32 bits, by their labels, because they were measured to be sensitive.
    pub also_keep: BTreeSet<String>,
}

impl Default for Fp16Options {
    fn default() -> Self {
        Self { keep_io: true, also_keep: BTreeSet::new() }
    }
}

/// A model that can't be made 16 bits.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Fp16Error {
    /// Control flow: types inside would have to change with those outside.
    #[error("{op} node {node:?} has a body, whose types are not converted")]
    Body {
        /// The node.
        node: String,
        /// Its operator.
        op: String,
    },
    /// A node gives what is no tensor, or nothing says what it gives.
    #[error("what {op} node {node:?} gives has no known element type")]
    Untyped {
        /// The node.
        node: String,
        /// Its operator.
        op: String,
    },
    /// A node that is to stay as it is does not exist.
    #[error("there is no node {node:?} to be kept in 32 bits")]
    NoSuchNode {
        /// The name that was given.
        node: String,
    },
    /// The graph can't be rewritten.
    #[error(transparent)]
    Rewrite(#[from] RewriteError),
}

/// Converts all that is 32-bit float to 16 bits, but for what would overflow, vanish, or lose what it is there for; the
/// report says so for each node, and for each constant that loses values.
///
/// # Errors
/// [`Fp16Error`] if types can't be told or a node that is to be kept does not exist.
pub fn to_fp16(rewriter: &mut Rewriter, options: &Fp16Options) -> Result<PassReport, Fp16Error> {
    check(rewriter, options)?;
    let elements = element_types(rewriter)?;
    let order = rewriter.order()?;
    let untyped = |id: &&NodeId| {
        let mut outputs = rewriter.node(**id).output.iter().filter(|value| !value.is_empty());
        outputs.any(|value| !elements.contains_key(value))
    };
    if let Some(id) = order.iter().find(untyped) {
        return Err(Fp16Error::Untyped { node: rewriter.label(*id), op: rewriter.node(*id).op_type().to_owned() });
    }
    let mut report = PassReport::new("fp16");
    let kept = kept::reasons(rewriter, &elements, &options.also_keep, &mut report)?;
    let mut conversion = Conversion { rewriter, elements, kept, keep_io: options.keep_io, casts: HashMap::new() };
    conversion.keep_casts(&order);
    for id in &order {
        conversion.tell(*id, &mut report);
    }
    conversion.convert(&order, &mut report)?;
    Ok(report)
}

fn check(rewriter: &Rewriter, options: &Fp16Options) -> Result<(), Fp16Error> {
    if let Some(id) = rewriter.control_flow() {
        return Err(Fp16Error::Body { node: rewriter.label(id), op: rewriter.node(id).op_type().to_owned() });
    }
    let labels: BTreeSet<String> = rewriter.ids().map(|id| rewriter.label(id)).collect();
    match options.also_keep.difference(&labels).next() {
        Some(node) => Err(Fp16Error::NoSuchNode { node: node.clone() }),
        None => Ok(()),
    }
}

/// What an operator takes at an input where it reads 32-bit floats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Takes {
    /// The type that it computes in.
    Computed,
    /// Whatever comes.
    Any,
    /// 32 bits, whatever it computes in.
    Float,
}

fn takes(rewriter: &Rewriter, id: NodeId, index: usize) -> Takes {
    let node = rewriter.node(id);
    match (node.domain(), node.op_type(), index) {
        ("" | "ai.onnx", "Cast" | "Shape" | "Size", _) => Takes::Any,
        // Region of interest and scales.
        ("" | "ai.onnx", "Resize", 1 | 2) => Takes::Float,
        // Ratio.
        ("" | "ai.onnx", "Dropout", 1) => Takes::Float,
        _ => Takes::Computed,
    }
}

/// True if the operator gives 32 bits there though it computes in 16: mean and deviation of a normalisation.
fn is_untouched_output(rewriter: &Rewriter, id: NodeId, index: usize) -> bool {
    let node = rewriter.node(id);
    match (node.domain(), node.op_type()) {
        ("" | "ai.onnx", "LayerNormalization") => index > 0,
        (MICROSOFT, "SkipLayerNormalization" | "SkipSimplifiedLayerNormalization") => matches!(index, 1 | 2),
        _ => false,
    }
}

/// True if the node reads or gives 32-bit floats that would be 16 bits if it computed in them.
fn is_float(rewriter: &Rewriter, id: NodeId, elements: &HashMap<String, ElementType>) -> bool {
    let node = rewriter.node(id);
    let is_f32 = |value: &String| elements.get(value) == Some(&ElementType::F32);
    let mut inputs = node.input.iter().enumerate();
    let mut outputs = node.output.iter().enumerate();
    inputs.any(|(index, value)| is_f32(value) && takes(rewriter, id, index) == Takes::Computed)
        || outputs.any(|(index, value)| is_f32(value) && !is_untouched_output(rewriter, id, index))
}

struct Conversion<'a> {
    rewriter: &'a mut Rewriter,
    /// The type of each value: first as it was, then as it is.
    elements: HashMap<String, ElementType>,
    kept: HashMap<NodeId, String>,
    keep_io: bool,
    /// The value or constant in the other type, for all who need it.
    casts: HashMap<String, String>,
}

impl Conversion<'_> {
    fn is_half(&self, id: NodeId) -> bool {
        !self.kept.contains_key(&id) && is_float(self.rewriter, id, &self.elements)
    }

    /// A `Cast` to 32 bits stays one if nothing that reads it computes in 16 bits.
    fn keep_casts(&mut self, order: &[NodeId]) {
        for id in order.iter().rev().filter(|id| self.rewriter.is(**id, "Cast")).copied().collect::<Vec<_>>() {
            let output = self.rewriter.output(id, 0);
            let reads = |reader: &NodeId| {
                let inputs = &self.rewriter.node(*reader).input;
                let mut places = inputs.iter().enumerate().filter(|(_, value)| *value == output);
                self.is_half(*reader)
                    && places.any(|(index, _)| takes(self.rewriter, *reader, index) == Takes::Computed)
            };
            let is_half_output = self.rewriter.is_output(output) && !self.keep_io;
            if !is_half_output && !self.rewriter.consumers(output).iter().any(reads) {
                self.kept.insert(id, String::new());
            }
        }
    }

    fn tell(&self, id: NodeId, report: &mut PassReport) {
        if !is_float(self.rewriter, id, &self.elements) {
            return;
        }
        match self.kept.get(&id) {
            // A Cast follows what reads it, which is told.
            Some(_) if self.rewriter.is(id, "Cast") => {}
            Some(reason) => report.keep(self.rewriter, id, reason.clone()),
            None => report.apply(self.rewriter, id, "16 bits"),
        }
    }

    fn convert(&mut self, order: &[NodeId], report: &mut PassReport) -> Result<(), Fp16Error> {
        let halves: Vec<NodeId> = order.iter().copied().filter(|id| self.is_half(*id)).collect();
        let wants = self.wants(order);
        let mut changed: HashMap<String, ElementType> = HashMap::new();
        if !self.keep_io {
            changed.extend(self.float_inputs(order).into_iter().map(|input| (input, ElementType::F16)));
        }
        for id in &halves {
            self.set_type_attribute(*id)?;
            for (index, value) in self.rewriter.node(*id).output.iter().enumerate() {
                if self.is_f32(value) && !is_untouched_output(self.rewriter, *id, index) {
                    changed.insert(value.clone(), ElementType::F16);
                }
            }
        }
        self.elements.extend(changed.iter().map(|(value, element)| (value.clone(), *element)));
        self.convert_constants(&wants, report)?;
        for Want { id, index, element } in wants {
            let value = self.rewriter.input(id, index).to_owned();
            if self.elements.get(&value) != Some(&element) {
                let cast = self.cast(&value, element);
                self.rewriter.set_input(id, index, &cast);
            }
        }
        self.convert_outputs(&mut changed);
        self.rewriter.declare(&changed);
        self.remove_idle_casts();
        self.rewriter.remove_dead();
        Ok(())
    }

    fn is_f32(&self, value: &str) -> bool {
        self.elements.get(value) == Some(&ElementType::F32)
    }

    /// What type each node needs where it reads 32 bits now.
    fn wants(&self, order: &[NodeId]) -> Vec<Want> {
        let mut wants = Vec::new();
        for id in order {
            let element = if self.is_half(*id) { ElementType::F16 } else { ElementType::F32 };
            for (index, value) in self.rewriter.node(*id).input.iter().enumerate() {
                if !self.is_f32(value) {
                    continue;
                }
                let element = match takes(self.rewriter, *id, index) {
                    Takes::Computed => element,
                    Takes::Float => ElementType::F32,
                    Takes::Any => continue,
                };
                wants.push(Want { id: *id, index, element });
            }
        }
        wants
    }

    fn float_inputs(&self, order: &[NodeId]) -> BTreeSet<String> {
        let read = order.iter().flat_map(|id| &self.rewriter.node(*id).input);
        let is_input = |value: &&String| {
            self.is_f32(value) && self.rewriter.producer(value).is_none() && !self.rewriter.is_constant(value)
        };
        read.filter(is_input).cloned().collect()
    }

    /// Attributes that name the type of what a node gives.
    fn set_type_attribute(&mut self, id: NodeId) -> Result<(), Fp16Error> {
        if self.rewriter.is(id, "Cast") {
            self.rewriter.set_attribute(id, "to", i64::from(ElementType::F16.number()));
        } else if self.rewriter.is(id, "ConstantOfShape") {
            let value = self.rewriter.tensor(id, "value")?.unwrap_or_else(|| Tensor::f32(&[1], vec![0.0]));
            self.rewriter.set_attribute(id, "value", Attribute::from(&halved(&value)));
        }
        Ok(())
    }

    /// Makes constants 16 bits: in place where all readers want that, else beside.
    fn convert_constants(&mut self, wants: &[Want], report: &mut PassReport) -> Result<(), Fp16Error> {
        let mut readers: HashMap<&str, (usize, usize)> = HashMap::new();
        for Want { id, index, element } in wants {
            let (halves, all) = readers.entry(self.rewriter.input(*id, *index)).or_default();
            *halves += usize::from(*element == ElementType::F16);
            *all += 1;
        }
        let readers: HashMap<String, (usize, usize)> =
            readers.into_iter().map(|(name, counts)| (name.to_owned(), counts)).collect();
        for name in self.rewriter.constants() {
            let Some((halves, all)) = readers.get(&name).copied().filter(|(halves, _)| *halves > 0) else { continue };
            let Some(tensor) = self.rewriter.constant(&name)? else { continue };
            let half = halved(&tensor);
            if let Some(what) = range::Loss::of(&tensor).remark() {
                let outcome = Outcome::Applied(format!("16 bits, {what}"));
                report.findings.push(Finding { node: name.clone(), op: "constant".to_owned(), outcome });
            }
            if halves == all && !self.rewriter.is_pinned(&name) {
                self.rewriter.set_constant(&name, &half);
                self.elements.insert(name, ElementType::F16);
            } else {
                let copy = self.rewriter.add_constant(&format!("{name}_fp16"), &half);
                self.casts.insert(name, copy);
            }
        }
        Ok(())
    }

    /// The value in another type.
    fn cast(&mut self, value: &str, element: ElementType) -> String {
        if let Some(cast) = self.casts.get(value) {
            return cast.clone();
        }
        let suffix = if element == ElementType::F16 { "fp16" } else { "fp32" };
        let cast = self.rewriter.fresh(&format!("{value}_{suffix}"));
        self.insert_cast(value, &cast, element);
        self.casts.insert(value.to_owned(), cast.clone());
        cast
    }

    fn insert_cast(&mut self, from: &str, to: &str, element: ElementType) {
        let mut node = self.rewriter.new_node("", "Cast", &[from], &[to]);
        node.attribute.push(Attribute::from(i64::from(element.number())).named("to"));
        self.rewriter.insert(node);
        self.elements.insert(to.to_owned(), element);
    }

    /// Gives the model's outputs the type that they are to have.
    fn convert_outputs(&mut self, changed: &mut HashMap<String, ElementType>) {
        let wanted = if self.keep_io { ElementType::F32 } else { ElementType::F16 };
        let graph = self.rewriter.frame().graph.get_or_insert_default();
        let outputs: Vec<String> = graph.output.iter().map(|output| output.name().to_owned()).collect();
        for output in outputs {
            let was_f32 = self.rewriter.declared(&output).is_some_and(|value| value.element == ElementType::F32);
            // An input or constant that is an output too stays what it is.
            if !was_f32 || self.rewriter.producer(&output).is_none() {
                continue;
            }
            let found = self.elements.get(&output).copied();
            if found != Some(wanted) {
                let inner = self.rewriter.rename_output(&output, &format!("{output}_inner"));
                if let Some(found) = found {
                    self.elements.insert(inner.clone(), found);
                }
                self.insert_cast(&inner, &output, wanted);
            }
            changed.insert(output, wanted);
        }
    }

    /// Takes out what casts to the type that a value has by now.
    fn remove_idle_casts(&mut self) {
        for id in self.rewriter.ids_of("Cast") {
            let to = self.rewriter.int(id, "to").and_then(|number| i32::try_from(number).ok());
            let found = self.elements.get(self.rewriter.input(id, 0)).map(|element| element.number());
            if found.is_some() && found == to {
                // Where both names are known outside, it stays and costs little.
                let _ = self.rewriter.bypass(id);
            }
        }
    }
}

/// The type that a node needs at one of its inputs.
struct Want {
    id: NodeId,
    index: usize,
    element: ElementType,
}

/// The tensor in 16 bits, rounded to the nearest.
fn halved(tensor: &Tensor) -> Tensor {
    let values = tensor.to_f32().unwrap_or_default().into_iter().map(half::f16::from_f32).collect();
    Tensor { dims: tensor.dims.clone(), values: Values::F16(values) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::fixtures;
    use super::*;
    use crate::inference::evaluate;
    use crate::onnx::Model;
    use crate::onnx::build::{Graph, ints};

    fn converted(model: &Model, options: &Fp16Options) -> (Model, PassReport) {
        let mut rewriter = Rewriter::new(model.clone()).unwrap();
        let report = to_fp16(&mut rewriter, options).unwrap();
        let once = rewriter.clone().finish().unwrap();
        assert_eq!(to_fp16(&mut rewriter, options).unwrap().applied(), 0);
        assert_eq!(rewriter.finish().unwrap(), once);
        (once, report)
    }

    fn kept(report: &PassReport) -> Vec<(&str, &str)> {
        let kept = report.findings.iter().filter_map(|finding| match &finding.outcome {
            Outcome::Kept(why) => Some((finding.node.as_str(), why.as_str())),
            Outcome::Applied(_) => None,
        });
        kept.collect()
    }

    fn outputs(model: &Model, x: &Tensor) -> Vec<f32> {
        evaluate(model, &[("x", x.clone())]).unwrap().remove(0).to_f32().unwrap()
    }

    fn ops(model: &Model) -> String {
        let counts = model.op_counts();
        counts.iter().map(|(op, count)| format!("{op} {count}")).collect::<Vec<_>>().join(", ")
    }

    fn small() -> Graph {
        let mut graph = Graph::new("small");
        let x = graph.input("x", ElementType::F32, &["n".into(), 2.into(), 4.into(), 4.into()]);
        let weight = graph.weights("w", &[2, 2, 1, 1], &[0.5, -1.0, 0.25, 2.0]);
        let conv = graph.node("Conv", &[&x, &weight], &[]);
        let scales = graph.weights("scales", &[4], &[1.0, 1.0, 2.0, 2.0]);
        let large = graph.node("Resize", &[&conv, "", &scales], &[]);
        let zero = graph.weights("zero", &[], &[0.0]);
        let is_large = graph.node("Greater", &[&large, &zero], &[]);
        let chosen = graph.node("Where", &[&is_large, &large, &zero], &[]);
        graph.output("y", &chosen, ElementType::F32, &["n".into(), 2.into(), 8.into(), 8.into()]);
        graph
    }

    #[test]
    fn callers_of_the_model_see_no_difference() {
        let before = small().finish();
        let (after, report) = converted(&before, &Fp16Options::default());
        assert_eq!((after.inputs(), after.outputs()), (before.inputs(), before.outputs()));
        assert!(kept(&report).is_empty(), "{report:?}");
        assert_eq!(ops(&after), "Cast 2, Conv 1, Greater 1, Identity 1, Resize 1, Where 1");
        let rewriter = Rewriter::new(after.clone()).unwrap();
        assert_eq!(rewriter.constant_element("w"), Some(ElementType::F16));
        assert_eq!(rewriter.constant_element("scales"), Some(ElementType::F32));
        // Halves and quarters of small integers are exact.
        let x = Tensor::f32(&[1, 2, 4, 4], (0..32).map(|value| value as f32 - 16.0).collect());
        assert_eq!(outputs(&before, &x), outputs(&after, &x));
    }

    #[test]
    fn inputs_and_outputs_become_16_bits_if_asked() {
        let options = Fp16Options { keep_io: false, ..Default::default() };
        let (after, _) = converted(&small().finish(), &options);
        assert_eq!(after.inputs()[0].to_string(), "x float16 [n, 2, 4, 4]");
        assert_eq!(after.outputs()[0].to_string(), "y float16 [n, 2, 8, 8]");
        assert!(!after.op_counts().contains_key("Cast"));
        let halves = halved(&Tensor::f32(&[1, 2, 4, 4], (0..32).map(|value| value as f32).collect()));
        assert!(outputs(&after, &halves).iter().all(|value| value.is_finite()));
    }

    #[test]
    fn nodes_named_as_sensitive_stay() {
        let also_keep = BTreeSet::from(["Resize_1".to_owned()]);
        let (after, report) = converted(&small().finish(), &Fp16Options { also_keep, ..Default::default() });
        assert_eq!(kept(&report), [("Resize_1", "it was named as sensitive")]);
        assert_eq!(ops(&after), "Cast 4, Conv 1, Greater 1, Identity 1, Resize 1, Where 1");
        let mut rewriter = Rewriter::new(small().finish()).unwrap();
        let also_keep = BTreeSet::from(["Resize_7".to_owned()]);
        let error = to_fp16(&mut rewriter, &Fp16Options { also_keep, ..Default::default() }).unwrap_err();
        assert_eq!(error.to_string(), "there is no node \"Resize_7\" to be kept in 32 bits");
    }

    #[test]
    fn a_normalisation_in_single_operators_stays() {
        let mut graph = Graph::new("norm");
        let dims = [2.into(), 8.into()];
        let x = graph.input("x", ElementType::F32, &dims);
        let gain = graph.weights("gain", &[8], &[300.0; 8]);
        let x = graph.node("Mul", &[&x, &gain], &[]);
        let mean = graph.node("ReduceMean", &[&x], &[("keepdims", 1.into())]);
        let centred = graph.node("Sub", &[&x, &mean], &[]);
        let two = graph.weights("two", &[], &[2.0]);
        let squared = graph.node("Pow", &[&centred, &two], &[]);
        let axes = graph.indices("axes", &[-1]);
        let variance = graph.node("ReduceMean", &[&squared, &axes], &[]);
        let epsilon = graph.weights("epsilon", &[], &[1e-12]);
        let sum = graph.node("Add", &[&variance, &epsilon], &[]);
        let deviation = graph.node("Sqrt", &[&sum], &[]);
        let normed = graph.node("Div", &[&centred, &deviation], &[]);
        let shifted = graph.node("Add", &[&normed, &gain], &[]);
        graph.output("y", &shifted, ElementType::F32, &dims);
        let before = graph.finish();
        let (after, report) = converted(&before, &Fp16Options::default());
        let nodes: Vec<&str> = kept(&report).into_iter().map(|(node, _)| node).collect();
        let expected = ["epsilon", "ReduceMean_1", "Sub_2", "Pow_3", "ReduceMean_4", "Add_5", "Sqrt_6", "Div_7"];
        assert_eq!(nodes, expected);
        // One cast in, one out to the last Add, and those of the model's input and output.
        assert_eq!(after.op_counts()["Cast"], 4);
        let x = Tensor::f32(&[2, 8], (0..16).map(|value| (value * value) as f32 / 8.0 - 7.0).collect());
        assert!(fixtures::relative(&outputs(&before, &x), &outputs(&after, &x)) < 1e-3);
    }

    #[test]
    fn constants_that_do_not_fit_are_told() {
        let mut graph = Graph::new("range");
        let x = graph.input("x", ElementType::F32, &[2.into()]);
        let large = graph.weights("large", &[2], &[1e5, 1.0]);
        let small = graph.weights("small", &[2], &[1e-9, 1.0]);
        let value = graph.node("Mul", &[&x, &large], &[]);
        let value = graph.node("Mul", &[&value, &small], &[]);
        graph.output("y", &value, ElementType::F32, &[2.into()]);
        let before = graph.finish();
        let (after, report) = converted(&before, &Fp16Options::default());
        let findings: Vec<String> = report.findings.iter().map(Finding::to_string).collect();
        assert_eq!(
            findings[..2],
            [
                "constant large: kept, it holds 1e5, and 16 bits end at 65504",
                "Mul Mul_0: kept, its constant large holds 1e5, and 16 bits end at 65504",
            ]
        );
        let told = "constant small: 16 bits, but 50.0 % of its values vanish: they are below 2^-24";
        assert!(findings.contains(&told.to_owned()), "{findings:?}");
        assert_eq!(outputs(&after, &Tensor::f32(&[2], vec![0.5, 0.25])), [0.0, 0.25]);
    }

    #[test]
    fn sizes_and_pixels_are_computed_in_32_bits() {
        let mut graph = Graph::new("integers");
        let x = graph.input("x", ElementType::U8, &[1.into(), 1.into(), 4.into(), "w".into()]);
        let float = || ("to", i64::from(ElementType::F32.number()).into());
        let pixels = graph.node("Cast", &[&x], &[float()]);
        let scale = graph.weights("scale", &[], &[1.0 / 255.0]);
        let pixels = graph.node("Mul", &[&pixels, &scale], &[]);
        let pixels = graph.node("Transpose", &[&pixels], &[("perm", ints(&[0, 1, 3, 2]))]);
        let shape = graph.node("Shape", &[&pixels], &[]);
        let sizes = graph.node("Cast", &[&shape], &[float()]);
        let factors = graph.weights("factors", &[4], &[1.0, 1.0, 1.5, 2.0]);
        let sizes = graph.node("Mul", &[&sizes, &factors], &[]);
        let sizes = graph.node("Floor", &[&sizes], &[]);
        let sizes = graph.node("Cast", &[&sizes], &[("to", i64::from(ElementType::I64.number()).into())]);
        let large = graph.node("Resize", &[&pixels, "", "", &sizes], &[]);
        graph.output("y", &large, ElementType::F32, &[1.into(), 1.into(), "h".into(), 8.into()]);
        let before = graph.finish();
        let (after, report) = converted(&before, &Fp16Options::default());
        let nodes: Vec<&str> = kept(&report).into_iter().map(|(node, _)| node).collect();
        assert_eq!(nodes, ["Mul_1", "Mul_5", "Floor_6"]);
        let x = Tensor { dims: vec![1, 1, 4, 6], values: Values::U8((0..24).map(|value| value * 10).collect()) };
        assert!(fixtures::relative(&outputs(&before, &x), &outputs(&after, &x)) <= 2f32.powi(-11));
    }

    #[test]
    fn casts_and_filled_tensors_follow_who_reads_them() {
        let mut graph = Graph::new("made");
        let x = graph.input("x", ElementType::U8, &[2.into()]);
        let pixels = graph.node("Cast", &[&x], &[("to", i64::from(ElementType::F32.number()).into())]);
        let shape = graph.node("Shape", &[&x], &[]);
        let ones = Tensor::f32(&[1], vec![1.0]);
        let ones = graph.node("ConstantOfShape", &[&shape], &[("value", Attribute::from(&ones))]);
        let both = graph.node("Concat", &[&pixels, &ones], &[("axis", 0.into())]);
        let again = graph.node("Cast", &[&both], &[("to", i64::from(ElementType::F32.number()).into())]);
        let value = graph.node("Relu", &[&again], &[]);
        graph.output("y", &value, ElementType::F32, &[4.into()]);
        let (after, _) = converted(&graph.finish(), &Fp16Options::default());
        // Of the casts in the model one is left, and the one to the output is new.
        assert_eq!(ops(&after), "Cast 2, Concat 1, ConstantOfShape 1, Identity 1, Relu 1, Shape 1");
        let x = Tensor { dims: vec![2], values: Values::U8(vec![255, 7]) };
        assert_eq!(outputs(&after, &x), [255.0, 7.0, 1.0, 1.0]);
    }

    #[test]
    fn bodies_are_refused() {
        let mut model = small().finish();
        let node = &mut model.proto_mut().graph.as_mut().unwrap().node[0];
        node.attribute.push(crate::onnx::proto::AttributeProto { g: Some(Default::default()), ..Default::default() });
        let error = to_fp16(&mut Rewriter::new(model).unwrap(), &Fp16Options::default()).unwrap_err();
        assert_eq!(error.to_string(), "Conv node \"Conv_0\" has a body, whose types are not converted");
    }

    #[test]
    fn exported_networks_give_what_they_gave() {
        for name in ["unet.onnx", "timm_unfused.onnx", "timm_sdpa.onnx", "hf_dinov2_eager.onnx", "torchvision_vit.onnx"]
        {
            let before = fixtures::model(name);
            let (after, _) = converted(&before, &Fp16Options::default());
            let input = &before.inputs()[0];
            let dims: Vec<usize> = input.dims.iter().flatten().map(|dim| dim.fixed().unwrap_or(2)).collect();
            let difference = fixtures::difference(&before, &after, &[(&input.name, fixtures::noise(&dims))]);
            // Some ten roundings of 2^-11 in a row.
            assert!(difference < 0.005, "{name}: {difference}");
        }
    }

    /// Half the distance of 1 to the next 16-bit float, and of 0.
    const ROUNDING: (f64, f64) = (1.0 / 2048.0, 1.0 / 33_554_432.0);

    /// A layer of the nets below: `[out, in, k, k]`, zero-padded to give images of the same size.
    struct Layer {
        weight: Vec<f64>,
        bias: Vec<f64>,
    }

    /// Images of `channels` planes of `side` by `side` pixels.
    #[derive(Clone, Copy)]
    struct Net {
        channels: usize,
        side: usize,
        kernel: usize,
    }

    impl Net {
        fn convolve(self, x: &[f64], weight: impl Fn(usize) -> f64) -> Vec<f64> {
            let Self { channels, side, kernel } = self;
            let mut y = vec![0.0; x.len()];
            for (index, y) in y.iter_mut().enumerate() {
                let (output, row, column) = (index / side / side, index / side % side, index % side);
                for tap in 0..channels * kernel * kernel {
                    let (input, i, j) = (tap / kernel / kernel, tap / kernel % kernel, tap % kernel);
                    let (i, j) = ((row + i).wrapping_sub(kernel / 2), (column + j).wrapping_sub(kernel / 2));
                    if i < side && j < side {
                        *y += weight(output * channels * kernel * kernel + tap) * x[(input * side + i) * side + j];
                    }
                }
            }
            y
        }

        /// The exact result of one layer, and how far one in 16 bits may be from it: `|W| e` from its input, weights
        /// and bias rounded, sums in 32 bits, `rounded` results rounded.
        fn layer(self, x: &[f64], error: &[f64], layer: &Layer, roundings: usize) -> (Vec<f64>, Vec<f64>) {
            let (relative, absolute) = ROUNDING;
            let sum = (self.channels * self.kernel * self.kernel + 2) as f64 / 16_777_216.0;
            let magnitudes: Vec<f64> = x.iter().map(|value| value.abs()).collect();
            let rounding = |value: f64| relative * value.abs() + absolute;
            let exact = self.convolve(x, |index| layer.weight[index]);
            let carried = self.convolve(error, |index| layer.weight[index].abs() + rounding(layer.weight[index]));
            let weights = self.convolve(&magnitudes, |index| rounding(layer.weight[index]));
            let size = self.convolve(&magnitudes, |index| layer.weight[index].abs());
            let mut values = Vec::new();
            let mut bounds = Vec::new();
            for index in 0..x.len() {
                let bias = layer.bias[index / self.side / self.side];
                let mut bound = carried[index] + weights[index] + rounding(bias);
                bound += sum * (size[index] + bias.abs() + carried[index] + weights[index]);
                for _ in 0..roundings {
                    bound += rounding(exact[index].abs() + bias.abs() + bound);
                }
                // Relu moves nothing apart.
                values.push((exact[index] + bias).max(0.0));
                bounds.push(bound);
            }
            (values, bounds)
        }

        fn check(self, depth: usize, numbers: &[i16]) -> Result<(), TestCaseError> {
            let Self { channels, side, kernel } = self;
            let mut numbers = numbers.iter().cycle().map(|number| f32::from(*number) / 20_000.0);
            let mut take = |count: usize| numbers.by_ref().take(count).collect::<Vec<f32>>();
            let mut graph = Graph::new("net");
            let is_dense = kernel == 1;
            let dims = [1.into(), channels.into(), side.into(), side.into()];
            let dims = if is_dense { &dims[..2] } else { &dims[..] };
            let mut value = graph.input("x", ElementType::F32, dims);
            let x = take(channels * side * side);
            let widen = |values: &[f32]| values.iter().map(|value| f64::from(*value)).collect::<Vec<f64>>();
            let mut exact = widen(&x);
            let mut error: Vec<f64> = exact.iter().map(|value| ROUNDING.0 * value.abs() + ROUNDING.1).collect();
            for index in 0..depth {
                let (weight, bias) = (take(channels * channels * kernel * kernel), take(channels));
                let (c, k) = (channels as i64, kernel as i64);
                let b = graph.weights(&format!("b{index}"), &[c], &bias);
                value = if is_dense {
                    // Of a MatMul the rows are the inputs.
                    let transposed: Vec<f32> =
                        (0..channels * channels).map(|at| weight[at % channels * channels + at / channels]).collect();
                    let w = graph.weights(&format!("w{index}"), &[c, c], &transposed);
                    let product = graph.node("MatMul", &[&value, &w], &[]);
                    graph.node("Add", &[&product, &b], &[])
                } else {
                    let w = graph.weights(&format!("w{index}"), &[c, c, k, k], &weight);
                    graph.node("Conv", &[&value, &w, &b], &[("pads", ints(&[k / 2; 4]))])
                };
                value = graph.node("Relu", &[&value], &[]);
                let layer = Layer { weight: widen(&weight), bias: widen(&bias) };
                (exact, error) = self.layer(&exact, &error, &layer, if is_dense { 2 } else { 1 });
            }
            graph.output("y", &value, ElementType::F32, dims);
            let (after, report) = converted(&graph.finish(), &Fp16Options::default());
            prop_assert!(kept(&report).is_empty());
            let dims: Vec<usize> = dims.iter().filter_map(|dim| dim.fixed()).collect();
            let found = outputs(&after, &Tensor::f32(&dims, x));
            for ((found, exact), error) in found.iter().zip(&exact).zip(&error) {
                let difference = (f64::from(*found) - exact).abs();
                prop_assert!(difference <= *error, "{difference} is above {error}");
            }
            Ok(())
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn a_perceptron_stays_within_the_bound_of_rounding(
            channels in 1usize..24,
            depth in 1usize..5,
            numbers in prop::collection::vec(any::<i16>(), 997),
        ) {
            Net { channels, side: 1, kernel: 1 }.check(depth, &numbers)?;
        }

        #[test]
        fn a_convolutional_net_stays_within_the_bound_of_rounding(
            channels in 1usize..6,
            side in 1usize..7,
            depth in 1usize..4,
            numbers in prop::collection::vec(any::<i16>(), 997),
        ) {
            Net { channels, side, kernel: 3 }.check(depth, &numbers)?;
        }
    }
}
