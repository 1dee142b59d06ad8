//! LoRA: finds the linear layers that an adapter was trained for, and adds it to their weights or beside them.
//!
//! A model file has lost the network's modules, but not all of their names: exporters note them at nodes, and weights
//! and biases keep theirs unless the exporter computed new ones. A layer is found by the first of these that names it;
//! a doubt is an error. This comes before passes that make new nodes, which have no such names, and after constants
//! were folded where nodes transpose weights.

mod adapter;
mod random;

use half::f16;

use super::passes::PassReport;
use super::{ElementType, NodeId, RewriteError, Rewriter, Tensor, Values};

pub use adapter::{Adapter, AdapterError, Update};
pub use random::RandomLora;

/// The key under which PyTorch's exporter notes the modules around a node.
const SCOPES: &str = "pkg.torch.onnx.name_scopes";

/// An adapter that does not fit the model.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoraError {
    /// No linear layer has the module's name.
    #[error(
        "module {module:?} ({outputs} x {inputs}) of the adapter: none of the {layers} linear layers has this name"
    )]
    NotFound {
        /// The module.
        module: String,
        /// Its number of outputs.
        outputs: usize,
        /// Its number of inputs.
        inputs: usize,
        /// How many linear layers with constant weights the model has.
        layers: usize,
    },
    /// Layers with weights of their own have the module's name.
    #[error("module {module:?} of the adapter: several layers of the model have this name: {}", nodes.join(", "))]
    Ambiguous {
        /// The module.
        module: String,
        /// The layers' nodes.
        nodes: Vec<String>,
    },
    /// The layer is of another size.
    #[error("module {module:?}: the adapter is for {adapter:?} (outputs, inputs), the model's {node:?} has {model:?}")]
    Shape {
        /// The module.
        module: String,
        /// Outputs and inputs of the adapter's module.
        adapter: [usize; 2],
        /// The layer's node.
        node: String,
        /// Outputs and inputs of the layer.
        model: [usize; 2],
    },
    /// The weights are neither 32-bit nor 16-bit floats.
    #[error("module {module:?}: its weights {weight:?} are of type {element}, not of 32-bit or 16-bit floats")]
    Element {
        /// The module.
        module: String,
        /// The weights' name in the model.
        weight: String,
        /// Their type.
        element: ElementType,
    },
    /// No linear layer is what a random adapter should be for.
    #[error("target {target:?}: none of the {layers} linear layers has a name that ends so")]
    NoTarget {
        /// What was asked for.
        target: String,
        /// How many linear layers with constant weights the model has.
        layers: usize,
    },
    /// A random adapter is to have no columns.
    #[error("an adapter of rank 0 adds nothing")]
    NoRank,
    /// The weights can't be read.
    #[error(transparent)]
    Rewrite(#[from] RewriteError),
}

impl LoraError {
    /// How to put it right.
    #[must_use]
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::NotFound { .. } | Self::Ambiguous { .. } | Self::Shape { .. } => Some(
                "export the model from the network that the adapter was trained on, and merge before anything else",
            ),
            Self::NoTarget { .. } => Some("a built ViT has qkv, proj, fc1 and fc2 in each block"),
            Self::NoRank => Some("give a rank of 1 or more"),
            _ => None,
        }
    }
}

/// Adds the adapter to the weights: W + scale · B · A, which costs nothing when the model runs. Merging twice adds
/// it twice. The model is not changed unless every module of the adapter has its layer.
///
/// # Errors
/// [`LoraError`] if a module of the adapter has no layer that is surely its own.
pub fn merge(rewriter: &mut Rewriter, adapter: &Adapter) -> Result<PassReport, LoraError> {
    let mut report = PassReport::new("LoRA");
    for Target { module, update, layers } in targets(rewriter, adapter)? {
        let layer = &layers[0];
        let Some(mut weights) = rewriter.constant(&layer.weight)? else { continue };
        let share = add(&mut weights, update, layer.is_transposed);
        report.apply(
            rewriter,
            layer.node,
            format!("{module}, rank {}: weights change by {:.1} %", update.rank, 100.0 * share),
        );
        let nodes: Vec<NodeId> = layers.iter().map(|layer| layer.node).collect();
        let is_own = rewriter.consumers(&layer.weight).iter().all(|id| nodes.contains(id));
        if is_own && !rewriter.is_pinned(&layer.weight) {
            rewriter.set_constant(&layer.weight, &weights);
            continue;
        }
        // Exporters store weights that happen to be equal once: the others keep theirs.
        let own = rewriter.add_constant(&format!("{module}.weight"), &weights);
        nodes.into_iter().for_each(|node| rewriter.set_input(node, 1, &own));
    }
    Ok(report)
}

/// Puts the adapter beside the layers, as PEFT computes it before merging: y + scale · B · (A · x). For measuring what
/// merging saves.
///
/// # Errors
/// [`LoraError`] if a module of the adapter has no layer that is surely its own.
pub fn attach(rewriter: &mut Rewriter, adapter: &Adapter) -> Result<PassReport, LoraError> {
    let mut report = PassReport::new("LoRA, not merged");
    for Target { module, update, layers } in targets(rewriter, adapter)? {
        let &Update { rank, inputs, outputs, scale, .. } = update;
        for layer in layers {
            report.apply(rewriter, layer.node, format!("{module}, rank {rank}: two products beside it"));
            let mut constant = |side: &str, dims: &[usize], values: Vec<f32>| {
                rewriter.add_constant(&format!("{module}.{side}"), &of_type(layer.element, dims, &values))
            };
            let a = constant("lora_A", &[inputs, rank], transposed(&update.a, inputs));
            let b = constant("lora_B", &[rank, outputs], transposed(&update.b, rank));
            let scale = constant("lora_scale", &[], vec![scale]);
            let (x, y) = (rewriter.input(layer.node, 0).to_owned(), rewriter.output(layer.node, 0).to_owned());
            let [own, down, up, scaled] =
                ["own", "down", "up", "scaled"].map(|part| rewriter.fresh(&format!("{y}/{part}")));
            if let Some(mut node) = rewriter.remove(layer.node) {
                node.output = vec![own.clone()];
                rewriter.insert(node);
            }
            let parts: [(&str, [&str; 2], &str); 4] = [
                ("MatMul", [&x, &a], &down),
                ("MatMul", [&down, &b], &up),
                ("Mul", [&up, &scale], &scaled),
                ("Add", [&own, &scaled], &y),
            ];
            for (op, inputs, output) in parts {
                let node = rewriter.new_node("", op, &inputs, &[output]);
                rewriter.insert(node);
            }
        }
    }
    Ok(report)
}

/// A linear layer of the model: a MatMul or Gemm with constant weights.
#[derive(Clone)]
struct Layer {
    node: NodeId,
    weight: String,
    element: ElementType,
    outputs: usize,
    inputs: usize,
    /// Weights are `[outputs, inputs]`, not `[inputs, outputs]`.
    is_transposed: bool,
    /// Names of the module that it may be, the surest first.
    names: Vec<String>,
}

/// A module of the adapter with its layer; with several only if these share their weights.
struct Target<'a> {
    module: &'a str,
    update: &'a Update,
    layers: Vec<Layer>,
}

fn targets<'a>(rewriter: &Rewriter, adapter: &'a Adapter) -> Result<Vec<Target<'a>>, LoraError> {
    let all: Vec<Layer> = rewriter.ids().filter_map(|id| Layer::new(rewriter, id)).collect();
    let target = |(module, update): (&'a String, &'a Update)| {
        let layers = find(&all, module);
        let &Update { outputs, inputs, .. } = update;
        let Some(layer) = layers.first() else {
            return Err(LoraError::NotFound { module: module.clone(), outputs, inputs, layers: all.len() });
        };
        let differs = |other: &Layer| (&other.weight, other.is_transposed) != (&layer.weight, layer.is_transposed);
        if layers.iter().any(differs) {
            let nodes = layers.iter().map(|layer| rewriter.label(layer.node)).collect();
            return Err(LoraError::Ambiguous { module: module.clone(), nodes });
        }
        if let Some(other) = layers.iter().find(|layer| [layer.outputs, layer.inputs] != [outputs, inputs]) {
            let (node, model) = (rewriter.label(other.node), [other.outputs, other.inputs]);
            return Err(LoraError::Shape { module: module.clone(), adapter: [outputs, inputs], node, model });
        }
        if !matches!(layer.element, ElementType::F32 | ElementType::F16) {
            let (weight, element) = (layer.weight.clone(), layer.element);
            return Err(LoraError::Element { module: module.clone(), weight, element });
        }
        Ok(Target { module, update, layers })
    };
    adapter.updates.iter().map(target).collect()
}

/// The layers with the name `module`, or with one that ends in it, as when the network is a part of what was exported.
fn find(layers: &[Layer], module: &str) -> Vec<Layer> {
    let ending = format!(".{module}");
    let rules: [&dyn Fn(&str) -> bool; 2] = [&|name| name == module, &|name| name.ends_with(&ending)];
    let places = layers.iter().map(|layer| layer.names.len()).max().unwrap_or(0);
    for is_named in rules {
        for place in 0..places {
            let is_hit = |layer: &&Layer| layer.names.get(place).is_some_and(|name| is_named(name));
            let hits: Vec<Layer> = layers.iter().filter(is_hit).cloned().collect();
            if !hits.is_empty() {
                return hits;
            }
        }
    }
    Vec::new()
}

impl Layer {
    fn new(rewriter: &Rewriter, id: NodeId) -> Option<Self> {
        let is_gemm = rewriter.is(id, "Gemm");
        // nn.Linear never has these.
        let is_changed = rewriter.int(id, "transA").is_some_and(|flag| flag != 0)
            || rewriter.float(id, "alpha").is_some_and(|alpha| alpha != 1.0);
        if !is_gemm && !rewriter.is(id, "MatMul") || is_changed {
            return None;
        }
        let weight = rewriter.input(id, 1);
        let &[rows, columns] = rewriter.constant_dims(weight)?.as_slice() else { return None };
        let is_transposed = is_gemm && rewriter.int(id, "transB").unwrap_or(0) != 0;
        let (outputs, inputs) = if is_transposed { (rows, columns) } else { (columns, rows) };
        let element = rewriter.constant_element(weight)?;
        let names = names(rewriter, id);
        Some(Self { node: id, weight: weight.to_owned(), element, outputs, inputs, is_transposed, names })
    }
}

/// Names of the module that a layer may be, the surest first: what the exporter noted, the node's own name, the
/// weights', the bias's; `""` where there is none.
fn names(rewriter: &Rewriter, id: NodeId) -> Vec<String> {
    let node = rewriter.node(id);
    let noted = node.metadata_props.iter().find(|entry| entry.key() == SCOPES);
    let bias = match rewriter.sole_consumer(rewriter.output(id, 0)).filter(|next| rewriter.is(*next, "Add")) {
        Some(sum) if !rewriter.is(id, "Gemm") => {
            let mut sides = rewriter.node(sum).input.iter();
            sides.find(|side| rewriter.is_constant(side)).map_or("", String::as_str)
        }
        _ => rewriter.input(id, 2),
    };
    let parameter = |name: &str, kind: &str| name.strip_suffix(kind).unwrap_or_default().to_owned();
    vec![
        noted.and_then(|entry| innermost(entry.value())).unwrap_or_default(),
        module_of_path(node.name()).unwrap_or_default(),
        parameter(rewriter.input(id, 1), ".weight"),
        parameter(bias, ".bias"),
    ]
}

/// The innermost module of a list as Python writes it, whose last entry is the operation:
/// `['', 'blocks', 'blocks.0', 'blocks.0.fc', 'linear']`.
fn innermost(scopes: &str) -> Option<String> {
    let entries: Vec<&str> = scopes.trim_matches(['[', ']']).split(", ").collect();
    let module = entries.get(entries.len().checked_sub(2)?)?;
    Some(module.trim_matches('\'').to_owned())
}

/// The module of a node's path as the older exporter writes it: `/blocks/blocks.0/fc/MatMul` is of `blocks.0.fc`.
fn module_of_path(name: &str) -> Option<String> {
    let (path, _) = name.strip_prefix('/')?.rsplit_once('/')?;
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        // A list's entry repeats the list's name.
        if parts.last().is_some_and(|list| part.strip_prefix(list).is_some_and(|rest| rest.starts_with('.'))) {
            parts.pop();
        }
        parts.push(part);
    }
    Some(parts.join("."))
}

/// Adds the update to weights; returns how large it is as a part of them, by their Frobenius norms.
fn add(weights: &mut Tensor, update: &Update, is_transposed: bool) -> f64 {
    let &Update { rank, inputs, outputs, scale, .. } = update;
    let (mut before, mut added) = (0.0_f64, 0.0_f64);
    let mut row = vec![0.0_f32; inputs];
    for output in 0..outputs {
        row.fill(0.0);
        for (b, a) in update.b[output * rank..][..rank].iter().zip(update.a.chunks_exact(inputs)) {
            row.iter_mut().zip(a).for_each(|(sum, a)| *sum += b * a);
        }
        for (input, change) in row.iter().enumerate() {
            let at = if is_transposed { output * inputs + input } else { input * outputs + output };
            let change = scale * change;
            let old = match &mut weights.values {
                Values::F32(values) => {
                    let old = values[at];
                    values[at] = old + change;
                    old
                }
                Values::F16(values) => {
                    let old = values[at].to_f32();
                    values[at] = f16::from_f32(old + change);
                    old
                }
                _ => 0.0,
            };
            before += f64::from(old).powi(2);
            added += f64::from(change).powi(2);
        }
    }
    (added / before.max(f64::MIN_POSITIVE)).sqrt()
}

fn of_type(element: ElementType, dims: &[usize], values: &[f32]) -> Tensor {
    match element {
        ElementType::F16 => {
            let values = Values::F16(values.iter().map(|value| f16::from_f32(*value)).collect());
            Tensor { dims: dims.to_vec(), values }
        }
        _ => Tensor::f32(dims, values.to_vec()),
    }
}

/// A matrix of `columns` columns with its axes exchanged.
fn transposed(values: &[f32], columns: usize) -> Vec<f32> {
    (0..columns).flat_map(|column| values.iter().skip(column).step_by(columns).copied()).collect()
}

#[cfg(test)]
mod tests {
    use super::super::Model;
    use super::super::build::Graph;
    use super::super::passes::fixtures::{difference, model, noise, path, relative};
    use super::*;
    use crate::inference::evaluate;

    /// Sums in another order, through two blocks.
    const CLOSE: f32 = 1e-5;

    /// Adds rank 2 to modules of these sizes (outputs, inputs).
    fn adapter(modules: &[(&str, usize, usize)]) -> Adapter {
        let floats = |dims: [usize; 2]| noise(&dims).to_f32().unwrap();
        let update = |outputs: usize, inputs: usize| Update {
            rank: 2,
            inputs,
            outputs,
            a: floats([2, inputs]),
            b: floats([outputs, 2]),
            scale: 0.25,
        };
        let updates = modules.iter().map(|&(module, outputs, inputs)| (module.to_owned(), update(outputs, inputs)));
        Adapter { updates: updates.collect() }
    }

    type Way = fn(&mut Rewriter, &Adapter) -> Result<PassReport, LoraError>;

    fn adapted(model: &Model, adapter: &Adapter, way: Way) -> Model {
        let mut rewriter = Rewriter::new(model.clone()).unwrap();
        assert_eq!(way(&mut rewriter, adapter).unwrap().applied(), adapter.updates.len());
        rewriter.finish().unwrap()
    }

    #[test]
    fn every_export_computes_what_peft_does() {
        let adapter = Adapter::load(&path("lora")).unwrap();
        let bytes = std::fs::read(path("lora/reference.safetensors")).unwrap();
        let reference = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let [input, output] = ["input", "output"].map(|name| {
            let view = reference.tensor(name).unwrap();
            let values = view.data().as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
            Tensor::f32(view.shape(), values)
        });
        let output = output.to_f32().unwrap();
        for name in ["timm_sdpa.onnx", "timm_unfused.onnx", "timm_torchscript.onnx", "timm_opset16.onnx"] {
            let run = |model: &Model| evaluate(model, &[("input", input.clone())]).unwrap()[0].to_f32().unwrap();
            let original = model(name);
            for way in [merge as Way, attach] {
                let difference = relative(&output, &run(&adapted(&original, &adapter, way)));
                assert!(difference < CLOSE, "{name} {difference}");
            }
            assert!(relative(&output, &run(&original)) > 0.1, "{name}: the adapter changes next to nothing");
        }
    }

    #[test]
    fn merged_and_beside_are_the_same() {
        // The Hugging Face models lie inside a module of the exported one.
        let hugging_face = |layer: &str, names: [&str; 2]| {
            let [query, dense] = names;
            vec![(format!("{layer}.0.{query}"), 16, 16), (format!("{layer}.1.{dense}"), 32, 16)]
        };
        let cases = [
            ("hf_vit_eager.onnx", hugging_face("layers", ["attention.q_proj", "mlp.fc1"])),
            ("hf_dinov2_sdpa.onnx", hugging_face("encoder.layer", ["attention.q_proj", "mlp.fc1"])),
            ("torchvision_vit.onnx", vec![("encoder.layers.encoder_layer_1.mlp.0".to_owned(), 32, 16)]),
            ("activations.onnx", vec![("layers.4".to_owned(), 8, 8)]),
            ("activations_torchscript.onnx", vec![("layers.4".to_owned(), 8, 8)]),
        ];
        for (name, modules) in cases {
            let modules: Vec<_> =
                modules.iter().map(|(name, outputs, inputs)| (name.as_str(), *outputs, *inputs)).collect();
            let (original, adapter) = (model(name), adapter(&modules));
            let (merged, attached) = (adapted(&original, &adapter, merge), adapted(&original, &adapter, attach));
            let untouched = Rewriter::new(original.clone()).unwrap().finish().unwrap();
            assert_eq!(merged.op_counts(), untouched.op_counts(), "{name}");
            let input = noise(if name.starts_with("activations") { &[5, 8] } else { &[2, 3, 32, 32] });
            let input = [("input", input)];
            assert!(difference(&attached, &merged, &input) < CLOSE, "{name}");
            assert!(difference(&original, &merged, &input) > 0.01, "{name}");
        }
    }

    /// Two linear layers of 4 channels that a bias names, maybe of the same weights.
    fn two_layers(shared: bool) -> Model {
        let mut graph = Graph::new("two");
        let mut x = graph.input("x", ElementType::F32, &["n".into(), 4.into()]);
        let values: Vec<f32> = (0..16_u8).map(|i| f32::from(i % 5) - 2.0).collect();
        for layer in ["a", "b"] {
            let weight = if shared { "w".to_owned() } else { format!("w_{layer}") };
            if layer == "a" || !shared {
                graph.weights(&weight, &[4, 4], &values);
            }
            let bias = graph.weights(&format!("net.{layer}.fc.bias"), &[4], &[0.5; 4]);
            let product = graph.node("MatMul", &[&x, &weight], &[]);
            x = graph.node("Add", &[&bias, &product], &[]);
        }
        graph.output("y", &x, ElementType::F32, &["n".into(), 4.into()]);
        graph.finish()
    }

    #[test]
    fn weights_stored_once_are_changed_for_one_layer() {
        let adapter = adapter(&[("net.b.fc", 4, 4)]);
        for shared in [true, false] {
            let original = two_layers(shared);
            let (merged, attached) = (adapted(&original, &adapter, merge), adapted(&original, &adapter, attach));
            assert!(difference(&attached, &merged, &[("x", noise(&[3, 4]))]) < 1e-6);
            assert_eq!(merged.proto().graph.as_ref().unwrap().initializer.len(), 4);
        }
    }

    #[test]
    fn a_module_without_a_layer_of_its_own_is_an_error() {
        let error = |modules: &[(&str, usize, usize)]| {
            let original = two_layers(false);
            let mut rewriter = Rewriter::new(original.clone()).unwrap();
            let error = merge(&mut rewriter, &adapter(modules)).unwrap_err();
            assert_eq!(rewriter.finish().unwrap(), original, "changed in spite of {error}");
            assert!(error.hint().is_some());
            error.to_string()
        };
        assert_eq!(
            error(&[("net.a.fc", 4, 4), ("net.c.fc", 4, 4)]),
            "module \"net.c.fc\" (4 x 4) of the adapter: none of the 2 linear layers has this name"
        );
        assert_eq!(
            error(&[("fc", 4, 4)]),
            "module \"fc\" of the adapter: several layers of the model have this name: MatMul_0, MatMul_2"
        );
        assert_eq!(
            error(&[("a.fc", 6, 4)]),
            "module \"a.fc\": the adapter is for [6, 4] (outputs, inputs), the model's \"MatMul_0\" has [4, 4]"
        );
    }

    #[test]
    fn weights_of_16_bits_stay_so_and_others_are_refused() {
        let mut original = two_layers(false);
        let weight = &mut original.proto_mut().graph.as_mut().unwrap().initializer[0];
        let values = Values::F16(
            Tensor::from_proto(weight).unwrap().to_f32().unwrap().iter().map(|v| f16::from_f32(*v)).collect(),
        );
        *weight = Tensor { dims: vec![4, 4], values }.to_proto("w_a");
        let mut rewriter = Rewriter::new(original.clone()).unwrap();
        merge(&mut rewriter, &adapter(&[("net.a.fc", 4, 4)])).unwrap();
        let merged = rewriter.constant("w_a").unwrap().unwrap();
        assert_eq!(merged.element(), ElementType::F16);
        let reference = adapted(&two_layers(false), &adapter(&[("net.a.fc", 4, 4)]), merge);
        let reference = Tensor::from_proto(&reference.proto().graph.as_ref().unwrap().initializer[0]).unwrap();
        // 11 bits of precision.
        assert!(relative(&reference.to_f32().unwrap(), &merged.to_f32().unwrap()) < 5e-4);

        let weight = &mut original.proto_mut().graph.as_mut().unwrap().initializer[0];
        *weight = Tensor { dims: vec![4, 4], values: Values::I8(vec![1; 16]) }.to_proto("w_a");
        let error = merge(&mut Rewriter::new(original).unwrap(), &adapter(&[("net.a.fc", 4, 4)])).unwrap_err();
        assert!(error.to_string().ends_with("are of type int8, not of 32-bit or 16-bit floats"), "{error}");
    }

    #[test]
    fn modules_are_read_as_the_exporters_write_them() {
        assert_eq!(innermost("['', 'blocks', 'blocks.0', 'blocks.0.fc', 'linear']").unwrap(), "blocks.0.fc");
        assert_eq!(innermost("['linear']"), None);
        assert_eq!(module_of_path("/blocks/blocks.0/mlp/mlp.1/fc/MatMul").unwrap(), "blocks.0.mlp.1.fc");
        assert_eq!(module_of_path("/fc/Gemm").unwrap(), "fc");
        assert_eq!((module_of_path("node_MatMul_12"), module_of_path("/MatMul")), (None, None));
    }
}
