//! Runs neural networks over whole-slide images.

pub mod geometry;
pub mod output;
pub mod tiff;
