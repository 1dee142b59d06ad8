//! INT8 for the CPU: ranges of activations, static and dynamic quantisation, and the choice of nodes to leave in float.
//!
//! Activations become unsigned bytes with one scale and zero point each, weights signed bytes with a scale per output
//! channel. The caller runs the model on calibration tiles, with [`observed`] values as extra outputs, and hands in
//! what they gave as [`ActivationRanges`].

mod affine;
mod channels_last;
mod dynamic;
mod plan;
mod product;
mod qdq;
mod ranges;
mod sensitive;

pub use dynamic::{DynamicOptions, quantize_dynamic};
pub use plan::Form;
pub use qdq::{StaticOptions, observed, quantize_static};
pub use ranges::{ActivationRanges, Range, RangeCollector, RangeError, RangeMethod};
pub use sensitive::{Search, SearchError, Sensitivity, quantize_within, sensitivities};
