//! The files that a command will write, tried before its work: none is a file that it reads, and their folder takes them.

use std::collections::BTreeSet;
use std::path::{Component, Path, PathBuf};

use super::ExperimentError;
use crate::inference::ModelCard;
use crate::output;

/// Makes sure that `written` can be written into `folder`, and that none of them is among `read`.
pub(super) fn prepare(
    folder: &Path,
    written: &[PathBuf],
    read: impl IntoIterator<Item = PathBuf>,
) -> Result<(), ExperimentError> {
    let read: BTreeSet<PathBuf> = read.into_iter().map(|path| resolved(&path)).collect();
    for path in written {
        let in_the_way = |what| Err(ExperimentError::InTheWay { path: path.clone(), what });
        if read.contains(&resolved(path)) {
            return in_the_way("is an input, and a result would be written over it");
        }
        if path.is_dir() {
            return in_the_way("is a folder where a result is to be written");
        }
    }
    Ok(output::try_folder(folder)?)
}

/// The files of a model: its card and its weights.
pub(super) fn of_model(card: &ModelCard) -> impl Iterator<Item = PathBuf> {
    std::iter::once(card.path.clone()).chain(card.variants.values().map(|variant| variant.file.clone()))
}

/// Where a path leads, links followed, whether or not all of it exists: what doesn't is taken for folders yet to be made.
pub(super) fn resolved(path: &Path) -> PathBuf {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let mut resolved = PathBuf::new();
    for part in path.components() {
        if part == Component::ParentDir {
            resolved.pop();
        } else {
            resolved.push(part);
            resolved = resolved.canonicalize().unwrap_or(resolved);
        }
    }
    resolved
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn a_path_is_resolved_before_it_exists() {
        let folder = tempfile::tempdir().unwrap();
        let real = folder.path().canonicalize().unwrap();
        let at = |name: &str| resolved(&folder.path().join(name));
        fs::create_dir(real.join("data")).unwrap();
        assert_eq!(at("none/../data/./a.png"), real.join("data/a.png"));
        assert_eq!(at("data/none/deep/../../b"), real.join("data/b"));
        #[cfg(unix)]
        {
            fs::create_dir(real.join("data/deep")).unwrap();
            std::os::unix::fs::symlink(real.join("data/deep"), real.join("link")).unwrap();
            assert_eq!(at("link/../a.png"), real.join("data/a.png"));
        }
    }

    #[test]
    fn no_result_takes_the_place_of_an_input() {
        let folder = tempfile::tempdir().unwrap();
        let (out, input) = (folder.path().join("out"), folder.path().join("in.csv"));
        fs::write(&input, "").unwrap();
        let results = [out.join("a.json"), out.join("a.csv")];
        prepare(&out, &results, [input.clone()]).unwrap();
        // The results of an earlier run may lie there.
        fs::create_dir(&out).unwrap();
        results.iter().for_each(|path| fs::write(path, "").unwrap());
        prepare(&out, &results, [input.clone()]).unwrap();
        let error = prepare(&out, &results, [input, folder.path().join("none/../out/a.csv")]).unwrap_err();
        assert!(error.to_string().ends_with("a.csv: is an input, and a result would be written over it"), "{error}");
        fs::create_dir(out.join("b.csv")).unwrap();
        let error = prepare(&out, &[out.join("b.csv")], []).unwrap_err();
        assert!(error.to_string().contains("b.csv: is a folder"), "{error}");
    }
}
