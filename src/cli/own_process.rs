//! This program's calls of itself: what is measured in a process of its own has its own memory, and ends no other.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Seek};
use std::process::{Command, ExitStatus};

use serde::de::DeserializeOwned;

use super::interrupt;

/// What a system ends that takes too much memory.
#[cfg(unix)]
const KILLED: i32 = signal_hook::consts::SIGKILL;

/// This very command line with one more option: what it prints.
pub(super) fn again<T: DeserializeOwned>(flag: &str, value: impl AsRef<OsStr>) -> Result<T, String> {
    let mut command = own()?;
    command.args(std::env::args_os().skip(1)).arg(flag).arg(value);
    call(&mut command)
}

/// Another command of this program: the JSON that it prints.
pub(super) fn other<T: DeserializeOwned>(args: impl IntoIterator<Item = String>) -> Result<T, String> {
    let mut command = own()?;
    call(command.args(args))
}

fn own() -> Result<Command, String> {
    Ok(Command::new(std::env::current_exe().map_err(|error| broken(&error))?))
}

fn call<T: DeserializeOwned>(command: &mut Command) -> Result<T, String> {
    let mut run = || {
        let mut said = tempfile::tempfile()?;
        let (status, output) = interrupt::run(command.stderr(said.try_clone()?))?;
        Ok((status, output, text(&mut said)?))
    };
    let (status, output, said) = run().map_err(|error: io::Error| broken(&error))?;
    if !status.success() {
        let error = said.lines().find_map(|line| line.strip_prefix("error: "));
        return Err(error.map_or_else(|| why(status), str::to_owned));
    }
    serde_json::from_slice(&output).map_err(|error| broken(&error))
}

fn text(file: &mut File) -> io::Result<String> {
    let mut bytes = Vec::new();
    file.rewind()?;
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Of a process that said nothing.
fn why(status: ExitStatus) -> String {
    #[cfg(unix)]
    if std::os::unix::process::ExitStatusExt::signal(&status) == Some(KILLED) {
        return "it was killed by the system, most likely because memory did not suffice".to_owned();
    }
    format!("it ended with {status}")
}

fn broken(error: &dyn std::fmt::Display) -> String {
    format!("slidestream can't call itself: {error}")
}

#[cfg(all(test, unix))]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    #[test]
    fn a_process_that_was_killed_is_explained() {
        assert!(why(ExitStatus::from_raw(9)).contains("memory did not suffice"));
        assert_eq!(why(ExitStatus::from_raw(3 << 8)), "it ended with exit status: 3");
    }
}
