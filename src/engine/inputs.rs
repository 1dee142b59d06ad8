//! What to run over: slide files, folders and lists become slides with ids, checked before any work.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use super::config::{TilingConfig, TissueSource};
use crate::geometry::{InvalidMpp, Mpp};
use crate::slide::{self, SlideError};

/// One slide of a run, as it was asked for.
#[derive(Clone, Debug, PartialEq)]
pub struct SlideInput {
    /// Its name in every file of the run: the stem of its file, or the id of a list.
    pub id: String,
    /// The slide file.
    pub path: PathBuf,
    /// Its resolution, where the user gave one for this slide.
    pub mpp: Option<Mpp>,
    /// Its tissue mask, where the user gave one for this slide.
    pub mask: Option<PathBuf>,
}

/// Why the slides of a run can't be told.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InputError {
    /// Nothing of that name.
    #[error("{}: no such file or folder", .0.display())]
    Missing(PathBuf),
    /// A folder in which nothing is a slide.
    #[error("{}: no slide in this folder or below", .0.display())]
    NoSlides(PathBuf),
    /// A folder that can't be read.
    #[error(transparent)]
    Unreadable(SlideError),
    /// A list that is no CSV with the right columns.
    #[error("{}: {reason}", path.display())]
    List {
        /// The list.
        path: PathBuf,
        /// What is wrong, with the line.
        reason: String,
    },
    /// Two slides would write the same files.
    #[error("two slides have the id {id:?}: {} and {}", first.display(), second.display())]
    SameId {
        /// The id.
        id: String,
        /// The one slide.
        first: PathBuf,
        /// The other.
        second: PathBuf,
    },
    /// An id that can't be a file name.
    #[error("{}: {id:?} can't be the name of a file", path.display())]
    BadId {
        /// The id.
        id: String,
        /// The slide or list.
        path: PathBuf,
    },
}

impl InputError {
    /// How to put it right.
    #[must_use]
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Missing(_) => None,
            Self::NoSlides(_) => Some("name slide files, a folder that holds some, or a list with a column slide"),
            Self::Unreadable(_) => Some("make the folder readable or leave it out"),
            Self::List { .. } => Some("a list is a CSV with the columns slide[,mpp][,mask][,id]"),
            Self::SameId { .. } => Some("run them from a list whose column id tells them apart"),
            Self::BadId { .. } => Some("give it an id of letters, digits, '.', '-' and '_' in a list's column id"),
        }
    }
}

/// Turns slide files, folders (searched recursively) and lists (`.csv`) into slides, in the order given.
///
/// A named file that does not exist is kept when it stands in a list, so that one bad line does not stop the others.
///
/// # Errors
/// [`InputError`] if there is nothing to run over, a list is malformed, or two slides share an id.
pub fn slides(arguments: &[PathBuf]) -> Result<Vec<SlideInput>, InputError> {
    let mut inputs = Vec::new();
    for argument in arguments {
        if argument.is_dir() {
            inputs.extend(folder(argument)?);
        } else if argument.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("csv")) {
            inputs.extend(list(argument)?);
        } else if argument.exists() {
            inputs.push(input(argument.clone())?);
        } else {
            return Err(InputError::Missing(argument.clone()));
        }
    }
    let mut seen: HashMap<&str, &Path> = HashMap::new();
    for input in &inputs {
        if let Some(first) = seen.insert(&input.id, &input.path) {
            let (first, second) = (first.to_owned(), input.path.clone());
            return Err(InputError::SameId { id: input.id.clone(), first, second });
        }
    }
    Ok(inputs)
}

/// Gives slides without a resolution of their own the one of a CSV with the columns `slide,mpp`, which names a slide by
/// its id, file name or path.
///
/// # Errors
/// [`InputError::List`] with the line; a line that names none of the slides is an error too, likely a typo.
pub fn add_mpp(slides: &mut [SlideInput], path: &Path) -> Result<(), InputError> {
    for (line, row) in rows(path, &["slide", "mpp"], &["slide", "mpp"])? {
        let problem = |reason: String| list_error(path, line, &reason);
        let mpp: Mpp = row["mpp"].parse().map_err(|error: InvalidMpp| problem(error.to_string()))?;
        let name = &row["slide"];
        let mut named = slides.iter_mut().filter(|slide| slide.is_named(name)).peekable();
        if named.peek().is_none() {
            return Err(problem(format!("{name:?} names none of the slides")));
        }
        named.for_each(|slide| slide.mpp = slide.mpp.or(Some(mpp)));
    }
    Ok(())
}

impl SlideInput {
    /// How this slide is cut: the run's settings, with what was given for this slide alone.
    #[must_use]
    pub fn tiling(&self, of_run: &TilingConfig) -> TilingConfig {
        let mut tiling = of_run.clone();
        tiling.slide_mpp = self.mpp.or(tiling.slide_mpp);
        if let Some(mask) = &self.mask {
            tiling.tissue = TissueSource::of_file(mask);
        }
        tiling
    }

    fn is_named(&self, name: &str) -> bool {
        self.id == name || self.path.file_name().is_some_and(|file| file == name) || self.path == Path::new(name)
    }
}

fn list_error(path: &Path, line: u64, reason: &str) -> InputError {
    InputError::List { path: path.to_owned(), reason: format!("line {line}: {reason}") }
}

fn input(path: PathBuf) -> Result<SlideInput, InputError> {
    let id = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
    Ok(SlideInput { id: checked_id(id, &path)?, path, mpp: None, mask: None })
}

fn checked_id(id: String, path: &Path) -> Result<String, InputError> {
    let is_name = !id.is_empty()
        && id.len() <= 200
        && !id.starts_with('.')
        && !id.chars().any(|c| c.is_control() || matches!(c, '/' | '\\'));
    if is_name { Ok(id) } else { Err(InputError::BadId { id, path: path.to_owned() }) }
}

fn folder(path: &Path) -> Result<Vec<SlideInput>, InputError> {
    let found = slide::discover(path);
    // A folder that can't be searched may hold slides: leaving it out in silence would lose them.
    if let Some(error) = found.errors.into_iter().next() {
        return Err(InputError::Unreadable(error));
    }
    if found.slides.is_empty() {
        return Err(InputError::NoSlides(path.to_owned()));
    }
    found.slides.into_iter().map(input).collect()
}

fn list(path: &Path) -> Result<Vec<SlideInput>, InputError> {
    let base = path.parent().unwrap_or(Path::new(""));
    let mut inputs = Vec::new();
    for (line, row) in rows(path, &["slide", "mpp", "mask", "id"], &["slide"])? {
        let problem = |reason: String| list_error(path, line, &reason);
        let field = |name: &str| row.get(name).filter(|value| !value.is_empty());
        let slide = field("slide").ok_or_else(|| problem("no slide is named".to_owned()))?;
        let mut input = input(base.join(slide))?;
        if let Some(id) = field("id") {
            input.id = checked_id(id.clone(), path)?;
        }
        input.mpp =
            field("mpp").map(|mpp| mpp.parse()).transpose().map_err(|error: InvalidMpp| problem(error.to_string()))?;
        input.mask = field("mask").map(|mask| base.join(mask));
        inputs.push(input);
    }
    if inputs.is_empty() {
        return Err(InputError::List { path: path.to_owned(), reason: "the list names no slide".to_owned() });
    }
    Ok(inputs)
}

type Row = HashMap<String, String>;

/// The rows of a CSV by column name, with their line numbers; all columns must be known, and all needed ones be there.
fn rows(path: &Path, known: &[&str], needed: &[&str]) -> Result<Vec<(u64, Row)>, InputError> {
    let problem = |reason: String| InputError::List { path: path.to_owned(), reason };
    let text = std::fs::read_to_string(path).map_err(|error| problem(error.to_string()))?;
    let mut reader = csv::ReaderBuilder::new().trim(csv::Trim::All).from_reader(text.as_bytes());
    let header = reader.headers().map_err(|error| problem(csv_problem(&text, &error)))?.clone();
    if let Some(unknown) = header.iter().find(|name| !known.contains(name)) {
        return Err(problem(format!("unknown column {unknown:?}; known are {}", known.join(", "))));
    }
    if let Some(missing) = needed.iter().find(|name| !header.iter().any(|column| column == **name)) {
        return Err(problem(format!("no column {missing:?}")));
    }
    let mut rows = Vec::new();
    for record in reader.records() {
        let record = record.map_err(|error| problem(csv_problem(&text, &error)))?;
        let line = csv_line(&text, record.position());
        rows.push((line, header.iter().map(str::to_owned).zip(record.iter().map(str::to_owned)).collect()));
    }
    Ok(rows)
}

/// The line that a record of a table begins in. What `csv` tells is where the record before it ended, blank lines not
/// counted.
pub(crate) fn csv_line(text: &str, position: Option<&csv::Position>) -> u64 {
    let start = position.and_then(|position| usize::try_from(position.byte()).ok()).unwrap_or(0);
    let rest = text.get(start..).unwrap_or_default();
    let blank = rest.len() - rest.trim_start_matches(['\r', '\n']).len();
    1 + text.get(..start + blank).unwrap_or_default().matches('\n').count() as u64
}

/// What is wrong with a table, and in which line.
pub(crate) fn csv_problem(text: &str, error: &csv::Error) -> String {
    match error.kind() {
        csv::ErrorKind::UnequalLengths { pos, expected_len, len } => {
            let line = csv_line(text, pos.as_ref());
            format!("line {line}: has {len} columns, the first line {expected_len}")
        }
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn folder_with(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        folder
    }

    #[test]
    fn a_list_gives_ids_resolutions_and_masks() {
        let list = "slide,mpp,mask,id\na/x.svs,0.25,x.png,first\nb/x.svs,,,second\n";
        let folder = folder_with(&[("list.csv", list), ("a/x.svs", ""), ("b/x.svs", "")]);
        let inputs = slides(&[folder.path().join("list.csv")]).unwrap();
        assert_eq!(inputs.len(), 2);
        assert_eq!(inputs[0].id, "first");
        assert_eq!(inputs[0].path, folder.path().join("a/x.svs"));
        assert_eq!(inputs[0].mpp, Mpp::new(0.25).ok());
        assert_eq!(inputs[0].mask, Some(folder.path().join("x.png")));
        assert_eq!((inputs[1].id.as_str(), inputs[1].mpp, &inputs[1].mask), ("second", None, &None));
    }

    #[test]
    fn lines_are_those_of_the_file() {
        let text = "a,b\n\n1,2\r\n\r\n\n3,4\n5\n";
        let mut reader = csv::ReaderBuilder::new().from_reader(text.as_bytes());
        let mut records = reader.records();
        for expected in [3, 6] {
            assert_eq!(csv_line(text, records.next().unwrap().unwrap().position()), expected);
        }
        let error = records.next().unwrap().unwrap_err();
        assert_eq!(csv_problem(text, &error), "line 7: has 1 columns, the first line 2");
    }

    #[test]
    fn what_is_wrong_is_said() {
        let folder = folder_with(&[
            ("a/x.svs", ""),
            ("b/x.svs", ""),
            ("columns.csv", "slide,magnification\nx.svs,20\n"),
            ("header.csv", "path\nx.svs\n"),
            ("mpp.csv", "slide,mpp\nx.svs,20x\n"),
            ("empty.csv", "slide\n"),
            ("id.csv", "slide,id\nx.svs,a/b\n"),
            ("text/readme.txt", "no slide"),
        ]);
        let at = |name: &str| folder.path().join(name);
        let message = |arguments: &[PathBuf]| slides(arguments).unwrap_err().to_string();
        assert!(message(&[at("a/x.svs"), at("b/x.svs")]).contains("two slides have the id \"x\""));
        assert!(
            message(&[at("columns.csv")]).ends_with("unknown column \"magnification\"; known are slide, mpp, mask, id")
        );
        assert!(message(&[at("header.csv")]).contains("unknown column \"path\""));
        assert!(message(&[at("mpp.csv")]).contains("line 2: \"20x\" is no resolution"));
        assert!(message(&[at("empty.csv")]).ends_with("the list names no slide"));
        assert!(message(&[at("id.csv")]).contains("\"a/b\" can't be the name of a file"));
        assert!(message(&[at("text")]).contains("no slide in this folder"));
        assert!(message(&[at("nothing.svs")]).ends_with("nothing.svs: no such file or folder"));
    }

    #[test]
    fn an_mpp_table_names_slides_by_id_or_file_name() {
        let folder = folder_with(&[("mpp.csv", "slide,mpp\nx.svs,0.25\ny,0.5\n"), ("typo.csv", "slide,mpp\nw,0.25\n")]);
        let mut slides: Vec<SlideInput> =
            ["d/x.svs", "d/y.tif", "d/z.tif"].map(|path| input(PathBuf::from(path)).unwrap()).to_vec();
        slides[1].mpp = Mpp::new(0.125).ok();
        add_mpp(&mut slides, &folder.path().join("mpp.csv")).unwrap();
        let mpp: Vec<Option<f64>> = slides.iter().map(|slide| slide.mpp.map(Mpp::get)).collect();
        assert_eq!(mpp, [Some(0.25), Some(0.125), None]);
        let error = add_mpp(&mut slides, &folder.path().join("typo.csv")).unwrap_err();
        assert!(error.to_string().ends_with("line 2: \"w\" names none of the slides"));
    }
}
