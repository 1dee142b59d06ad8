//! The linear layers that make queries, keys and values of tokens.

use super::Heads;
use super::trace::Path;
use crate::onnx::{Rewriter, Shapes, Tensor};

/// A linear layer over the last axis: `input · weight + bias`.
pub(super) struct Linear {
    pub(super) input: String,
    pub(super) weight: String,
    /// True if the weight is `[out, in]`.
    pub(super) is_transposed: bool,
    pub(super) bias: Option<String>,
}

impl Linear {
    /// The layer that gives `value`.
    pub(super) fn of(rewriter: &Rewriter, value: &str) -> Option<Self> {
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
    pub(super) fn width(&self, rewriter: &Rewriter) -> Option<usize> {
        rewriter.constant_dims(&self.weight)?.get(usize::from(!self.is_transposed)).copied()
    }

    /// `[in, out]`.
    pub(super) fn matrix(&self, rewriter: &Rewriter) -> Option<Tensor> {
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
pub(super) struct Projection {
    pub(super) linear: Linear,
    /// The value that holds the tokens, `[batch, tokens, width]`.
    pub(super) tokens: String,
    /// Column of the linear layer's output for each `(head, place)`.
    pub(super) columns: Vec<usize>,
    pub(super) factor: f32,
}

impl Projection {
    pub(super) fn find(
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
