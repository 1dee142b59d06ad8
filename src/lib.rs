//! Runs neural networks over whole-slide images as fast as the hardware allows, and tells exactly what was done.
//!
//! ```text
//! plan ─▶ read ─▶ batch ─▶ infer ─▶ stitch ─▶ write
//! ```
//!
//! The stages of a run are joined by bounded channels, so that a slow one holds back the others. [`engine::plan`]
//! decides which tiles of a slide are inferred, [`engine::Engine`] holds a loaded model, and [`engine::cohort::run`]
//! takes it over any number of slides. The parts can be used alone: [`slide::TileReader`] reads tiles,
//! [`inference::SessionFactory`] runs models, [`stitch::Stitcher`] blends maps, [`output`] writes what other tools read.
//!
//! Both native libraries, ONNX Runtime and OpenSlide, are found at run time: see [`native`].

pub mod engine;
pub mod experiment;
pub mod geometry;
pub mod inference;
pub mod measure;
pub mod native;
pub mod onnx;
pub mod output;
pub mod pipeline;
pub mod report;
pub mod slide;
pub mod stitch;
pub mod tiff;
pub mod tissue;
