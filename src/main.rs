//! The command line of slidestream.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    // SAFETY: no other thread runs yet.
    #[expect(
        unsafe_code,
        reason = "ONNX Runtime reads it when it is loaded, and otherwise keeps accounts for its maker"
    )]
    unsafe {
        std::env::set_var("ORT_DISABLE_TELEMETRY", "1");
    }
    cli::main()
}
