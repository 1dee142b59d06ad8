//! Finds and loads the two native libraries, ONNX Runtime and OpenSlide, and knows which was taken and why.
//!
//! Looked for in this order: the path set by [`set_paths`] (a flag), an environment variable, beside the executable,
//! `native/lib` (above the executable, then in the working directory), the system. The first that exists is taken; if
//! it can't be loaded that is an error, never a reason to try the next. One of each is loaded per process.

use std::env;
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// One of the two native libraries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Library {
    /// Runs the models.
    OnnxRuntime,
    /// Reads the slides.
    OpenSlide,
}

impl Library {
    /// The environment variable that names the library file.
    #[must_use]
    pub fn variable(self) -> &'static str {
        match self {
            Self::OnnxRuntime => "ORT_DYLIB_PATH",
            Self::OpenSlide => "OPENSLIDE_LIBRARY",
        }
    }

    /// What the file's name starts with; a version may follow.
    fn file_stem(self) -> &'static str {
        match self {
            Self::OnnxRuntime => "libonnxruntime.so",
            Self::OpenSlide => "libopenslide.so",
        }
    }
}

impl fmt::Display for Library {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OnnxRuntime => "ONNX Runtime",
            Self::OpenSlide => "OpenSlide",
        })
    }
}

/// Why a library file was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Named by [`set_paths`].
    Setting,
    /// Named by the library's environment variable.
    Variable,
    /// Lies in the executable's own folder, or in `lib` beside it.
    BesideExecutable,
    /// Put into `native/lib` by `native/setup.sh`.
    NativeLib,
    /// Left to the system's search.
    System,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Setting => "named by a flag",
            Self::Variable => "named by the environment",
            Self::BesideExecutable => "beside the executable",
            Self::NativeLib => "in native/lib",
            Self::System => "from the system",
        })
    }
}

/// A library that was loaded.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// The file, or a bare name where the system's search found it.
    pub path: PathBuf,
    /// Why this one.
    pub origin: Origin,
    /// The library's own version, such as `1.31.1`.
    pub version: String,
}

/// A native library that is missing or can't be loaded.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{library} can't be loaded from {} ({origin}): {reason}", path.display())]
pub struct NativeError {
    /// Which library.
    pub library: Library,
    /// The file or name that was tried.
    pub path: PathBuf,
    /// Why that one was tried.
    pub origin: Origin,
    /// The loader's message.
    pub reason: String,
}

impl NativeError {
    /// How to put it right.
    #[must_use]
    pub fn hint(&self) -> String {
        let variable = self.library.variable();
        match self.origin {
            Origin::System => format!("run native/setup.sh, or set {variable} to the library file"),
            _ => format!("give {variable} a library file for this machine, or unset it and run native/setup.sh"),
        }
    }
}

/// Library files named by the user; what is `None` is looked for.
#[derive(Clone, Debug, Default)]
pub struct Paths {
    /// ONNX Runtime's library file.
    pub onnx_runtime: Option<PathBuf>,
    /// OpenSlide's library file.
    pub openslide: Option<PathBuf>,
}

static PATHS: OnceLock<Paths> = OnceLock::new();

// Dropping the environment would end the runtime, so it lives as long as the process.
static ENVIRONMENT: OnceLock<ort::environment::Environment> = OnceLock::new();

/// Names library files; has an effect only once, and only before the first library is loaded.
pub fn set_paths(paths: Paths) {
    PATHS.get_or_init(|| paths);
}

/// Loads OpenSlide for the rest of the process; later calls return the first one's answer.
///
/// # Errors
/// [`NativeError`] if none is found or the one found can't be loaded.
pub fn openslide() -> Result<&'static Loaded, NativeError> {
    static LOADED: OnceLock<Result<Loaded, NativeError>> = OnceLock::new();
    let result = LOADED.get_or_init(|| {
        load(Library::OpenSlide, |path| {
            openslide_sys::load(path)?;
            openslide_rs::OpenSlide::version().map_err(|error| error.to_string())
        })
    });
    result.as_ref().map_err(Clone::clone)
}

/// Loads ONNX Runtime for the rest of the process; later calls return the first one's answer.
///
/// Its telemetry is switched off; that it does not even open its files for it takes `ORT_DISABLE_TELEMETRY=1` in the
/// environment, which the program sets for itself.
///
/// # Errors
/// [`NativeError`] if none is found, or the one found can't be loaded or is older than 1.22.
pub fn onnx_runtime() -> Result<&'static Loaded, NativeError> {
    static LOADED: OnceLock<Result<Loaded, NativeError>> = OnceLock::new();
    let result = LOADED.get_or_init(|| {
        load(Library::OnnxRuntime, |path| {
            let builder = ort::init_from(path).map_err(|error| error.to_string())?;
            let environment = builder.with_name("slidestream").with_telemetry(false).build();
            ENVIRONMENT.set(environment.map_err(|error| error.to_string())?).ok();
            onnx_runtime_version(path)
        })
    });
    result.as_ref().map_err(Clone::clone)
}

/// The environment that every session of the process belongs to; loads ONNX Runtime first.
///
/// # Errors
/// As [`onnx_runtime`].
pub(crate) fn onnx_environment() -> Result<&'static ort::environment::Environment, NativeError> {
    let loaded = onnx_runtime()?;
    ENVIRONMENT.get().ok_or_else(|| NativeError {
        library: Library::OnnxRuntime,
        path: loaded.path.clone(),
        origin: loaded.origin,
        reason: "it has no environment".to_owned(),
    })
}

/// The version as the library at `path` itself tells it.
fn onnx_runtime_version(path: &Path) -> Result<String, String> {
    // SAFETY: the file was loaded before, and every ONNX Runtime exports this function with this signature; the
    // string it leads to is static.
    #[expect(unsafe_code, reason = "ort has no call for the library's version")]
    unsafe {
        let library = libloading::Library::new(path).map_err(|error| error.to_string())?;
        let base = library
            .get::<unsafe extern "C" fn() -> *const ort::sys::OrtApiBase>(b"OrtGetApiBase\0")
            .map_err(|error| error.to_string())?;
        Ok(std::ffi::CStr::from_ptr(((*base()).GetVersionString)()).to_string_lossy().into_owned())
    }
}

fn load(library: Library, open: impl Fn(&Path) -> Result<String, String>) -> Result<Loaded, NativeError> {
    let paths = PATHS.get_or_init(Paths::default);
    let setting = match library {
        Library::OnnxRuntime => paths.onnx_runtime.clone(),
        Library::OpenSlide => paths.openslide.clone(),
    };
    let executable = env::current_exe().ok();
    let working_directory = env::current_dir().ok();
    let places = Places {
        setting,
        variable: env::var_os(library.variable()).filter(|value| !value.is_empty()),
        executable: executable.as_deref(),
        working_directory: working_directory.as_deref(),
    };
    let candidates = match places.find(library) {
        Some((path, origin)) => vec![(path, origin)],
        None => system_names(library).into_iter().map(|name| (name, Origin::System)).collect(),
    };
    let mut failure = None;
    for (path, origin) in candidates {
        match open(&path) {
            Ok(version) => return Ok(Loaded { path, origin, version }),
            // The first name is the one to report: the later ones are older sonames.
            Err(reason) => failure = failure.or(Some(NativeError { library, path, origin, reason })),
        }
    }
    Err(failure.unwrap_or_else(|| NativeError {
        library,
        path: PathBuf::from(library.file_stem()),
        origin: Origin::System,
        reason: "no such library".to_owned(),
    }))
}

/// Everything that a search looks at, so that it can be tested without touching the process.
struct Places<'a> {
    setting: Option<PathBuf>,
    variable: Option<OsString>,
    executable: Option<&'a Path>,
    working_directory: Option<&'a Path>,
}

impl Places<'_> {
    fn find(&self, library: Library) -> Option<(PathBuf, Origin)> {
        if let Some(path) = &self.setting {
            return Some((path.clone(), Origin::Setting));
        }
        if let Some(path) = &self.variable {
            return Some((PathBuf::from(path), Origin::Variable));
        }
        let folder = self.executable.and_then(Path::parent);
        let beside = folder.into_iter().flat_map(|folder| [folder.to_owned(), folder.join("lib")]);
        let above = folder.into_iter().flat_map(Path::ancestors).chain(self.working_directory);
        beside
            .map(|folder| (folder, Origin::BesideExecutable))
            .chain(above.map(|folder| (folder.join("native/lib"), Origin::NativeLib)))
            .find_map(|(folder, origin)| Some((newest(&folder, library.file_stem())?, origin)))
    }
}

/// The file of `folder` whose name starts with `stem`, the highest version if there are several.
fn newest(folder: &Path, stem: &str) -> Option<PathBuf> {
    let files = std::fs::read_dir(folder).ok()?.flatten().map(|entry| entry.path());
    let named = |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(stem));
    files.filter(named).max()
}

fn system_names(library: Library) -> Vec<PathBuf> {
    let names: &[&str] = match library {
        Library::OnnxRuntime => &["libonnxruntime.so", "libonnxruntime.so.1"],
        Library::OpenSlide => &["libopenslide.so.1", "libopenslide.so.0", "libopenslide.so"],
    };
    names.iter().map(PathBuf::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn libraries_are_looked_for_in_the_stated_order() {
        let root = tempfile::tempdir().unwrap();
        let bin = root.path().join("target/release");
        let native = root.path().join("native/lib");
        fs::create_dir_all(&bin).unwrap();
        fs::create_dir_all(&native).unwrap();
        let executable = bin.join("slidestream");
        let mut places =
            Places { setting: None, variable: None, executable: Some(&executable), working_directory: None };
        assert_eq!(places.find(Library::OnnxRuntime), None);

        let in_native = native.join("libonnxruntime.so.1.31.1");
        fs::write(native.join("libonnxruntime.so.1.22.0"), "").unwrap();
        fs::write(&in_native, "").unwrap();
        assert_eq!(places.find(Library::OnnxRuntime), Some((in_native, Origin::NativeLib)));
        assert_eq!(places.find(Library::OpenSlide), None);

        let beside = bin.join("libonnxruntime.so");
        fs::write(&beside, "").unwrap();
        assert_eq!(places.find(Library::OnnxRuntime), Some((beside, Origin::BesideExecutable)));

        places.variable = Some("/opt/a.so".into());
        assert_eq!(places.find(Library::OnnxRuntime), Some(("/opt/a.so".into(), Origin::Variable)));
        places.setting = Some("/opt/b.so".into());
        assert_eq!(places.find(Library::OnnxRuntime), Some(("/opt/b.so".into(), Origin::Setting)));
    }

    #[test]
    fn both_libraries_load_and_tell_their_version() {
        assert!(openslide().unwrap().version.starts_with('4'));
        assert!(onnx_runtime().unwrap().version.starts_with("1."));
    }
}
