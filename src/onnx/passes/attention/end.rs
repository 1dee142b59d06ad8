//! The way of an attention's result back from heads to tokens.

use super::Heads;
use super::projection::Linear;
use super::trace::{Elements, is_layout};
use crate::onnx::{MICROSOFT, NodeId, Rewriter, Shapes, Tensor};

/// How an attention's result goes on: from heads back to `[batch, tokens, hidden]`.
pub(super) struct End {
    /// The value that the fused operator, or what is rebuilt after it, gives.
    pub(super) value: String,
    /// The node that gave it, and those before it that no one else needs are dead afterwards.
    replaced: NodeId,
    /// True if the value is `[batch·tokens, hidden]`.
    is_flat: bool,
    /// The output projection, where tokens come into their order only after it.
    projection: Option<(String, Option<String>, bool)>,
}

impl End {
    pub(super) fn find(rewriter: &Rewriter, shapes: &Shapes, heads: &Heads) -> Result<Self, String> {
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
    pub(super) fn insert(self, rewriter: &mut Rewriter, heads: &Heads, op: &str, inputs: &[&str], scale: f32) {
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
