//! What is built on the engine to learn something: making faster variants of a model, comparing them, holding a model
//! against labels, and predicting images that are no slides.

pub mod agreement;
pub mod bench;
pub mod compare;
mod error;
pub mod evaluate;
mod images;
mod labels;
mod one_class;
pub mod optimize;
mod pace;
pub mod predict;
mod probe;
pub mod race;
mod resources;
mod results;
pub mod simulate;
pub mod tiles;

pub use self::error::ExperimentError;
