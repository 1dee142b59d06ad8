//! Attention fusion: softmax(Q·Kᵀ)·V with its projections becomes one operator of ONNX Runtime's.
//!
//! Found from the softmax outwards. If Q, K and V are linear in one and the same `[batch, tokens, hidden]`, their weights
//! are packed `[in, 3·hidden]` as Q|K|V and all of it becomes `com.microsoft.Attention`. If they are not (rotary
//! positions, normalised heads, cross attention), `com.microsoft.MultiHeadAttention` takes them as they are.

mod trace;

use self::trace::{Elements, Path, is_layout, scaled};
use super::PassReport;
use crate::onnx::{MICROSOFT, NodeId, RewriteError, Rewriter, Shapes, Tensor};

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

/// A linear layer over the last axis: `input · weight + bias`.
struct Linear {
    input: String,
    weight: String,
    /// True if the weight is `[out, in]`.
    is_transposed: bool,
    bias: Option<String>,
}

impl Linear {
    /// The layer that gives `value`.
    fn of(rewriter: &Rewriter, value: &str) -> Option<Self> {
        let id = rewriter.producer(value)?;
        if rewriter.is(id, "Add") {
            let (first, second) = (rewriter.input(id, 0), rewriter.input(id, 1));
            let (product, bias) = if rewriter.is_constant(first) { (second, first) } else { (first, second) };
            let linear = Self::of(rewriter, product).filter(|linear| linear.bias.is_none())?;
            let width = linear.width(rewriter)?;
            let dims = rewriter.constant_dims(bias)?;
            let fits = dims.last() == Some(&width) && dims.iter().product::<usize>() == width;
            return fits.then(|| Self { bias: Some(bias.to_owned()), ..linear });
        }
        let weight = rewriter.input(id, 1).to_owned();
        if rewriter.constant_dims(&weight)?.len() != 2 {
            return None;
        }
        let input = rewriter.input(id, 0).to_owned();
        if rewriter.is(id, "MatMul") {
            return Some(Self { input, weight, is_transposed: false, bias: None });
        }
        let is_plain = |name: &str| rewriter.float(id, name).is_none_or(|value| value == 1.0);
        if !rewriter.is(id, "Gemm") || rewriter.int(id, "transA") == Some(1) || !is_plain("alpha") || !is_plain("beta")
        {
            return None;
        }
        let bias = rewriter.input(id, 2);
        if !bias.is_empty() && rewriter.constant_dims(bias)?.len() != 1 {
            return None;
        }
        let is_transposed = rewriter.int(id, "transB") == Some(1);
        Some(Self { input, weight, is_transposed, bias: (!bias.is_empty()).then(|| bias.to_owned()) })
    }

    /// Columns of the output.
    fn width(&self, rewriter: &Rewriter) -> Option<usize> {
        rewriter.constant_dims(&self.weight)?.get(usize::from(!self.is_transposed)).copied()
    }

    /// `[in, out]`.
    fn matrix(&self, rewriter: &Rewriter) -> Option<Tensor> {
        let weight = rewriter.floats(&self.weight)?;
        if !self.is_transposed {
            return Some(weight);
        }
        let (rows, columns) = (weight.dims[0], weight.dims[1]);
        let values = weight.to_f32()?;
        let turned = (0..rows * columns).map(|index| values[index % rows * columns + index / rows]).collect();
        Some(Tensor::f32(&[columns, rows], turned))
    }
}

/// One of Q, K and V as a linear function of tokens.
struct Projection {
    linear: Linear,
    /// The value that holds the tokens, `[batch, tokens, width]`.
    tokens: String,
    /// Column of the linear layer's output for each `(head, place)`.
    columns: Vec<usize>,
    factor: f32,
}

impl Projection {
    fn find(
        rewriter: &Rewriter,
        shapes: &Shapes,
        heads: &Heads,
        value: &str,
        is_transposed: bool,
    ) -> Result<Self, String> {
        let path = Path::back_from(rewriter, value);
        let linear = Linear::of(rewriter, &path.source).ok_or_else(|| {
            let op = rewriter.producer(&path.source).map_or("an input", |id| rewriter.node(id).op_type());
            format!("a projection ends at {op}, not at a linear layer")
        })?;
        let dims = shapes.of(&path.source).ok_or("a projection's dimensions are not known")?;
        let width = *dims.last().ok_or("a projection is a scalar")?;
        let elements = path.elements(rewriter, dims).ok_or("a projection is rearranged in an unknown way")?;
        let tokens = if is_transposed { heads.key_tokens } else { elements.dims[elements.dims.len() - 2] };
        if elements.source.len() != heads.batch * heads.heads * tokens * heads.size {
            return Err("queries, keys and values differ in size".to_owned());
        }
        // Each element must be column(head, place) of row(batch, token).
        let mut rows = vec![usize::MAX; heads.batch * tokens];
        let mut columns = vec![usize::MAX; heads.hidden()];
        let agree = |seen: &mut usize, now: usize| {
            let is_new = *seen == usize::MAX;
            if is_new {
                *seen = now;
            }
            is_new || *seen == now
        };
        for (source, [batch, head, token, place]) in elements.source.iter().zip(heads.places(is_transposed, tokens)) {
            let source = *source as usize;
            let row_agrees = agree(&mut rows[batch * tokens + token], source / width);
            if !row_agrees || !agree(&mut columns[head * heads.size + place], source % width) {
                return Err("a projection mixes tokens and channels".to_owned());
            }
        }
        let tokens = token_source(rewriter, shapes, &linear.input, &rows, &[heads.batch, tokens])
            .ok_or("the projection's input is no batch of tokens")?;
        Ok(Self { linear, tokens, columns, factor: path.factor })
    }
}

/// The value `[batch, tokens, width]` whose row `i` is row `rows[i]` of `value`, found on the way back from it.
fn token_source(
    rewriter: &Rewriter,
    shapes: &Shapes,
    value: &str,
    rows: &[usize],
    lead: &[usize; 2],
) -> Option<String> {
    let whole = Path::back_from(rewriter, value);
    let width = *shapes.of(value)?.last()?;
    for steps in 0..=whole.nodes.len() {
        let nodes = whole.nodes[..steps].to_vec();
        let source = nodes.last().map_or(value, |(id, _)| rewriter.input(*id, 0)).to_owned();
        let dims = shapes.of(&source)?;
        if dims != [lead[0], lead[1], width] {
            continue;
        }
        let path = Path { nodes, source: source.clone(), factor: 1.0 };
        let elements = path.elements(rewriter, dims)?;
        let is_row = |(place, row): (usize, &usize)| {
            (0..width).all(|column| elements.source[row * width + column] as usize == place * width + column)
        };
        if rows.iter().enumerate().all(is_row) {
            return Some(source);
        }
    }
    None
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

/// How an attention's result goes on: from heads back to `[batch, tokens, hidden]`.
struct End {
    /// The value that the fused operator, or what is rebuilt after it, gives.
    value: String,
    /// The node that gave it, and those before it that no one else needs are dead afterwards.
    replaced: NodeId,
    /// True if the value is `[batch·tokens, hidden]`.
    is_flat: bool,
    /// The output projection, where tokens come into their order only after it.
    projection: Option<(String, Option<String>, bool)>,
}

impl End {
    fn find(rewriter: &Rewriter, shapes: &Shapes, heads: &Heads) -> Result<Self, String> {
        let Heads { batch, tokens, size, .. } = *heads;
        let hidden = heads.hidden();
        let whole = u32::try_from(batch * tokens * hidden).map_err(|_| "it is too large")?;
        debug_assert!(whole > 0 && size > 0);
        let dims = shapes.of(&heads.output).ok_or("the result's dimensions are not known")?.to_vec();
        let numbers = heads.places(false, tokens).map(|[batch, head, token, place]| {
            u32::try_from(((batch * tokens + token) * heads.heads + head) * size + place).unwrap_or(0)
        });
        let mut elements = Elements { dims, source: numbers.collect() };
        let (mut value, mut width, mut linear) = (heads.output.clone(), hidden, None);
        loop {
            let replaced = rewriter.producer(&value).ok_or("the result has no producer")?;
            let end = |is_flat| {
                let projection = linear
                    .as_ref()
                    .map(|linear: &Linear| (linear.weight.clone(), linear.bias.clone(), linear.is_transposed));
                Ok(Self { value: value.clone(), replaced, is_flat, projection })
            };
            if elements.is_all_of(&[batch, tokens, width]) {
                return end(false);
            }
            // Only where nothing puts the tokens in order later.
            let next = rewriter.sole_consumer(&value);
            let goes_on = next.is_some_and(|id| is_layout(rewriter, id));
            if elements.is_all_of(&[batch * tokens, width]) && !goes_on {
                return end(true);
            }
            let next = next.ok_or("the heads are not joined to tokens")?;
            let output = rewriter.output(next, 0).to_owned();
            if is_layout(rewriter, next) && rewriter.node(next).output.len() == 1 {
                elements = elements.through(rewriter, next, 0).ok_or("the heads are joined in an unknown way")?;
                value = output;
                continue;
            }
            // A projection that leaves rows alone: tokens may come into order behind it.
            let after = rewriter.sole_consumer(&output).filter(|id| rewriter.is(*id, "Add"));
            let with_bias = after.map(|id| rewriter.output(id, 0).to_owned());
            let candidates = [with_bias, Some(output)];
            let found = candidates.into_iter().flatten().find_map(|end| {
                Linear::of(rewriter, &end).filter(|linear| linear.input == value).map(|linear| (end, linear))
            });
            let (end, projection) = found.ok_or("the heads are not joined to tokens")?;
            if linear.is_some() || !elements.source.chunks(width).all(|row| is_row(row, width)) {
                return Err("the heads are not joined to tokens".to_owned());
            }
            let new_width = projection.width(rewriter).ok_or("the output projection has no width")?;
            let rows = elements.source.chunks(width).map(|row| row[0] / u32::try_from(width).unwrap_or(1));
            let new = u32::try_from(new_width).unwrap_or(0);
            let source = rows.flat_map(|row| (0..new).map(move |column| row * new + column)).collect();
            let mut dims = elements.dims.clone();
            if let Some(last) = dims.last_mut() {
                *last = new_width;
            }
            elements = Elements { dims, source };
            (value, width, linear) = (end, new_width, Some(projection));
        }
    }

    /// Puts the fused operator where the value came from.
    fn insert(self, rewriter: &mut Rewriter, heads: &Heads, op: &str, inputs: &[&str], scale: f32) {
        let count = i64::try_from(heads.heads).unwrap_or(0);
        rewriter.remove(self.replaced);
        let is_last = !self.is_flat && self.projection.is_none();
        let output = if is_last { self.value.clone() } else { rewriter.fresh(&format!("{}/attention", self.value)) };
        let node = rewriter.new_node(MICROSOFT, op, inputs, &[&output]);
        let id = rewriter.insert(node);
        rewriter.set_attribute(id, "num_heads", count);
        rewriter.set_attribute(id, "scale", scale);
        let mut last = output;
        if let Some((weight, bias, is_transposed)) = self.projection {
            let weight = if is_transposed { transposed(rewriter, &weight) } else { weight };
            let is_end = !self.is_flat && bias.is_none();
            let product = if is_end { self.value.clone() } else { rewriter.fresh(&format!("{}/product", self.value)) };
            let node = rewriter.new_node("", "MatMul", &[&last, &weight], &[&product]);
            rewriter.insert(node);
            last = product;
            if let Some(bias) = bias {
                let sum =
                    if self.is_flat { rewriter.fresh(&format!("{}/sum", self.value)) } else { self.value.clone() };
                let node = rewriter.new_node("", "Add", &[&last, &bias], &[&sum]);
                rewriter.insert(node);
                last = sum;
            }
        }
        if self.is_flat {
            let width = i64::try_from(heads.hidden()).unwrap_or(0);
            let shape = rewriter.add_constant(&format!("{}/flat", self.value), &Tensor::indices(&[-1, width]));
            let node = rewriter.new_node("", "Reshape", &[&last, &shape], &[&self.value]);
            rewriter.insert(node);
        }
    }
}

/// True if the elements are one row, in order.
fn is_row(row: &[u32], width: usize) -> bool {
    (row[0] as usize).is_multiple_of(width) && row.windows(2).all(|pair| pair[1] == pair[0] + 1)
}

/// A constant matrix turned, as a new constant.
fn transposed(rewriter: &mut Rewriter, weight: &str) -> String {
    let linear = Linear { input: String::new(), weight: weight.to_owned(), is_transposed: true, bias: None };
    match linear.matrix(rewriter) {
        Some(matrix) => rewriter.add_constant(&format!("{weight}/transposed"), &matrix),
        None => weight.to_owned(),
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

    /// Attention over `[n, 3, 4, 4]` as `[n, 12, 4]` in 2 heads, with normalised queries or a mask on the scores.
    fn attention(is_normalised: bool, is_masked: bool) -> Model {
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
        if is_normalised {
            let gamma = graph.weights("gamma", &[2], &[1.0, 0.5]);
            heads[0] = graph.node("LayerNormalization", &[&heads[0], &gamma], &[("axis", (-1).into())]);
        }
        let key = graph.node("Transpose", &[&heads[1]], &[("perm", ints(&[0, 1, 3, 2]))]);
        let mut scores = graph.node("MatMul", &[&heads[0], &key], &[]);
        if is_masked {
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
    fn normalised_heads_keep_their_own_queries() {
        for (is_normalised, op) in [(false, "com.microsoft.Attention"), (true, "com.microsoft.MultiHeadAttention")] {
            let model = attention(is_normalised, false);
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
        let model = attention(false, true);
        let (report, fused) = report_of(&model);
        assert_eq!(
            report.findings[0].to_string(),
            "Softmax Softmax_13: kept, the scores have a mask or a position bias (Add)"
        );
        assert_eq!(fused.op_counts(), model.op_counts());
    }
}
