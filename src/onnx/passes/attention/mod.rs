//! Attention fusion: softmax(Q·Kᵀ)·V with its projections becomes one operator of ONNX Runtime's.
//!
//! Found from the softmax outwards. If Q, K and V are linear in one and the same `[batch, tokens, hidden]`, their weights
//! are packed `[in, 3·hidden]` as Q|K|V and all of it becomes `com.microsoft.Attention`. If they are not (rotary
//! positions, normalised heads, cross attention), `com.microsoft.MultiHeadAttention` takes them as they are.

mod end;
mod projection;
mod trace;

use self::end::End;
use self::projection::Projection;
use self::trace::scaled;
use super::PassReport;
use crate::onnx::{NodeId, RewriteError, Rewriter, Shapes, Tensor};

/// Fuses what it can; `shapes` are best those of more than one image: one alone can't tell batch from heads.
///
/// # Errors
/// [`RewriteError`] if a weight can't be read.
pub fn fuse_attention(rewriter: &mut Rewriter, shapes: &Shapes) -> Result<PassReport, RewriteError> {
    let mut report = PassReport::new("attention");
    for softmax in rewriter.ids_of("Softmax") {
        if !rewriter.contains(softmax) {
            continue;
        }
        match Heads::find(rewriter, shapes, softmax) {
            Err(why) => report.keep(rewriter, softmax, why),
            Ok(heads) => match Packed::find(rewriter, shapes, &heads) {
                Ok(packed) => {
                    report.apply(rewriter, softmax, format!("Attention of {} heads", heads.heads));
                    packed.insert(rewriter, &heads);
                }
                Err(why_not_packed) => match Separate::find(rewriter, shapes, &heads) {
                    Ok(separate) => {
                        let what = format!("MultiHeadAttention of {} heads ({why_not_packed})", heads.heads);
                        report.apply(rewriter, softmax, what);
                        separate.insert(rewriter, &heads);
                    }
                    Err(why) => report.keep(rewriter, softmax, format!("{why_not_packed}; {why}")),
                },
            },
        }
    }
    rewriter.remove_dead();
    Ok(report)
}

/// The middle of an attention: softmax(factor · Q·Kᵀ)·V over heads.
struct Heads {
    /// `[batch, heads, tokens, size]`, or with batch and heads in one.
    query: String,
    /// The same with the last two exchanged.
    key_transposed: String,
    value: String,
    factor: f32,
    batch: usize,
    heads: usize,
    tokens: usize,
    /// Tokens of key and value.
    key_tokens: usize,
    size: usize,
    /// What it gives, in the dimensions of `query`.
    output: String,
}

impl Heads {
    fn find(rewriter: &Rewriter, shapes: &Shapes, softmax: NodeId) -> Result<Self, String> {
        let probabilities = rewriter.output(softmax, 0).to_owned();
        let dims = shapes.of(&probabilities).ok_or("its dimensions are not known")?.to_vec();
        let last = i64::try_from(dims.len()).unwrap_or(0) - 1;
        if ![-1, last].contains(&rewriter.int(softmax, "axis").unwrap_or(-1)) {
            return Err("the softmax is not over the last axis".to_owned());
        }
        let (mut scores, mut factor) = (rewriter.input(softmax, 0).to_owned(), 1.0);
        while let Some(id) = rewriter.producer(&scores) {
            scores = match (scaled(rewriter, id), unmasked(rewriter, id)) {
                (Some((input, number)), _) => {
                    factor *= number;
                    input
                }
                (None, Some(input)) => input,
                (None, None) => break,
            };
        }
        let product = rewriter.producer(&scores).ok_or("the scores are an input of the model")?;
        if !rewriter.is(product, "MatMul") {
            let op = rewriter.node(product).op_type();
            return Err(match op {
                "Add" | "Where" => format!("the scores have a mask or a position bias ({op})"),
                _ => format!("the scores come from {op}, not from a product of queries and keys"),
            });
        }
        let (query, key_transposed) = (rewriter.input(product, 0).to_owned(), rewriter.input(product, 1).to_owned());
        let probabilities = guarded(rewriter, &probabilities).unwrap_or(probabilities);
        let weighted = rewriter.sole_consumer(&probabilities).ok_or("the probabilities are used elsewhere too")?;
        if !rewriter.is(weighted, "MatMul") || rewriter.input(weighted, 0) != probabilities {
            return Err("the probabilities do not weigh a value".to_owned());
        }
        let value = rewriter.input(weighted, 1).to_owned();
        if [&query, &key_transposed, &value].into_iter().any(|value| rewriter.is_constant(value)) {
            return Err("queries, keys or values are constant".to_owned());
        }
        let query_dims = shapes.of(&query).ok_or("the queries' dimensions are not known")?;
        let (lead, [tokens, size]) = query_dims.split_last_chunk::<2>().ok_or("the queries are no matrices")?;
        let (batch, heads) = match lead {
            [batch, heads] => (*batch, *heads),
            [both] if both.is_multiple_of(shapes.batch()) => (shapes.batch(), both / shapes.batch()),
            _ => return Err(format!("queries of dimensions {query_dims:?} are not per head")),
        };
        let key_tokens = dims[dims.len() - 1];
        Ok(Self {
            factor,
            batch,
            heads,
            tokens: *tokens,
            key_tokens,
            size: *size,
            output: rewriter.output(weighted, 0).to_owned(),
            query,
            key_transposed,
            value,
        })
    }

    fn hidden(&self) -> usize {
        self.heads * self.size
    }

    /// The head's element that each element of queries, values (or keys, transposed) is: `(batch, head, token, place)`.
    fn places(&self, is_transposed: bool, tokens: usize) -> impl Iterator<Item = [usize; 4]> + use<> {
        let (batches, heads, size) = (self.batch, self.heads, self.size);
        let (rows, columns) = if is_transposed { (size, tokens) } else { (tokens, size) };
        (0..batches * heads * rows * columns).map(move |index| {
            let (column, row) = (index % columns, index / columns % rows);
            let both = index / columns / rows;
            let (token, place) = if is_transposed { (column, row) } else { (row, column) };
            [both / heads, both % heads, token, place]
        })
    }
}

/// The scores that a node adds nothing to: a mask that masks nothing.
fn unmasked(rewriter: &Rewriter, id: NodeId) -> Option<String> {
    if !rewriter.is(id, "Add") {
        return None;
    }
    let (first, second) = (rewriter.input(id, 0), rewriter.input(id, 1));
    let (scores, mask) = if rewriter.is_constant(first) { (second, first) } else { (first, second) };
    (rewriter.scalar(mask)? == 0.0).then(|| scores.to_owned())
}

/// The probabilities behind a guard that replaces NaN: only a row that is masked as a whole has any, and nothing is
/// masked here.
fn guarded(rewriter: &Rewriter, probabilities: &str) -> Option<String> {
    let [one, other] = rewriter.consumers(probabilities) else { return None };
    let (test, choice) = if rewriter.is(*one, "IsNaN") { (*one, *other) } else { (*other, *one) };
    let is_guard = rewriter.is(test, "IsNaN")
        && rewriter.is(choice, "Where")
        && rewriter.input(choice, 0) == rewriter.output(test, 0)
        && rewriter.input(choice, 2) == probabilities;
    is_guard.then(|| rewriter.output(choice, 0).to_owned())
}

/// An attention whose projections are packed.
struct Packed {
    tokens: String,
    /// `[in, 3·hidden]`.
    weight: Tensor,
    /// `[3·hidden]`.
    bias: Tensor,
    scale: f32,
    end: End,
}

impl Packed {
    fn find(rewriter: &Rewriter, shapes: &Shapes, heads: &Heads) -> Result<Self, String> {
        let parts = [(&heads.query, false), (&heads.key_transposed, true), (&heads.value, false)];
        let mut projections = Vec::with_capacity(3);
        for (value, is_transposed) in parts {
            projections.push(Projection::find(rewriter, shapes, heads, value, is_transposed)?);
        }
        let tokens = projections[0].tokens.clone();
        if projections.iter().any(|projection| projection.tokens != tokens) {
            return Err("queries, keys and values are made from different tokens".to_owned());
        }
        if projections[2].factor != 1.0 {
            return Err("the values are scaled".to_owned());
        }
        let hidden = heads.hidden();
        let input_width = shapes.of(&tokens).and_then(|dims| dims.last()).copied().ok_or("the tokens have no width")?;
        let mut weight = vec![0.0; input_width * 3 * hidden];
        let mut bias = vec![0.0; 3 * hidden];
        for (part, projection) in projections.iter().enumerate() {
            let unreadable = || format!("weight {:?} can't be read as numbers", projection.linear.weight);
            let matrix = projection.linear.matrix(rewriter).ok_or_else(unreadable)?;
            let (width, values) = (matrix.dims[1], matrix.to_f32().ok_or_else(unreadable)?);
            let from = match &projection.linear.bias {
                Some(bias) => rewriter.floats(bias).and_then(|bias| bias.to_f32()).ok_or_else(unreadable)?,
                None => vec![0.0; width],
            };
            for (place, column) in projection.columns.iter().enumerate() {
                bias[part * hidden + place] = from[*column];
                for row in 0..input_width {
                    weight[row * 3 * hidden + part * hidden + place] = values[row * width + column];
                }
            }
        }
        let scale = heads.factor * projections[0].factor * projections[1].factor;
        let end = End::find(rewriter, shapes, heads)?;
        let (weight, bias) = (Tensor::f32(&[input_width, 3 * hidden], weight), Tensor::f32(&[3 * hidden], bias));
        Ok(Self { tokens, weight, bias, scale, end })
    }

    fn insert(self, rewriter: &mut Rewriter, heads: &Heads) {
        let weight = rewriter.add_constant(&format!("{}/qkv_weight", self.end.value), &self.weight);
        let bias = rewriter.add_constant(&format!("{}/qkv_bias", self.end.value), &self.bias);
        let inputs = [self.tokens.as_str(), &weight, &bias];
        self.end.insert(rewriter, heads, "Attention", &inputs, self.scale);
    }
}

/// An attention whose queries, keys and values are given.
struct Separate {
    factor: f32,
    end: End,
}

impl Separate {
    fn find(rewriter: &Rewriter, shapes: &Shapes, heads: &Heads) -> Result<Self, String> {
        let is_per_head = |value: &str| shapes.of(value).is_some_and(|dims| dims.len() == 4);
        if ![&heads.query, &heads.key_transposed, &heads.value].into_iter().all(|value| is_per_head(value)) {
            return Err("heads and batch share a dimension".to_owned());
        }
        Ok(Self { factor: heads.factor, end: End::find(rewriter, shapes, heads)? })
    }

    fn insert(self, rewriter: &mut Rewriter, heads: &Heads) {
        let tokens = |rewriter: &mut Rewriter, value: &str, perm: &[i64]| {
            let width = i64::try_from(heads.hidden()).unwrap_or(0);
            let turned = rewriter.fresh(&format!("{value}/by_token"));
            let node = rewriter.new_node("", "Transpose", &[value], &[&turned]);
            let id = rewriter.insert(node);
            rewriter.set_attribute(id, "perm", crate::onnx::build::ints(perm));
            let shape = rewriter.add_constant(&format!("{value}/token_shape"), &Tensor::indices(&[0, 0, width]));
            let flat = rewriter.fresh(&format!("{value}/tokens"));
            let node = rewriter.new_node("", "Reshape", &[&turned, &shape], &[&flat]);
            rewriter.insert(node);
            flat
        };
        let query = tokens(rewriter, &heads.query, &[0, 2, 1, 3]);
        let key = tokens(rewriter, &heads.key_transposed, &[0, 3, 1, 2]);
        let value = tokens(rewriter, &heads.value, &[0, 2, 1, 3]);
        self.end.insert(rewriter, heads, "MultiHeadAttention", &[&query, &key, &value], self.factor);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::onnx::build::{Graph, ints};
    use crate::onnx::passes::fixtures::{self, evaluate_images, noise, relative, shapes_of};
    use crate::onnx::passes::freeze::{Case, freeze};
    use crate::onnx::passes::skip_layer_norm::fuse_skip_layer_norm;
    use crate::onnx::{ElementType, Model};

    /// Attention nodes, MultiHeadAttention nodes and SkipLayerNormalization nodes of a fixture after fusion.
    fn fuse(name: &str) -> (usize, usize, usize) {
        let original = fixtures::model(&format!("{name}.onnx"));
        let mut rewriter = Rewriter::new(original.clone()).unwrap();
        freeze(&mut rewriter, &mut evaluate_images).unwrap();
        let shapes = shapes_of(&rewriter);
        let report = fuse_attention(&mut rewriter, &shapes).unwrap();
        let skipped = fuse_skip_layer_norm(&mut rewriter, &shapes);
        let fused = rewriter.finish().unwrap();
        let run = |model: &Model, batch| evaluate_images(model, Case::Batch(batch)).unwrap().unwrap();
        for batch in [1, 3] {
            for (a, b) in run(&original, batch).iter().zip(&run(&fused, batch)) {
                let difference = relative(&a.to_f32().unwrap(), &b.to_f32().unwrap());
                // Only the order of sums differs.
                assert!(difference < 1e-5, "{name}, batch {batch}: {difference}\n{report:#?}");
            }
        }
        let counts = fused.op_counts();
        let of = |op: &str| counts.get(&format!("com.microsoft.{op}")).copied().unwrap_or(0);
        let found = (of("Attention"), of("MultiHeadAttention"), of("SkipLayerNormalization"));
        assert_eq!(report.applied(), found.0 + found.1, "{report:#?}");
        assert_eq!(skipped.applied(), found.2, "{skipped:#?}");
        let mut again = Rewriter::new(fused).unwrap();
        let shapes = shapes_of(&again);
        assert_eq!(fuse_attention(&mut again, &shapes).unwrap().applied(), 0, "{name}");
        found
    }

    #[test]
    fn every_attention_of_real_exports_is_found() {
        const EXPORTS: [&str; 9] = [
            "timm_sdpa",
            "timm_unfused",
            "timm_torchscript",
            "timm_swiglu",
            "torchvision_vit",
            "hf_vit_eager",
            "hf_vit_sdpa",
            "hf_dinov2_eager",
            "hf_dinov2_sdpa",
        ];
        for name in EXPORTS {
            // Two blocks; the first block's first norm follows the positions, a constant.
            assert_eq!(fuse(name), (2, 0, 4), "{name}");
        }
    }

    /// What an attention of the test has beside projections, softmax and heads.
    #[derive(Clone, Copy, PartialEq)]
    enum Beside {
        Nothing,
        NormalisedQueries,
        ScaledValues,
        Mask,
    }

    /// Attention over `[n, 3, 4, 4]` as `[n, 12, 4]` in 2 heads.
    fn attention(beside: Beside) -> Model {
        let mut graph = Graph::new("attention");
        let x = graph.input("x", ElementType::F32, &["n".into(), 3.into(), 4.into(), 4.into()]);
        let shape = graph.indices("tokens_shape", &[-1, 12, 4]);
        let tokens = graph.node("Reshape", &[&x, &shape], &[]);
        let mut heads = Vec::new();
        let weights = noise(&[48]).to_f32().unwrap();
        for (part, weights) in ["q", "k", "v"].into_iter().zip(weights.chunks(16)) {
            let weight = graph.weights(&format!("{part}_w"), &[4, 4], weights);
            let linear = graph.node("MatMul", &[&tokens, &weight], &[]);
            let shape = graph.indices(&format!("{part}_shape"), &[0, 0, 2, 2]);
            let split = graph.node("Reshape", &[&linear, &shape], &[]);
            heads.push(graph.node("Transpose", &[&split], &[("perm", ints(&[0, 2, 1, 3]))]));
        }
        if beside == Beside::NormalisedQueries {
            let gamma = graph.weights("gamma", &[2], &[1.0, 0.5]);
            heads[0] = graph.node("LayerNormalization", &[&heads[0], &gamma], &[("axis", (-1).into())]);
        }
        if beside == Beside::ScaledValues {
            let factor = graph.weights("factor", &[], &[3.0]);
            heads[2] = graph.node("Mul", &[&heads[2], &factor], &[]);
        }
        let key = graph.node("Transpose", &[&heads[1]], &[("perm", ints(&[0, 1, 3, 2]))]);
        let mut scores = graph.node("MatMul", &[&heads[0], &key], &[]);
        if beside == Beside::Mask {
            let mask = graph.weights("mask", &[1, 12], &[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -9.0]);
            scores = graph.node("Add", &[&scores, &mask], &[]);
        }
        let probabilities = graph.node("Softmax", &[&scores], &[("axis", (-1).into())]);
        let weighted = graph.node("MatMul", &[&probabilities, &heads[2]], &[]);
        let turned = graph.node("Transpose", &[&weighted], &[("perm", ints(&[0, 2, 1, 3]))]);
        let shape = graph.indices("joined_shape", &[0, 0, 4]);
        let joined = graph.node("Reshape", &[&turned, &shape], &[]);
        graph.output("y", &joined, ElementType::F32, &["n".into(), 12.into(), 4.into()]);
        graph.finish()
    }

    fn report_of(model: &Model) -> (PassReport, Model) {
        let mut rewriter = Rewriter::new(model.clone()).unwrap();
        let shapes = shapes_of(&rewriter);
        let report = fuse_attention(&mut rewriter, &shapes).unwrap();
        (report, rewriter.finish().unwrap())
    }

    #[test]
    fn heads_that_are_no_plain_projections_stay_as_they_are() {
        let (packed, separate) = ("com.microsoft.Attention", "com.microsoft.MultiHeadAttention");
        let cases =
            [(Beside::Nothing, packed), (Beside::NormalisedQueries, separate), (Beside::ScaledValues, separate)];
        for (beside, op) in cases {
            let model = attention(beside);
            let (report, fused) = report_of(&model);
            assert_eq!(fused.op_counts().get(op), Some(&1), "{report:#?}");
            for batch in [1, 2, 5] {
                let run = |model: &Model| evaluate_images(model, Case::Batch(batch)).unwrap().unwrap().remove(0);
                let [before, after] = [&model, &fused].map(|model| run(model).to_f32().unwrap());
                assert!(relative(&before, &after) < 1e-5, "{op}");
            }
        }
    }

    #[test]
    fn a_mask_is_kept_and_told() {
        let model = attention(Beside::Mask);
        let (report, fused) = report_of(&model);
        assert_eq!(
            report.findings[0].to_string(),
            "Softmax Softmax_13: kept, the scores have a mask or a position bias (Add)"
        );
        assert_eq!(fused.op_counts(), model.op_counts());
    }
}
