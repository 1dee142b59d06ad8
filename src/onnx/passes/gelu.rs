//! Activations: finds GELU and x·sigmoid(αx) by the function that a group of nodes computes, however it is written.
//!
//! Exporters write one activation in many ways: constants first or last, a cube as a power or as products. So the
//! group's formula is evaluated and compared with the activation's own, instead of its nodes with a list of patterns.

use std::collections::HashMap;
use std::f64::consts::{FRAC_1_SQRT_2, FRAC_2_PI};

use super::PassReport;
use crate::onnx::{ElementType, MICROSOFT, NodeId, RewriteError, Rewriter};

/// Largest difference from the activation, between -6 and 6. The constants of a 32-bit model are exact to 6e-8; GELU and
/// its approximation with tanh differ by 4.7e-4.
const TOLERANCE: f64 = 1e-6;

/// The same for 16-bit constants: √2 becomes 1.4141, which changes GELU by 3e-5.
const TOLERANCE_F16: f64 = 1e-4;

/// Nodes that an activation is made of at most; the approximation of GELU with a cube of products needs ten.
const MAX_NODES: usize = 16;

/// Replaces the nodes of an activation by one of ONNX Runtime's: `Gelu` (the exact one, with erf), `FastGelu` (the
/// approximation with tanh) or `QuickGelu` (x·sigmoid(αx); SiLU with α = 1). Each becomes what it is, never an
/// approximation of it. The standard `Gelu` becomes one of the first two.
///
/// # Errors
/// None of its own.
pub fn fuse_gelu(rewriter: &mut Rewriter) -> Result<PassReport, RewriteError> {
    let mut report = PassReport::new("gelu");
    let all: Vec<NodeId> = rewriter.ids().collect();
    for id in all {
        if rewriter.is(id, "Gelu") {
            let is_exact = rewriter.text(id, "approximate").is_none_or(|approximate| approximate == "none");
            let activation = if is_exact { Activation::Gelu } else { Activation::FastGelu };
            let (x, y) = (rewriter.input(id, 0).to_owned(), rewriter.output(id, 0).to_owned());
            report.apply(rewriter, id, activation.to_string());
            activation.put(rewriter, &[id], &x, &y);
        } else if ["Erf", "Tanh", "Sigmoid"].iter().any(|op| rewriter.is(id, op)) {
            match find(rewriter, id) {
                Ok(Match { activation, nodes, x, y }) => {
                    report.apply(rewriter, id, format!("{activation} of {x:?}, from {} nodes", nodes.len()));
                    activation.put(rewriter, &nodes, &x, &y);
                }
                Err(why) => report.keep(rewriter, id, why),
            }
        }
    }
    Ok(report)
}

/// Lets ONNX Runtime's `Gelu` and `FastGelu` add the bias of the MatMul before them: `BiasGelu`, or `FastGelu` with two
/// inputs. Comes after [`fuse_gelu`].
///
/// # Errors
/// None of its own.
pub fn fuse_bias_gelu(rewriter: &mut Rewriter) -> Result<PassReport, RewriteError> {
    let mut report = PassReport::new("bias gelu");
    let all: Vec<NodeId> = rewriter.ids().collect();
    for id in all {
        let node = rewriter.node(id);
        let op = match node.op_type() {
            "Gelu" => "BiasGelu",
            "FastGelu" if rewriter.input(id, 1).is_empty() => "FastGelu",
            _ => continue,
        };
        if node.domain() != MICROSOFT {
            continue;
        }
        match bias_before(rewriter, id) {
            Ok(Bias { sum, x, bias }) => {
                report.apply(rewriter, id, format!("{op} with bias {bias:?}"));
                let y = rewriter.output(id, 0).to_owned();
                let fused = rewriter.new_node(MICROSOFT, op, &[&x, &bias], &[&y]);
                rewriter.replace(&[sum, id], fused);
            }
            Err(why) => report.keep(rewriter, id, why),
        }
    }
    Ok(report)
}

/// An activation that is one operator of ONNX Runtime's.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Activation {
    /// x·Φ(x), Φ being the normal distribution (Hendrycks and Gimpel 2016).
    Gelu,
    /// Its approximation ½x(1 + tanh(√(2/π)(x + 0.044715x³))), in the same paper.
    FastGelu,
    /// x·sigmoid(αx).
    QuickGelu { alpha: f32 },
}

impl std::fmt::Display for Activation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Gelu => f.write_str("Gelu"),
            Self::FastGelu => f.write_str("FastGelu"),
            Self::QuickGelu { alpha } => write!(f, "QuickGelu, alpha {alpha}"),
        }
    }
}

impl Activation {
    fn at(self, x: f64) -> f64 {
        match self {
            Self::Gelu => 0.5 * x * (1.0 + libm::erf(x * FRAC_1_SQRT_2)),
            Self::FastGelu => 0.5 * x * (1.0 + (FRAC_2_PI.sqrt() * (x + 0.044715 * x.powi(3))).tanh()),
            Self::QuickGelu { alpha } => x * sigmoid(f64::from(alpha) * x),
        }
    }

    /// The activation that a formula is, if it is one.
    fn of(formula: &Formula) -> Option<Self> {
        // At 1, x·sigmoid(αx) gives α away.
        let at_one = formula.at(1.0);
        #[expect(clippy::cast_possible_truncation, reason = "ONNX stores 32-bit attributes")]
        let alpha = (at_one / (1.0 - at_one)).ln() as f32;
        let near = |activation: &Self| {
            let mut points = (-24..=24).map(|quarter| f64::from(quarter) / 4.0);
            points.all(|x| (formula.at(x) - activation.at(x)).abs() <= formula.tolerance)
        };
        [Self::Gelu, Self::FastGelu, Self::QuickGelu { alpha }].into_iter().find(near)
    }

    /// Puts it in the place of `nodes`.
    fn put(self, rewriter: &mut Rewriter, nodes: &[NodeId], x: &str, y: &str) {
        let op = match self {
            Self::Gelu => "Gelu",
            Self::FastGelu => "FastGelu",
            Self::QuickGelu { .. } => "QuickGelu",
        };
        let node = rewriter.new_node(MICROSOFT, op, &[x], &[y]);
        let id = rewriter.replace(nodes, node);
        if let Self::QuickGelu { alpha } = self {
            rewriter.set_attribute(id, "alpha", alpha);
        }
    }
}

struct Match {
    activation: Activation,
    nodes: Vec<NodeId>,
    x: String,
    y: String,
}

/// The activation that the node `seed` is part of; else why there is none.
fn find(rewriter: &Rewriter, seed: NodeId) -> Result<Match, String> {
    let roots = roots(rewriter, rewriter.input(seed, 0));
    let mut y = rewriter.output(seed, 0);
    for _ in 0..MAX_NODES {
        for x in &roots {
            let Some(formula) = Formula::new(rewriter, x, y) else { continue };
            let Some(activation) = Activation::of(&formula) else { continue };
            if formula.is_f64 {
                return Err(format!("{activation} is computed in 64 bits, for which ONNX Runtime has no operator"));
            }
            let nodes: Vec<NodeId> = formula.nodes();
            if let Some(value) = rewriter.escaping(&nodes, y) {
                return Err(format!("{value:?} inside {activation} is read elsewhere too"));
            }
            return Ok(Match { activation, nodes, x: x.clone(), y: y.to_owned() });
        }
        match rewriter.sole_consumer(y) {
            Some(next) => y = rewriter.output(next, 0),
            None => break,
        }
    }
    Err("is part of neither GELU nor x·sigmoid(αx)".to_owned())
}

/// Values that `value` may be a function of, the nearest first.
fn roots(rewriter: &Rewriter, value: &str) -> Vec<String> {
    let mut found = vec![value.to_owned()];
    let mut next = 0;
    while next < found.len() && found.len() < MAX_NODES {
        if let Some(id) = rewriter.producer(&found[next]).filter(|id| is_elementwise(rewriter, *id)) {
            for input in &rewriter.node(id).input {
                if !rewriter.is_constant(input) && !found.contains(input) {
                    found.push(input.clone());
                }
            }
        }
        next += 1;
    }
    found
}

/// What a value is as a function of one other and of single numbers.
struct Formula {
    /// Each reads those before it; the last is the value.
    terms: Vec<Term>,
    /// Some number is of 64 bits, so all are.
    is_f64: bool,
    tolerance: f64,
}

enum Term {
    X,
    Number(f64),
    Node { id: NodeId, op: String, inputs: Vec<usize> },
}

impl Formula {
    /// `y` as a function of `x`; `None` if it depends on anything else.
    fn new(rewriter: &Rewriter, x: &str, y: &str) -> Option<Self> {
        let mut formula = Self { terms: vec![Term::X], is_f64: false, tolerance: TOLERANCE };
        let mut places = HashMap::from([(x.to_owned(), 0)]);
        let last = formula.add(rewriter, y, &mut places)?;
        (last > 0 && last + 1 == formula.terms.len()).then_some(formula)
    }

    fn add(&mut self, rewriter: &Rewriter, value: &str, places: &mut HashMap<String, usize>) -> Option<usize> {
        if let Some(place) = places.get(value) {
            return Some(*place);
        }
        let term = if rewriter.is_constant(value) {
            // More dimensions would be dimensions of the result.
            rewriter.constant_dims(value).filter(|dims| matches!(dims[..], [] | [1]))?;
            match rewriter.constant_element(value)? {
                ElementType::F64 => self.is_f64 = true,
                ElementType::F16 => self.tolerance = TOLERANCE_F16,
                _ => {}
            }
            let integer = || rewriter.indices(value).and_then(|values| i32::try_from(values[0]).ok()).map(f64::from);
            Term::Number(rewriter.scalar(value).map(f64::from).or_else(integer)?)
        } else {
            let id = rewriter.producer(value).filter(|id| is_elementwise(rewriter, *id))?;
            if self.terms.len() > 2 * MAX_NODES {
                return None;
            }
            let node = rewriter.node(id);
            let inputs = node.input.iter().map(|input| self.add(rewriter, input, places));
            Term::Node { id, op: node.op_type().to_owned(), inputs: inputs.collect::<Option<_>>()? }
        };
        self.terms.push(term);
        places.insert(value.to_owned(), self.terms.len() - 1);
        Some(self.terms.len() - 1)
    }

    fn nodes(&self) -> Vec<NodeId> {
        let id = |term: &Term| match term {
            Term::Node { id, .. } => Some(*id),
            _ => None,
        };
        self.terms.iter().filter_map(id).collect()
    }

    fn at(&self, x: f64) -> f64 {
        let mut values: Vec<f64> = Vec::with_capacity(self.terms.len());
        for term in &self.terms {
            values.push(match term {
                Term::X => x,
                Term::Number(number) => *number,
                Term::Node { op, inputs, .. } => {
                    let inputs: Vec<f64> = inputs.iter().map(|place| values[*place]).collect();
                    apply(op, &inputs).unwrap_or(f64::NAN)
                }
            });
        }
        values.last().copied().unwrap_or(f64::NAN)
    }
}

fn is_elementwise(rewriter: &Rewriter, id: NodeId) -> bool {
    let node = rewriter.node(id);
    rewriter.is(id, node.op_type()) && apply(node.op_type(), &vec![1.0; node.input.len()]).is_some()
}

/// A standard operator on single numbers; `None` if it is none that activations are made of.
fn apply(op: &str, inputs: &[f64]) -> Option<f64> {
    Some(match (op, inputs) {
        ("Add", [a, b]) => a + b,
        ("Sub", [a, b]) => a - b,
        ("Mul", [a, b]) => a * b,
        ("Div", [a, b]) => a / b,
        ("Pow", [a, b]) => a.powf(*b),
        ("Neg", [a]) => -a,
        ("Reciprocal", [a]) => a.recip(),
        ("Sqrt", [a]) => a.sqrt(),
        ("Exp", [a]) => a.exp(),
        ("Erf", [a]) => libm::erf(*a),
        ("Tanh", [a]) => a.tanh(),
        ("Sigmoid", [a]) => sigmoid(*a),
        ("Identity", [a]) => *a,
        _ => return None,
    })
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// A sum that adds a bias to what a MatMul gives.
struct Bias {
    sum: NodeId,
    x: String,
    bias: String,
}

fn bias_before(rewriter: &Rewriter, id: NodeId) -> Result<Bias, String> {
    let input = rewriter.input(id, 0);
    let sum = rewriter.producer_of(input, "Add").ok_or_else(|| format!("{input:?} is no sum"))?;
    let sides = [(0, 1), (1, 0)].map(|(x, bias)| (rewriter.input(sum, x), rewriter.input(sum, bias)));
    let found = sides.into_iter().find_map(|(x, bias)| {
        let product = rewriter.producer_of(x, "MatMul")?;
        let width = *rewriter.constant_dims(rewriter.input(product, 1))?.last()?;
        (rewriter.constant_dims(bias)? == [width]).then_some((x, bias))
    });
    let (x, bias) = found.ok_or_else(|| format!("{input:?} is not a MatMul with weights plus one bias per column"))?;
    if rewriter.sole_consumer(input).is_none() {
        return Err(format!("the sum {input:?} is read elsewhere too"));
    }
    Ok(Bias { sum, x: x.to_owned(), bias: bias.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::super::Outcome;
    use super::super::fixtures::{difference, model, noise};
    use super::*;
    use crate::onnx::build::{Attribute, Graph};
    use crate::onnx::{Model, Tensor, Values};

    /// ONNX Runtime computes erf, tanh and exp with rational approximations of its own in either form.
    const CLOSE: f32 = 2e-6;

    fn graph(build: impl Fn(&mut Graph, &str) -> String) -> Model {
        let mut graph = Graph::new("activation");
        let x = graph.input("x", ElementType::F32, &["n".into(), 8.into()]);
        let y = build(&mut graph, &x);
        graph.output("y", &y, ElementType::F32, &["n".into(), 8.into()]);
        graph.finish()
    }

    fn erf_gelu(graph: &mut Graph, x: &str, divisor: f32) -> String {
        let root = graph.weights("root", &[], &[divisor]);
        let one = graph.weights("one", &[1], &[1.0]);
        let half = graph.weights("half", &[], &[0.5]);
        let scaled = graph.node("Div", &[x, &root], &[]);
        let erf = graph.node("Erf", &[&scaled], &[]);
        let sum = graph.node("Add", &[&one, &erf], &[]);
        let product = graph.node("Mul", &[x, &sum], &[]);
        graph.node("Mul", &[&product, &half], &[])
    }

    fn fuse(before: &Model) -> (Model, PassReport) {
        let mut rewriter = Rewriter::new(before.clone()).unwrap();
        let report = fuse_gelu(&mut rewriter).unwrap();
        assert_eq!(fuse_gelu(&mut rewriter).unwrap().applied(), 0);
        (rewriter.finish().unwrap(), report)
    }

    fn kept(report: &PassReport) -> &str {
        match &report.findings[0].outcome {
            Outcome::Kept(why) => why,
            Outcome::Applied(what) => panic!("{what}"),
        }
    }

    #[test]
    fn gelu_stays_exact() {
        let before = graph(|graph, x| erf_gelu(graph, x, std::f32::consts::SQRT_2));
        let (after, report) = fuse(&before);
        assert_eq!(report.findings[0].to_string(), "Erf Erf_1: Gelu of \"x\", from 5 nodes");
        assert_eq!(after.op_counts().keys().collect::<Vec<_>>(), ["Identity", "com.microsoft.Gelu"]);
        assert!(difference(&before, &after, &[("x", noise(&[5, 8]))]) < CLOSE);
    }

    #[test]
    fn what_is_nearly_gelu_is_left() {
        // 1.41 is √2 to three digits.
        let (_, report) = fuse(&graph(|graph, x| erf_gelu(graph, x, 1.41)));
        assert_eq!((report.applied(), kept(&report)), (0, "is part of neither GELU nor x·sigmoid(αx)"));
        let (_, report) = fuse(&graph(|graph, x| graph.node("Tanh", &[x], &[])));
        assert_eq!(report.applied(), 0);
        // One number per channel is no scalar function.
        let (_, report) = fuse(&graph(|graph, x| {
            let alpha = graph.weights("alpha", &[8], &[1.0; 8]);
            let scaled = graph.node("Mul", &[x, &alpha], &[]);
            let sigmoid = graph.node("Sigmoid", &[&scaled], &[]);
            graph.node("Mul", &[x, &sigmoid], &[])
        }));
        assert_eq!(report.applied(), 0);
    }

    #[test]
    fn constants_of_16_bits_are_as_good_as_they_can_be() {
        let half = |divisor: f32| {
            let mut model = graph(|graph, x| erf_gelu(graph, x, divisor));
            for constant in &mut model.proto_mut().graph.as_mut().unwrap().initializer {
                let value = Tensor::from_proto(constant).unwrap().to_scalar().unwrap();
                let dims = constant.dims.iter().map(|dim| usize::try_from(*dim).unwrap()).collect();
                let tensor = Tensor { dims, values: Values::F16(vec![half::f16::from_f32(value)]) };
                *constant = tensor.to_proto(constant.name());
            }
            model
        };
        assert_eq!(fuse(&half(std::f32::consts::SQRT_2)).1.applied(), 1);
        assert_eq!(fuse(&half(1.41)).1.applied(), 0);
    }

    #[test]
    fn a_gate_of_another_value_is_no_activation() {
        let (_, report) = fuse(&graph(|graph, x| {
            let weights: Vec<f32> = (0..64).map(|i| i as f32 / 64.0).collect();
            let w = graph.weights("w", &[8, 8], &weights);
            let gate = graph.node("MatMul", &[x, &w], &[]);
            let sigmoid = graph.node("Sigmoid", &[&gate], &[]);
            graph.node("Mul", &[x, &sigmoid], &[])
        }));
        assert_eq!(report.applied(), 0);
    }

    #[test]
    fn a_value_that_is_read_elsewhere_is_kept() {
        let before = graph(|graph, x| {
            let sigmoid = graph.node("Sigmoid", &[x], &[]);
            let silu = graph.node("Mul", &[x, &sigmoid], &[]);
            graph.node("Add", &[&silu, &sigmoid], &[])
        });
        assert_eq!(fuse(&before).1.applied(), 0);
        let before = graph(|graph, x| {
            let half = graph.weights("h", &[], &[2.0]);
            let scaled = graph.node("Mul", &[x, &half], &[]);
            let sigmoid = graph.node("Sigmoid", &[&scaled], &[]);
            let quick = graph.node("Mul", &[x, &sigmoid], &[]);
            graph.node("Add", &[&quick, &scaled], &[])
        });
        assert_eq!(kept(&fuse(&before).1), "\"mul_0\" inside QuickGelu, alpha 2 is read elsewhere too");
    }

    #[test]
    fn the_standard_operator_becomes_onnx_runtimes() {
        for (approximate, op) in [("none", "com.microsoft.Gelu"), ("tanh", "com.microsoft.FastGelu")] {
            let attributes: [(&str, Attribute); 1] = [("approximate", approximate.into())];
            let mut before = graph(|graph, x| graph.node("Gelu", &[x], &attributes));
            before.proto_mut().opset_import[0].version = Some(20);
            let (after, report) = fuse(&before);
            assert_eq!((report.applied(), after.op_counts()[op]), (1, 1));
            assert!(difference(&before, &after, &[("x", noise(&[5, 8]))]) < CLOSE);
        }
    }

    #[test]
    fn every_exported_activation_is_found() {
        for name in ["activations.onnx", "activations_torchscript.onnx"] {
            let before = model(name);
            let (after, report) = fuse(&before);
            let expected = ["Gelu", "FastGelu", "QuickGelu, alpha 1", "FastGelu", "QuickGelu, alpha 1.702"];
            for (finding, expected) in report.findings.iter().zip(expected) {
                assert!(finding.to_string().contains(&format!(": {expected} of")), "{name} {finding}");
            }
            assert_eq!(report.applied(), 5, "{name}");
            assert!(difference(&before, &after, &[("input", noise(&[5, 8]))]) < CLOSE, "{name}");
        }
    }

    #[test]
    fn exported_transformers_keep_their_results() {
        let cases = [
            ("timm_sdpa.onnx", "com.microsoft.Gelu"),
            ("timm_unfused.onnx", "com.microsoft.Gelu"),
            ("timm_torchscript.onnx", "com.microsoft.Gelu"),
            ("timm_opset16.onnx", "com.microsoft.Gelu"),
            ("timm_swiglu.onnx", "com.microsoft.QuickGelu"),
            ("torchvision_vit.onnx", "com.microsoft.Gelu"),
            ("hf_vit_eager.onnx", "com.microsoft.Gelu"),
            ("hf_vit_sdpa.onnx", "com.microsoft.Gelu"),
            ("hf_dinov2_eager.onnx", "com.microsoft.Gelu"),
            ("hf_dinov2_sdpa.onnx", "com.microsoft.Gelu"),
        ];
        for (name, op) in cases {
            let before = model(name);
            let (after, report) = fuse(&before);
            assert_eq!((report.applied(), after.op_counts()[op]), (2, 2), "{name}");
            let mut rewriter = Rewriter::new(after).unwrap();
            let report = fuse_bias_gelu(&mut rewriter).unwrap();
            assert_eq!(fuse_bias_gelu(&mut rewriter).unwrap().applied(), 0);
            let after = rewriter.finish().unwrap();
            let biased = if op == "com.microsoft.Gelu" { 2 } else { 0 };
            assert_eq!(report.applied(), biased, "{name} {:?}", report.findings);
            // Twice the sums of two blocks in another order.
            let difference = difference(&before, &after, &[("input", noise(&[2, 3, 32, 32]))]);
            assert!(difference < 1e-5, "{name} {difference}");
        }
    }

    #[test]
    fn the_bias_of_a_linear_layer_joins_its_activation() {
        let linear = |width: i64, op: &'static str| {
            let attributes: [(&str, Attribute); 1] = [("approximate", op.into())];
            let mut model = graph(|graph, x| {
                let w = graph.weights("w", &[8, 8], &[0.25; 64]);
                let b = graph.weights("b", &[width], &vec![0.5; usize::try_from(width).unwrap()]);
                let product = graph.node("MatMul", &[x, &w], &[]);
                let sum = graph.node("Add", &[&b, &product], &[]);
                graph.node("Gelu", &[&sum], &attributes)
            });
            model.proto_mut().opset_import[0].version = Some(20);
            model
        };
        for (approximate, op) in [("none", "com.microsoft.BiasGelu"), ("tanh", "com.microsoft.FastGelu")] {
            let before = linear(8, approximate);
            let mut rewriter = Rewriter::new(fuse(&before).0).unwrap();
            assert_eq!(fuse_bias_gelu(&mut rewriter).unwrap().applied(), 1);
            let after = rewriter.finish().unwrap();
            assert_eq!((after.op_counts()[op], after.op_counts().contains_key("Add")), (1, false));
            assert!(difference(&before, &after, &[("x", noise(&[5, 8]))]) < CLOSE);
        }
        let mut rewriter = Rewriter::new(fuse(&linear(1, "none")).0).unwrap();
        let report = fuse_bias_gelu(&mut rewriter).unwrap();
        assert!(kept(&report).contains("plus one bias per column"), "{:?}", report.findings);
    }
}
