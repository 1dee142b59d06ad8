//! Optimised graphs kept for later runs: of a large transformer, ONNX Runtime optimises the graph for longer than it takes
//! to read it.
//!
//! A graph lies under the hash of all that it was made of: the model, ONNX Runtime, the variant's settings and the
//! processor, since it holds nodes that are for this machine alone.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use sha2::{Digest, Sha256};
use tempfile::TempPath;

use crate::inference::card::Variant;
use crate::inference::device::{self, CpuInfo};
use crate::inference::error::SessionError;
use crate::native;

/// Models of more bytes are not kept: ONNX Runtime writes a graph into a single file, which ends at 2 GiB.
const MOST_BYTES: u64 = 2_000_000_000;

/// The place of one model's optimised graph.
#[derive(Debug)]
pub(super) struct GraphCache {
    folder: PathBuf,
    file: PathBuf,
    /// Whether it was there when the model was loaded.
    was_kept: bool,
    /// Of several sessions one keeps its graph.
    is_begun: AtomicBool,
}

impl GraphCache {
    /// The place in `folder`, which is made if it is missing. `is_whole`: the model's weights lie in its own file.
    pub(super) fn of(folder: &Path, variant: &Variant, is_whole: bool) -> Result<Self, SessionError> {
        let prepare = || {
            if !is_whole {
                // ONNX Runtime would look for them beside the graph.
                return Err(io::Error::other("the model has weights in files of their own"));
            }
            if fs::metadata(&variant.file)?.len() > MOST_BYTES {
                return Err(io::Error::other("the model is too large: its graph would not fit a file"));
            }
            fs::create_dir_all(folder)
        };
        prepare().map_err(not_kept(folder))?;
        let runtime = native::onnx_runtime()?.version.clone();
        let CpuInfo { name, features, .. } = device::list().cpu;
        let made_of = format!("{}\n{runtime}\n{:?}\n{name} {features:?}", variant.sha256, variant.options);
        let hash: String = Sha256::digest(made_of).iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        let stem = variant.file.file_stem().unwrap_or_default().to_string_lossy();
        let file = folder.join(format!("{stem}-{hash}.onnx"));
        let was_kept = file.is_file();
        Ok(Self { folder: folder.to_owned(), file, was_kept, is_begun: AtomicBool::new(was_kept) })
    }

    /// The graph, if an earlier run has kept it.
    pub(super) fn kept(&self) -> Option<&Path> {
        self.was_kept.then_some(&self.file)
    }

    /// Where a session writes its graph, to be [kept](Self::keep); `None` if another one does.
    pub(super) fn begin(&self) -> Result<Option<TempPath>, SessionError> {
        if self.is_begun.swap(true, Ordering::Relaxed) {
            return Ok(None);
        }
        let mut builder = tempfile::Builder::new();
        builder.prefix(".graph-").suffix(".onnx");
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            // A temporary file is private by default; colleagues may share the folder.
            builder.permissions(fs::Permissions::from_mode(0o666));
        }
        let temporary = builder.tempfile_in(&self.folder);
        Ok(Some(temporary.map_err(not_kept(&self.folder))?.into_temp_path()))
    }

    /// Gives a whole graph its name.
    pub(super) fn keep(&self, temporary: TempPath) -> Result<(), SessionError> {
        File::open(&temporary).and_then(|file| file.sync_all()).map_err(not_kept(&self.folder))?;
        temporary.persist(&self.file).map_err(|error| not_kept(&self.folder)(error.error))
    }
}

fn not_kept(folder: &Path) -> impl Fn(io::Error) -> SessionError {
    |source| SessionError::GraphCache { folder: folder.to_owned(), source }
}
