//! The exact cost of a graph: operations and parameters, counted node by node from the dimensions that values have.

use std::collections::{BTreeMap, BTreeSet};

use super::proto::tensor_proto::DataType;
use super::{Dim, ElementType, NodeId, Rewriter, Shapes, full_op};

/// What a model computes for one image, and what it holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Operations of all products (convolutions, matrix products, attention) of floats or integers: a multiplication
    /// with its addition is two, biases are none.
    pub flops: u64,
    /// [`Self::flops`] by operator, as in [`super::Model::op_counts`].
    pub by_op: BTreeMap<String, u64>,
    /// Elements that the other operators compute, such as sums, activations, norms, softmax and pooling: one for each
    /// element of the output, or of the input where that is larger. Moving elements is free.
    pub elementwise: u64,
    /// Elements of all constants, without scalars and 64-bit integers, which are shapes and the numbers in formulas, and
    /// without the scales and zero points that bytes come with: a quantised model has as many as the original.
    pub parameters: u64,
    /// What [`Self::parameters`] take in bytes.
    pub parameter_bytes: u64,
    /// Nodes that are not in the sums, by operator: what they cost, or the dimensions of what they work on, is not known.
    pub uncounted: BTreeMap<String, usize>,
}

/// Counts what the model costs, for one of the images of the batch that `shapes` are for.
///
/// Convolutions and products cost what fvcore counts, two for each of its multiply-adds; unlike there, every operator is
/// either counted or named in [`Cost::uncounted`].
#[must_use]
pub fn cost(rewriter: &Rewriter, shapes: &Shapes) -> Cost {
    let graph = Dimensions { rewriter, shapes };
    let mut cost = Cost::default();
    for id in rewriter.ids() {
        let op = full_op(rewriter.node(id));
        match graph.work(id) {
            Some(Work::Products(count)) => *cost.by_op.entry(op).or_default() += 2 * count,
            Some(Work::Elements(count)) => cost.elementwise += count,
            Some(Work::Nothing) => {}
            None => *cost.uncounted.entry(op).or_default() += 1,
        }
    }
    let images = graph.images();
    cost.by_op.values_mut().for_each(|flops| *flops /= images);
    cost.flops = cost.by_op.values().sum();
    cost.elementwise /= images;
    let scales = scales(rewriter);
    for name in rewriter.constants().into_iter().filter(|name| !scales.contains(name.as_str())) {
        let element = rewriter.constant_element(&name).unwrap_or(ElementType::Other(0));
        let dims = rewriter.constant_dims(&name).unwrap_or_default();
        if element != ElementType::I64 && !dims.is_empty() {
            let count = len(&dims);
            cost.parameters += count;
            cost.parameter_bytes += (count * bits(element)).div_ceil(8);
        }
    }
    cost
}

/// The constants that say what bytes stand for.
fn scales(rewriter: &Rewriter) -> BTreeSet<&str> {
    let places = |op: &str| -> &[usize] {
        match op {
            "QuantizeLinear" | "DequantizeLinear" => &[1, 2],
            "QLinearConv" | "QLinearMatMul" | "QLinearAdd" | "QLinearMul" => &[1, 2, 4, 5, 6, 7],
            "QGemm" => &[1, 2, 4, 5, 7, 8],
            "MatMulInteger" | "ConvInteger" | "DynamicQuantizeMatMul" => &[2, 3],
            "MatMulIntegerToFloat" => &[2, 3, 4, 5],
            "QAttention" => &[3, 4, 6, 7],
            _ => &[],
        }
    };
    let of_node = |id| places(rewriter.node(id).op_type()).iter().map(move |place| rewriter.input(id, *place));
    rewriter.ids().flat_map(of_node).collect()
}

/// What one node does for the whole batch.
enum Work {
    /// Multiplications whose results are added.
    Products(u64),
    Elements(u64),
    /// It moves elements, or is computed once when the model is loaded.
    Nothing,
}

/// Operators whose cost is in the sums of elements.
#[rustfmt::skip]
const COMPUTING: &[&str] = &[
    "Abs", "Acos", "Acosh", "Add", "And", "ArgMax", "ArgMin", "Asin", "Asinh", "Atan", "Atanh", "AveragePool",
    "BatchNormalization", "BiasAdd", "BiasGelu", "BiasSoftmax", "Ceil", "Celu", "Clip", "Cos", "Cosh", "CumSum",
    "DequantizeLinear", "Div", "DynamicQuantizeLinear", "Elu", "Equal", "Erf", "Exp", "FastGelu", "Floor", "Gelu",
    "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "Greater", "GreaterOrEqual", "GroupNorm",
    "GroupNormalization", "HardSigmoid", "HardSwish", "Hardmax", "InstanceNormalization", "IsInf", "IsNaN", "LRN",
    "LayerNormalization", "LeakyRelu", "Less", "LessOrEqual", "Log", "LogSoftmax", "LpNormalization", "LpPool", "Max",
    "MaxPool", "Mean", "MeanVarianceNormalization", "Min", "Mish", "Mod", "Mul", "Neg", "Not", "Or", "PRelu", "Pow",
    "QLinearAdd", "QLinearAveragePool", "QLinearGlobalAveragePool", "QLinearLeakyRelu", "QLinearMul",
    "QLinearReduceMean", "QLinearSigmoid", "QLinearSoftmax", "QuantizeLinear", "QuickGelu", "RMSNormalization",
    "Reciprocal", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin",
    "ReduceProd", "ReduceSum", "ReduceSumSquare", "Relu", "Resize", "RotaryEmbedding", "Round", "Selu", "Shrink",
    "Sigmoid", "Sign", "SimplifiedLayerNormalization", "Sin", "Sinh", "SkipGroupNorm", "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization", "Softmax", "Softplus", "Softsign", "Sqrt", "Sub", "Sum", "Swish", "Tan", "Tanh",
    "ThresholdedRelu", "Upsample", "Where", "Xor",
];

/// Operators that move, copy, choose or retype elements.
#[rustfmt::skip]
const MOVING: &[&str] = &[
    "Cast", "CastLike", "Compress", "Concat", "Constant", "ConstantOfShape", "DepthToSpace", "Dropout", "Expand",
    "EyeLike", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "OneHot", "Pad", "QLinearConcat", "Range",
    "ReorderInput", "ReorderOutput", "Reshape", "ReverseSequence", "ScatterElements", "ScatterND", "Shape", "Size",
    "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Trilu", "Unsqueeze",
];

/// A graph with the dimensions of its values.
struct Dimensions<'a> {
    rewriter: &'a Rewriter,
    shapes: &'a Shapes,
}

impl Dimensions<'_> {
    fn images(&self) -> u64 {
        self.shapes.batch().max(1) as u64
    }

    fn of(&self, value: &str) -> Option<Vec<usize>> {
        if let Some(dims) = self.shapes.of(value) {
            return Some(dims.to_vec());
        }
        if let Some(dims) = self.rewriter.constant_dims(value) {
            return Some(dims);
        }
        // An input of the model: only the batch is open.
        let declared = self.rewriter.declared(value)?.dims?;
        let size = |(place, dim): (usize, &Dim)| dim.fixed().or((place == 0).then_some(self.shapes.batch()));
        declared.iter().enumerate().map(size).collect()
    }

    fn input(&self, id: NodeId, index: usize) -> Option<Vec<usize>> {
        self.of(self.rewriter.input(id, index))
    }

    fn output(&self, id: NodeId) -> Option<Vec<usize>> {
        self.of(self.rewriter.output(id, 0))
    }

    /// What a node does; `None` if that is not known.
    fn work(&self, id: NodeId) -> Option<Work> {
        let node = self.rewriter.node(id);
        let op = node.op_type();
        let mut inputs = node.input.iter().filter(|input| !input.is_empty()).peekable();
        let is_fixed = inputs.peek().is_some() && inputs.all(|input| self.rewriter.is_constant(input));
        if MOVING.contains(&op) || is_fixed && COMPUTING.contains(&op) {
            return Some(Work::Nothing);
        }
        if COMPUTING.contains(&op) {
            let read = self.input(id, 0).map_or(0, |dims| len(&dims));
            return Some(Work::Elements(len(&self.output(id)?).max(read)));
        }
        self.products(id, op).map(Work::Products)
    }

    fn products(&self, id: NodeId, op: &str) -> Option<u64> {
        match op {
            "Conv" | "FusedConv" | "ConvInteger" | "NhwcConv" | "NhwcFusedConv" => self.convolution(id, 1),
            "QLinearConv" => self.convolution(id, 3),
            // Each element of the input meets the weights of its channel.
            "ConvTranspose" => Some(len(&self.input(id, 0)?) * len(self.input(id, 1)?.get(1..)?)),
            "MatMul"
            | "MatMulInteger"
            | "MatMulIntegerToFloat"
            | "DynamicQuantizeMatMul"
            | "QLinearMatMul"
            | "MatMulNBits"
            | "FusedMatMul"
            | "Gemm"
            | "FusedGemm"
            | "QGemm" => self.matrix_product(id),
            "Attention" if self.rewriter.node(id).domain() == super::MICROSOFT => self.packed_attention(id, 4),
            "QAttention" => self.packed_attention(id, 8),
            "Attention" | "MultiHeadAttention" => self.separate_attention(id),
            _ => None,
        }
    }

    /// Each element of the output is a sum over the window and the channels of its group: all but the first dimension
    /// of the weights.
    fn convolution(&self, id: NodeId, weight: usize) -> Option<u64> {
        Some(len(&self.output(id)?) * len(self.input(id, weight)?.get(1..)?))
    }

    /// Each element of the output is a sum over a row of the first factor, or over a column where that is transposed.
    fn matrix_product(&self, id: NodeId) -> Option<u64> {
        let first = self.input(id, 0)?;
        let is_transposed = self.rewriter.int(id, "transA").unwrap_or(0) != 0 && first.len() > 1;
        let terms = first.iter().rev().nth(usize::from(is_transposed))?;
        Some(len(&self.output(id)?) * *terms as u64)
    }

    /// Attention with its projections in it: input `[batch, tokens, in]`, weights `[in, q + k + v]`.
    fn packed_attention(&self, id: NodeId, past: usize) -> Option<u64> {
        let (input, weights) = (self.input(id, 0)?, self.input(id, 1)?);
        let (&[batch, tokens, _], &[_, columns]) = (&input[..], &weights[..]) else { return None };
        if !self.rewriter.input(id, past).is_empty() {
            return None;
        }
        let sizes = self.rewriter.ints(id, "qkv_hidden_sizes").filter(|sizes| sizes.len() == 3);
        let (key, value) = match sizes {
            Some(sizes) => (usize::try_from(sizes[1]).ok()?, usize::try_from(sizes[2]).ok()?),
            None => (columns / 3, columns / 3),
        };
        Some(len(&[batch, tokens]) * len(&weights) + len(&[batch, tokens, tokens, key + value]))
    }

    /// Attention of projections that were made before: each query meets each key, and each weight each value.
    fn separate_attention(&self, id: NodeId) -> Option<u64> {
        let past = if self.rewriter.node(id).domain() == super::MICROSOFT { 6 } else { 4 };
        if !self.rewriter.input(id, past).is_empty() {
            return None;
        }
        let query = Heads::new(&self.input(id, 0)?)?;
        let optional = |index: usize| match self.rewriter.input(id, index) {
            "" => Some(query),
            value => Heads::new(&self.of(value)?),
        };
        // Packed ones hold the keys and values that are not given.
        let key = optional(1)?;
        let value = if self.rewriter.input(id, 2).is_empty() { key } else { optional(2)? };
        // Where heads share keys, these count more than once.
        let is_shared = query.heads.min(value.heads) != 0 && query.heads != value.heads
            || self.rewriter.int(id, "q_num_heads") != self.rewriter.int(id, "kv_num_heads");
        (!is_shared).then(|| query.batch * query.tokens * key.tokens * (query.channels + value.channels))
    }
}

/// Dimensions of queries, keys or values.
#[derive(Clone, Copy)]
struct Heads {
    batch: u64,
    tokens: u64,
    /// 0 where they are not told apart.
    heads: u64,
    channels: u64,
}

impl Heads {
    /// `[batch, tokens, channels]`, `[batch, heads, tokens, size]`, or packed `[batch, tokens, heads, 2 or 3, size]`.
    fn new(dims: &[usize]) -> Option<Self> {
        let dims: Vec<u64> = dims.iter().map(|dim| *dim as u64).collect();
        match dims[..] {
            [batch, tokens, channels] => Some(Self { batch, tokens, heads: 0, channels }),
            [batch, heads, tokens, size] | [batch, tokens, heads, _, size] => {
                Some(Self { batch, tokens, heads, channels: heads * size })
            }
            _ => None,
        }
    }
}

fn len(dims: &[usize]) -> u64 {
    dims.iter().map(|dim| *dim as u64).product()
}

/// What an element takes in bits; 0 for text and unknown types.
fn bits(element: ElementType) -> u64 {
    let Ok(data_type) = DataType::try_from(element.number()) else { return 0 };
    match data_type {
        DataType::Double | DataType::Int64 | DataType::Uint64 | DataType::Complex64 => 64,
        DataType::Float | DataType::Int32 | DataType::Uint32 => 32,
        DataType::Float16 | DataType::Bfloat16 | DataType::Int16 | DataType::Uint16 => 16,
        DataType::Complex128 => 128,
        DataType::Int4 | DataType::Uint4 => 4,
        DataType::Undefined | DataType::String => 0,
        _ => 8,
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::onnx::build::{Attribute, Graph, ints};
    use crate::onnx::passes::attention::fuse_attention;
    use crate::onnx::passes::fixtures::shapes_of;
    use crate::onnx::passes::freeze::freeze;
    use crate::onnx::{MICROSOFT, Model, Tensor, Values};

    fn cost_of(model: Model) -> Cost {
        let rewriter = Rewriter::new(model).unwrap();
        cost(&rewriter, &shapes_of(&rewriter))
    }

    fn committed(name: &str) -> Cost {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        cost_of(Model::load(&root.join(format!("models/{name}/{name}.onnx"))).unwrap())
    }

    #[test]
    fn committed_models_cost_what_fvcore_counts() {
        // fvcore 0.1.5 on the nets of models/train/nets.py, in multiply-adds: FlopCountAnalysis(UNet().eval(),
        // zeros(1, 3, 256, 256)).by_operator()["conv"] = 3,035,627,520; torch.utils.flop_counter: 6,071,255,040.
        let unet = committed("cells-unet");
        assert_eq!(unet.flops, 2 * 3_035_627_520);
        assert_eq!(unet.by_op.keys().map(String::as_str).collect::<Vec<_>>(), ["Conv", "ConvTranspose"]);
        // Batch normalisation is folded into the weights: the net has 1,942,628.
        assert_eq!((unet.parameters, unet.parameter_bytes), (1_941_156, 4 * 1_941_156));
        // ViT().eval(), zeros(1, 3, 96, 96): conv 5,308,416, linear 384,860,928 (192 · 4 of it in the head),
        // matmul 48,441,600; torch.utils.flop_counter: 877,221,888.
        let vit = committed("cells-vit");
        assert_eq!(vit.by_op["Conv"], 2 * 5_308_416);
        assert_eq!(vit.by_op["MatMul"], 2 * (384_860_928 - 768 + 48_441_600));
        assert_eq!((vit.by_op["Gemm"], vit.flops), (2 * 768, 877_221_888));
        assert_eq!(vit.parameters, 2_735_428);
        for cost in [unet, vit] {
            assert!(cost.uncounted.is_empty() && cost.elementwise > 0, "{cost:?}");
        }
    }

    #[test]
    fn fused_attention_costs_what_its_parts_did() {
        let model = crate::onnx::vit::build(&"image=16,patch=4,dim=8,depth=2,heads=2".parse().unwrap(), 1).unwrap();
        let plain = cost_of(model.clone());
        let mut rewriter = Rewriter::new(model).unwrap();
        freeze(&mut rewriter, &mut crate::onnx::passes::fixtures::evaluate_images).unwrap();
        let shapes = shapes_of(&rewriter);
        assert_eq!(fuse_attention(&mut rewriter, &shapes).unwrap().applied(), 2);
        let fused = cost_of(rewriter.finish().unwrap());
        assert_eq!(fused.flops, plain.flops);
        assert!(fused.by_op["com.microsoft.Attention"] > 0);
        assert_eq!(fused.parameters, plain.parameters);
        // Softmax and scaling are inside now.
        assert!(fused.elementwise < plain.elementwise);
    }

    /// The cost of one node for images `[n, 4, 6, 6]` and a weight, which need not run.
    fn node(op: &str, input: &[usize], weight: &[usize], output: &[usize], attributes: &[(&str, Attribute)]) -> Cost {
        let mut graph = Graph::new("one");
        let dims: Vec<Dim> = std::iter::once("n".into()).chain(input[1..].iter().map(|dim| (*dim).into())).collect();
        let x = graph.input("x", ElementType::F32, &dims);
        let w = graph
            .constant("w", &Tensor { dims: weight.to_vec(), values: Values::I8(vec![1; weight.iter().product()]) });
        // A scale for each of two channels, which is no parameter.
        let y = if op == "QLinearConv" {
            let s = graph.constant("s", &Tensor::f32(&[2], vec![1.0; 2]));
            graph.node(op, &[&x, &s, &s, &w], attributes)
        } else {
            graph.node(op, &[&x, &w, &w, &w], attributes)
        };
        graph.output("y", &y, ElementType::F32, &[]);
        let mut rewriter = Rewriter::new(graph.finish()).unwrap();
        let id = rewriter.ids().next().unwrap();
        let mut node = rewriter.remove(id).unwrap();
        if !matches!(op, "Conv" | "ConvTranspose" | "Gemm" | "QLinearConv" | "Relu" | "Einsum") {
            node.domain = Some(MICROSOFT.to_owned());
        }
        // Microsoft's attention has its past there.
        node.input.truncate(if op == "QLinearConv" { 4 } else { 3 });
        rewriter.insert(node);
        let answer = Tensor::indices(&output.iter().map(|dim| *dim as i64).collect::<Vec<_>>());
        let shapes = Shapes::from_answer(vec![y, "y".to_owned()], &[answer.clone(), answer], input[0]);
        cost(&rewriter, &shapes)
    }

    #[test]
    fn each_product_is_counted_for_one_image() {
        // A 3 × 3 convolution of 4 to 8 channels in 2 groups: 6·6·8 elements of 2·9 products.
        let weight = [8, 2, 3, 3];
        for op in ["Conv", "QLinearConv"] {
            let cost = node(op, &[5, 4, 6, 6], &weight, &[5, 8, 6, 6], &[("group", 2.into())]);
            assert_eq!(cost.flops, 2 * 288 * 18, "{op}");
            assert_eq!((cost.parameters, cost.parameter_bytes), (144, 144));
        }
        // The same elements, channels last.
        assert_eq!(node("NhwcConv", &[5, 6, 6, 4], &weight, &[5, 6, 6, 8], &[]).flops, 2 * 288 * 18);
        // Each of 4·6·6 elements is spread over 8 channels of 2 × 2.
        let strides = [("strides", ints(&[2, 2]))];
        assert_eq!(node("ConvTranspose", &[3, 4, 6, 6], &[4, 8, 2, 2], &[3, 8, 12, 12], &strides).flops, 2 * 144 * 32);
        for op in ["MatMulIntegerToFloat", "DynamicQuantizeMatMul", "FusedMatMul"] {
            assert_eq!(node(op, &[2, 10, 4], &[4, 3], &[2, 10, 3], &[]).flops, 2 * 10 * 4 * 3, "{op}");
        }
        // [n, 7]ᵀ · [n, 3] for n = 1: the sum is over n.
        assert_eq!(node("Gemm", &[1, 7], &[1, 3], &[7, 3], &[("transA", 1.into())]).flops, 2 * 21);
        // 10 tokens of 4 channels to 3·6, then 10·10·6 scores and as many sums.
        let packed = 2 * (10 * 4 * 18 + 2 * 10 * 10 * 6);
        for op in ["Attention", "QAttention"] {
            assert_eq!(node(op, &[2, 10, 4], &[4, 18], &[2, 10, 6], &[]).flops, packed, "{op}");
        }
        let sizes = [("qkv_hidden_sizes", ints(&[4, 4, 10]))];
        let cost = node("Attention", &[2, 10, 4], &[4, 18], &[2, 10, 10], &sizes);
        assert_eq!(cost.flops, 2 * (10 * 4 * 18 + 10 * 10 * (4 + 10)));
        // 10 queries of 6 channels; 5 keys and values of two heads of 3.
        let cost = node("MultiHeadAttention", &[1, 10, 6], &[1, 2, 5, 3], &[1, 10, 6], &[]);
        assert_eq!(cost.flops, 2 * 2 * 10 * 5 * 6);
    }

    #[test]
    fn what_is_not_known_is_named() {
        let cost = node("Einsum", &[2, 10, 4], &[4, 3], &[2, 10, 3], &[("equation", "nij,jk->nik".into())]);
        assert_eq!((cost.flops, cost.uncounted), (0, BTreeMap::from([("Einsum".to_owned(), 1)])));
        let cost = node("GroupQueryAttention", &[2, 10, 4], &[4, 3], &[2, 10, 3], &[]);
        assert_eq!(cost.uncounted, BTreeMap::from([("com.microsoft.GroupQueryAttention".to_owned(), 1)]));
        // No dimensions at all.
        let mut graph = Graph::new("one");
        let x = graph.input("x", ElementType::F32, &["n".into(), 3.into()]);
        let y = graph.node("Relu", &[&x], &[]);
        graph.output("y", &y, ElementType::F32, &[]);
        let cost = super::cost(&Rewriter::new(graph.finish()).unwrap(), &Shapes::default());
        assert_eq!((cost.elementwise, cost.uncounted), (0, BTreeMap::from([("Relu".to_owned(), 1)])));
        let cost = node("Relu", &[2, 10, 4], &[1], &[2, 10, 4], &[]);
        assert_eq!((cost.elementwise, cost.parameters), (40, 1));
    }
}
