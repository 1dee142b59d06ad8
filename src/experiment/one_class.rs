//! A model of one class against labels: they tell apart that class and, after it, what is not it.
//!
//! What a model says of its only class, p, is then two probabilities: p and 1 − p. From one half on the class has it.

use ndarray::{Array2, Array4};

use crate::inference::{Activation, Class, ModelCard, Prediction, Session, SessionError};

/// Index of what is not the only class.
pub(super) const NOT: usize = 1;

/// Colour of what is not the only class; it is the background of a map, so only a legend shows it.
const GREY: [u8; 3] = [160; 3];

/// Whether a model has just one class.
pub(super) fn is_alone(card: &ModelCard) -> bool {
    card.classes.len() == 1
}

/// The card with the classes that labels tell apart: the model's own, and of a model with one class what is not it too.
pub(super) fn told_apart(card: &ModelCard) -> ModelCard {
    let mut card = card.clone();
    if let [only] = card.classes.as_slice() {
        let not = Class { name: format!("not {}", only.name), color: GREY };
        card.classes.push(not);
        card.background = Some(NOT);
        if card.activation == Activation::Sigmoid {
            // A sigmoid and what it leaves to 1 are a softmax over its logit and 0: they exclude each other.
            card.activation = Activation::Softmax;
        }
    }
    card
}

/// What a reader of figures should know of a model with one class.
pub(super) fn note(card: &ModelCard) -> Option<String> {
    let [only] = card.classes.as_slice() else { return None };
    Some(format!("The model has one class: from a probability of 0.5 on it says {0}, below not {0}.", only.name))
}

/// A session that gives what is not a model's only class its probability too; of several classes it changes nothing.
pub(super) struct BothSides<'a>(pub(super) &'a mut dyn Session);

impl Session for BothSides<'_> {
    fn predict(&mut self, tiles: &[&[u8]]) -> Result<Prediction, SessionError> {
        Ok(match self.0.predict(tiles)? {
            Prediction::Classes(scores) if scores.ncols() == 1 => {
                let rows = scores.nrows();
                Prediction::Classes(Array2::from_shape_fn((rows, 2), |(tile, side)| of_side(scores[[tile, 0]], side)))
            }
            Prediction::Map(map) if map.dim().1 == 1 => {
                let (tiles, _, height, width) = map.dim();
                Prediction::Map(Array4::from_shape_fn((tiles, 2, height, width), |(tile, side, row, column)| {
                    of_side(map[[tile, 0, row, column]], side)
                }))
            }
            other => other,
        })
    }
}

fn of_side(probability: f32, side: usize) -> f32 {
    if side == NOT { 1.0 - probability } else { probability }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inference::{BareModel, FakeSession, Task};
    use ndarray::array;
    use std::path::Path;

    /// Says the same of every batch.
    struct Always(Prediction);

    impl Session for Always {
        fn predict(&mut self, _: &[&[u8]]) -> Result<Prediction, SessionError> {
            Ok(self.0.clone())
        }
    }

    fn both_sides(prediction: Prediction) -> Prediction {
        BothSides(&mut Always(prediction)).predict(&[]).unwrap()
    }

    #[test]
    fn the_only_class_gets_its_opposite() {
        let Prediction::Classes(scores) = both_sides(Prediction::Classes(array![[0.25], [f32::NAN]])) else { panic!() };
        assert_eq!(scores.row(0).to_vec(), [0.25, 0.75]);
        assert!(scores.row(1).iter().all(|score| score.is_nan()));
        let Prediction::Map(map) = both_sides(Prediction::Map(array![[[[0.0, 0.5]]], [[[1.0, 0.75]]]])) else {
            panic!()
        };
        assert_eq!(map, array![[[[0.0, 0.5]], [[1.0, 0.5]]], [[[1.0, 0.75]], [[0.0, 0.25]]]]);
        let three = FakeSession::new(Task::Classification, 1).predict(&[&[1, 2, 3]]).unwrap();
        assert_eq!(both_sides(three.clone()), three);
    }

    #[test]
    fn cards_of_several_classes_stay_as_they_are() {
        let several = ModelCard::load(Path::new("models/cells-unet"), &BareModel::default()).unwrap();
        assert_eq!((told_apart(&several), note(&several)), (several.clone(), None));
        let only = Class { name: "tumour".to_owned(), color: [1; 3] };
        let one = ModelCard { classes: vec![only], activation: Activation::Sigmoid, background: None, ..several };
        let told = told_apart(&one);
        assert_eq!((told.classes[0].clone(), told.classes[NOT].name.as_str()), (one.classes[0].clone(), "not tumour"));
        assert!(told.is_exclusive() && told.background == Some(NOT) && is_alone(&one) && !is_alone(&told));
        let bare = told_apart(&ModelCard { activation: Activation::None, ..one });
        assert!(bare.is_exclusive() && bare.activation == Activation::None);
    }
}
