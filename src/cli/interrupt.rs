//! Interrupts: Ctrl-C, a hang-up and a termination end the program with 130, and nothing temporary stays behind.
//!
//! A command that can wind down is asked to; a second request does not wait for it. Every other command ends at once.

use std::io::{self, Read};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::iterator::Signals;
use tempfile::TempDir;

use super::{Failure, INTERRUPTED};

/// What there is to do before the program may end.
struct Open {
    /// Holds everything temporary.
    folder: Option<PathBuf>,
    /// This program's call of itself that is at work.
    child: Option<Child>,
    /// Asks the command to wind down.
    wind_down: Option<Box<dyn FnOnce() + Send>>,
}

static OPEN: Mutex<Open> = Mutex::new(Open { folder: None, child: None, wind_down: None });

/// Never returns once the program is being ended.
fn open() -> MutexGuard<'static, Open> {
    OPEN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Listens from now on; all temporary files lie in the folder that is returned, as long as it is kept.
pub(super) fn listen() -> Result<Option<TempDir>, Failure> {
    // Who needs a temporary file says what is wrong with the system's folder.
    let folder = tempfile::Builder::new().prefix("slidestream-").tempdir().ok();
    if let Some(folder) = &folder {
        tempfile::env::override_temp_dir(folder.path()).ok();
        open().folder = Some(folder.path().to_owned());
    }
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGQUIT, SIGHUP]).map_err(|error| Failure {
        message: format!("no handler for interrupts: {error}"),
        hint: None,
        code: 1,
    })?;
    #[expect(clippy::disallowed_methods, reason = "it listens as long as the program runs")]
    std::thread::spawn(move || {
        for _ in signals.forever() {
            let wind_down = open().wind_down.take();
            match wind_down {
                Some(wind_down) => wind_down(),
                None => end(INTERRUPTED),
            }
        }
    });
    Ok(folder)
}

/// Lets the first interrupt call `wind_down` instead of ending the program.
pub(super) fn wind_down_by(wind_down: impl FnOnce() + Send + 'static) {
    open().wind_down = Some(Box::new(wind_down));
}

/// Waits for the end if the program is being ended: what fails by that is no error.
pub(super) fn wait_if_ending() {
    drop(open());
}

/// Ends the program at once, and leaves nothing temporary behind. Not in an orderly way, which would pull the ground from
/// under ONNX Runtime's threads.
pub(super) fn end(code: u8) -> ! {
    let mut open = open();
    if let Some(child) = &mut open.child {
        child.kill().and_then(|()| child.wait()).ok();
    }
    if let Some(folder) = &open.folder {
        // Under another name nobody puts anything into it any more.
        let leaving = folder.with_extension("leaving");
        std::fs::rename(folder, &leaving).and_then(|()| std::fs::remove_dir_all(&leaving)).ok();
    }
    signal_hook::low_level::exit(code.into())
}

/// Runs a command to its end, with what it writes to stdout; it ends with this program, and its temporary files too.
pub(super) fn run(command: &mut Command) -> io::Result<(ExitStatus, Vec<u8>)> {
    let (mut output, mut stdout) = (Vec::new(), None);
    {
        let mut open = open();
        if let Some(folder) = &open.folder {
            command.env("TMPDIR", folder);
        }
        let child = open.child.insert(command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?);
        std::mem::swap(&mut stdout, &mut child.stdout);
    }
    let read = stdout.map_or(Ok(0), |mut stdout| stdout.read_to_end(&mut output));
    let child = open().child.take();
    let status = child.map_or(Err(io::ErrorKind::NotFound.into()), |mut child| child.wait())?;
    read?;
    if status.code() == Some(INTERRUPTED.into()) {
        // A terminal tells both, and the other may hear it first.
        end(INTERRUPTED);
    }
    Ok((status, output))
}
