//! How large a model is, what a tile costs, and what may be too much for a device.

use crate::experiment::ExperimentError;
use crate::experiment::probe::Probe;
use crate::experiment::tiles::TileSet;
use crate::inference::{Device, ModelCard, Variant, device};
use crate::onnx::cost;
use crate::onnx::vit::VitConfig;
use crate::onnx::{ElementType, Rewriter};
use crate::report::{FormulaRecord, ModelSizeRecord};

/// Tokens wider, or blocks more, than these are slow on most devices.
const WIDE: usize = 1024;
const DEEP: usize = 24;
/// A model takes about three times its weights: weights, activations, workspace.
const MEMORY_FACTOR: f64 = 3.0;
/// Of an image.
const CHANNELS: usize = 3;
/// Share of a GPU's memory beyond which it gets tight.
const TIGHT: f64 = 0.8;

/// What a variant is by its graph, and the floats that most of its weights are; `None` for integers.
pub(in crate::experiment) fn size(
    card: &ModelCard,
    variant: &Variant,
    vit: Option<&VitConfig>,
) -> Result<(ModelSizeRecord, Option<ElementType>), ExperimentError> {
    let mut model = variant.load()?;
    model.embed_weights(&variant.file)?;
    let contract = card.check(&model, &variant.file)?;
    let rewriter = Rewriter::new(model)?;
    let tiles = TileSet::synthetic(card.tile_size, 1, 1);
    let shapes = Probe { card, contract: &contract, tiles: &tiles }.shapes(&rewriter)?;
    let cost = cost(&rewriter, &shapes);
    let formula = vit.map(|vit| FormulaRecord {
        flops: vit.flops_by_formula(),
        flops_with_class_token: vit.flops_by_formula_with_class_token(),
        parameters: vit.parameters(),
    });
    let element_bytes = match contract.element {
        ElementType::F32 => 4,
        ElementType::F16 => 2,
        _ => 1,
    };
    let record = ModelSizeRecord {
        parameters: cost.parameters,
        parameter_bytes: cost.parameter_bytes,
        input_bytes: (contract.side * contract.side * CHANNELS * element_bytes) as u64,
        flops: cost.flops,
        flops_by_op: cost.by_op,
        elementwise: cost.elementwise,
        uncounted: cost.uncounted,
        formula,
    };
    Ok((record, element(&rewriter)))
}

/// The type of most weights, if they are floats.
fn element(rewriter: &Rewriter) -> Option<ElementType> {
    let elements_of = |wanted: &[ElementType]| -> usize {
        let constants = rewriter.constants();
        let is_wanted =
            |name: &&String| rewriter.constant_element(name).is_some_and(|element| wanted.contains(&element));
        let size = |name: &String| rewriter.constant_dims(name).map_or(0, |dims| dims.iter().product());
        constants.iter().filter(is_wanted).map(size).sum()
    };
    let integers = elements_of(&[ElementType::I8, ElementType::U8]);
    let (halves, floats) = (elements_of(&[ElementType::F16]), elements_of(&[ElementType::F32]));
    // Of other floats, such as BF16, no products are measured.
    let others = elements_of(&[ElementType::F64, ElementType::Bf16]);
    match () {
        () if integers.max(others) > halves.max(floats) => None,
        () if halves > floats => Some(ElementType::F16),
        () => Some(ElementType::F32),
    }
}

/// What may be slow or not fit.
pub(super) fn warnings(size: &ModelSizeRecord, vit: Option<&VitConfig>, on: Device) -> Vec<String> {
    let mut warnings = Vec::new();
    if let Some(vit) = vit.filter(|vit| vit.dim > WIDE || vit.depth > DEEP) {
        warnings
            .push(format!("a large model: {} channels in {} blocks, more than {WIDE} or {DEEP}", vit.dim, vit.depth));
    }
    let Device::Cuda { index } = on else { return warnings };
    let gpu = device::list().gpus.into_iter().find(|gpu| gpu.index == index);
    warnings.extend(gpu.and_then(|gpu| tight(size.parameter_bytes, gpu.memory_total_bytes)));
    warnings
}

fn tight(parameter_bytes: u64, memory_bytes: u64) -> Option<String> {
    let needed = MEMORY_FACTOR * parameter_bytes as f64;
    let gib = |bytes: f64| bytes / f64::from(1 << 30);
    (needed > TIGHT * memory_bytes as f64).then(|| {
        let (needed, has) = (gib(needed), gib(memory_bytes as f64));
        format!("memory may not suffice: about {needed:.1} GiB are needed, the GPU has {has:.1} GiB")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_models_are_warned_of() {
        let vit: VitConfig = "dim=1280,depth=32,heads=16".parse().unwrap();
        assert_eq!(
            warnings(&ModelSizeRecord::default(), Some(&vit), Device::Cpu),
            ["a large model: 1280 channels in 32 blocks, more than 1024 or 24"]
        );
        assert_eq!(tight(8 << 30, 80 << 30), None);
        assert!(tight(24 << 30, 80 << 30).unwrap().contains("72.0 GiB are needed, the GPU has 80.0 GiB"));
    }
}
