//! How fast a device multiplies matrices: the rate that no model on it exceeds.

use std::time::{Duration, Instant};

use half::f16;
use ort::session::Session;
use ort::value::Tensor;

use super::device::{self, Device, Provider};
use super::error::SessionError;
use crate::native;
use crate::onnx::build::Graph;
use crate::onnx::{ElementType, Values};

/// Products in a row, so that what comes before and after them does not count.
const PRODUCTS: usize = 8;
/// How long is measured at most.
const MOST_TIME: Duration = Duration::from_secs(3);
/// Runs that are measured at least.
const LEAST_RUNS: usize = 5;

/// Floating-point operations per second of products of square matrices, 1 multiply-add being 2: the fastest of some
/// runs, on all cores of a CPU. The matrices have 8,192 rows on a GPU and 1,024 on a CPU.
///
/// # Errors
/// [`SessionError::Ceiling`]; an element other than `F32` and `F16` is one.
pub fn matmul_flops_per_sec(device: Device, provider: Provider, element: ElementType) -> Result<f64, SessionError> {
    measured(device, provider, element).map_err(|source| SessionError::Ceiling { provider, source })
}

fn measured(device: Device, provider: Provider, element: ElementType) -> Result<f64, ort::Error> {
    let rows = if device == Device::Cpu { 1024 } else { 8192 };
    let environment = native::onnx_environment().map_err(ort::Error::wrap)?;
    let mut builder =
        Session::builder(environment)?.with_execution_providers([device::dispatch(provider, device, &[])])?;
    let mut session = builder.commit_from_memory(&products(rows, element)?.to_bytes())?;
    let (mut fastest, mut runs) = (f64::INFINITY, 0);
    let begin = Instant::now();
    while runs < LEAST_RUNS || begin.elapsed() < MOST_TIME && runs < 20 * LEAST_RUNS {
        // Another factor each time: nothing can be kept from the run before.
        #[expect(clippy::cast_precision_loss, reason = "a small number")]
        let factor = Tensor::from_array(([1_usize], vec![1.0 + runs as f32 / 1024.0]))?;
        let start = Instant::now();
        let outputs = session.run(ort::inputs![factor])?;
        // Reading the result waits for it.
        outputs[0].try_extract_tensor::<f32>()?;
        // The first run also chooses kernels.
        if runs > 0 {
            fastest = fastest.min(start.elapsed().as_secs_f64());
        }
        runs += 1;
    }
    Ok(2.0 * (rows as f64).powi(3) * PRODUCTS as f64 / fastest)
}

/// The largest element of `W·f·W·…·W`.
fn products(rows: usize, element: ElementType) -> Result<crate::onnx::Model, ort::Error> {
    let mut graph = Graph::new("products");
    let factor = graph.input("factor", ElementType::F32, &[1.into()]);
    let factor = graph.node("Cast", &[&factor], &[("to", i64::from(element.number()).into())]);
    // Uniform with a variance of 1 / rows: products keep their size.
    let half_width = (3.0 / rows as f64).sqrt();
    let mut state = 1_u32;
    let mut next = || {
        // The constants of Numerical Recipes; the low bits are poor.
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        #[expect(clippy::cast_possible_truncation, reason = "a small weight")]
        let weight = (half_width * (f64::from(state >> 8) / f64::from(1 << 23) - 1.0)) as f32;
        weight
    };
    let floats: Vec<f32> = (0..rows * rows).map(|_| next()).collect();
    let values = match element {
        ElementType::F32 => Values::F32(floats),
        ElementType::F16 => Values::F16(floats.into_iter().map(f16::from_f32).collect()),
        other => return Err(ort::Error::new(format!("no products of {other} are measured"))),
    };
    let weights = graph.constant("w", &crate::onnx::Tensor { dims: vec![rows, rows], values });
    let mut product = graph.node("Mul", &[&weights, &factor], &[]);
    for _ in 0..PRODUCTS {
        product = graph.node("MatMul", &[&product, &weights], &[]);
    }
    let largest = graph.node("ReduceMax", &[&product], &[("keepdims", 0.into())]);
    let largest = graph.node("Cast", &[&largest], &[("to", i64::from(ElementType::F32.number()).into())]);
    graph.output("largest", &largest, ElementType::F32, &[]);
    Ok(graph.finish())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_keep_their_size() {
        for element in [ElementType::F32, ElementType::F16] {
            let model = products(64, element).unwrap();
            let factor = crate::onnx::Tensor::f32(&[1], vec![1.0]);
            let largest = crate::inference::evaluate(&model, &[("factor", factor)]).unwrap();
            let largest = largest[0].to_f32().unwrap()[0];
            assert!((0.01..100.0).contains(&largest), "{element}: {largest}");
        }
        assert!(products(4, ElementType::I64).is_err());
    }
}
