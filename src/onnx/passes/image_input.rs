//! Lets a model take pixels as images store them: bytes with the channels last, instead of normalised floats.
//!
//! A quarter of the bytes then goes to the device, and no one normalises on the CPU.

use super::{Finding, Outcome, PassReport};
use crate::onnx::build::{ints, value_info};
use crate::onnx::{Dim, ElementType, NodeId, RewriteError, Rewriter, Tensor, Value};

/// The value of a full channel in bytes; normalisation is of values from 0 to 1.
const WHITE: f64 = 255.0;
/// Red, green, blue.
const CHANNELS: usize = 3;

/// What the model expects of its input: `(rgb / 255 - mean) / std`, per channel.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Normalization {
    /// Subtracted first; of red, green, blue.
    pub mean: [f32; CHANNELS],
    /// Divided by then; of red, green, blue.
    pub std: [f32; CHANNELS],
}

impl Normalization {
    /// Factor and subtrahend: `rgb * scale - shift` is the same.
    fn affine(&self) -> [(f64, f64); CHANNELS] {
        std::array::from_fn(|channel| {
            let (mean, std) = (f64::from(self.mean[channel]), f64::from(self.std[channel]));
            (1.0 / (WHITE * std), mean / std)
        })
    }
}

/// A model whose input can't be made to take pixels.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageInputError {
    /// The model has no input of that name.
    #[error("the model has no input {input:?}")]
    Missing {
        /// The name.
        input: String,
    },
    /// The input is of another type or shape.
    #[error("input {found} is no image: float [n, 3, height, width] is")]
    NotAnImage {
        /// The input as the model declares it.
        found: Value,
    },
    /// The input is read where it can't be replaced.
    #[error("input {input:?} is an output too, or read by the body of a node")]
    Bound {
        /// The name.
        input: String,
    },
    /// A mean or standard deviation that is no use.
    #[error("normalisation {normalization:?} divides by zero or is not finite")]
    Normalization {
        /// The values.
        normalization: Normalization,
    },
    /// The graph can't be rewritten.
    #[error(transparent)]
    Rewrite(#[from] RewriteError),
}

/// Makes the input `[n, 3, h, w]` one of bytes `[n, h, w, 3]` of the same name, normalised inside the graph.
///
/// If only a `Conv` without padding reads it, its weights take the normalisation over. With padding they can't: the
/// model was trained with a border of zeros *after* normalisation, which is a border of the mean colour before.
///
/// # Errors
/// [`ImageInputError`] if the input is no such image.
pub fn take_pixels(
    rewriter: &mut Rewriter,
    input: &str,
    normalization: &Normalization,
) -> Result<PassReport, ImageInputError> {
    let mut report = PassReport::new("take pixels");
    let mut note = |outcome| {
        report.findings.push(Finding { node: input.to_owned(), op: "input".to_owned(), outcome });
    };
    let Some(dims) = image_dims(rewriter, input)? else {
        note(Outcome::Kept("it takes pixels already".to_owned()));
        return Ok(report);
    };
    let affine = normalization.affine();
    if affine.iter().any(|(scale, shift)| !scale.is_finite() || !shift.is_finite()) {
        return Err(ImageInputError::Normalization { normalization: *normalization });
    }
    let folded = fold(rewriter, input, &affine);
    let separate = folded.is_err();
    note(Outcome::Applied(match folded {
        Ok(layer) => format!("takes bytes with channels last; the weights of {layer} normalise"),
        Err(why) => format!("takes bytes with channels last; a Mul and a Sub normalise, because {why}"),
    }));
    let [batch, channels, height, width] = dims;
    let info = value_info(input, ElementType::U8, &[batch, height, width, channels]);
    let graph = rewriter.frame().graph.get_or_insert_default();
    graph.input.iter_mut().filter(|declared| declared.name() == input).for_each(|declared| *declared = info.clone());
    let planes = rewriter.fresh(&format!("{input}_nchw"));
    rewriter.redirect(input, &planes);
    let mut pixels = insert(rewriter, "Cast", &[input], &format!("{input}_float"));
    let cast = rewriter.producer(&pixels);
    if let Some(cast) = cast {
        rewriter.set_attribute(cast, "to", i64::from(ElementType::F32.number()));
    }
    if separate {
        let [scale, shift] = [narrow(affine.iter().map(|pair| pair.0)), narrow(affine.iter().map(|pair| pair.1))];
        let scale = rewriter.add_constant(&format!("{input}_scale"), &scale);
        let shift = rewriter.add_constant(&format!("{input}_shift"), &shift);
        pixels = insert(rewriter, "Mul", &[&pixels, &scale], &format!("{input}_scaled"));
        pixels = insert(rewriter, "Sub", &[&pixels, &shift], &format!("{input}_normalized"));
    }
    let mut transpose = rewriter.new_node("", "Transpose", &[&pixels], &[&planes]);
    transpose.attribute.push(ints(&[0, 3, 1, 2]).named("perm"));
    rewriter.insert(transpose);
    Ok(report)
}

/// The input's dimensions `[n, 3, h, w]`; `None` if it takes pixels already.
fn image_dims(rewriter: &Rewriter, input: &str) -> Result<Option<[Dim; 4]>, ImageInputError> {
    let missing = || ImageInputError::Missing { input: input.to_owned() };
    let found = rewriter.declared(input).filter(|_| rewriter.producer(input).is_none()).ok_or_else(missing)?;
    let dims: Option<[Dim; 4]> = found.dims.clone().and_then(|dims| dims.try_into().ok());
    match dims {
        Some(dims) if found.element == ElementType::F32 && dims[1] == Dim::Fixed(CHANNELS) => {
            if rewriter.is_output(input) || rewriter.control_flow().is_some() {
                return Err(ImageInputError::Bound { input: input.to_owned() });
            }
            Ok(Some(dims))
        }
        Some(dims) if found.element == ElementType::U8 && dims[3] == Dim::Fixed(CHANNELS) => Ok(None),
        _ => Err(ImageInputError::NotAnImage { found }),
    }
}

/// Adds a node with one output; returns that output's name.
fn insert(rewriter: &mut Rewriter, op: &str, inputs: &[&str], hint: &str) -> String {
    let output = rewriter.fresh(hint);
    let node = rewriter.new_node("", op, inputs, &[&output]);
    rewriter.insert(node);
    output
}

/// Makes the weights of the only layer that reads the input take the normalisation over; returns what the layer is
/// called, or why there is none.
fn fold(rewriter: &mut Rewriter, input: &str, affine: &[(f64, f64); CHANNELS]) -> Result<String, String> {
    let [layer] = *rewriter.consumers(input) else { return Err("several nodes read it".to_owned()) };
    let name = format!("{} {}", rewriter.node(layer).op_type(), rewriter.label(layer));
    if !rewriter.is(layer, "Conv") {
        return Err(format!("{name} reads it, which has no weights"));
    }
    let pads = rewriter.ints(layer, "pads").unwrap_or_default();
    let padding = rewriter.text(layer, "auto_pad").unwrap_or_else(|| "NOTSET".to_owned());
    if pads.iter().any(|pad| *pad != 0) || !matches!(padding.as_str(), "NOTSET" | "VALID") {
        return Err(format!("{name} pads with zeros, which would no longer be the mean colour"));
    }
    let (weight, bias) = folded(rewriter, layer, affine)?;
    rewriter.set_constant_input(layer, 1, &weight);
    rewriter.set_constant_input(layer, 2, &bias);
    Ok(name)
}

/// Weights `[out, 3, h, w]` and bias of a layer that reads pixels as they are.
fn folded(rewriter: &Rewriter, layer: NodeId, affine: &[(f64, f64); CHANNELS]) -> Result<(Tensor, Tensor), String> {
    let label = rewriter.label(layer);
    let constant = |index: usize| {
        let name = rewriter.input(layer, index);
        let is_float = rewriter.constant_element(name) == Some(ElementType::F32);
        let tensor = rewriter.floats(name).filter(|_| is_float);
        tensor.ok_or_else(|| format!("{name:?} of Conv {label} is no constant of 32-bit floats"))
    };
    let weight = constant(1)?;
    let [outputs, CHANNELS, height, width] = weight.dims[..] else {
        return Err(format!("the weights of Conv {label} are for single channels"));
    };
    let (values, kernel) = (weight.to_f32().unwrap_or_default(), height * width);
    let mut bias: Vec<f64> = match rewriter.input(layer, 2) {
        "" => vec![0.0; outputs],
        _ => constant(2)?.to_f32().unwrap_or_default().into_iter().map(f64::from).collect(),
    };
    let mut scaled = Vec::with_capacity(values.len());
    for (index, value) in values.iter().enumerate() {
        let (scale, shift) = affine[index / kernel % CHANNELS];
        scaled.push(f64::from(*value) * scale);
        if let Some(bias) = bias.get_mut(index / kernel / CHANNELS) {
            *bias -= f64::from(*value) * shift;
        }
    }
    let weight = Tensor { dims: weight.dims, values: narrow(scaled.into_iter()).values };
    Ok((weight, narrow(bias.into_iter())))
}

#[expect(clippy::cast_possible_truncation, reason = "rounded once, at the end")]
fn narrow(values: impl Iterator<Item = f64>) -> Tensor {
    let values: Vec<f32> = values.map(|value| value as f32).collect();
    Tensor::f32(&[values.len()], values)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::inference::evaluate;
    use crate::onnx::build::Graph;
    use crate::onnx::{Model, Values};

    const IMAGENET: Normalization = Normalization { mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225] };

    fn model(pads: [i64; 4], bias: Option<&[f32]>, values: &[f32]) -> Model {
        let mut graph = Graph::new("embed");
        let x = graph.input("x", ElementType::F32, &["n".into(), 3.into(), 4.into(), "w".into()]);
        let weight = graph.weights("w", &[2, 3, 2, 2], values);
        let bias = bias.map(|bias| graph.weights("b", &[2], bias));
        let inputs: Vec<&str> = [x.as_str(), &weight].into_iter().chain(bias.as_deref()).collect();
        let value = graph.node("Conv", &inputs, &[("pads", ints(&pads)), ("strides", ints(&[2, 2]))]);
        graph.output("y", &value, ElementType::F32, &["n".into(), 2.into(), "a".into(), "b".into()]);
        graph.finish()
    }

    fn taking_pixels(model: &Model) -> (Model, String) {
        let mut rewriter = Rewriter::new(model.clone()).unwrap();
        let report = take_pixels(&mut rewriter, "x", &IMAGENET).unwrap();
        assert_eq!(take_pixels(&mut rewriter, "x", &IMAGENET).unwrap().applied(), 0);
        (rewriter.finish().unwrap(), report.findings[0].to_string())
    }

    /// The largest difference between the model on normalised pixels and the other one on the pixels.
    fn difference(before: &Model, after: &Model, pixels: &[u8]) -> f32 {
        let planes = (0..3).flat_map(|channel| {
            let normalized = move |rgb: &u8| (f32::from(*rgb) / 255.0 - IMAGENET.mean[channel]) / IMAGENET.std[channel];
            pixels.iter().skip(channel).step_by(3).map(normalized)
        });
        let planes = Tensor::f32(&[1, 3, 4, 6], planes.collect());
        let pixels = Tensor { dims: vec![1, 4, 6, 3], values: Values::U8(pixels.to_vec()) };
        let run = |model, x| evaluate(model, &[("x", x)]).unwrap().remove(0).to_f32().unwrap();
        let pairs = run(before, planes).into_iter().zip(run(after, pixels));
        pairs.map(|(before, after)| (before - after).abs()).fold(0.0, f32::max)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn pixels_give_what_normalised_planes_gave(
            pixels in prop::collection::vec(any::<u8>(), 72),
            values in prop::collection::vec(-1.0f32..1.0, 24),
            has_bias: bool,
            is_padded: bool,
        ) {
            let before = model(if is_padded { [1; 4] } else { [0; 4] }, has_bias.then_some(&values[..2]), &values);
            let (after, finding) = taking_pixels(&before);
            prop_assert_eq!(after.inputs()[0].to_string(), "x uint8 [n, 4, w, 3]");
            prop_assert_eq!(after.op_counts().contains_key("Mul"), is_padded, "{}", finding);
            // 12 products and a bias, of values below 4.4 before the mean is taken off and each rounded a few times
            // to 24 bits.
            let bound = 13.0 * 4.4 * 8.0 / 16_777_216.0;
            prop_assert!(difference(&before, &after, &pixels) < bound);
        }
    }

    #[test]
    fn who_normalises_is_told() {
        let values = [0.5; 24];
        let (after, finding) = taking_pixels(&model([0; 4], None, &values));
        assert_eq!(finding, "input x: takes bytes with channels last; the weights of Conv Conv_0 normalise");
        let ops: Vec<String> = after.op_counts().into_keys().collect();
        assert_eq!(ops, ["Cast", "Conv", "Identity", "Transpose"]);
        let (_, finding) = taking_pixels(&model([0, 0, 1, 0], None, &values));
        assert!(finding.contains("because Conv Conv_0 pads with zeros"), "{finding}");
    }

    #[test]
    fn what_is_no_image_is_an_error() {
        let refusal = |element, dims: &[Dim], normalization| {
            let mut graph = Graph::new("other");
            let x = graph.input("x", element, dims);
            let value = graph.node("Relu", &[&x], &[]);
            graph.output("y", &value, element, dims);
            take_pixels(&mut Rewriter::new(graph.finish()).unwrap(), "x", &normalization).unwrap_err().to_string()
        };
        let image = ["n".into(), 3.into(), 8.into(), 8.into()];
        assert_eq!(
            refusal(ElementType::F32, &["n".into(), 1.into(), 8.into(), 8.into()], IMAGENET),
            "input x float [n, 1, 8, 8] is no image: float [n, 3, height, width] is"
        );
        assert!(refusal(ElementType::F16, &image, IMAGENET).contains("is no image"));
        assert!(refusal(ElementType::F32, &image[1..], IMAGENET).contains("is no image"));
        let zero = Normalization { std: [0.0; 3], ..IMAGENET };
        assert!(refusal(ElementType::F32, &image, zero).contains("divides by zero"));
        let mut rewriter = Rewriter::new(model([0; 4], None, &[0.5; 24])).unwrap();
        let missing = take_pixels(&mut rewriter, "image", &IMAGENET).unwrap_err().to_string();
        assert_eq!(missing, "the model has no input \"image\"");
    }
}
