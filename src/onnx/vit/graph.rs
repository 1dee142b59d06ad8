//! A ViT as a graph, in the plain operators that PyTorch's exporter writes, with random weights.

use super::config::{Pool, VitConfig, VitError};
use crate::onnx::build::{Graph, ints};
use crate::onnx::truncated_normal::TruncatedNormal;
use crate::onnx::{ElementType, Model, Tensor, Values};

/// Standard deviation of the normal distribution that weights are cut from; timm's.
const SIGMA: f32 = 0.02;
/// What timm's norms add to the variance.
const EPSILON: f64 = 1e-6;

/// Builds the ViT with weights of its own: normally distributed with σ = 0.02 and cut at 2σ, the same for the same seed.
/// As timm initialises, biases are 0 and norms 1; the class token, which timm draws with σ = 10⁻⁶, is 0.
///
/// Input `input` `[batch, 3, image, image]`; output `features` `[batch, dim]`, or `logits` `[batch, classes]`. Weights
/// have timm's names; those of the blocks' linear layers are `[in, out]`, as exported.
///
/// # Errors
/// [`VitError`] if there can be no such ViT.
pub fn build(config: &VitConfig, seed: u64) -> Result<Model, VitError> {
    config.check()?;
    let mut builder = Builder { graph: Graph::new("vit"), random: TruncatedNormal::new(seed), config };
    builder.constants();
    let side = config.image;
    let dims = ["batch".into(), 3.into(), side.into(), side.into()];
    let input = builder.graph.input("input", ElementType::F32, &dims);
    let mut tokens = builder.embed(&input);
    for block in 0..config.depth {
        tokens = builder.block(&tokens, &format!("blocks.{block}"));
    }
    let features = builder.pool(&tokens);
    let (output, name, size) = match config.classes {
        0 => (features, "features", config.dim),
        classes => (builder.head(&features, classes), "logits", classes),
    };
    builder.graph.output(name, &output, ElementType::F32, &["batch".into(), size.into()]);
    Ok(builder.graph.finish())
}

struct Builder<'a> {
    graph: Graph,
    random: TruncatedNormal,
    config: &'a VitConfig,
}

impl Builder<'_> {
    /// Numbers and shapes that all blocks read.
    fn constants(&mut self) {
        let &VitConfig { dim, heads, .. } = self.config;
        let [all_tokens, heads, size, dim] = [self.config.tokens(), heads, dim / heads, dim].map(signed);
        for (name, shape) in [
            ("token_dims", &[1, dim][..]),
            ("patches_shape", &[0, dim, -1]),
            ("heads_shape", &[0, all_tokens, 3, heads, size]),
            ("joined_shape", &[0, all_tokens, dim]),
        ] {
            self.graph.indices(name, shape);
        }
        for (name, index) in [("first", 0), ("second", 1), ("third", 2)] {
            self.graph.constant(name, &Tensor { dims: Vec::new(), values: Values::I64(vec![index]) });
        }
        #[expect(clippy::cast_precision_loss, reason = "sizes are small")]
        let scale = 1.0 / (size as f32).sqrt();
        for (name, number) in [("scale", scale), ("sqrt_2", std::f32::consts::SQRT_2), ("one", 1.0), ("half", 0.5)] {
            self.graph.constant(name, &Tensor::scalar(number));
        }
    }

    /// Image `[batch, 3, image, image]` to tokens `[batch, tokens, dim]`.
    fn embed(&mut self, image: &str) -> String {
        let &VitConfig { patch, dim, .. } = self.config;
        let weight = self.weight("patch_embed.proj.weight", &[dim, 3, patch, patch]);
        let bias = self.filled("patch_embed.proj.bias", &[dim], 0.0);
        let sides = || ints(&[signed(patch), signed(patch)]);
        let maps =
            self.graph.node("Conv", &[image, &weight, &bias], &[("kernel_shape", sides()), ("strides", sides())]);
        let rows = self.graph.node("Reshape", &[&maps, "patches_shape"], &[]);
        let patches = self.transposed(&rows, &[0, 2, 1]);
        let batch = self.graph.node("Shape", &[image], &[("start", 0.into()), ("end", 1.into())]);
        let class_shape = self.graph.node("Concat", &[&batch, "token_dims"], &[("axis", 0.into())]);
        let class_token = self.filled("cls_token", &[1, 1, dim], 0.0);
        let class_tokens = self.graph.node("Expand", &[&class_token, &class_shape], &[]);
        let tokens = self.graph.node("Concat", &[&class_tokens, &patches], &[("axis", 1.into())]);
        let positions = self.weight("pos_embed", &[1, self.config.tokens(), dim]);
        self.graph.node("Add", &[&tokens, &positions], &[])
    }

    fn block(&mut self, tokens: &str, name: &str) -> String {
        let normed = self.norm(tokens, &format!("{name}.norm1"));
        let attended = self.attend(&normed, &format!("{name}.attn"));
        let tokens = self.graph.node("Add", &[tokens, &attended], &[]);
        let normed = self.norm(&tokens, &format!("{name}.norm2"));
        let changed = self.mlp(&normed, &format!("{name}.mlp"));
        self.graph.node("Add", &[&tokens, &changed], &[])
    }

    /// softmax(Q·Kᵀ / √size)·V in each head.
    fn attend(&mut self, tokens: &str, name: &str) -> String {
        let dim = self.config.dim;
        let packed = self.linear(tokens, &format!("{name}.qkv"), [dim, 3 * dim]);
        let split = self.graph.node("Reshape", &[&packed, "heads_shape"], &[]);
        let parts = self.transposed(&split, &[2, 0, 3, 1, 4]);
        let [query, key, value] =
            ["first", "second", "third"].map(|part| self.graph.node("Gather", &[&parts, part], &[("axis", 0.into())]));
        let query = self.graph.node("Mul", &[&query, "scale"], &[]);
        let key = self.transposed(&key, &[0, 1, 3, 2]);
        let scores = self.graph.node("MatMul", &[&query, &key], &[]);
        let shares = self.graph.node("Softmax", &[&scores], &[("axis", (-1).into())]);
        let heads = self.graph.node("MatMul", &[&shares, &value], &[]);
        let turned = self.transposed(&heads, &[0, 2, 1, 3]);
        let joined = self.graph.node("Reshape", &[&turned, "joined_shape"], &[]);
        self.linear(&joined, &format!("{name}.proj"), [dim, dim])
    }

    fn mlp(&mut self, tokens: &str, name: &str) -> String {
        let (dim, hidden) = (self.config.dim, self.config.hidden());
        let wide = self.linear(tokens, &format!("{name}.fc1"), [dim, hidden]);
        let active = self.gelu(&wide);
        self.linear(&active, &format!("{name}.fc2"), [hidden, dim])
    }

    /// x·(1 + erf(x/√2))/2.
    fn gelu(&mut self, x: &str) -> String {
        let reduced = self.graph.node("Div", &[x, "sqrt_2"], &[]);
        let erf = self.graph.node("Erf", &[&reduced], &[]);
        let sum = self.graph.node("Add", &[&erf, "one"], &[]);
        let product = self.graph.node("Mul", &[x, &sum], &[]);
        self.graph.node("Mul", &[&product, "half"], &[])
    }

    /// Tokens to features `[batch, dim]`: as in timm, the last norm comes before the class token is taken, but after the
    /// mean.
    fn pool(&mut self, tokens: &str) -> String {
        match self.config.pool {
            Pool::Cls => {
                let normed = self.norm(tokens, "norm");
                self.graph.node("Gather", &[&normed, "first"], &[("axis", 1.into())])
            }
            Pool::Avg => {
                let from = self.graph.indices("first_patch", &[1]);
                let to = self.graph.indices("last_patch", &[i64::MAX]);
                let axis = self.graph.indices("token_axis", &[1]);
                let patches = self.graph.node("Slice", &[tokens, &from, &to, &axis], &[]);
                let mean = self.graph.node("ReduceMean", &[&patches, &axis], &[("keepdims", 0.into())]);
                self.norm(&mean, "fc_norm")
            }
        }
    }

    fn head(&mut self, features: &str, classes: usize) -> String {
        let weight = self.weight("head.weight", &[classes, self.config.dim]);
        let bias = self.filled("head.bias", &[classes], 0.0);
        self.graph.node("Gemm", &[features, &weight, &bias], &[("transB", 1.into())])
    }

    fn linear(&mut self, x: &str, name: &str, [inputs, outputs]: [usize; 2]) -> String {
        let weight = self.weight(&format!("{name}.weight"), &[inputs, outputs]);
        let bias = self.filled(&format!("{name}.bias"), &[outputs], 0.0);
        let product = self.graph.node("MatMul", &[x, &weight], &[]);
        self.graph.node("Add", &[&product, &bias], &[])
    }

    fn norm(&mut self, x: &str, name: &str) -> String {
        let weight = self.filled(&format!("{name}.weight"), &[self.config.dim], 1.0);
        let bias = self.filled(&format!("{name}.bias"), &[self.config.dim], 0.0);
        let attributes = [("axis", (-1).into()), ("epsilon", EPSILON.into())];
        self.graph.node("LayerNormalization", &[x, &weight, &bias], &attributes)
    }

    fn weight(&mut self, name: &str, dims: &[usize]) -> String {
        let values = self.random.draw(name, SIGMA, dims.iter().product());
        self.graph.constant(name, &Tensor::f32(dims, values))
    }

    fn filled(&mut self, name: &str, dims: &[usize], value: f32) -> String {
        self.graph.constant(name, &Tensor::f32(dims, vec![value; dims.iter().product()]))
    }

    fn transposed(&mut self, x: &str, perm: &[i64]) -> String {
        self.graph.node("Transpose", &[x], &[("perm", ints(perm))])
    }
}

/// A size as ONNX stores it.
fn signed(size: usize) -> i64 {
    i64::try_from(size).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::inference::evaluate;
    use crate::onnx::passes::attention::fuse_attention;
    use crate::onnx::passes::fixtures::{difference, evaluate_images, noise, relative, shapes_of};
    use crate::onnx::passes::freeze::freeze;
    use crate::onnx::passes::gelu::fuse_gelu;
    use crate::onnx::passes::skip_layer_norm::fuse_skip_layer_norm;
    use crate::onnx::{Rewriter, cost};

    const TINY: &str = "image=12,patch=4,dim=12,depth=2,heads=3,mlp=2";

    fn tiny(change: &str) -> (VitConfig, Model) {
        let config: VitConfig = format!("{TINY}{change}").parse().unwrap();
        let model = build(&config, 1).unwrap();
        (config, model)
    }

    fn constants(model: &Model) -> HashMap<String, Tensor> {
        let constants = &model.proto().graph.as_ref().unwrap().initializer;
        constants.iter().map(|tensor| (tensor.name().to_owned(), Tensor::from_proto(tensor).unwrap())).collect()
    }

    #[test]
    fn the_graph_has_the_parameters_that_are_counted() {
        let parse = |text: &str| text.parse::<VitConfig>().unwrap();
        for text in ["vit_tiny_patch16_224", "vit_small_patch32_224", "vit_tiny_patch16_224,pool=avg,classes=5", TINY] {
            let model = build(&parse(text), 0).unwrap();
            // Shapes are integers and the numbers in formulas have no dimensions.
            let learned =
                constants(&model).into_values().filter(|c| c.element() == ElementType::F32 && !c.dims.is_empty());
            let count: usize = learned.map(|constant| constant.values.len()).sum();
            assert_eq!(count as u64, parse(text).parameters(), "{text}");
        }
        assert!(matches!(build(&VitConfig { heads: 5, ..parse(TINY) }, 0), Err(VitError::NotDivisible { .. })));
    }

    #[test]
    fn weights_are_initialised_as_told() {
        let model = build(&"image=32,patch=8,dim=128,depth=1,heads=2,classes=200".parse().unwrap(), 3).unwrap();
        let constants = constants(&model);
        for (name, tensor) in constants.iter().filter(|(name, _)| name.contains('.') || name.ends_with("embed")) {
            let values = tensor.to_f32().unwrap();
            if name.ends_with(".bias") || name.contains("norm") {
                let expected = if name.ends_with(".bias") { 0.0 } else { 1.0 };
                assert!(values.iter().all(|value| *value == expected), "{name}");
                continue;
            }
            assert!(values.iter().all(|value| value.abs() <= 2.0 * SIGMA), "{name}");
            let squares: f64 = values.iter().map(|value| f64::from(*value).powi(2)).sum();
            let sigma = (squares / values.len() as f64).sqrt() / f64::from(SIGMA);
            // √0.77374, see there. Estimated from n values it is off by 1/√(4n) or so: 0.3 % from 24,576 values.
            let bound = if values.len() > 20_000 { 0.01 } else { 0.05 };
            assert!((sigma / 0.87963 - 1.0).abs() < bound, "{name}: {sigma}");
        }
        assert_eq!(constants["cls_token"].to_f32().unwrap(), [0.0; 128]);
        let again = build(&"image=32,patch=8,dim=128,depth=1,heads=2,classes=200".parse().unwrap(), 3).unwrap();
        assert_eq!(model, again);
        let (config, one) = tiny("");
        let other = build(&config, 2).unwrap();
        assert!(difference(&one, &other, &[("input", noise(&[1, 3, 12, 12]))]) > 0.1);
    }

    /// The model with noise in all learned parameters, so that each of them matters.
    fn with_noise(mut model: Model) -> Model {
        for (place, tensor) in model.proto_mut().graph.as_mut().unwrap().initializer.iter_mut().enumerate() {
            let old = Tensor::from_proto(tensor).unwrap();
            if old.element() == ElementType::F32 && !old.dims.is_empty() {
                let mut values = noise(&[old.values.len() + place]).to_f32().unwrap().split_off(place);
                values.iter_mut().for_each(|value| *value *= 0.4);
                *tensor = Tensor::f32(&old.dims, values).to_proto(tensor.name());
            }
        }
        model
    }

    /// The definition of a ViT, one number at a time.
    struct Reference<'a> {
        config: &'a VitConfig,
        constants: HashMap<String, Tensor>,
    }

    type Rows = Vec<Vec<f64>>;

    impl Reference<'_> {
        fn values(&self, name: &str) -> Vec<f64> {
            self.constants[name].to_f32().unwrap().into_iter().map(f64::from).collect()
        }

        fn linear(&self, rows: &Rows, name: &str) -> Rows {
            let (weight, bias) = (self.values(&format!("{name}.weight")), self.values(&format!("{name}.bias")));
            let output = |row: &Vec<f64>, column: usize| {
                let products = row.iter().enumerate().map(|(input, x)| x * weight[input * bias.len() + column]);
                products.sum::<f64>() + bias[column]
            };
            rows.iter().map(|row| (0..bias.len()).map(|column| output(row, column)).collect()).collect()
        }

        fn norm(&self, rows: &Rows, name: &str) -> Rows {
            let (weight, bias) = (self.values(&format!("{name}.weight")), self.values(&format!("{name}.bias")));
            let norm = |row: &Vec<f64>| {
                let mean = row.iter().sum::<f64>() / row.len() as f64;
                let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / row.len() as f64;
                let scaled = row.iter().map(|x| (x - mean) / (variance + 1e-6).sqrt());
                scaled.zip(weight.iter().zip(&bias)).map(|(x, (weight, bias))| x * weight + bias).collect()
            };
            rows.iter().map(norm).collect()
        }

        fn embed(&self, image: &[f32]) -> Rows {
            let &VitConfig { image: side, patch, dim, .. } = self.config;
            let (weight, bias) = (self.values("patch_embed.proj.weight"), self.values("patch_embed.proj.bias"));
            let mut rows = vec![self.values("cls_token")];
            for place in 0..(side / patch).pow(2) {
                let (top, left) = (place / (side / patch) * patch, place % (side / patch) * patch);
                let channel = |channel: usize| {
                    let products = (0..3 * patch * patch).map(|index| {
                        let (colour, y, x) = (index / patch / patch, index / patch % patch, index % patch);
                        let pixel = image[(colour * side + top + y) * side + left + x];
                        f64::from(pixel) * weight[channel * 3 * patch * patch + index]
                    });
                    products.sum::<f64>() + bias[channel]
                };
                rows.push((0..dim).map(channel).collect());
            }
            add(&rows, &self.values("pos_embed").chunks(dim).map(<[f64]>::to_vec).collect())
        }

        fn attend(&self, rows: &Rows, name: &str) -> Rows {
            let &VitConfig { dim, heads, .. } = self.config;
            let size = dim / heads;
            let packed = self.linear(rows, &format!("{name}.qkv"));
            let mut joined = vec![Vec::new(); rows.len()];
            for head in 0..heads {
                let part = |row: usize, part: usize| &packed[row][part * dim + head * size..][..size];
                for (row, joined) in joined.iter_mut().enumerate() {
                    let score = |other: usize| {
                        let products = part(row, 0).iter().zip(part(other, 1)).map(|(q, k)| q * k);
                        (products.sum::<f64>() / (size as f64).sqrt()).exp()
                    };
                    let scores: Vec<f64> = (0..rows.len()).map(score).collect();
                    let sum: f64 = scores.iter().sum();
                    let value = |place: usize| {
                        scores.iter().enumerate().map(|(other, score)| score / sum * part(other, 2)[place]).sum::<f64>()
                    };
                    joined.extend((0..size).map(value));
                }
            }
            self.linear(&joined, &format!("{name}.proj"))
        }

        fn mlp(&self, rows: &Rows, name: &str) -> Rows {
            let mut wide = self.linear(rows, &format!("{name}.fc1"));
            let gelu = |x: &mut f64| *x = *x / 2.0 * (1.0 + libm::erf(*x / 2.0_f64.sqrt()));
            wide.iter_mut().flatten().for_each(gelu);
            self.linear(&wide, &format!("{name}.fc2"))
        }

        #[expect(clippy::cast_possible_truncation, reason = "to compare with 32-bit floats")]
        fn run(&self, image: &[f32]) -> Vec<f32> {
            let mut rows = self.embed(image);
            for block in 0..self.config.depth {
                let name = |part: &str| format!("blocks.{block}.{part}");
                rows = add(&rows, &self.attend(&self.norm(&rows, &name("norm1")), &name("attn")));
                rows = add(&rows, &self.mlp(&self.norm(&rows, &name("norm2")), &name("mlp")));
            }
            let features = match self.config.pool {
                Pool::Cls => self.norm(&vec![rows[0].clone()], "norm"),
                Pool::Avg => {
                    let count = (rows.len() - 1) as f64;
                    let mean = |channel: usize| rows[1..].iter().map(|row| row[channel]).sum::<f64>() / count;
                    self.norm(&vec![(0..self.config.dim).map(mean).collect()], "fc_norm")
                }
            };
            let outputs = if self.config.classes == 0 {
                features[0].clone()
            } else {
                let weight = self.values("head.weight");
                let rows = weight.chunks(self.config.dim).zip(self.values("head.bias"));
                rows.map(|(row, bias)| row.iter().zip(&features[0]).map(|(w, x)| w * x).sum::<f64>() + bias).collect()
            };
            outputs.into_iter().map(|x| x as f32).collect()
        }
    }

    fn add(one: &Rows, other: &Rows) -> Rows {
        let sum = |(one, other): (&Vec<f64>, &Vec<f64>)| one.iter().zip(other).map(|(a, b)| a + b).collect();
        one.iter().zip(other).map(sum).collect()
    }

    #[test]
    fn it_computes_what_a_vit_is() {
        for change in ["", ",pool=avg", ",classes=5", ",pool=avg,classes=5,image=16,heads=2,depth=3"] {
            // Properties may not be given twice.
            let text = TINY.split(',').filter(|part| !change.contains(part.split_once('=').unwrap().0));
            let config: VitConfig = format!("{}{change}", text.collect::<Vec<_>>().join(",")).parse().unwrap();
            let model = with_noise(build(&config, 1).unwrap());
            let reference = Reference { config: &config, constants: constants(&model) };
            let images = noise(&[2, 3, config.image, config.image]);
            let expected = images.to_f32().unwrap();
            let expected: Vec<f32> =
                expected.chunks(expected.len() / 2).flat_map(|image| reference.run(image)).collect();
            let found = evaluate(&model, &[("input", images)]).unwrap().swap_remove(0);
            assert_eq!(found.dims, [2, if config.classes == 0 { config.dim } else { config.classes }]);
            // 32-bit sums against 64-bit ones.
            let difference = relative(&expected, &found.to_f32().unwrap());
            assert!(difference < 1e-5, "{change}: {difference}");
        }
    }

    #[test]
    fn every_block_fuses() {
        for change in ["", ",pool=avg,classes=5"] {
            let (config, model) = tiny(change);
            let model = with_noise(model);
            let mut rewriter = Rewriter::new(model.clone()).unwrap();
            freeze(&mut rewriter, &mut evaluate_images).unwrap();
            let shapes = shapes_of(&rewriter);
            let report = fuse_attention(&mut rewriter, &shapes).unwrap();
            fuse_gelu(&mut rewriter).unwrap();
            // All norms but the first, which follows the positions, and the one behind the mean.
            let skipped = fuse_skip_layer_norm(&mut rewriter, &shapes);
            assert_eq!(skipped.applied(), 2 * config.depth - usize::from(config.pool == Pool::Avg), "{skipped:#?}");
            let fused = rewriter.finish().unwrap();
            let counts = fused.op_counts();
            for op in ["Attention", "Gelu"] {
                assert_eq!(counts.get(&format!("com.microsoft.{op}")), Some(&config.depth), "{report:#?}");
            }
            for batch in [1, 3] {
                let images = [("input", noise(&[batch, 3, 12, 12]))];
                // Only the order of sums differs.
                assert!(difference(&model, &fused, &images) < 1e-5);
            }
        }
    }

    #[test]
    fn the_exact_cost_is_the_sum_of_all_products() {
        let (config, model) = tiny(",classes=5");
        let rewriter = Rewriter::new(model).unwrap();
        let cost = cost(&rewriter, &shapes_of(&rewriter));
        // 9 patches of 48 numbers, 10 tokens of 12 channels, 24 inside the MLP.
        assert_eq!(cost.by_op["Conv"], 2 * 9 * 48 * 12);
        let products = 10 * 12 * 36 + 2 * 10 * 10 * 12 + 10 * 12 * 12 + 2 * 10 * 12 * 24;
        assert_eq!(cost.by_op["MatMul"], 2 * 2 * products);
        assert_eq!(cost.by_op["Gemm"], 2 * 12 * 5);
        assert_eq!(cost.flops, 10_368 + 4 * 13_920 + 120);
        assert_eq!(cost.parameters, config.parameters());
        assert_eq!(cost.parameter_bytes, 4 * config.parameters());
        assert!(cost.uncounted.is_empty(), "{:?}", cost.uncounted);
        // Positions and the last norm; in a block norms, biases and sums of 12 channels, q·scale, softmax of 3 heads, and
        // the bias and five steps of GELU over 24.
        let block = 10 * 12 * (2 + 3 + 1 + 1 + 2 + 1) + 3 * 10 * 10 + 10 * 24 * 6;
        assert_eq!(cost.elementwise, 2 * 10 * 12 + 2 * block);
        // The formula with the class token has the norms of the blocks in it, but not the head.
        let norms = 2 * 4 * 10 * 12;
        assert_eq!(cost.flops - 120 + norms, config.flops_by_formula_with_class_token());
    }
}
