//! Runs neural networks over whole-slide images.

pub mod geometry;
pub mod native;
pub mod slide;
pub mod tiff;
pub mod tissue;
