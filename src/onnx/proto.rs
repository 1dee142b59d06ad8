//! The types of `proto/onnx.proto` (ONNX 1.23.1), as prost generates them.
#![expect(missing_docs, reason = "generated; proto/onnx.proto documents every field")]
#![expect(clippy::all, reason = "generated")]

include!(concat!(env!("OUT_DIR"), "/onnx.rs"));
