//! Works out the element type of every value of a graph.

use std::collections::HashMap;

use crate::onnx::{ElementType, MICROSOFT, NodeId, RewriteError, Rewriter};

/// The type of each value by its name; values that no rule is known for, such as results of control flow and lists of
/// tensors, are left out.
pub(super) fn element_types(rewriter: &Rewriter) -> Result<HashMap<String, ElementType>, RewriteError> {
    let mut types = HashMap::new();
    for name in rewriter.constants() {
        if let Some(element) = rewriter.constant_element(&name) {
            types.insert(name, element);
        }
    }
    for id in rewriter.order()? {
        let node = rewriter.node(id);
        // Inputs of the model come into view where they are read.
        for value in &node.input {
            if rewriter.producer(value).is_none()
                && let Some(declared) = rewriter.declared(value)
            {
                types.entry(value.clone()).or_insert(declared.element);
            }
        }
        for (index, value) in node.output.iter().enumerate().filter(|(_, value)| !value.is_empty()) {
            if let Some(element) = output_type(rewriter, id, index, &types)? {
                types.insert(value.clone(), element);
            }
        }
    }
    Ok(types)
}

/// The type of a node's output number `index`, as the operators' specifications give it.
fn output_type(
    rewriter: &Rewriter,
    id: NodeId,
    index: usize,
    types: &HashMap<String, ElementType>,
) -> Result<Option<ElementType>, RewriteError> {
    let node = rewriter.node(id);
    let input = |index: usize| types.get(rewriter.input(id, index)).copied();
    let first = || node.input.iter().find(|value| !value.is_empty()).and_then(|value| types.get(value)).copied();
    let attribute = |name: &str| {
        let number = rewriter.int(id, name).and_then(|number| i32::try_from(number).ok());
        number.filter(|number| *number != 0).map(ElementType::from_number)
    };
    let element = match node.domain() {
        "" | "ai.onnx" => match node.op_type() {
            "Shape" | "Size" | "ArgMax" | "ArgMin" | "NonZero" | "NonMaxSuppression" => Some(ElementType::I64),
            "TopK" | "MaxPool" | "Unique" if index > 0 => Some(ElementType::I64),
            "Equal" | "Less" | "LessOrEqual" | "Greater" | "GreaterOrEqual" | "And" | "Or" | "Xor" | "Not"
            | "IsNaN" | "IsInf" => Some(ElementType::Bool),
            "Dropout" if index > 0 => Some(ElementType::Bool),
            "Cast" => attribute("to"),
            "CastLike" => input(1),
            "ConstantOfShape" => Some(rewriter.tensor(id, "value")?.map_or(ElementType::F32, |value| value.element())),
            "RandomNormal" | "RandomUniform" => attribute("dtype").or(Some(ElementType::F32)),
            "RandomNormalLike" | "RandomUniformLike" | "EyeLike" | "Bernoulli" => attribute("dtype").or_else(first),
            "Multinomial" => attribute("dtype").or(Some(ElementType::I32)),
            "HannWindow" | "HammingWindow" | "BlackmanWindow" | "MelWeightMatrix" => {
                attribute("output_datatype").or(Some(ElementType::F32))
            }
            "Where" => input(1).or_else(|| input(2)),
            "OneHot" => input(2),
            "QuantizeLinear" => attribute("output_dtype").or_else(|| input(2)).or(Some(ElementType::U8)),
            "DequantizeLinear" => attribute("output_dtype").or_else(|| input(1)),
            "DynamicQuantizeLinear" => Some(if index == 1 { ElementType::F32 } else { ElementType::U8 }),
            "QLinearConv" | "QLinearMatMul" => input(7),
            "ConvInteger" | "MatMulInteger" => Some(ElementType::I32),
            // Mean and deviation of what is normalised, in the type that is computed in.
            "LayerNormalization" if index > 0 => attribute("stash_type").or(Some(ElementType::F32)),
            "If" | "Loop" | "Scan" => None,
            op if ["Sequence", "Optional", "String"].iter().any(|kind| op.contains(kind)) => None,
            _ => first(),
        },
        MICROSOFT => match node.op_type() {
            "SkipLayerNormalization" | "SkipSimplifiedLayerNormalization" if matches!(index, 1 | 2) => {
                Some(ElementType::F32)
            }
            "EmbedLayerNormalization" => {
                if index == 1 {
                    Some(ElementType::I32)
                } else {
                    input(2)
                }
            }
            "QuantizeLinear" => input(2).or(Some(ElementType::U8)),
            "DequantizeLinear" => input(1),
            "MatMulIntegerToFloat" => input(2),
            _ => first(),
        },
        _ => first(),
    };
    Ok(element)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::onnx::Tensor;
    use crate::onnx::build::{Attribute, Graph};

    #[test]
    fn types_follow_the_operators() {
        let mut graph = Graph::new("types");
        let x = graph.input("x", ElementType::F32, &[2.into(), 3.into()]);
        let pixels = graph.input("pixels", ElementType::U8, &[2.into(), 3.into()]);
        let f64_number = i64::from(ElementType::F64.number());
        let ones = Tensor { dims: vec![1], values: crate::onnx::Values::I32(vec![1]) };
        let relu = graph.node("Relu", &[&x], &[]);
        let shape = graph.node("Shape", &[&relu], &[]);
        let cast = graph.node("Cast", &[&pixels], &[("to", f64_number.into())]);
        let is_large = graph.node("Greater", &[&x, &relu], &[]);
        let chosen = graph.node("Where", &[&is_large, &x, &relu], &[]);
        let filled = graph.node("ConstantOfShape", &[&shape], &[("value", Attribute::from(&ones))]);
        let zeros = graph.node("ConstantOfShape", &[&shape], &[]);
        let best = graph.node("ArgMax", &[&zeros], &[]);
        let types = element_types(&Rewriter::new(graph.finish()).unwrap()).unwrap();
        let expected = [
            (relu, ElementType::F32),
            (shape, ElementType::I64),
            (cast, ElementType::F64),
            (is_large, ElementType::Bool),
            (chosen, ElementType::F32),
            (filled, ElementType::I32),
            (zeros, ElementType::F32),
            (best, ElementType::I64),
        ];
        for (value, element) in expected {
            assert_eq!(types.get(&value), Some(&element), "{value}");
        }
    }
}
