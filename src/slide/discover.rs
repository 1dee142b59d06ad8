//! The slides below a folder.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use walkdir::{DirEntry, WalkDir};

use super::{Reader, Slide, SlideError, detect, dicom};

/// What [`discover`] found.
#[derive(Debug, Default)]
pub struct Discovery {
    /// One path per slide, sorted.
    pub slides: Vec<PathBuf>,
    /// What couldn't be looked at; the rest was searched all the same.
    pub errors: Vec<SlideError>,
}

/// Finds every slide below `folder`, of any format that can be read.
///
/// Symbolic links are followed. The folder of data files beside a `.mrxs` file is not entered. The files of one DICOM
/// series in one folder are one slide, for which its first file that opens stands.
#[must_use]
pub fn discover(folder: impl AsRef<Path>) -> Discovery {
    let mut found = Discovery::default();
    let mut series: BTreeMap<(PathBuf, String), Vec<PathBuf>> = BTreeMap::new();
    let walk = WalkDir::new(folder).follow_links(true).sort_by_file_name().into_iter();
    for entry in walk.filter_entry(|entry| !is_mirax_data(entry)) {
        let path = match entry {
            Ok(entry) if entry.file_type().is_file() => entry.into_path(),
            Ok(_) => continue,
            Err(error) => {
                found.errors.push(error.into());
                continue;
            }
        };
        match detect(&path).as_deref() {
            Some("dicom") => {
                let folder = path.parent().unwrap_or(Path::new("")).to_owned();
                // A file without a series is a slide of its own.
                let uid = dicom::series_uid(&path).unwrap_or_else(|| path.display().to_string());
                series.entry((folder, uid)).or_default().push(path);
            }
            Some(_) => found.slides.push(path),
            // Not a slide, unless it only can't be looked at.
            None => {
                if let Err(source) = File::open(&path) {
                    found.errors.push(SlideError::Io { path, source });
                }
            }
        }
    }
    // If none of a series opens, its first file is kept: the error is told where the slide is opened.
    let first_that_opens = |files: Vec<PathBuf>| {
        let opens = files.iter().position(|file| Slide::open(file, Some(Reader::OpenSlide)).is_ok());
        files.into_iter().nth(opens.unwrap_or(0))
    };
    found.slides.extend(series.into_values().filter_map(first_that_opens));
    found.slides.sort();
    found
}

/// Whether this is the folder `case` beside a file `case.mrxs`.
fn is_mirax_data(entry: &DirEntry) -> bool {
    let mut index = entry.path().as_os_str().to_owned();
    index.push(".mrxs");
    entry.file_type().is_dir() && entry.depth() > 0 && Path::new(&index).is_file()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::slide::synthetic::{SvsOptions, SyntheticSlide};

    #[test]
    fn slides_are_found_sorted_and_mirax_data_is_not_entered() {
        let folder = tempfile::tempdir().unwrap();
        let inside = |path: &str| folder.path().join(path);
        for sub in ["b/case.1", "b/other", "a"] {
            std::fs::create_dir_all(inside(sub)).unwrap();
        }
        let slide = SyntheticSlide::new(300, 200, 1);
        for name in ["z.svs", "b/case.1/Dat_0001.svs", "b/other/2.tif", "a/no-extension"] {
            slide.write(&inside(name), &SvsOptions::default()).unwrap();
        }
        // MIRAX knows its slides by this file; an empty one is detected as none.
        std::fs::write(inside("b/case.1.mrxs"), "").unwrap();
        std::fs::write(inside("notes.svs"), "not a slide").unwrap();
        let found = discover(folder.path());
        let expected = ["a/no-extension", "b/other/2.tif", "z.svs"].map(inside);
        assert_eq!(found.slides, expected);
        assert!(found.errors.is_empty(), "{:?}", found.errors);
    }

    #[test]
    fn a_missing_folder_is_an_error_not_an_empty_cohort() {
        let found = discover("/nonexistent/cohort");
        assert!(found.slides.is_empty());
        assert!(matches!(found.errors[..], [SlideError::Walk(_)]));
    }

    #[cfg(unix)]
    #[test]
    fn a_link_that_leads_back_is_reported_once() {
        let folder = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink(folder.path(), folder.path().join("again")).unwrap();
        let found = discover(folder.path());
        assert_eq!((found.slides.len(), found.errors.len()), (0, 1));
    }
}
