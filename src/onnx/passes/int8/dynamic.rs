//! Dynamic INT8.
use crate::onnx::{RewriteError, Rewriter};
use crate::onnx::passes::PassReport;
/// x
pub fn quantize_dynamic(rewriter: &mut Rewriter) -> Result<PassReport, RewriteError> { let _ = rewriter; Ok(PassReport::new("int8 dynamic")) }
