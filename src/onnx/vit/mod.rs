//! Vision transformers by description: parameters, cost and, with random weights, the model itself.

mod config;
mod graph;

pub use config::{Pool, VitConfig, VitError};
pub use graph::build;
