//! Runs models on tiles for passes that need to know values: shapes, constants, ranges of activations.

use crate::experiment::ExperimentError;
use crate::experiment::tiles::TileSet;
use crate::inference::{Contract, Evaluator, Layout, ModelCard, image_tensor};
use crate::onnx::passes::EvaluateError;
use crate::onnx::passes::freeze::Case;
use crate::onnx::{Model, Rewriter, Shapes, Tensor, Values};

/// A model's input, and tiles to fill it with.
pub(super) struct Probe<'a> {
    pub(super) card: &'a ModelCard,
    pub(super) contract: &'a Contract,
    pub(super) tiles: &'a TileSet,
}

impl Probe<'_> {
    /// The outputs of a part of the model for a case; `None` if there is no such case.
    pub(super) fn evaluate(&self, model: &Model, case: Case) -> Result<Option<Vec<Tensor>>, EvaluateError> {
        let batch = match case {
            Case::Batch(batch) => batch,
            Case::OtherSide if self.has_open_side(model) => 1,
            Case::OtherSide => return Ok(None),
        };
        let batch = self.contract.fixed_batch.unwrap_or(batch);
        let tiles: Vec<&[u8]> = self.tiles.tiles.iter().map(Vec::as_slice).cycle().take(batch).collect();
        let mut image = image_tensor(self.card, self.contract, &tiles);
        if case == Case::OtherSide {
            image = self.enlarged(&image);
        }
        let inputs = if model.inputs().is_empty() { vec![] } else { vec![(self.contract.input.as_str(), &image)] };
        let run = || Evaluator::open(model)?.run(&inputs);
        match (run(), case) {
            (Ok(outputs), _) => Ok(Some(outputs)),
            // A model that says it takes any side and does not.
            (Err(_), Case::OtherSide) => Ok(None),
            (Err(error), _) => Err(EvaluateError::Run(Box::new(error))),
        }
    }

    /// The dimensions of all values for two tiles, or as many as the model takes.
    pub(super) fn shapes(&self, rewriter: &Rewriter) -> Result<Shapes, ExperimentError> {
        let (question, values) = Shapes::question(rewriter)?;
        let batch = self.contract.fixed_batch.unwrap_or(2);
        let answer = self.evaluate(&question, Case::Batch(batch))?.unwrap_or_default();
        Ok(Shapes::from_answer(values, &answer, batch))
    }

    /// Runs `model` tile by tile and hands out its outputs.
    pub(super) fn each_tile(
        &self,
        model: &Model,
        mut take: impl FnMut(&Tensor, Vec<Tensor>),
    ) -> Result<(), ExperimentError> {
        let failed = |error| EvaluateError::Run(Box::new(error));
        let mut evaluator = Evaluator::open(model).map_err(failed)?;
        for tile in self.tiles.slices() {
            let batch = vec![tile; self.contract.fixed_batch.unwrap_or(1)];
            let image = image_tensor(self.card, self.contract, &batch);
            take(&image, evaluator.run(&[(&self.contract.input, &image)]).map_err(failed)?);
        }
        Ok(())
    }

    fn has_open_side(&self, model: &Model) -> bool {
        let inputs = model.inputs();
        let dims = inputs.first().and_then(|input| input.dims.as_ref());
        // Batch and channels aside.
        dims.is_some_and(|dims| dims.iter().skip(1).filter(|dim| dim.fixed().is_none()).count() >= 2)
    }

    /// The image four times, two by two; as it is if its elements are none that a model takes.
    fn enlarged(&self, image: &Tensor) -> Tensor {
        let side = self.contract.side;
        let (planes, pixel) = match self.contract.layout {
            Layout::Nchw => (image.dims[0] * image.dims[1], 1),
            Layout::Nhwc => (image.dims[0], image.dims[3]),
        };
        let values = match &image.values {
            Values::F32(values) => Values::F32(twice(values, planes, side, pixel)),
            Values::F16(values) => Values::F16(twice(values, planes, side, pixel)),
            Values::U8(values) => Values::U8(twice(values, planes, side, pixel)),
            _ => return image.clone(),
        };
        // Height and width: what follows the batch and, of planes, the channels.
        let first = if planes == image.dims[0] { 1 } else { 2 };
        let is_side = |axis: usize| axis == first || axis == first + 1;
        let dims = image.dims.iter().enumerate().map(|(axis, dim)| if is_side(axis) { 2 * dim } else { *dim });
        Tensor { dims: dims.collect(), values }
    }
}

/// Planes of `side` rows of `side` pixels, each twice as wide and high by repetition.
fn twice<T: Copy>(values: &[T], planes: usize, side: usize, pixel: usize) -> Vec<T> {
    let mut doubled = Vec::with_capacity(values.len() * 4);
    for plane in 0..planes {
        for row in (0..side).chain(0..side) {
            let start = (plane * side + row) * side * pixel;
            doubled.extend_from_slice(&values[start..start + side * pixel]);
            doubled.extend_from_slice(&values[start..start + side * pixel]);
        }
    }
    doubled
}

#[cfg(test)]
mod tests {
    use super::twice;

    #[test]
    fn an_image_is_repeated_to_both_sides() {
        // One plane of two rows of two pixels with one channel, then one row and column of a pixel with two.
        assert_eq!(twice(&[1, 2, 3, 4], 1, 2, 1), [1, 2, 1, 2, 3, 4, 3, 4, 1, 2, 1, 2, 3, 4, 3, 4]);
        assert_eq!(twice(&[7_u8, 8], 1, 1, 2), [7, 8, 7, 8, 7, 8, 7, 8]);
        assert_eq!(twice(&[5.0, 6.0], 2, 1, 1), [5.0, 5.0, 5.0, 5.0, 6.0, 6.0, 6.0, 6.0]);
    }
}
