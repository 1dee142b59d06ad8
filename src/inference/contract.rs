//! What a model's graph takes and gives, held against its card.

use std::path::Path;

use super::card::{ModelCard, Task};
use super::error::ModelError;
use crate::onnx::{Dim, ElementType, Model, Value};

/// The order of an input's dimensions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// `[n, 3, h, w]`.
    Nchw,
    /// `[n, h, w, 3]`.
    Nhwc,
}

/// How a model is fed and read: the part of its graph that its card agrees with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Contract {
    /// The input's name.
    pub input: String,
    /// The order of its dimensions.
    pub layout: Layout,
    /// f32, f16, or u8. A model that takes bytes is given RGB 0 to 255 as it is and normalises by itself.
    pub element: ElementType,
    /// Side of the image that the model sees, in pixels.
    pub side: usize,
    /// The batch size that is fixed in the graph; `None` if any will do.
    pub fixed_batch: Option<usize>,
    /// The name of the output that is read.
    pub output: String,
}

impl ModelCard {
    /// Holds the card against the model in `file`.
    ///
    /// Of several outputs, the first that has the task's rank is read: `[n, c]` (or `[n]` for one class) for
    /// classification; `[n, c, h, w]` (or `[n, h, w]` for one class) for segmentation; `[n, d]` for features, and
    /// `[n, t, d]` where the card has `pool`. Sizes that the graph leaves open are checked when it runs.
    ///
    /// # Errors
    /// [`ModelError::Contradiction`] with the card's key, or [`ModelError::Graph`].
    pub fn check(&self, model: &Model, file: &Path) -> Result<Contract, ModelError> {
        let graph = |problem: String| ModelError::Graph { path: file.to_owned(), problem };
        let inputs = model.inputs();
        let [input] = &inputs[..] else {
            return Err(graph(format!("has {} inputs, but one image is what it can be given", inputs.len())));
        };
        let (layout, dims) = layout_of(input).ok_or_else(|| {
            graph(format!("input {input} is no batch of RGB images: [n, 3, h, w] or [n, h, w, 3] is needed"))
        })?;
        if !matches!(input.element, ElementType::F32 | ElementType::F16 | ElementType::U8) {
            return Err(graph(format!("input {input} is neither float, float16 nor uint8")));
        }
        let sides = match layout {
            Layout::Nchw => &dims[2..],
            Layout::Nhwc => &dims[1..3],
        };
        let side = self.input_side() as usize;
        if sides.iter().filter_map(Dim::fixed).any(|fixed| fixed != side) {
            let key = if self.resize.is_some() { "resize" } else { "tile_size" };
            return Err(self.contradicts(key, format!("the card says {side}, input {input}")));
        }
        let output = self.output_of(&model.outputs())?;
        Ok(Contract {
            input: input.name.clone(),
            layout,
            element: input.element,
            side,
            fixed_batch: dims[0].fixed().filter(|&batch| batch > 0),
            output,
        })
    }

    fn output_of(&self, outputs: &[Value]) -> Result<String, ModelError> {
        let all = || outputs.iter().map(Value::to_string).collect::<Vec<_>>().join("; ");
        let Some(output) = outputs.iter().find(|output| self.fits_rank(output)) else {
            if self.task == Task::Features && outputs.iter().any(|output| rank(output) == Some(3)) {
                return Err(self.contradicts("pool", format!("is not set, but outputs are tokens: {}", all())));
            }
            let key = if self.pool.is_some() { "pool" } else { "task" };
            let says = self.pool.map_or(self.task.to_string(), |pool| pool.to_string());
            return Err(self.contradicts(key, format!("the card says {says}, outputs are {}", all())));
        };
        if !matches!(output.element, ElementType::F32 | ElementType::F16) {
            return Err(self.contradicts("task", format!("scores are float or float16, output {output}")));
        }
        let dims = output.dims.as_deref().unwrap_or(&[]);
        if let (Task::Classification | Task::Segmentation, Some(channels)) = (self.task, self.channels(dims))
            && channels != self.classes.len()
        {
            return Err(self.contradicts("classes", format!("the card names {}, output {output}", self.classes.len())));
        }
        let is_map = self.task == Task::Segmentation;
        let sides = if is_map { &dims[dims.len().saturating_sub(2)..] } else { &[] };
        if sides.iter().filter_map(Dim::fixed).any(|side| side != self.tile_size as usize) {
            return Err(self.contradicts("tile_size", format!("the card says {}, output {output}", self.tile_size)));
        }
        Ok(output.name.clone())
    }

    fn fits_rank(&self, output: &Value) -> bool {
        match (self.task, rank(output)) {
            (_, None) => true,
            (Task::Classification, Some(rank)) => rank == 2 || (rank == 1 && self.classes.len() == 1),
            (Task::Segmentation, Some(rank)) => rank == 4 || (rank == 3 && self.classes.len() == 1),
            (Task::Features, Some(rank)) => rank == if self.pool.is_some() { 3 } else { 2 },
        }
    }

    /// How many scores the output has per tile or pixel; `None` if its graph leaves that open.
    fn channels(&self, dims: &[Dim]) -> Option<usize> {
        match (self.task, dims.len()) {
            (Task::Classification, 1) | (Task::Segmentation, 3) => Some(1),
            _ => dims.get(1)?.fixed(),
        }
    }

    fn contradicts(&self, key: &'static str, problem: String) -> ModelError {
        ModelError::Contradiction { path: self.path.clone(), key, problem }
    }
}

fn rank(value: &Value) -> Option<usize> {
    value.dims.as_ref().map(Vec::len)
}

/// The layout of an image input, if it is one; channels that the graph leaves open are taken to be NCHW, as ONNX
/// itself has them.
pub(super) fn layout_of(input: &Value) -> Option<(Layout, &[Dim])> {
    let dims = input.dims.as_deref().filter(|dims| dims.len() == 4)?;
    match (dims[1].fixed(), dims[3].fixed()) {
        (Some(3), _) => Some((Layout::Nchw, dims)),
        (_, Some(3)) => Some((Layout::Nhwc, dims)),
        (None, _) => Some((Layout::Nchw, dims)),
        (Some(_), _) => None,
    }
}
