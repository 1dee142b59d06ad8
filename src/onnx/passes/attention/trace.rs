//! Where the elements of a value come from: follows reshapes, transpositions and slices back to the value that they cut.
//!
//! Exporters write the heads of an attention in many ways. Instead of knowing them all, the layout operators on the way
//! are applied to the numbers of the elements, and the outcome is compared with what an attention needs.

use crate::onnx::{NodeId, Rewriter};

/// For each element of a value, in row-major order, the number of the source's element that it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Elements {
    pub(super) dims: Vec<usize>,
    pub(super) source: Vec<u32>,
}

impl Elements {
    /// The source itself.
    pub(super) fn all(dims: &[usize]) -> Self {
        let len = u32::try_from(dims.iter().product::<usize>()).unwrap_or(0);
        Self { dims: dims.to_vec(), source: (0..len).collect() }
    }

    /// True if nothing was moved, only dimensions were changed to these.
    pub(super) fn is_all_of(&self, dims: &[usize]) -> bool {
        self.dims == dims && self.source.iter().zip(0..).all(|(source, place)| *source == place)
    }

    /// What a node makes of it at its output number `output`; `None` if the node does more than move elements.
    pub(super) fn through(&self, rewriter: &Rewriter, id: NodeId, output: usize) -> Option<Self> {
        let node = rewriter.node(id);
        let axis = |default: i64| self.axis(rewriter.int(id, "axis").unwrap_or(default));
        match node.op_type() {
            "Identity" => Some(self.clone()),
            "Reshape" => self.reshaped(&rewriter.indices(rewriter.input(id, 1))?),
            "Flatten" => {
                let axis = axis(1)?;
                let rows = self.dims[..axis].iter().product();
                let columns = self.dims[axis..].iter().product();
                Some(Self { dims: vec![rows, columns], source: self.source.clone() })
            }
            "Squeeze" | "Unsqueeze" => self.with_axes(node.op_type() == "Unsqueeze", &axes(rewriter, id)?),
            "Transpose" => {
                let rank = self.dims.len();
                let reversed = || (0..rank).rev().map(|axis| i64::try_from(axis).unwrap_or(0)).collect();
                let perm = rewriter.ints(id, "perm").unwrap_or_else(reversed);
                let perm: Vec<usize> = perm.into_iter().map(|axis| self.axis(axis)).collect::<Option<_>>()?;
                (perm.len() == rank).then(|| self.transposed(&perm))
            }
            "Split" => {
                let axis = axis(0)?;
                let size = self.dims[axis];
                let sizes = match rewriter.indices(rewriter.input(id, 1)) {
                    Some(sizes) => sizes.into_iter().map(usize::try_from).collect::<Result<Vec<_>, _>>().ok()?,
                    None => {
                        let each = size.div_ceil(node.output.len().max(1));
                        (0..node.output.len()).map(|part| each.min(size.saturating_sub(part * each))).collect()
                    }
                };
                let start = sizes.get(..output)?.iter().sum();
                self.sliced(axis, start, *sizes.get(output)?)
            }
            "Gather" => {
                let axis = axis(0)?;
                let dims = rewriter.constant_dims(rewriter.input(id, 1))?;
                let [index] = rewriter.indices(rewriter.input(id, 1))?[..] else { return None };
                let one = self.sliced(axis, self.place(axis, index)?, 1)?;
                match dims[..] {
                    [] => one.with_axes(false, &[i64::try_from(axis).ok()?]),
                    [1] => Some(one),
                    _ => None,
                }
            }
            "Slice" => {
                let list = |input: usize| rewriter.indices(rewriter.input(id, input));
                let ([start], [end]) = (&list(1)?[..], &list(2)?[..]) else { return None };
                let axis = self.axis(list(3).map_or(Some(0), |axes| axes.first().copied())?)?;
                if list(4).is_some_and(|steps| steps != [1]) {
                    return None;
                }
                let size = i64::try_from(self.dims[axis]).ok()?;
                let clamp = |at: i64| usize::try_from(if at < 0 { at + size } else { at.min(size) }).ok();
                let (start, end) = (clamp(*start)?, clamp(*end)?);
                self.sliced(axis, start, end.checked_sub(start)?)
            }
            _ => None,
        }
    }

    fn axis(&self, axis: i64) -> Option<usize> {
        let rank = i64::try_from(self.dims.len()).ok()?;
        usize::try_from(if axis < 0 { axis + rank } else { axis }).ok().filter(|axis| *axis < self.dims.len())
    }

    fn place(&self, axis: usize, index: i64) -> Option<usize> {
        let size = i64::try_from(self.dims[axis]).ok()?;
        usize::try_from(if index < 0 { index + size } else { index }).ok()
    }

    fn reshaped(&self, shape: &[i64]) -> Option<Self> {
        let mut dims = Vec::with_capacity(shape.len());
        for (place, size) in shape.iter().enumerate() {
            dims.push(match size {
                0 => *self.dims.get(place)?,
                -1 => 1,
                size => usize::try_from(*size).ok()?,
            });
        }
        let len = self.source.len();
        if let Some(open) = shape.iter().position(|size| *size == -1) {
            dims[open] = len.checked_div(dims.iter().product())?;
        }
        (dims.iter().product::<usize>() == len).then(|| Self { dims, source: self.source.clone() })
    }

    fn with_axes(&self, inserts: bool, axes: &[i64]) -> Option<Self> {
        let rank = self.dims.len() + if inserts { axes.len() } else { 0 };
        let signed_rank = i64::try_from(rank).ok()?;
        let place = |axis: &i64| usize::try_from(if *axis < 0 { axis + signed_rank } else { *axis }).ok();
        let axes: Vec<usize> = axes.iter().map(place).collect::<Option<_>>()?;
        let dims = if inserts {
            let mut old = self.dims.iter();
            (0..rank).map(|axis| if axes.contains(&axis) { Some(1) } else { old.next().copied() }).collect()
        } else {
            let kept = self.dims.iter().enumerate().filter(|(axis, _)| !axes.contains(axis));
            kept.map(|(_, size)| Some(*size)).collect::<Option<Vec<usize>>>()
        }?;
        self.reshaped(&dims.iter().map(|size| i64::try_from(*size).unwrap_or(0)).collect::<Vec<_>>())
    }

    /// Strides of each dimension in elements.
    fn strides(&self) -> Vec<usize> {
        let mut strides = vec![1; self.dims.len()];
        for axis in (1..self.dims.len()).rev() {
            strides[axis - 1] = strides[axis] * self.dims[axis];
        }
        strides
    }

    fn transposed(&self, perm: &[usize]) -> Self {
        let strides = self.strides();
        let dims: Vec<usize> = perm.iter().map(|axis| self.dims[*axis]).collect();
        let strides: Vec<usize> = perm.iter().map(|axis| strides[*axis]).collect();
        let mut source = Vec::with_capacity(self.source.len());
        let mut at = vec![0; dims.len()];
        for _ in 0..self.source.len() {
            source.push(self.source[at.iter().zip(&strides).map(|(index, stride)| index * stride).sum::<usize>()]);
            for axis in (0..dims.len()).rev() {
                at[axis] += 1;
                if at[axis] < dims[axis] {
                    break;
                }
                at[axis] = 0;
            }
        }
        Self { dims, source }
    }

    fn sliced(&self, axis: usize, start: usize, size: usize) -> Option<Self> {
        if start + size > self.dims[axis] {
            return None;
        }
        let inner = self.strides()[axis];
        let block = inner * self.dims[axis];
        let parts = self.source.chunks(block.max(1));
        let source = parts.flat_map(|part| &part[start * inner..(start + size) * inner]).copied().collect();
        let mut dims = self.dims.clone();
        dims[axis] = size;
        Some(Self { dims, source })
    }
}

/// The axes of a `Squeeze` or `Unsqueeze`.
fn axes(rewriter: &Rewriter, id: NodeId) -> Option<Vec<i64>> {
    rewriter.indices(rewriter.input(id, 1))
}

/// The way back from a value: the layout nodes that it went through, the last one first.
#[derive(Clone, Debug)]
pub(super) struct Path {
    /// Each with the number of its output that lies on the way.
    pub(super) nodes: Vec<(NodeId, usize)>,
    /// Where the way begins.
    pub(super) source: String,
    /// The product of the factors on the way.
    pub(super) factor: f32,
}

impl Path {
    /// Follows `value` back as far as elements are only moved, or all multiplied by one number.
    pub(super) fn back_from(rewriter: &Rewriter, value: &str) -> Self {
        let mut path = Self { nodes: Vec::new(), source: value.to_owned(), factor: 1.0 };
        while let Some(id) = rewriter.producer(&path.source) {
            if let Some((input, factor)) = scaled(rewriter, id) {
                path.factor *= factor;
                path.source = input;
            } else if is_layout(rewriter, id) {
                let output = rewriter.node(id).output.iter().position(|output| *output == path.source);
                path.nodes.push((id, output.unwrap_or(0)));
                path.source = rewriter.input(id, 0).to_owned();
            } else {
                break;
            }
        }
        path
    }

    /// Where the value's elements lie in the source, which has these dimensions.
    pub(super) fn elements(&self, rewriter: &Rewriter, dims: &[usize]) -> Option<Elements> {
        let steps = self.nodes.iter().rev();
        steps
            .into_iter()
            .try_fold(Elements::all(dims), |elements, (id, output)| elements.through(rewriter, *id, *output))
    }
}

/// True if a node may only move elements; whether it does is found by [`Elements::through`].
pub(super) fn is_layout(rewriter: &Rewriter, id: NodeId) -> bool {
    const LAYOUT: [&str; 9] =
        ["Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Split", "Gather", "Slice"];
    // A `Gather` from a table has its constant first.
    LAYOUT.iter().any(|op| rewriter.is(id, op)) && !rewriter.is_constant(rewriter.input(id, 0))
}

/// The value that a node multiplies by one number or divides by it, and the factor.
pub(super) fn scaled(rewriter: &Rewriter, id: NodeId) -> Option<(String, f32)> {
    let (first, second) = (rewriter.input(id, 0), rewriter.input(id, 1));
    if rewriter.is(id, "Mul") {
        let (value, number) = if rewriter.is_constant(first) { (second, first) } else { (first, second) };
        return Some((value.to_owned(), rewriter.scalar(number)?));
    }
    if rewriter.is(id, "Div") {
        return Some((first.to_owned(), 1.0 / rewriter.scalar(second)?));
    }
    None
}
