//! What is built on the engine to learn something: making faster variants of a model, and comparing them.

pub mod agreement;
pub mod bench;
pub mod compare;
mod error;
pub mod optimize;
mod probe;
pub mod race;
mod resources;
pub mod simulate;
pub mod tiles;

pub use self::error::ExperimentError;
