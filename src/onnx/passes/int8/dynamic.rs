//! Dynamic INT8: products with constant weights whose activations are scaled anew in every run, over the whole batch.

use std::collections::{BTreeSet, HashMap};

use super::affine::Magnitude;
use super::plan::weighted;
use super::product::{Bytes, multiply};
use crate::onnx::passes::PassReport;
use crate::onnx::{RewriteError, Rewriter};

/// How to quantise without measured ranges.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DynamicOptions {
    /// Leave weights 7 bits, for x86 CPUs without VNNI, whose sums of two products would else saturate.
    pub reduce_range: bool,
    /// Names of nodes to leave in float, as [`Finding`](crate::onnx::passes::Finding) has them.
    pub exclude: BTreeSet<String>,
}

/// Turns products with constant weights, such as a transformer's, to INT8. Needs no calibration, but a tile's result
/// then depends a little on the tiles beside it in the batch.
///
/// # Errors
/// None of its own.
pub fn quantize_dynamic(rewriter: &mut Rewriter, options: &DynamicOptions) -> Result<PassReport, RewriteError> {
    let mut report = PassReport::new("int8 dynamic");
    let magnitude = Magnitude::of(options.reduce_range);
    let mut scaled: HashMap<String, Bytes> = HashMap::new();
    for id in rewriter.ids().collect::<Vec<_>>() {
        let why = match weighted(rewriter, id) {
            None => continue,
            _ if rewriter.is(id, "Conv") => "dynamic INT8 makes convolutions about 5 times slower".to_owned(),
            _ if options.exclude.contains(&rewriter.label(id)) => "left in float on request".to_owned(),
            Some(Err(why)) => why,
            Some(Ok(())) => {
                let x = rewriter.input(id, 0).to_owned();
                let bytes = scaled.entry(x.clone()).or_insert_with(|| quantize(rewriter, &x)).clone();
                let noted = report.findings.len();
                report.apply(rewriter, id, "INT8, scaled in every run");
                match multiply(rewriter, id, &bytes, magnitude) {
                    Ok(()) => continue,
                    Err(why) => {
                        report.findings.truncate(noted);
                        why
                    }
                }
            }
        };
        report.keep(rewriter, id, why);
    }
    Ok(report)
}

/// Adds the node that finds a value's scale and makes bytes of it, once for all who read it.
fn quantize(rewriter: &mut Rewriter, value: &str) -> Bytes {
    let mut name = |part: &str| rewriter.fresh(&format!("{value}/{part}"));
    let bytes = Bytes { values: name("bytes"), scale: name("scale"), zero_point: name("zero_point") };
    let outputs = [bytes.values.as_str(), &bytes.scale, &bytes.zero_point];
    let node = rewriter.new_node("", "DynamicQuantizeLinear", &[value], &outputs);
    rewriter.insert(node);
    bytes
}
