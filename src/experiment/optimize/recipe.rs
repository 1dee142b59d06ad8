//! Which passes make which graph: the order that they need, in one place.

use crate::experiment::ExperimentError;
use crate::experiment::probe::Probe;
use crate::onnx::Rewriter;
use crate::onnx::passes::{
    PassReport, attention, batch_norm, clean, conv_transpose, freeze, gelu, layer_norm, layer_scale, skip_layer_norm,
    split_concat,
};

/// What every variant begins with: constants folded, norms and scales gone into weights, nothing left that does nothing.
pub(super) fn clean(rewriter: &mut Rewriter, probe: &Probe<'_>) -> Result<Vec<PassReport>, ExperimentError> {
    Ok(vec![
        freeze::freeze(rewriter, &mut |model, case| probe.evaluate(model, case))?,
        clean::clean(rewriter)?,
        batch_norm::fold_batch_norm(rewriter)?,
        layer_scale::fold_layer_scale(rewriter)?,
    ])
}

/// Up-convolutions as operators that have faster kernels, and 8-bit ones.
pub(super) fn up_convolutions(rewriter: &mut Rewriter) -> Result<Vec<PassReport>, ExperimentError> {
    Ok(vec![conv_transpose::rewrite_conv_transpose(rewriter)?])
}

/// What an INT8 variant is quantised from: up-convolutions in a form that has 8-bit kernels, activations, norms and
/// attentions as one operator each. Biases stay apart, because the 8-bit products take them in.
pub(super) fn for_int8(rewriter: &mut Rewriter, probe: &Probe<'_>) -> Result<Vec<PassReport>, ExperimentError> {
    let mut reports = up_convolutions(rewriter)?;
    reports.push(layer_norm::fuse_layer_norm(rewriter)?);
    reports.push(gelu::fuse_gelu(rewriter)?);
    reports.push(attention::fuse_attention(rewriter, &probe.shapes(rewriter)?)?);
    Ok(reports)
}

/// Transformers as the operators that ONNX Runtime has for them.
pub(super) fn transformer(rewriter: &mut Rewriter, probe: &Probe<'_>) -> Result<Vec<PassReport>, ExperimentError> {
    let mut reports = vec![layer_norm::fuse_layer_norm(rewriter)?, gelu::fuse_gelu(rewriter)?];
    reports.push(attention::fuse_attention(rewriter, &probe.shapes(rewriter)?)?);
    reports.push(gelu::fuse_bias_gelu(rewriter)?);
    reports.push(skip_layer_norm::fuse_skip_layer_norm(rewriter, &probe.shapes(rewriter)?));
    Ok(reports)
}

/// Convolutions over glued channels taken apart: cuDNN then adds bias and rectifier in one kernel.
pub(super) fn split_concats(rewriter: &mut Rewriter) -> Result<Vec<PassReport>, ExperimentError> {
    Ok(vec![split_concat::split_concat(rewriter)?])
}
