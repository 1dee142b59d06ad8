//! Enlarges images of bytes with channels last, as INT8 convolutions have them: whole runs of channels are copied.
//!
//! ONNX Runtime's own kernels go byte by byte. Without them a UNet of base 32 became 1.25 times as fast
//! (`DepthToSpace`), one that repeats pixels 1.2 times (`Resize`).

use crate::onnx::build::ints;
use crate::onnx::{NodeId, Rewriter, Tensor};

/// Puts copies and reshapes in the place of a `DepthToSpace`, or of a `Resize` that repeats pixels, and has them read
/// `from` and give `to`, both `[n, c, h, w]`. Returns false if the node is another; it is as it was then.
pub(super) fn enlarge(rewriter: &mut Rewriter, id: NodeId, from: &str, to: &str) -> bool {
    // `Shape` gives a part of a shape since version 15.
    if rewriter.opset() < 15 {
        return false;
    }
    let Some((step, factor)) = step(rewriter, id) else { return false };
    rewriter.remove(id);
    let mut graph = Graph { rewriter, to };
    let last = graph.node("Transpose", &[from], Some(("perm", &[0, 2, 3, 1])));
    // Both give [n, h, factor · w or (factor, w), factor · c]: rows of the larger image, one after the other.
    let rows = match step {
        Step::Spread => {
            let shape = graph.constant(&[0, 0, 0, factor, -1]);
            let split = graph.node("Reshape", &[&last, &shape], None);
            graph.node("Transpose", &[&split], Some(("perm", &[0, 1, 3, 2, 4])))
        }
        Step::Repeat => {
            let copies = |value: &str| vec![value.to_owned(); usize::try_from(factor).unwrap_or(1)];
            let wide = graph.join(&copies(&last), 3);
            graph.join(&copies(&wide), 2)
        }
    };
    // [n, factor · h, factor · w, c], whatever size the image has.
    let size = graph.node("Shape", &[from], None);
    if let Some(shape) = graph.rewriter.producer(&size) {
        graph.rewriter.set_attribute(shape, "start", 2);
    }
    let factors = graph.constant(&[factor, factor]);
    let size = graph.node("Mul", &[&size, &factors], None);
    let around = [graph.constant(&[0]), size, graph.constant(&[-1])];
    let shape = graph.join(&around, 0);
    let image = graph.node("Reshape", &[&rows, &shape], None);
    graph.last("Transpose", &[&image], &[0, 3, 1, 2]);
    true
}

/// How an image grows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Channels become pixels.
    Spread,
    /// Pixels are repeated.
    Repeat,
}

/// How a node enlarges its image, and by how much along each side; `None` if not by a whole factor, or otherwise.
fn step(rewriter: &Rewriter, id: NodeId) -> Option<(Step, i64)> {
    if rewriter.is(id, "DepthToSpace") {
        // The other order would copy byte by byte.
        let in_runs = rewriter.text(id, "mode").is_none_or(|mode| mode == "DCR");
        return in_runs.then_some((Step::Spread, rewriter.int(id, "blocksize")?));
    }
    if !rewriter.is(id, "Resize") || rewriter.node(id).input.len() > 3 {
        return None;
    }
    let scales = rewriter.floats(rewriter.input(id, 2))?.to_f32()?;
    let [1.0, 1.0, height, width] = scales[..] else { return None };
    #[expect(clippy::cast_possible_truncation, reason = "compared with what it was")]
    let factor = height as i64;
    let whole = height == width && factor as f32 == height && factor > 1;
    let text = |name: &str, default: &str| rewriter.text(id, name).unwrap_or_else(|| default.to_owned());
    // With these, a pixel of the larger image is nearest to the one that it lies in.
    let nearest = text("mode", "nearest") == "nearest"
        && match text("coordinate_transformation_mode", "half_pixel").as_str() {
            "asymmetric" => text("nearest_mode", "round_prefer_floor") == "floor",
            "half_pixel" | "pytorch_half_pixel" => text("nearest_mode", "round_prefer_floor").starts_with("round"),
            _ => false,
        };
    (whole && nearest && rewriter.ints(id, "axes").is_none()).then_some((Step::Repeat, factor))
}

/// Adds nodes whose values have names near `to`.
struct Graph<'a> {
    rewriter: &'a mut Rewriter,
    to: &'a str,
}

impl Graph<'_> {
    fn constant(&mut self, values: &[i64]) -> String {
        self.rewriter.add_constant(&format!("{}/shape", self.to), &Tensor::indices(values))
    }

    fn node(&mut self, op: &str, inputs: &[&str], attribute: Option<(&str, &[i64])>) -> String {
        let output = self.rewriter.fresh(&format!("{}/{}", self.to, op.to_lowercase()));
        let node = self.rewriter.new_node("", op, inputs, &[&output]);
        let id = self.rewriter.insert(node);
        if let Some((name, values)) = attribute {
            self.rewriter.set_attribute(id, name, ints(values));
        }
        output
    }

    /// Puts values one after the other along an axis.
    fn join(&mut self, values: &[String], axis: i64) -> String {
        let values: Vec<&str> = values.iter().map(String::as_str).collect();
        let joined = self.node("Concat", &values, None);
        if let Some(id) = self.rewriter.producer(&joined) {
            self.rewriter.set_attribute(id, "axis", axis);
        }
        joined
    }

    fn last(&mut self, op: &str, inputs: &[&str], perm: &[i64]) {
        let node = self.rewriter.new_node("", op, inputs, &[self.to]);
        let id = self.rewriter.insert(node);
        self.rewriter.set_attribute(id, "perm", ints(perm));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inference::evaluate;
    use crate::onnx::build::{self, Attribute};
    use crate::onnx::passes::fixtures::noise;
    use crate::onnx::{ElementType, Model};

    fn model(op: &str, scales: &[f32], attributes: &[(&str, Attribute)]) -> Model {
        let mut graph = build::Graph::new("enlarge");
        let x = graph.input("x", ElementType::F32, &["n".into(), 8.into(), "h".into(), "w".into()]);
        let scales = graph.weights("scales", &[4], scales);
        let inputs = [x.as_str(), "", &scales];
        let y = graph.node(op, &inputs[..if op == "Resize" { 3 } else { 1 }], attributes);
        graph.output("y", &y, ElementType::F32, &["n".into(), "c".into(), "h2".into(), "w2".into()]);
        graph.finish()
    }

    /// The rewritten model, if the node is one that is rewritten.
    fn enlarged(model: &Model) -> Option<Model> {
        let mut rewriter = Rewriter::new(model.clone()).unwrap();
        let id = rewriter.ids().next().unwrap();
        let to = rewriter.output(id, 0).to_owned();
        enlarge(&mut rewriter, id, "x", &to).then(|| rewriter.finish().unwrap())
    }

    fn resize(scales: &[f32], how: [&str; 3]) -> Model {
        let names = ["mode", "coordinate_transformation_mode", "nearest_mode"];
        let attributes: Vec<(&str, Attribute)> = names.into_iter().zip(how.map(Attribute::from)).collect();
        model("Resize", scales, &attributes)
    }

    #[test]
    fn pixels_land_where_the_operators_put_them() {
        let floor = ["nearest", "asymmetric", "floor"];
        let round = ["nearest", "half_pixel", "round_prefer_floor"];
        let models = [
            model("DepthToSpace", &[], &[("blocksize", 2.into())]),
            resize(&[1.0, 1.0, 2.0, 2.0], floor),
            resize(&[1.0, 1.0, 3.0, 3.0], round),
            resize(&[1.0, 1.0, 4.0, 4.0], round),
        ];
        for model in models {
            let rewritten = enlarged(&model).unwrap();
            assert!(!rewritten.op_counts().keys().any(|op| op == "Resize" || op == "DepthToSpace"));
            for dims in [[1, 8, 2, 3], [3, 8, 5, 4]] {
                let inputs = [("x", noise(&dims))];
                assert_eq!(evaluate(&model, &inputs).unwrap(), evaluate(&rewritten, &inputs).unwrap());
            }
        }
    }

    #[test]
    fn what_moves_pixels_otherwise_stays() {
        let stays = [
            model("DepthToSpace", &[], &[("blocksize", 2.into()), ("mode", "CRD".into())]),
            resize(&[1.0, 1.0, 2.0, 3.0], ["nearest", "asymmetric", "floor"]),
            resize(&[1.0, 1.0, 1.5, 1.5], ["nearest", "asymmetric", "floor"]),
            resize(&[1.0, 1.0, 2.0, 2.0], ["nearest", "asymmetric", "ceil"]),
            resize(&[1.0, 1.0, 2.0, 2.0], ["linear", "half_pixel", "round_prefer_floor"]),
            model("Relu", &[], &[]),
        ];
        for model in stays {
            assert!(enlarged(&model).is_none(), "{:?}", model.op_counts());
        }
    }
}
