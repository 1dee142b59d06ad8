//! Layer normalisation: what exporters before version 17 of the operators write as means, differences and roots becomes
//! one `LayerNormalization`.

use super::PassReport;
use crate::onnx::build::Attribute;
use crate::onnx::{ElementType, NodeId, RewriteError, Rewriter};

/// The version of the standard operators that `LayerNormalization` came with.
const SINCE: i64 = 17;

/// Replaces (x - mean) / √(variance + ε) · γ + β over the last axis by `LayerNormalization`, its epsilon as it was; β
/// may be missing. Raises the version of the standard operators to 17 where that changes nothing else.
///
/// # Errors
/// None of its own.
pub fn fuse_layer_norm(rewriter: &mut Rewriter) -> Result<PassReport, RewriteError> {
    let mut report = PassReport::new("layer norm");
    for id in rewriter.ids_of("Sqrt") {
        let Some(parts) = normalisation(rewriter, id) else { continue };
        match parts.check(rewriter).and_then(|scaled| raise_opset(rewriter).map(|()| scaled)) {
            Ok(scaled) => {
                report.apply(rewriter, id, format!("LayerNormalization of {:?}", parts.x));
                parts.replace(rewriter, &scaled);
            }
            Err(why) => report.keep(rewriter, id, why),
        }
    }
    Ok(report)
}

/// Nodes that bring the values of one axis to mean 0 and variance 1.
struct Normalisation {
    nodes: Vec<NodeId>,
    x: String,
    /// The ReduceMean nodes: of the values, and of their squared distances from the mean.
    means: [NodeId; 2],
    epsilon: f32,
    result: String,
}

/// A normalisation with what follows it: its values times γ plus β.
struct Scaled {
    nodes: Vec<NodeId>,
    gamma: String,
    beta: Option<String>,
    result: String,
}

/// The normalisation that the root `id` is part of; `None` if it is a root of something else.
fn normalisation(rewriter: &Rewriter, id: NodeId) -> Option<Normalisation> {
    // Backwards to the mean ...
    let sum = rewriter.producer_of(rewriter.input(id, 0), "Add")?;
    let (variance, epsilon) = value_and_number(rewriter, sum)?;
    let outer_mean = rewriter.producer_of(variance, "ReduceMean")?;
    let square = rewriter.producer(rewriter.input(outer_mean, 0))?;
    let is_square = if rewriter.is(square, "Pow") {
        rewriter.scalar(rewriter.input(square, 1)) == Some(2.0)
            || rewriter.indices(rewriter.input(square, 1)).is_some_and(|exponent| exponent == [2])
    } else {
        rewriter.is(square, "Mul") && rewriter.input(square, 0) == rewriter.input(square, 1)
    };
    let distance = rewriter.input(square, 0);
    let difference = rewriter.producer_of(distance, "Sub").filter(|_| is_square)?;
    let x = rewriter.input(difference, 0);
    let inner_mean = rewriter.producer_of(rewriter.input(difference, 1), "ReduceMean")?;
    if rewriter.input(inner_mean, 0) != x {
        return None;
    }
    // ... and on to the quotient.
    let mut nodes = vec![inner_mean, difference, square, outer_mean, sum, id];
    let root = rewriter.output(id, 0);
    let next = rewriter.sole_consumer(root)?;
    let quotient = if rewriter.is(next, "Reciprocal") {
        nodes.push(next);
        let inverse = rewriter.output(next, 0);
        rewriter.sole_consumer(inverse).filter(|id| rewriter.is(*id, "Mul") && other(rewriter, *id, inverse).is_some())
    } else {
        Some(next).filter(|id| rewriter.is(*id, "Div") && rewriter.input(*id, 0) != root)
    }?;
    let numerator = rewriter.node(quotient).input.iter().find(|input| {
        // Some exporters compute the distance from the mean once for each use.
        *input == distance
            || rewriter.producer_of(input, "Sub").is_some_and(|sub| same_inputs(rewriter, sub, difference))
    })?;
    nodes.extend(rewriter.producer(numerator).filter(|sub| *sub != difference));
    nodes.push(quotient);
    let result = rewriter.output(quotient, 0).to_owned();
    Some(Normalisation { nodes, x: x.to_owned(), means: [inner_mean, outer_mean], epsilon, result })
}

impl Normalisation {
    /// The same with γ and β; else why it is no `LayerNormalization`.
    fn check(&self, rewriter: &Rewriter) -> Result<Scaled, String> {
        for mean in self.means {
            is_over_last_axis(rewriter, mean, &self.x)?;
        }
        let no_gamma = || "no factors per channel follow, so the width is not known".to_owned();
        let scaling = rewriter.sole_consumer(&self.result).filter(|id| rewriter.is(*id, "Mul")).ok_or_else(no_gamma)?;
        let gamma = other(rewriter, scaling, &self.result).ok_or_else(no_gamma)?;
        let width = match rewriter.constant_dims(gamma).as_deref() {
            // One factor may stand for any number of channels.
            Some([width]) if *width > 1 => *width,
            _ => return Err(no_gamma()),
        };
        if rewriter.constant_element(gamma) == Some(ElementType::F64) {
            return Err("it is computed in 64 bits".to_owned());
        }
        let mut nodes = self.nodes.clone();
        nodes.push(scaling);
        let scaled = rewriter.output(scaling, 0);
        let shift = rewriter.sole_consumer(scaled).filter(|id| rewriter.is(*id, "Add"));
        let shift = shift.and_then(|id| Some((id, other(rewriter, id, scaled)?)));
        let shift = shift.filter(|(_, beta)| rewriter.constant_dims(beta).is_some_and(|dims| dims == [width]));
        nodes.extend(shift.map(|(id, _)| id));
        let last = shift.map_or(scaling, |(id, _)| id);
        let result = rewriter.output(last, 0).to_owned();
        if let Some(value) = rewriter.escaping(&nodes, &result) {
            return Err(format!("{value:?} inside it is read elsewhere too"));
        }
        Ok(Scaled { nodes, gamma: gamma.to_owned(), beta: shift.map(|(_, beta)| beta.to_owned()), result })
    }

    fn replace(&self, rewriter: &mut Rewriter, scaled: &Scaled) {
        let Scaled { nodes, gamma, beta, result } = scaled;
        let inputs: Vec<&str> = [self.x.as_str(), gamma].into_iter().chain(beta.as_deref()).collect();
        let mut node = rewriter.new_node("", "LayerNormalization", &inputs, &[result]);
        node.attribute.push(Attribute::from(-1).named("axis"));
        node.attribute.push(Attribute::from(self.epsilon).named("epsilon"));
        rewriter.replace(nodes, node);
    }
}

/// Checks that a ReduceMean keeps the last axis of `x` as one of size 1, and is over no other.
fn is_over_last_axis(rewriter: &Rewriter, mean: NodeId, x: &str) -> Result<(), String> {
    let axes = match rewriter.input(mean, 1) {
        "" => rewriter.ints(mean, "axes"),
        axes => rewriter.indices(axes),
    };
    match axes.as_deref() {
        _ if rewriter.int(mean, "keepdims") == Some(0) => Err("a mean drops its axis".to_owned()),
        Some([-1]) => Ok(()),
        Some(&[axis]) => match rewriter.rank(x) {
            Some(rank) if usize::try_from(axis).is_ok_and(|axis| axis + 1 == rank) => Ok(()),
            Some(rank) => Err(format!("a mean is over axis {axis} of {rank}, not over the last")),
            None => Err(format!("a mean is over axis {axis}, and the number of axes of {x:?} is not known")),
        },
        Some(axes) => Err(format!("a mean is over the axes {axes:?}, not over the last alone")),
        None => Err("the axes of a mean are no constant".to_owned()),
    }
}

/// Raises the version of the standard operators to [`SINCE`] if every node means the same there.
fn raise_opset(rewriter: &mut Rewriter) -> Result<(), String> {
    let found = rewriter.opset();
    if found >= SINCE {
        return Ok(());
    }
    let differs = |id: &NodeId| {
        let node = rewriter.node(*id);
        // RoiAlign aligns pixels otherwise since 16; bodies are not looked into.
        node.op_type() == "RoiAlign" || node.attribute.iter().any(|attribute| attribute.g.is_some())
            // Its further outputs are others since 14.
            || (node.op_type() == "BatchNormalization" && node.output.len() > 1)
    };
    if let Some(id) = rewriter.ids().find(differs) {
        let node = rewriter.label(id);
        return Err(format!(
            "LayerNormalization needs version {SINCE} of the operators; {node:?} may change from {found}"
        ));
    }
    let imports = &mut rewriter.frame().opset_import;
    let standard = imports.iter_mut().filter(|import| matches!(import.domain(), "" | "ai.onnx"));
    standard.for_each(|import| import.version = Some(SINCE));
    Ok(())
}

/// The two inputs of a sum of a value and a single number.
fn value_and_number(rewriter: &Rewriter, sum: NodeId) -> Option<(&str, f32)> {
    let (a, b) = (rewriter.input(sum, 0), rewriter.input(sum, 1));
    rewriter.scalar(b).map(|number| (a, number)).or_else(|| rewriter.scalar(a).map(|number| (b, number)))
}

/// The input of a node with two that is not `value`.
fn other<'a>(rewriter: &'a Rewriter, id: NodeId, value: &str) -> Option<&'a str> {
    match (rewriter.input(id, 0), rewriter.input(id, 1)) {
        (a, b) if a == value && b != value => Some(b),
        (a, b) if b == value && a != value => Some(a),
        _ => None,
    }
}

fn same_inputs(rewriter: &Rewriter, a: NodeId, b: NodeId) -> bool {
    rewriter.node(a).input == rewriter.node(b).input
}

#[cfg(test)]
mod tests {
    use super::super::Outcome;
    use super::super::fixtures::{difference, model, noise};
    use super::*;
    use crate::onnx::Model;
    use crate::onnx::build::{Graph, ints};

    /// Means of 8 values, summed in another order.
    const CLOSE: f32 = 2e-6;

    #[derive(Clone, Copy)]
    struct Form {
        axis: i64,
        reciprocal: bool,
        power: bool,
        gamma: bool,
        beta: bool,
        read_elsewhere: bool,
    }

    const PLAIN: Form =
        Form { axis: -1, reciprocal: false, power: true, gamma: true, beta: true, read_elsewhere: false };

    fn norm(form: Form) -> Model {
        let mut graph = Graph::new("norm");
        let x = graph.input("x", ElementType::F32, &["n".into(), 5.into(), 8.into()]);
        let two = graph.weights("two", &[], &[2.0]);
        let epsilon = graph.weights("epsilon", &[], &[0.125]);
        let gamma = graph.weights("gamma", &[8], &[0.5, 1.0, -1.0, 2.0, 3.0, 0.25, 1.5, -2.0]);
        let beta = graph.weights("beta", &[8], &[1.0, 0.0, -1.0, 2.0, 0.5, 0.0, 0.0, 3.0]);
        // Version 18 gives axes as an input.
        let axes = graph.indices("axes", &[form.axis]);
        let mean = graph.node("ReduceMean", &[&x, &axes], &[("keepdims", 1.into())]);
        let distance = graph.node("Sub", &[&x, &mean], &[]);
        let square = match form.power {
            true => graph.node("Pow", &[&distance, &two], &[]),
            false => graph.node("Mul", &[&distance, &distance], &[]),
        };
        let variance = graph.node("ReduceMean", &[&square, &axes], &[]);
        let sum = graph.node("Add", &[&variance, &epsilon], &[]);
        let deviation = graph.node("Sqrt", &[&sum], &[]);
        let mut y = if form.reciprocal {
            let inverse = graph.node("Reciprocal", &[&deviation], &[]);
            graph.node("Mul", &[&distance, &inverse], &[])
        } else {
            graph.node("Div", &[&distance, &deviation], &[])
        };
        if form.gamma {
            y = graph.node("Mul", &[&gamma, &y], &[]);
        }
        if form.beta {
            y = graph.node("Add", &[&y, &beta], &[]);
        }
        if form.read_elsewhere {
            y = graph.node("Mul", &[&y, &mean], &[]);
        }
        graph.output("y", &y, ElementType::F32, &["n".into(), 5.into(), 8.into()]);
        graph.finish()
    }

    fn fuse(before: &Model) -> (Model, PassReport) {
        let mut rewriter = Rewriter::new(before.clone()).unwrap();
        let report = fuse_layer_norm(&mut rewriter).unwrap();
        assert_eq!(fuse_layer_norm(&mut rewriter).unwrap().applied(), 0);
        (rewriter.finish().unwrap(), report)
    }

    #[test]
    fn every_form_becomes_one_node() {
        let forms = [
            PLAIN,
            Form { power: false, ..PLAIN },
            Form { reciprocal: true, ..PLAIN },
            Form { beta: false, ..PLAIN },
            Form { axis: 2, ..PLAIN },
        ];
        for (i, form) in forms.into_iter().enumerate() {
            let before = norm(form);
            let (after, report) = fuse(&before);
            assert_eq!(report.applied(), 1, "{i} {:?}", report.findings);
            assert_eq!(after.op_counts().keys().collect::<Vec<_>>(), ["Identity", "LayerNormalization"], "{i}");
            assert!(difference(&before, &after, &[("x", noise(&[2, 5, 8]))]) < CLOSE, "{i}");
        }
    }

    #[test]
    fn what_is_no_layer_norm_is_told() {
        let why = |form: Form| {
            let (_, report) = fuse(&norm(form));
            match &report.findings[..] {
                [finding] if report.applied() == 0 => finding.to_string(),
                findings => panic!("{findings:?}"),
            }
        };
        assert!(why(Form { axis: 1, ..PLAIN }).ends_with("kept, a mean is over axis 1 of 3, not over the last"));
        assert!(why(Form { gamma: false, ..PLAIN }).contains("the width is not known"));
        assert!(why(Form { read_elsewhere: true, ..PLAIN }).contains("\"reducemean_0\" inside it is read elsewhere"));
    }

    #[test]
    fn a_root_of_something_else_is_not_mentioned() {
        let mut graph = Graph::new("root");
        let x = graph.input("x", ElementType::F32, &[8.into()]);
        let root = graph.node("Sqrt", &[&x], &[]);
        graph.output("y", &root, ElementType::F32, &[8.into()]);
        assert_eq!(fuse(&graph.finish()).1.findings, []);
    }

    #[test]
    fn version_16_is_raised_unless_that_changes_a_node() {
        let before = model("timm_opset16.onnx");
        let (after, report) = fuse(&before);
        assert_eq!((report.applied(), after.op_counts()["LayerNormalization"]), (5, 5), "{:?}", report.findings);
        assert_eq!(after.opset(), Some(17));
        assert!(!after.op_counts().contains_key("ReduceMean"));
        // Sums of 16 values in another order, through two blocks.
        let difference = difference(&before, &after, &[("input", noise(&[2, 3, 32, 32]))]);
        assert!(difference < 1e-5, "{difference}");

        let mut before = norm(PLAIN);
        before.proto_mut().opset_import[0].version = Some(16);
        let graph = before.proto_mut().graph.as_mut().unwrap();
        for node in graph.node.iter_mut().filter(|node| node.op_type() == "ReduceMean") {
            node.input.truncate(1);
            node.attribute.push(ints(&[-1]).named("axes"));
        }
        assert_eq!(fuse(&before).1.applied(), 1);
        let graph = before.proto_mut().graph.as_mut().unwrap();
        let mut align = graph.node[0].clone();
        align.name = Some("align".to_owned());
        align.op_type = Some("RoiAlign".to_owned());
        align.output = vec!["aligned".to_owned()];
        graph.node.push(align);
        let (after, report) = fuse(&before);
        let Outcome::Kept(why) = &report.findings[0].outcome else { panic!("{:?}", report.findings) };
        assert!(why.ends_with("\"align\" may change from 16"), "{why}");
        assert_eq!(after.opset(), Some(16));
    }
}
