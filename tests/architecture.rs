//! Holds the dependency direction of the modules, and who may use which outside crate.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::{Path, PathBuf};

/// What each module of the library may use of the others.
const MAY_USE: &[(&str, &[&str])] = &[
    ("geometry", &[]),
    ("native", &[]),
    ("onnx", &[]),
    ("pipeline", &[]),
    ("measure", &[]),
    ("report", &["measure"]),
    ("tiff", &[]),
    ("inference", &["geometry", "native", "onnx"]),
    ("output", &["geometry", "tiff"]),
    ("slide", &["geometry", "native", "tiff"]),
    ("stitch", &["geometry"]),
    ("tissue", &["geometry", "slide"]),
    ("engine", &["geometry", "inference", "native", "output", "pipeline", "report", "slide", "stitch", "tissue"]),
    (
        "experiment",
        &[
            "engine",
            "geometry",
            "inference",
            "measure",
            "native",
            "onnx",
            "output",
            "pipeline",
            "report",
            "slide",
            "stitch",
            "tissue",
        ],
    ),
];

/// Crates that only some modules may name.
const CONFINED: &[(&str, &[&str])] = &[
    ("clap", &["cli"]),
    ("indicatif", &["cli"]),
    ("signal_hook", &["cli"]),
    ("ort", &["inference", "native"]),
    ("openslide_rs", &["slide", "native"]),
    ("openslide_sys", &["native"]),
    ("prost", &["onnx"]),
    ("rust_hdf5", &["output"]),
    ("libloading", &["native"]),
    ("safetensors", &["onnx"]),
    ("rand", &["experiment"]),
];

/// Files that are compiled for tests alone, which may use what they like.
const FOR_TESTS: &[&str] = &["onnx/passes/fixtures.rs", "report/bench/example.rs", "report/compare/example.rs"];

fn sources(of: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(of).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs")
            && !FOR_TESTS.iter().any(|file| path.ends_with(file))
        {
            files.push(path);
        }
    }
    files
}

/// The top-level module that a file belongs to.
fn module_of(file: &Path) -> String {
    let below = file.strip_prefix(source_folder()).unwrap();
    let first = below.components().next().unwrap().as_os_str().to_string_lossy().into_owned();
    first.trim_end_matches(".rs").to_owned()
}

fn source_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

/// The code without comments and without the tests at its end, which may use what they like.
fn code_of(file: &Path) -> String {
    let text = fs::read_to_string(file).unwrap();
    let code = text.split("#[cfg(test)]\nmod tests").next().unwrap();
    code.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n")
}

/// Names that follow `crate::` in the code.
fn used_modules(code: &str) -> Vec<String> {
    let names = code.split("crate::").skip(1);
    let mut found = Vec::new();
    for rest in names {
        if let Some(list) = rest.strip_prefix('{') {
            let list = list.split('}').next().unwrap();
            found.extend(list.split(',').map(|item| item.trim().split("::").next().unwrap().to_owned()));
        } else {
            found.push(rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect());
        }
    }
    found.retain(|name| !name.is_empty());
    found
}

#[test]
fn modules_use_only_what_lies_below_them() {
    let mut wrong = Vec::new();
    for file in sources(&source_folder()) {
        let module = module_of(&file);
        if ["lib", "main", "cli"].contains(&module.as_str()) {
            continue;
        }
        let (_, allowed) = MAY_USE
            .iter()
            .find(|(name, _)| *name == module)
            .unwrap_or_else(|| panic!("module {module} has no line in MAY_USE"));
        for used in used_modules(&code_of(&file)) {
            if used != module && !allowed.contains(&used.as_str()) {
                wrong.push(format!("{} uses {used}", file.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Whether a path in the code starts with the crate: a longer name that ends alike (`report` for `ort`) or a module of
/// ours with the crate's name (`inference::ort`) does not count.
fn names_crate(code: &str, name: &str) -> bool {
    let starts_path = |index: usize| {
        let before = code[..index].chars().next_back();
        !before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':')
    };
    code.match_indices(&format!("{name}::")).any(|(index, _)| starts_path(index))
        || code.contains(&format!("use {name};"))
}

#[test]
fn outside_crates_stay_where_they_belong() {
    let mut wrong = Vec::new();
    for file in sources(&source_folder()) {
        let (module, code) = (module_of(&file), code_of(&file));
        for (name, places) in CONFINED {
            if names_crate(&code, name) && !places.contains(&module.as_str()) {
                wrong.push(format!("{} names {name}", file.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn every_file_says_its_job_in_its_first_line() {
    let silent: Vec<PathBuf> = sources(&source_folder())
        .into_iter()
        .filter(|file| !fs::read_to_string(file).unwrap().starts_with("//!"))
        .collect();
    assert!(silent.is_empty(), "{silent:#?}");
}

#[test]
fn the_library_prints_nothing() {
    let mut printing = Vec::new();
    for file in sources(&source_folder()) {
        let code = code_of(&file);
        if ["print!(", "println!(", "eprint!(", "eprintln!(", "dbg!("].iter().any(|call| code.contains(call)) {
            printing.push(file);
        }
    }
    assert!(printing.is_empty(), "{printing:#?}");
}
