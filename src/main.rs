//! The command line of slidestream.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::main()
}
