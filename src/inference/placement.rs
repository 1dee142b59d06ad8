//! Which provider ran which operators, read from ONNX Runtime's own profile of one run.

use std::collections::BTreeMap;
use std::collections::HashSet;
use std::path::Path;

use serde::Deserialize;

use super::device::Provider;

/// Operators that carry a model's work. ONNX Runtime puts shape arithmetic on the CPU on purpose; these never.
const HEAVY: &[&str] = &[
    "Attention",
    "Conv",
    "ConvInteger",
    "ConvTranspose",
    "Einsum",
    "GRU",
    "Gemm",
    "GroupQueryAttention",
    "LSTM",
    "MatMul",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "MatMulNBits",
    "MultiHeadAttention",
    "NhwcConv",
    "NhwcFusedConv",
    "PackedAttention",
    "PackedMultiHeadAttention",
    "Resize",
    "Upsample",
];

/// Which provider ran which operators.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Placement {
    /// Provider by ONNX Runtime's name, then operator, then how many nodes.
    pub nodes: BTreeMap<String, BTreeMap<String, usize>>,
}

/// One event of a profile; other events lack these arguments.
#[derive(Deserialize)]
struct Event {
    #[serde(default)]
    cat: String,
    #[serde(default)]
    name: String,
    #[serde(default)]
    args: serde_json::Map<String, serde_json::Value>,
}

impl Placement {
    /// Reads the profile file at `path`.
    pub(super) fn read(path: &Path) -> Result<Self, std::io::Error> {
        Self::parse(&std::fs::read(path)?)
    }

    /// Parses a profile: a JSON array of events, those of category `Node` naming operator and provider.
    fn parse(json: &[u8]) -> Result<Self, std::io::Error> {
        let events: Vec<Event> = serde_json::from_slice(json)?;
        let mut placement = Self::default();
        let mut seen = HashSet::new();
        for Event { cat, name, args } in &events {
            let text = |key: &str| args.get(key).and_then(serde_json::Value::as_str);
            let (Some(op), Some(provider)) = (text("op_name"), text("provider")) else { continue };
            // Old versions report a node up to three times: fence before, kernel, fence after.
            if cat != "Node" || !name.ends_with("_kernel_time") || provider.is_empty() {
                continue;
            }
            // Nodes may share a name, or have none; a node that ran twice is still one.
            if seen.insert((name, text("node_index"))) {
                let ops = placement.nodes.entry(provider.to_owned()).or_default();
                *ops.entry(op.to_owned()).or_default() += 1;
            }
        }
        Ok(placement)
    }

    /// The operators that run on the CPU though `provider` was meant to take the work, such as `Conv 3, MatMul 1`.
    #[must_use]
    pub fn heavy_on_cpu(&self, provider: Provider) -> Option<String> {
        let on_cpu = self.nodes.get(Provider::Cpu.runtime_name()).filter(|_| provider != Provider::Cpu)?;
        let heavy: Vec<_> =
            on_cpu.iter().filter(|(op, _)| is_heavy(op)).map(|(op, count)| format!("{op} {count}")).collect();
        (!heavy.is_empty()).then(|| heavy.join(", "))
    }
}

/// True for the operators of [`HEAVY`], their quantised and dynamically quantised forms, and what ONNX Runtime fuses
/// them into (`FusedConv`, `FusedMatMul`, `QLinearConv`, `DynamicQuantizeMatMul`).
fn is_heavy(op: &str) -> bool {
    let plain = ["QLinear", "Fused", "DynamicQuantize", "Q"].iter().find_map(|prefix| op.strip_prefix(prefix));
    HEAVY.contains(&op) || plain.is_some_and(|plain| HEAVY.contains(&plain))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The shape of a profile by ONNX Runtime 1.31 with the CUDA provider.
    const PROFILE: &str = r#"[
{"cat":"Session","pid":1,"tid":1,"dur":5,"ts":1,"ph":"X","name":"model_loading_uri","args":{}},
{"cat":"Node","pid":1,"tid":1,"dur":9,"ts":2,"ph":"X","name":"conv1_kernel_time","args":{"op_name":"Conv","provider":"CUDAExecutionProvider","node_index":"0"}},
{"cat":"Node","pid":1,"tid":1,"dur":9,"ts":2,"ph":"X","name":"conv1_fence_after","args":{"op_name":"Conv","node_index":"0"}},
{"cat":"Node","pid":1,"tid":1,"dur":9,"ts":3,"ph":"X","name":"s_kernel_time","args":{"op_name":"Shape","provider":"CPUExecutionProvider","node_index":"1"}},
{"cat":"Node","pid":1,"tid":1,"dur":9,"ts":3,"ph":"X","name":"c2_kernel_time","args":{"op_name":"FusedConv","provider":"CPUExecutionProvider","node_index":"2"}},
{"cat":"Node","pid":1,"tid":1,"dur":9,"ts":9,"ph":"X","name":"c2_kernel_time","args":{"op_name":"FusedConv","provider":"CPUExecutionProvider","node_index":"2"}}
]"#;

    #[test]
    fn a_profile_tells_each_node_once() {
        let placement = Placement::parse(PROFILE.as_bytes()).unwrap();
        assert_eq!(placement.nodes["CUDAExecutionProvider"], BTreeMap::from([("Conv".to_owned(), 1)]));
        assert_eq!(placement.nodes["CPUExecutionProvider"]["FusedConv"], 1);
        assert_eq!(placement.heavy_on_cpu(Provider::Cuda).as_deref(), Some("FusedConv 1"));
        assert_eq!(placement.heavy_on_cpu(Provider::Cpu), None);
    }

    #[test]
    fn light_operators_may_stay_on_the_cpu() {
        let light = PROFILE.replace("FusedConv", "Gather");
        assert_eq!(Placement::parse(light.as_bytes()).unwrap().heavy_on_cpu(Provider::Cuda), None);
        let cases = [("QLinearConv", true), ("QAttention", true), ("DynamicQuantizeMatMul", true), ("Concat", false)];
        for (op, expected) in cases {
            assert_eq!(is_heavy(op), expected, "{op}");
        }
    }

    #[test]
    fn what_is_no_profile_is_an_error() {
        for text in ["", "{}", "[{\"cat\": 3}]"] {
            assert!(Placement::parse(text.as_bytes()).is_err(), "{text}");
        }
    }
}
