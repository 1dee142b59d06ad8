//! Finds the INT8 variant of a model: calibrates on tiles, tries what suits its operators, and holds each to the gate.

use super::trial::Trial;
use super::{Candidate, Graphs, Target, recipe};
use crate::experiment::ExperimentError;
use crate::experiment::probe::Probe;
use crate::inference::Provider;
use crate::onnx::passes::int8::{
    ActivationRanges, DynamicOptions, Form, RangeCollector, RangeMethod, Search, StaticOptions, observed,
    quantize_dynamic, quantize_within,
};
use crate::onnx::{Model, Rewriter};

/// How ranges are chosen, in the order in which they are tried.
const METHODS: [(RangeMethod, &str); 3] =
    [(RangeMethod::MinMax, "min-max"), (RangeMethod::Percentile(0.9999), "99.99 %"), (RangeMethod::Entropy, "entropy")];

/// The candidates: static with the method of least error, and for models whose work is matrix products dynamic too.
pub(super) fn candidates(
    graphs: &Graphs<'_>,
    trial: &Trial<'_>,
    say: &mut dyn FnMut(&str),
) -> Result<Vec<Candidate>, ExperimentError> {
    let request = graphs.request;
    let tiles = request.calibration.as_ref().ok_or(ExperimentError::NoCalibration)?;
    let probe = Probe { tiles, ..*graphs.probe };
    let is_plain = request.target == Target::OpenVino;
    let mut rewriter = graphs.clean.clone();
    let passes = if is_plain { Vec::new() } else { recipe::for_int8(&mut rewriter, &probe)? };
    let form = if is_plain { Form::Plain } else { Form::Kernels };
    let collected = calibrate(&rewriter, &probe)?;
    let options = StaticOptions { reduce_range: request.reduce_range, form, ..StaticOptions::default() };
    let gate = 1.0 - request.min_cosine;
    let error = |model: &Model| Ok(1.0 - trial.agreement_of(model)?.mean_cosine());

    let mut best: Option<(Search, &str)> = None;
    for (method, name) in METHODS {
        say(&format!("quantising with {name} ranges"));
        let ranges: ActivationRanges = collected.ranges(method);
        match quantize_within::<ExperimentError>(&rewriter, &ranges, &options, gate, error) {
            // Fewer nodes left in float first, then the smaller error.
            Ok(found) => {
                let kept = |search: &crate::onnx::passes::int8::Search| search.report.applied();
                let is_better =
                    best.as_ref().is_none_or(|(best, _)| (kept(&found), -found.error) > (kept(best), -best.error));
                if is_better {
                    best = Some((found, name));
                }
            }
            Err(error) => say(&format!("no INT8 with {name} ranges: {error}")),
        }
    }
    let mut made = Vec::new();
    if let Some((found, name)) = best.filter(|(found, _)| found.report.applied() > 0) {
        let note = format!("static INT8 with {name} ranges of {}{}", tiles.source, needs(request.reduce_range));
        let passes = passes.iter().cloned().chain([found.report]).collect();
        let name = if is_plain { "int8-openvino" } else { "int8" };
        let candidate = graphs.candidate(name, Rewriter::new(found.model)?, passes, &note)?;
        let provider = if is_plain { Provider::OpenVino } else { Provider::Cpu };
        made.push(Candidate { provider, ..candidate });
    }
    if !is_plain && is_mostly_products(&graphs.clean) {
        let options = DynamicOptions { reduce_range: request.reduce_range, ..DynamicOptions::default() };
        let report = quantize_dynamic(&mut rewriter, &options)?;
        let note = format!("dynamic INT8{}", needs(request.reduce_range));
        let is_quantized = report.applied() > 0;
        let passes = passes.into_iter().chain([report]).collect();
        if is_quantized {
            made.push(graphs.candidate("int8", rewriter, passes, &note)?);
        }
    }
    if made.is_empty() { Err(ExperimentError::NothingToQuantize) } else { Ok(made) }
}

/// Runs the model on the calibration tiles and collects what its values are.
fn calibrate(rewriter: &Rewriter, probe: &Probe<'_>) -> Result<RangeCollector, ExperimentError> {
    let values = observed(rewriter);
    let model = rewriter.clone().finish()?.with_outputs(&values);
    let names: Vec<String> = model.outputs().into_iter().map(|output| output.name).collect();
    let mut collector = RangeCollector::default();
    // The input is no output of a node, but what it holds is quantised too.
    let input = probe.contract.input.clone();
    let wants_input = values.contains(&input);
    probe.each_tile(&model, |image, outputs| {
        for (name, tensor) in names.iter().zip(&outputs).filter(|(name, _)| values.contains(name)) {
            collector.observe(name, tensor);
        }
        if wants_input {
            collector.observe(&input, image);
        }
    })?;
    Ok(collector)
}

fn is_mostly_products(rewriter: &Rewriter) -> bool {
    let count = |op: &str| rewriter.ids_of(op).len();
    count("MatMul") + count("Gemm") > count("Conv")
}

fn needs(reduce_range: bool) -> &'static str {
    if reduce_range { "; 7-bit weights, for any CPU" } else { "; needs a CPU with VNNI (AVX2 alone may saturate)" }
}
