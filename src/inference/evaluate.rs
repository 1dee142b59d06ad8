//! Runs a model on the CPU as it is written, and returns every output: for passes that need to know values, and
//! for proofs that a rewritten model computes what the original does.

use half::{bf16, f16};
use ort::session::builder::GraphOptimizationLevel;
use ort::session::{Session, SessionInputValue};
use ort::value::TensorElementType as Element;
use ort::value::{DynValue, PrimitiveTensorElementType, Tensor as OrtTensor, ValueType};

use crate::native;
use crate::onnx::{Model, Tensor, Values};

/// A model that is run as it is written, without any optimisation of ONNX Runtime's.
pub struct Evaluator {
    session: Session,
    /// The outputs, in the order of the graph.
    outputs: Vec<String>,
}

impl Evaluator {
    /// Opens `model`.
    ///
    /// # Errors
    /// ONNX Runtime's reason not to.
    pub fn open(model: &Model) -> Result<Self, ort::Error> {
        let environment = native::onnx_environment().map_err(ort::Error::wrap)?;
        let builder = Session::builder(environment)?.with_optimization_level(GraphOptimizationLevel::Disable)?;
        let mut builder = builder.with_intra_op_spinning(false)?;
        // Through a file, because beyond 2 GiB a model can't be handed over in memory.
        let folder = tempfile::tempdir().map_err(ort::Error::wrap)?;
        let file = folder.path().join("model.onnx");
        model.clone().save_with_weights(&file).map_err(ort::Error::wrap)?;
        let session = builder.commit_from_file(&file)?;
        let outputs = session.outputs().iter().map(|output| output.name().to_owned()).collect();
        Ok(Self { session, outputs })
    }

    /// Runs the model with the named inputs; the outputs come in the order of the graph.
    ///
    /// # Errors
    /// ONNX Runtime's, also if an output is of a type that [`Values`] does not have.
    pub fn run(&mut self, inputs: &[(&str, &Tensor)]) -> Result<Vec<Tensor>, ort::Error> {
        let inputs = inputs.iter().map(|(name, tensor)| Ok((*name, input(tensor)?)));
        let inputs = inputs.collect::<Result<Vec<(&str, SessionInputValue<'_>)>, ort::Error>>()?;
        let outputs = self.session.run(inputs)?;
        self.outputs.iter().map(|name| output(&outputs[name.as_str()], name)).collect()
    }
}

/// Runs `model` once; see [`Evaluator`].
///
/// # Errors
/// ONNX Runtime's.
pub fn evaluate(model: &Model, inputs: &[(&str, Tensor)]) -> Result<Vec<Tensor>, ort::Error> {
    let inputs: Vec<(&str, &Tensor)> = inputs.iter().map(|(name, tensor)| (*name, tensor)).collect();
    Evaluator::open(model)?.run(&inputs)
}

fn input(tensor: &Tensor) -> Result<SessionInputValue<'static>, ort::Error> {
    fn of<T: PrimitiveTensorElementType + std::fmt::Debug + Clone + 'static>(
        dims: &[usize],
        values: &[T],
    ) -> Result<SessionInputValue<'static>, ort::Error> {
        Ok(OrtTensor::from_array((dims.to_vec(), values.to_vec()))?.into_dyn().into())
    }
    let dims = &tensor.dims;
    match &tensor.values {
        Values::F32(values) => of(dims, values),
        Values::F64(values) => of(dims, values),
        Values::F16(values) => of(dims, values),
        Values::Bf16(values) => of(dims, values),
        Values::I64(values) => of(dims, values),
        Values::I32(values) => of(dims, values),
        Values::I8(values) => of(dims, values),
        Values::U8(values) => of(dims, values),
        Values::Bool(values) => of(dims, values),
    }
}

fn output(value: &DynValue, name: &str) -> Result<Tensor, ort::Error> {
    fn of<T: PrimitiveTensorElementType + Clone>(value: &DynValue) -> Result<(Vec<usize>, Vec<T>), ort::Error> {
        let (shape, values) = value.try_extract_tensor::<T>()?;
        Ok((shape.iter().map(|dim| usize::try_from(*dim).unwrap_or(0)).collect(), values.to_vec()))
    }
    macro_rules! read {
        ($variant:ident, $type:ty) => {{
            let (dims, values) = of::<$type>(value)?;
            Ok(Tensor { dims, values: Values::$variant(values) })
        }};
    }
    match value.dtype() {
        ValueType::Tensor { ty: Element::Float32, .. } => read!(F32, f32),
        ValueType::Tensor { ty: Element::Float64, .. } => read!(F64, f64),
        ValueType::Tensor { ty: Element::Float16, .. } => read!(F16, f16),
        ValueType::Tensor { ty: Element::Bfloat16, .. } => read!(Bf16, bf16),
        ValueType::Tensor { ty: Element::Int64, .. } => read!(I64, i64),
        ValueType::Tensor { ty: Element::Int32, .. } => read!(I32, i32),
        ValueType::Tensor { ty: Element::Int8, .. } => read!(I8, i8),
        ValueType::Tensor { ty: Element::Uint8, .. } => read!(U8, u8),
        ValueType::Tensor { ty: Element::Bool, .. } => read!(Bool, bool),
        other => Err(ort::Error::new(format!("output {name} is {other}, which no pass computes with"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::onnx::ElementType;
    use crate::onnx::build::Graph;

    #[test]
    fn outputs_come_in_the_graphs_order_with_type_and_shape() {
        let mut graph = Graph::new("two");
        let x = graph.input("x", ElementType::F32, &["n".into(), 3.into()]);
        let double = graph.node("Add", &[&x, &x], &[]);
        let shape = graph.node("Shape", &[&x], &[]);
        graph.output("shape", &shape, ElementType::I64, &[2.into()]);
        graph.output("double", &double, ElementType::F32, &["n".into(), 3.into()]);
        let outputs = evaluate(&graph.finish(), &[("x", Tensor::f32(&[1, 3], vec![1.0, 2.0, -3.0]))]).unwrap();
        assert_eq!(outputs[0], Tensor::indices(&[1, 3]));
        assert_eq!(outputs[1], Tensor::f32(&[1, 3], vec![2.0, 4.0, -6.0]));
    }
}
