//! Takes out nodes that do nothing in inference, and what no output needs.

use super::{Finding, Outcome, PassReport};
use crate::onnx::{Dim, ElementType, NodeId, RewriteError, Rewriter, Values};

/// Removes dead nodes and unused constants, `Identity`, `Dropout`, `Cast` to the type that a value has, and `Reshape`
/// and `Transpose` that change nothing; makes one of two `Transpose` or `Reshape` in a row.
///
/// # Errors
/// [`RewriteError`] if a constant can't be read.
pub fn clean(rewriter: &mut Rewriter) -> Result<PassReport, RewriteError> {
    let mut report = PassReport::new("clean");
    remove_dead(rewriter, &mut report);
    for id in rewriter.order()? {
        // By now a node may be gone or read something else, so that each is looked at when its turn comes.
        let verdict = match rewriter.node(id).op_type() {
            _ if !is_standard(rewriter, id) => continue,
            "Identity" => Ok("it gives its input"),
            "Dropout" => dropout(rewriter, id)?,
            "Cast" if casts_to_same(rewriter, id) => Ok("its input has that type"),
            "Reshape" if reshapes_to_same(rewriter, id) => Ok("its input has that shape"),
            "Reshape" => {
                merge_reshapes(rewriter, id, &mut report);
                continue;
            }
            "Transpose" => match merge_transposes(rewriter, id, &mut report) {
                true => Ok("it moves nothing"),
                false => continue,
            },
            _ => continue,
        };
        match verdict {
            Ok(reason) => bypass(rewriter, id, reason, &mut report),
            Err(reason) => report.keep(rewriter, id, reason),
        }
    }
    // What was left over by the above.
    rewriter.remove_dead();
    Ok(report)
}

fn is_standard(rewriter: &Rewriter, id: NodeId) -> bool {
    matches!(rewriter.node(id).domain(), "" | "ai.onnx")
}

fn remove_dead(rewriter: &mut Rewriter, report: &mut PassReport) {
    let constants = rewriter.constants();
    let applied = |node: String, op: &str| {
        let what = "removed, no output needs it".to_owned();
        Finding { node, op: op.to_owned(), outcome: Outcome::Applied(what) }
    };
    for node in rewriter.remove_dead() {
        let name = node.name.as_ref().filter(|name| !name.is_empty()).or(node.output.first());
        report.findings.push(applied(name.cloned().unwrap_or_default(), node.op_type()));
    }
    for name in constants.into_iter().filter(|name| !rewriter.is_constant(name)) {
        report.findings.push(applied(name, "constant"));
    }
}

/// Takes out a node that gives its first input, and tells.
fn bypass(rewriter: &mut Rewriter, id: NodeId, reason: &str, report: &mut PassReport) {
    let (node, op) = (rewriter.label(id), rewriter.node(id).op_type().to_owned());
    let outcome = match rewriter.bypass(id) {
        Ok(()) => Outcome::Applied(format!("removed, {reason}")),
        Err(why) => Outcome::Kept(why.to_owned()),
    };
    report.findings.push(Finding { node, op, outcome });
}

/// Whether a `Dropout` gives its input, as it does unless it is told to train.
fn dropout(rewriter: &Rewriter, id: NodeId) -> Result<Result<&'static str, &'static str>, RewriteError> {
    let mask = rewriter.output(id, 1);
    if rewriter.is_pinned(mask) || !rewriter.consumers(mask).is_empty() {
        return Ok(Err("its mask is read"));
    }
    let training = rewriter.input(id, 2);
    let is_off = match rewriter.constant(training)? {
        Some(tensor) => tensor.values == Values::Bool(vec![false]),
        None => training.is_empty(),
    };
    Ok(if is_off { Ok("it does nothing in inference") } else { Err("whether it trains is told by an input") })
}

fn casts_to_same(rewriter: &Rewriter, id: NodeId) -> bool {
    let to = rewriter.int(id, "to").and_then(|number| i32::try_from(number).ok()).map(ElementType::from_number);
    to.is_some() && element(rewriter, rewriter.input(id, 0)) == to
}

/// A value's type where it is plain: of constants, declared values, results of `Cast`.
fn element(rewriter: &Rewriter, value: &str) -> Option<ElementType> {
    if let Some(cast) = rewriter.producer_of(value, "Cast") {
        return rewriter.int(cast, "to").and_then(|number| i32::try_from(number).ok()).map(ElementType::from_number);
    }
    rewriter.constant_element(value).or_else(|| rewriter.declared(value).map(|declared| declared.element))
}

/// True if every entry of the target shape is provably the input's own size there.
fn reshapes_to_same(rewriter: &Rewriter, id: NodeId) -> bool {
    let (data, target) = (rewriter.input(id, 0), rewriter.input(id, 1));
    if let Some(shape) = rewriter.producer_of(target, "Shape") {
        let is_whole = rewriter.node(shape).attribute.is_empty();
        return is_whole && rewriter.input(shape, 0) == data;
    }
    let dims = rewriter.declared(data).and_then(|declared| declared.dims);
    let (Some(target), Some(dims)) = (rewriter.indices(target), dims) else { return false };
    let copies_zeros = rewriter.int(id, "allowzero").unwrap_or(0) == 0;
    let is_same = |(entry, dim): (&i64, &Dim)| match dim.fixed().map(i64::try_from) {
        Some(Ok(size)) if size == *entry && size != 0 => true,
        _ => *entry == 0 && copies_zeros,
    };
    // One entry may be worked out from the others: then it is the same as they are.
    let unknown = target.iter().filter(|entry| **entry == -1).count();
    let same = target.iter().zip(&dims).filter(|pair| is_same(*pair)).count();
    target.len() == dims.len() && unknown <= 1 && same + unknown == target.len()
}

/// Makes a `Reshape` of a `Reshape` read what the first one read.
fn merge_reshapes(rewriter: &mut Rewriter, id: NodeId, report: &mut PassReport) {
    let Some(first) = rewriter.producer_of(rewriter.input(id, 0), "Reshape") else { return };
    // A zero copies a size of the first one's result.
    let Some(target) = rewriter.indices(rewriter.input(id, 1)).filter(|target| !target.contains(&0)) else { return };
    let data = rewriter.input(first, 0).to_owned();
    report.apply(rewriter, id, format!("reshapes {data} to {target:?} directly"));
    rewriter.set_input(id, 0, &data);
}

/// Makes a `Transpose` of a `Transpose` read what the first one read; true if a node moves nothing (any more).
fn merge_transposes(rewriter: &mut Rewriter, id: NodeId, report: &mut PassReport) -> bool {
    let perm = rewriter.ints(id, "perm");
    let is_identity = |perm: &[i64]| perm.iter().zip(0..).all(|(axis, index)| *axis == index);
    if perm.as_deref().is_some_and(is_identity) {
        return true;
    }
    let Some(first) = rewriter.producer_of(rewriter.input(id, 0), "Transpose") else { return false };
    let data = rewriter.input(first, 0).to_owned();
    let (first, second) = match (rewriter.ints(first, "perm"), perm) {
        (Some(first), Some(second)) => (first, second),
        // Without one the axes are reversed: twice is not at all.
        (None, None) => {
            rewriter.set_input(id, 0, &data);
            return true;
        }
        (Some(first), None) => {
            (first.clone(), (0..).take(first.len()).collect::<Vec<i64>>().into_iter().rev().collect())
        }
        (None, Some(second)) => ((0..).take(second.len()).collect::<Vec<i64>>().into_iter().rev().collect(), second),
    };
    let merged: Option<Vec<i64>> = second.iter().map(|axis| first.get(usize::try_from(*axis).ok()?).copied()).collect();
    let Some(merged) = merged else { return false };
    rewriter.set_input(id, 0, &data);
    rewriter.set_attribute(id, "perm", crate::onnx::build::ints(&merged));
    if is_identity(&merged) {
        return true;
    }
    report.apply(rewriter, id, format!("moves the axes of {data} to {merged:?} at once"));
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inference::evaluate;
    use crate::onnx::build::{Graph, ints};
    use crate::onnx::{Model, Tensor};

    fn cleaned(graph: Graph) -> (Model, Model, PassReport) {
        let model = graph.finish();
        let mut rewriter = Rewriter::new(model.clone()).unwrap();
        let report = clean(&mut rewriter).unwrap();
        assert_eq!(clean(&mut rewriter).unwrap().applied(), 0);
        (model, rewriter.finish().unwrap(), report)
    }

    fn assert_same(before: &Model, after: &Model) {
        let x = Tensor::f32(&[2, 3, 4], (0..24).map(|value| value as f32).collect());
        let run = |model| evaluate(model, &[("x", x.clone())]).unwrap();
        assert_eq!(run(before), run(after));
    }

    fn ops(model: &Model) -> String {
        let counts = model.op_counts();
        counts.iter().map(|(op, count)| format!("{op} {count}")).collect::<Vec<_>>().join(", ")
    }

    fn input(graph: &mut Graph) -> String {
        graph.input("x", ElementType::F32, &["n".into(), 3.into(), 4.into()])
    }

    #[test]
    fn what_does_nothing_goes() {
        let mut graph = Graph::new("idle");
        let x = input(&mut graph);
        let relu = graph.node("Relu", &[&x], &[]);
        let value = graph.node("Dropout", &[&relu], &[]);
        let value = graph.node("Cast", &[&value], &[("to", i64::from(ElementType::F32.number()).into())]);
        let value = graph.node("Cast", &[&value], &[("to", i64::from(ElementType::F32.number()).into())]);
        let value = graph.node("Transpose", &[&value], &[("perm", ints(&[0, 1, 2]))]);
        let value = graph.node("Transpose", &[&value], &[("perm", ints(&[1, 2, 0]))]);
        let value = graph.node("Transpose", &[&value], &[("perm", ints(&[2, 0, 1]))]);
        let value = graph.node("Transpose", &[&value], &[]);
        let value = graph.node("Transpose", &[&value], &[]);
        let shape = graph.node("Shape", &[&value], &[]);
        let value = graph.node("Reshape", &[&value, &shape], &[]);
        graph.node("Exp", &[&value], &[]);
        graph.weights("unused", &[1], &[0.0]);
        graph.output("y", &value, ElementType::F32, &["n".into(), 3.into(), 4.into()]);
        let (before, after, report) = cleaned(graph);
        assert_same(&before, &after);
        // The first Cast stays: nothing says what Relu gives.
        assert_eq!(ops(&after), "Cast 1, Relu 1");
        let findings: Vec<String> = report.findings.iter().map(Finding::to_string).collect();
        assert!(findings.contains(&"constant unused: removed, no output needs it".to_owned()), "{findings:?}");
        assert!(findings.contains(&"Exp Exp_11: removed, no output needs it".to_owned()), "{findings:?}");
    }

    #[test]
    fn shapes_are_compared_entry_by_entry() {
        for (target, is_same) in
            [(&[0, 3, 4][..], true), (&[-1, 3, 4], true), (&[0, -1, 4], true), (&[0, 4, 3], false), (&[-1, 12], false)]
        {
            let mut graph = Graph::new("reshape");
            let x = input(&mut graph);
            let target = graph.indices("target", target);
            let value = graph.node("Reshape", &[&x, &target], &[]);
            let value = graph.node("Neg", &[&value], &[]);
            graph.output("y", &value, ElementType::F32, &["n".into(), Dim::Unknown, Dim::Unknown]);
            let (_, after, _) = cleaned(graph);
            assert_eq!(after.op_counts().contains_key("Reshape"), !is_same);
        }
    }

    #[test]
    fn two_in_a_row_become_one() {
        let mut graph = Graph::new("rows");
        let x = input(&mut graph);
        let value = graph.node("Transpose", &[&x], &[("perm", ints(&[1, 2, 0]))]);
        let value = graph.node("Transpose", &[&value], &[("perm", ints(&[1, 0, 2]))]);
        let first = graph.indices("first", &[12, 2]);
        let second = graph.indices("second", &[4, -1]);
        let value = graph.node("Reshape", &[&value, &first], &[]);
        let value = graph.node("Reshape", &[&value, &second], &[]);
        graph.output("y", &value, ElementType::F32, &[4.into(), 6.into()]);
        let (before, after, _) = cleaned(graph);
        assert_same(&before, &after);
        assert_eq!(ops(&after), "Reshape 1, Transpose 1");
    }

    #[test]
    fn what_is_known_outside_stays() {
        let mut graph = Graph::new("through");
        let x = input(&mut graph);
        graph.output("y", &x, ElementType::F32, &["n".into(), 3.into(), 4.into()]);
        let (before, after, report) = cleaned(graph);
        assert_eq!(before, after);
        assert!(report.findings[0].to_string().contains("kept, its input and its output have names"));
    }

    #[test]
    fn a_dropout_whose_mask_is_read_stays() {
        let mut graph = Graph::new("mask");
        let x = input(&mut graph);
        let value = graph.node("Dropout", &[&x], &[]);
        graph.output("y", &value, ElementType::F32, &["n".into(), 3.into(), 4.into()]);
        graph.output("m", "mask", ElementType::Bool, &["n".into(), 3.into(), 4.into()]);
        let mut model = graph.finish();
        model.proto_mut().graph.as_mut().unwrap().node[0].output.push("mask".to_owned());
        let mut rewriter = Rewriter::new(model).unwrap();
        let report = clean(&mut rewriter).unwrap();
        assert!(report.findings.iter().any(|finding| finding.outcome == Outcome::Kept("its mask is read".to_owned())));
    }
}
