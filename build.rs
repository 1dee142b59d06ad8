//! Turns the official ONNX schema into Rust types, without protoc.

use std::error::Error;

const SCHEMA: &str = "src/onnx/proto/onnx.proto";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed={SCHEMA}");
    let schema = protox::compile([SCHEMA], ["src/onnx/proto"])?;
    // The schema's comments are written for protobuf: as Rust documentation they have broken links and code blocks.
    prost_build::Config::new().disable_comments(["."]).compile_fds(schema)?;
    Ok(())
}
