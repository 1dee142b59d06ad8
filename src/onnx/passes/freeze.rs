//! Constant folding, shapes included: what does not depend on the image becomes a constant.
//!
//! Exporters compute shapes at run time from the batch size. Values that are made of constants and shapes alone are
//! evaluated for several batch sizes; one that is always the same becomes a constant, and a `Reshape` target of which
//! one entry changes gets −1 there. What does not hold for other batches is therefore never folded.

use std::collections::HashSet;

use super::{EvaluateError, PassReport};
use crate::onnx::{Model, NodeId, RewriteError, Rewriter, Shapes, Tensor, Values};

/// Results larger than this stay computed, unless they are no larger than what they are made of.
const LARGEST_BYTES: usize = 1 << 20;

/// The inputs that a model is evaluated for: they differ in batch size and, where the model leaves it open, in image
/// size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Case {
    /// Images of the usual size.
    Batch(usize),
    /// One image of another size. A model that leaves the size open and yet fails for another one has a fixed size.
    OtherSide,
}

/// Runs a model on images and returns its outputs; `None` if the case does not exist for it.
pub type Evaluate<'a> = dyn FnMut(&Model, Case) -> Result<Option<Vec<Tensor>>, EvaluateError> + 'a;

/// Folds what is the same for all inputs.
///
/// # Errors
/// [`EvaluateError`] if the model does not run.
pub fn freeze(rewriter: &mut Rewriter, evaluate: &mut Evaluate<'_>) -> Result<PassReport, EvaluateError> {
    let mut report = PassReport::new("freeze");
    let candidates = candidates(rewriter)?;
    if candidates.is_empty() {
        return Ok(report);
    }
    let values: Vec<String> = candidates.iter().map(|(_, value)| value.clone()).collect();
    let model = rewriter.extract(&values)?;
    let mut cases = Vec::new();
    for case in [Case::Batch(1), Case::Batch(2), Case::Batch(3), Case::OtherSide] {
        cases.extend(evaluate(&model, case)?);
    }
    let Some((first, others)) = cases.split_first() else { return Ok(report) };
    let (question, asked) = Shapes::question(rewriter)?;
    let answer = evaluate(&question, Case::Batch(2))?.unwrap_or_default();
    let shapes = Shapes::from_answer(asked, &answer, 2);
    for (index, (id, value)) in candidates.into_iter().enumerate() {
        let others: Vec<&Tensor> = others.iter().map(|outputs| &outputs[index]).collect();
        let (frozen, what) = match verdict(rewriter, &shapes, &value, &first[index], &others) {
            Ok(frozen) => frozen,
            Err(why) => {
                report.keep(rewriter, id, why);
                continue;
            }
        };
        // Recorded by hand: the node is gone once its value is frozen.
        report.apply(rewriter, id, what);
        rewriter.freeze(&value, &frozen);
    }
    rewriter.remove_dead();
    Ok(report)
}

/// The constant that takes the value's place with what to say of it, or why there is none.
fn verdict(
    rewriter: &Rewriter,
    shapes: &Shapes,
    value: &str,
    first: &Tensor,
    others: &[&Tensor],
) -> Result<(Tensor, String), String> {
    if others.iter().all(|other| *other == first) {
        let bytes = first.to_proto("").raw_data.map_or(0, |bytes| bytes.len());
        if bytes > LARGEST_BYTES && bytes > source_bytes(rewriter, value) {
            return Err(format!("the constant would take {bytes} bytes"));
        }
        return Ok((first.clone(), format!("a constant of dimensions {:?}", first.dims)));
    }
    if let Some(one) = one_number(first, others)
        && rewriter.consumers(value).iter().all(|id| is_broadcast(rewriter, shapes, *id, value))
        && !rewriter.is_pinned(value)
    {
        return Ok((one, "one number, the same everywhere".to_owned()));
    }
    let is_shape =
        rewriter.consumers(value).iter().all(|id| rewriter.is(*id, "Reshape") && rewriter.input(*id, 1) == value);
    let varies = || "depends on the batch".to_owned();
    let (true, false, Values::I64(sizes)) = (is_shape, rewriter.is_pinned(value), &first.values) else {
        return Err(varies());
    };
    let differs = |index: &usize| {
        others.iter().any(|other| matches!(&other.values, Values::I64(other) if other.get(*index) != sizes.get(*index)))
    };
    let open: Vec<usize> = (0..sizes.len()).filter(differs).collect();
    match (&open[..], sizes.contains(&-1)) {
        ([open], false) => {
            let mut sizes = sizes.clone();
            sizes[*open] = -1;
            Ok((Tensor::indices(&sizes), format!("the shape {sizes:?}")))
        }
        _ => Err(varies()),
    }
}

/// The number that all elements are for all inputs, as a tensor of one element that broadcasts to the same.
fn one_number(first: &Tensor, others: &[&Tensor]) -> Option<Tensor> {
    let number = *first.to_f32()?.first()?;
    let is_everywhere =
        |tensor: &Tensor| tensor.to_f32().is_some_and(|values| values.iter().all(|value| *value == number));
    let all = is_everywhere(first) && others.iter().all(|other| is_everywhere(other));
    (all && matches!(first.values, Values::F32(_))).then(|| Tensor::f32(&vec![1; first.dims.len()], vec![number]))
}

/// True if a node computes element by element, and another input alone gives its output the size that it has.
fn is_broadcast(rewriter: &Rewriter, shapes: &Shapes, id: NodeId, value: &str) -> bool {
    let is_elementwise = ["Add", "Sub", "Mul", "Div"].iter().any(|op| rewriter.is(id, op));
    let dims = shapes.of(rewriter.output(id, 0));
    let mut others = rewriter.node(id).input.iter().filter(|input| *input != value);
    is_elementwise && dims.is_some() && others.any(|other| shapes.of(other) == dims)
}

/// Bytes of the constants that a value is made of.
fn source_bytes(rewriter: &Rewriter, value: &str) -> usize {
    let (mut wanted, mut seen, mut bytes) = (vec![value.to_owned()], HashSet::new(), 0);
    while let Some(value) = wanted.pop() {
        if !seen.insert(value.clone()) {
            continue;
        }
        if let Some(dims) = rewriter.constant_dims(&value) {
            bytes += 4 * dims.iter().product::<usize>();
        }
        if let Some(id) = rewriter.producer(&value) {
            wanted.extend(rewriter.node(id).input.iter().cloned());
        }
    }
    bytes
}

/// Values made of constants and shapes alone that nodes of another kind read, with the nodes that give them.
fn candidates(rewriter: &Rewriter) -> Result<Vec<(NodeId, String)>, RewriteError> {
    let mut fixed: HashSet<String> = rewriter.constants().into_iter().collect();
    let mut made = Vec::new();
    for id in rewriter.order()? {
        let node = rewriter.node(id);
        let is_shape = rewriter.is(id, "Shape") || rewriter.is(id, "Size");
        let mut inputs = node.input.iter().filter(|input| !input.is_empty()).peekable();
        let from_fixed = inputs.peek().is_some() && inputs.all(|input| fixed.contains(input));
        if is_shape || (from_fixed && is_foldable(rewriter, id)) {
            fixed.extend(node.output.iter().filter(|output| !output.is_empty()).cloned());
            made.push(id);
        }
    }
    let made_set: HashSet<NodeId> = made.iter().copied().collect();
    let leaves =
        |value: &str| rewriter.is_pinned(value) || rewriter.consumers(value).iter().any(|id| !made_set.contains(id));
    let outputs = made.iter().flat_map(|id| rewriter.node(*id).output.iter().map(move |output| (*id, output)));
    let leaving = outputs.filter(|(_, value)| !value.is_empty() && !rewriter.is_output(value) && leaves(value));
    Ok(leaving.map(|(id, value)| (id, value.clone())).collect())
}

/// Not what is random, has a body, or is small only as long as it is not computed.
fn is_foldable(rewriter: &Rewriter, id: NodeId) -> bool {
    let node = rewriter.node(id);
    let is_random = node.op_type().starts_with("Random") || matches!(node.op_type(), "Bernoulli" | "Multinomial");
    let has_body = node.attribute.iter().any(|attribute| attribute.g.is_some() || !attribute.graphs.is_empty());
    let is_sequence = node.op_type().contains("Sequence") || node.op_type().starts_with("Optional");
    !is_random && !has_body && !is_sequence && node.op_type() != "DequantizeLinear"
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::onnx::ElementType;
    use crate::onnx::build::{Graph, ints};
    use crate::onnx::passes::fixtures::evaluate_images;

    /// `[n, 3, 4, 4]` → Shape → batch, glued to `[8, 6]` → Reshape; and a constant times a constant.
    fn model() -> Model {
        let mut graph = Graph::new("shapes");
        let x = graph.input("x", ElementType::F32, &["n".into(), 3.into(), 4.into(), 4.into()]);
        let shape = graph.node("Shape", &[&x], &[]);
        let zero = graph.indices("zero", &[0]);
        let batch = graph.node("Gather", &[&shape, &zero], &[("axis", 0.into())]);
        let rest = graph.indices("rest", &[8, 6]);
        let target = graph.node("Concat", &[&batch, &rest], &[("axis", 0.into())]);
        let reshaped = graph.node("Reshape", &[&x, &target], &[]);
        let (two, three) = (graph.weights("two", &[1], &[2.0]), graph.weights("three", &[1], &[3.0]));
        let six = graph.node("Mul", &[&two, &three], &[]);
        let product = graph.node("Mul", &[&reshaped, &six], &[]);
        graph.output("y", &product, ElementType::F32, &["n".into(), 8.into(), 6.into()]);
        graph.output("shape", &shape, ElementType::I64, &[4.into()]);
        graph.finish()
    }

    #[test]
    fn shapes_and_constants_fold_and_the_batch_stays_open() {
        let mut rewriter = Rewriter::new(model()).unwrap();
        let report = freeze(&mut rewriter, &mut evaluate_images).unwrap();
        let found: Vec<String> = report.findings.iter().map(ToString::to_string).collect();
        assert_eq!(found, ["Concat Concat_2: the shape [-1, 8, 6]", "Mul Mul_4: a constant of dimensions [1]"]);
        assert_eq!(freeze(&mut rewriter, &mut evaluate_images).unwrap().applied(), 0);
        let folded = rewriter.finish().unwrap();
        assert_eq!(
            folded.op_counts().keys().map(String::as_str).collect::<Vec<_>>(),
            ["Identity", "Mul", "Reshape", "Shape"]
        );
        for batch in [1, 5] {
            let run = |model: &Model| evaluate_images(model, Case::Batch(batch)).unwrap().unwrap();
            assert_eq!(run(&folded), run(&model()));
        }
    }

    #[test]
    fn what_follows_the_batch_or_the_side_is_kept() {
        let mut graph = Graph::new("open");
        let x = graph.input("x", ElementType::F32, &["n".into(), 3.into(), "h".into(), "w".into()]);
        let shape = graph.node("Shape", &[&x], &[]);
        let filled = graph.node("ConstantOfShape", &[&shape], &[]);
        let sum = graph.node("Add", &[&x, &filled], &[]);
        let axes = graph.indices("axes", &[2]);
        let side = graph.node("Gather", &[&shape, &axes], &[("axis", 0.into())]);
        let tail = graph.indices("tail", &[-1]);
        let target = graph.node("Concat", &[&side, &tail], &[("axis", 0.into())]);
        let flat = graph.node("Reshape", &[&sum, &target], &[]);
        let sum = graph.node("ReduceSum", &[&flat], &[("keepdims", 1.into())]);
        let flat = graph.node("Transpose", &[&sum], &[("perm", ints(&[0, 1]))]);
        graph.output("y", &flat, ElementType::F32, &[1.into(), 1.into()]);
        let mut rewriter = Rewriter::new(graph.finish()).unwrap();
        let report = freeze(&mut rewriter, &mut evaluate_images).unwrap();
        assert_eq!(report.applied(), 0, "{report:?}");
        assert_eq!(report.findings.len(), 2);
    }
}
