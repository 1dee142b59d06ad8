//! Runs neural networks over whole-slide images.

pub mod engine;
pub mod geometry;
pub mod inference;
pub mod native;
pub mod onnx;
pub mod output;
pub mod pipeline;
pub mod report;
pub mod slide;
pub mod stitch;
pub mod tiff;
pub mod tissue;
