//! Adapters of random numbers, to measure what LoRA costs without having trained one.

use std::collections::BTreeMap;

use super::{Adapter, Layer, LoraError, Update};
use crate::onnx::Rewriter;
use crate::onnx::truncated_normal::TruncatedNormal;

/// What PEFT would be told, in part.
#[derive(Clone, Debug, PartialEq)]
pub struct RandomLora {
    /// The rank r of every update.
    pub rank: usize,
    /// α: updates are scaled by α / r.
    pub alpha: f32,
    /// The layers: those whose module is so called, or ends in a point and this, such as `qkv`. Linear layers only.
    pub targets: Vec<String>,
    /// Decides the numbers.
    pub seed: u64,
}

impl Adapter {
    /// An adapter for the layers of the model that are named. A is random with standard deviation 1/√inputs, so that
    /// A·x is as large as x, and B with 0.02 instead of the zeros that training begins with: both from a normal
    /// distribution cut at 2σ.
    ///
    /// # Errors
    /// [`LoraError`] if the rank is 0 or a target is the name of no linear layer.
    pub fn random(rewriter: &Rewriter, lora: &RandomLora) -> Result<Self, LoraError> {
        let &RandomLora { rank, alpha, seed, .. } = lora;
        if rank == 0 {
            return Err(LoraError::NoRank);
        }
        let layers: Vec<Layer> = rewriter.ids().filter_map(|id| Layer::new(rewriter, id)).collect();
        let random = TruncatedNormal::new(seed);
        let mut updates = BTreeMap::new();
        for target in &lora.targets {
            let named = layers.iter().filter_map(|layer| Some((layer.called(target)?, layer)));
            let before = updates.len();
            updates.extend(named.map(|(module, layer)| {
                let &Layer { inputs, outputs, .. } = layer;
                #[expect(clippy::cast_precision_loss, reason = "sizes are small")]
                let (sigma, scale) = (1.0 / (inputs as f32).sqrt(), alpha / rank as f32);
                let a = random.draw(&format!("{module}.lora_A"), sigma, rank * inputs);
                let b = random.draw(&format!("{module}.lora_B"), 0.02, outputs * rank);
                (module.to_owned(), Update { rank, inputs, outputs, a, b, scale })
            }));
            if updates.len() == before {
                return Err(LoraError::NoTarget { target: target.clone(), layers: layers.len() });
            }
        }
        Ok(Self { updates })
    }

    /// The number of elements of all A and B: those that training changes.
    #[must_use]
    pub fn parameters(&self) -> usize {
        self.updates.values().map(|update| update.rank * (update.inputs + update.outputs)).sum()
    }
}

impl Layer {
    /// The layer's surest name of those that are `target` or end in it.
    fn called(&self, target: &str) -> Option<&str> {
        let is_target = |name: &&String| {
            !target.is_empty() && name.strip_suffix(target).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
        };
        self.names.iter().find(is_target).map(String::as_str)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{attach, merge};
    use super::*;
    use crate::onnx::passes::fixtures::{self, difference, noise};
    use crate::onnx::vit::{VitConfig, build};

    const LAYERS: [&str; 4] = ["qkv", "proj", "fc1", "fc2"];

    fn lora(rank: usize, targets: &[&str]) -> RandomLora {
        RandomLora { rank, alpha: 16.0, targets: targets.iter().map(|&target| target.to_owned()).collect(), seed: 5 }
    }

    fn tiny() -> Rewriter {
        let config: VitConfig = "image=16,patch=4,dim=24,depth=2,heads=2,mlp=3,classes=4".parse().unwrap();
        Rewriter::new(build(&config, 1).unwrap()).unwrap()
    }

    #[test]
    fn every_named_layer_has_its_update() {
        let adapter = Adapter::random(&tiny(), &lora(8, &["qkv", "proj"])).unwrap();
        let modules: Vec<&str> = adapter.updates.keys().map(String::as_str).collect();
        assert_eq!(modules, ["blocks.0.attn.proj", "blocks.0.attn.qkv", "blocks.1.attn.proj", "blocks.1.attn.qkv"]);
        let qkv = &adapter.updates["blocks.1.attn.qkv"];
        assert_eq!((qkv.inputs, qkv.outputs, qkv.a.len(), qkv.b.len(), qkv.scale), (24, 72, 192, 576, 2.0));
        assert!(qkv.b.iter().all(|b| *b != 0.0 && b.abs() <= 0.04));
        // Two blocks of rank · (in + out).
        assert_eq!(adapter.parameters(), 2 * 8 * ((24 + 72) + (24 + 24)));
        let all = Adapter::random(&tiny(), &lora(4, &LAYERS)).unwrap();
        assert_eq!(all.parameters(), 2 * 4 * ((24 + 72) + (24 + 24) + (24 + 72) + (72 + 24)));
        assert_eq!(Adapter::random(&tiny(), &lora(8, &["attn.qkv", "blocks.0.attn.proj"])).unwrap().updates.len(), 3);
        // PEFT 0.21.2 on timm's model, r=16, target_modules=r".*blocks\..*\.(qkv|proj)": get_nb_trainable_parameters().
        let timm = build(&"vit_tiny_patch16_224".parse().unwrap(), 1).unwrap();
        let adapter = Adapter::random(&Rewriter::new(timm).unwrap(), &lora(16, &["qkv", "proj"])).unwrap();
        assert_eq!(adapter.parameters(), 221_184);
        assert_ne!(all, Adapter::random(&tiny(), &RandomLora { seed: 6, ..lora(4, &LAYERS) }).unwrap());
        assert_eq!(all, Adapter::random(&tiny(), &lora(4, &LAYERS)).unwrap());
    }

    #[test]
    fn merged_and_beside_are_the_same() {
        let original = tiny();
        for rank in [1, 8] {
            let adapter = Adapter::random(&original, &lora(rank, &LAYERS)).unwrap();
            let [merged, attached] = [merge, attach].map(|way| {
                let mut rewriter = original.clone();
                assert_eq!(way(&mut rewriter, &adapter).unwrap().applied(), 8);
                rewriter.finish().unwrap()
            });
            let input = [("input", noise(&[2, 3, 16, 16]))];
            // Sums in another order, through two blocks.
            assert!(difference(&attached, &merged, &input) < 1e-5);
            assert!(difference(&original.clone().finish().unwrap(), &merged, &input) > 0.01);
        }
    }

    #[test]
    fn exported_models_have_their_layers_too() {
        let rewriter = Rewriter::new(fixtures::model("timm_sdpa.onnx")).unwrap();
        let adapter = Adapter::random(&rewriter, &lora(4, &["qkv", "proj"])).unwrap();
        assert_eq!(adapter.updates.len(), 4);
        merge(&mut rewriter.clone(), &adapter).unwrap();
    }

    #[test]
    fn what_names_nothing_is_told() {
        let error = |lora: &RandomLora| Adapter::random(&tiny(), lora).unwrap_err();
        let unknown = error(&lora(4, &["qkv", "kv"]));
        assert_eq!(unknown.to_string(), "target \"kv\": none of the 9 linear layers has a name that ends so");
        assert!(unknown.hint().is_some());
        assert_eq!(error(&lora(0, &["qkv"])).to_string(), "an adapter of rank 0 adds nothing");
    }
}
