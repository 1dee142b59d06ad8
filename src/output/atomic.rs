//! A file that appears whole or not at all.
//!
//! The bytes go to a hidden temporary file in the target's folder (a rename is atomic only within one file system);
//! [`AtomicFile::commit`] syncs it, renames it over the target and syncs the folder. Without a commit the temporary file
//! is removed, and what a killed process leaves behind can't be taken for a result: see [`is_partial`].

use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use tempfile::TempPath;

use super::OutputError;

/// Bytes gathered before a write reaches the system.
const BUFFER_BYTES: usize = 256 * 1024;

/// A file under a temporary name, to be committed under its own.
///
/// It is buffered; errors of its `Write` and `Seek` carry no path, which [`OutputError`] adds.
#[derive(Debug)]
pub struct AtomicFile {
    writer: BufWriter<File>,
    temporary: TempPath,
    target: PathBuf,
    position: u64,
    /// Hash of all bytes so far; `None` once an earlier byte may have been overwritten.
    hasher: Option<Sha256>,
}

/// A file that was committed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// Its final path.
    pub path: PathBuf,
    /// Hash of its content, 64 lower-case hexadecimal digits.
    pub sha256: String,
    /// Its length.
    pub length_bytes: u64,
}

impl AtomicFile {
    /// Starts a file that will be `target`; missing parent folders are made.
    ///
    /// # Errors
    /// [`OutputError::Write`] if the folder or the temporary file can't be made.
    pub fn create(target: &Path) -> Result<Self, OutputError> {
        let wrap = |source| OutputError::Write { path: target.to_owned(), source };
        let name = target.file_name().ok_or_else(|| wrap(io::ErrorKind::InvalidInput.into()))?;
        fs::create_dir_all(folder_of(target)).map_err(wrap)?;
        let mut prefix = std::ffi::OsString::from(".");
        prefix.push(name);
        prefix.push(".");
        let mut builder = tempfile::Builder::new();
        builder.prefix(&prefix).suffix(".partial");
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            // A temporary file is private by default, but this one becomes a result that colleagues read.
            builder.permissions(fs::Permissions::from_mode(0o666));
        }
        let (file, temporary) = builder.tempfile_in(folder_of(target)).map_err(wrap)?.into_parts();
        Ok(Self::over(file, temporary, target))
    }

    /// The same for a file whose start is written last: its hash is taken when it is complete, not while it is written.
    pub(super) fn hashed_at_end(self) -> Self {
        Self { hasher: None, ..self }
    }

    /// The final path.
    #[must_use]
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// The temporary path, for a library that must open the file itself.
    ///
    /// What is written there other than through `self` is seen by [`commit_foreign`](Self::commit_foreign).
    pub(super) fn temporary_path(&self) -> &Path {
        &self.temporary
    }

    /// Puts the file under its final name, synced to the disk.
    ///
    /// # Errors
    /// [`OutputError::Write`]; the temporary file is then removed.
    pub fn commit(mut self) -> Result<Written, OutputError> {
        let sha256 = self.seal().map_err(OutputError::write(&self.target))?;
        self.publish(sha256)
    }

    /// [`commit`](Self::commit) for a file that was written through [`temporary_path`](Self::temporary_path).
    pub(super) fn commit_foreign(mut self) -> Result<Written, OutputError> {
        self.hasher = None;
        self.commit()
    }

    fn over(file: File, temporary: TempPath, target: &Path) -> Self {
        Self {
            writer: BufWriter::with_capacity(BUFFER_BYTES, file),
            temporary,
            target: target.to_owned(),
            position: 0,
            hasher: Some(Sha256::new()),
        }
    }

    /// Flushes, syncs and hashes.
    fn seal(&mut self) -> io::Result<(String, u64)> {
        self.writer.flush()?;
        let hasher = self.hasher.take();
        // Both take long for a large file: the one waits for the disk, the other for a core.
        let (synced, hash) = rayon::join(
            || self.writer.get_ref().sync_all(),
            || match hasher {
                Some(hasher) => Ok((hex(&hasher.finalize()), self.position)),
                None => hash_file(&self.temporary),
            },
        );
        synced.and(hash)
    }

    fn publish(self, (sha256, length_bytes): (String, u64)) -> Result<Written, OutputError> {
        let Self { temporary, target, .. } = self;
        temporary.persist(&target).map_err(|error| OutputError::write(&target)(error.error))?;
        // Without this, a power cut may undo the rename though the content is on the disk.
        #[cfg(unix)]
        File::open(folder_of(&target)).and_then(|folder| folder.sync_all()).map_err(OutputError::write(&target))?;
        Ok(Written { path: target, sha256, length_bytes })
    }
}

impl Write for AtomicFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.writer.write(bytes)?;
        self.position += written as u64;
        if let Some(hasher) = &mut self.hasher {
            hasher.update(&bytes[..written]);
        }
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.writer.flush()
    }
}

impl Seek for AtomicFile {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let position = self.writer.seek(to)?;
        if position != self.position {
            self.hasher = None;
        }
        self.position = position;
        Ok(position)
    }

    fn stream_position(&mut self) -> io::Result<u64> {
        Ok(self.position)
    }
}

/// Writes a small file atomically.
///
/// # Errors
/// [`OutputError::Write`] naming `path`.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<Written, OutputError> {
    let mut file = AtomicFile::create(path)?;
    file.write_all(bytes).map_err(OutputError::write(path))?;
    file.commit()
}

/// Tries that files can be written into a folder, which need not exist yet, and leaves nothing behind. It is cheap, so that
/// it stands before long work whose results would otherwise be lost.
///
/// # Errors
/// [`OutputError::Write`] naming `folder`.
pub fn try_folder(folder: &Path) -> Result<(), OutputError> {
    let is_missing = |path: &&Path| !path.as_os_str().is_empty() && !path.exists();
    let missing: Vec<&Path> = folder.ancestors().take_while(is_missing).collect();
    let mut builder = tempfile::Builder::new();
    builder.prefix(".trial.").suffix(".partial");
    let tried = fs::create_dir_all(folder).and_then(|()| builder.tempfile_in(folder)).map(drop);
    // The deepest comes first, and none that holds something is removed.
    for folder in missing {
        fs::remove_dir(folder).ok();
    }
    tried.map_err(OutputError::write(folder))
}

/// Whether `path` is named like the remains of an [`AtomicFile`] that was never committed.
#[must_use]
pub fn is_partial(path: &Path) -> bool {
    path.file_name()
        .and_then(|name| name.to_str())
        .is_some_and(|name| name.starts_with('.') && name.ends_with(".partial"))
}

/// The folder of a file; a bare name lies in the current one.
fn folder_of(file: &Path) -> &Path {
    file.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn hash_file(path: &Path) -> io::Result<(String, u64)> {
    let mut file = File::open(path)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut length = 0;
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok((hex(&hasher.finalize()), length)),
            count => {
                hasher.update(&buffer[..count]);
                length += count as u64;
            }
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    bytes
        .iter()
        .flat_map(|byte| [DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]])
        .map(char::from)
        .collect()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::error::Error;

    const ABC_SHA256: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    /// An [`AtomicFile`] on a device that is always full.
    #[cfg(target_os = "linux")]
    pub(crate) fn on_full_disk(folder: &Path, target: &Path) -> AtomicFile {
        let temporary = tempfile::NamedTempFile::new_in(folder).unwrap().into_temp_path();
        let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        AtomicFile::over(full, temporary, target)
    }

    fn names_in(folder: &Path) -> Vec<String> {
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn commit_makes_folders_and_returns_the_hash() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("a/b/x.txt");
        let written = write_atomic(&target, b"abc").unwrap();
        assert_eq!(written, Written { path: target.clone(), sha256: ABC_SHA256.into(), length_bytes: 3 });
        assert_eq!(fs::read(&target).unwrap(), b"abc");
        assert_eq!(names_in(target.parent().unwrap()), ["x.txt"]);
    }

    #[test]
    fn an_overwritten_byte_is_hashed_as_it_lies_on_the_disk() {
        let folder = tempfile::tempdir().unwrap();
        let mut file = AtomicFile::create(&folder.path().join("x")).unwrap();
        file.write_all(b"xbc").unwrap();
        file.seek(SeekFrom::Start(0)).unwrap();
        file.write_all(b"a").unwrap();
        let written = file.commit().unwrap();
        assert_eq!((written.sha256.as_str(), written.length_bytes), (ABC_SHA256, 3));
    }

    #[test]
    fn drop_leaves_the_old_file_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("x.txt");
        write_atomic(&target, b"old").unwrap();
        let mut file = AtomicFile::create(&target).unwrap();
        file.write_all(b"new").unwrap();
        assert!(is_partial(file.temporary_path()));
        assert!(!is_partial(&target));
        drop(file);
        assert_eq!(names_in(folder.path()), ["x.txt"]);
        assert_eq!(fs::read(&target).unwrap(), b"old");
    }

    #[cfg(unix)]
    #[test]
    fn a_result_is_readable_as_the_umask_allows() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let plain = folder.path().join("plain");
        fs::write(&plain, b"").unwrap();
        let written = write_atomic(&folder.path().join("x"), b"").unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(mode(&written.path), mode(&plain));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_names_the_file_and_the_way_out() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("map.tif");
        let mut file = on_full_disk(folder.path(), &target);
        file.write_all(b"abc").unwrap();
        let error = file.commit().unwrap_err();
        assert!(error.to_string().contains("map.tif"), "{error}");
        assert!(error.source().unwrap().to_string().contains("No space left"));
        assert_eq!(error.hint(), Some("free space or choose another `out`"));
        assert!(names_in(folder.path()).is_empty());
    }

    #[test]
    fn a_folder_is_tried_and_nothing_stays_behind() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("a/b");
        try_folder(&out).unwrap();
        try_folder(&folder.path().join("c/../d")).unwrap();
        assert!(names_in(folder.path()).is_empty());
        fs::create_dir_all(&out).unwrap();
        try_folder(&out).unwrap();
        assert!(out.is_dir() && names_in(&out).is_empty());
        fs::write(out.join("file"), b"").unwrap();
        for name in ["file", "file/below"] {
            let error = try_folder(&out.join(name)).unwrap_err();
            assert!(error.to_string().ends_with(&format!("{name}: can't be written")), "{error}");
            assert_eq!(error.hint(), Some("choose another `out`: a file or folder of that name is in the way"));
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_folder_that_takes_no_files_is_refused() {
        let error = try_folder(Path::new("/proc/self")).unwrap_err();
        assert!(error.to_string().contains("/proc/self: can't be written"), "{error}");
    }

    #[test]
    fn a_file_in_place_of_the_folder_is_named() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("out"), b"").unwrap();
        let error = AtomicFile::create(&folder.path().join("out/x.csv")).unwrap_err();
        assert!(error.to_string().contains("x.csv"));
        assert_eq!(error.hint(), Some("choose another `out`: a file or folder of that name is in the way"));
    }
}
