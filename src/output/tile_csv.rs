//! The tile table, `minx,miny,width,height,prob_<class>…`, one row per inferred tile; and its reader for coordinates
//! made elsewhere.

use std::path::{Path, PathBuf};

use crate::geometry::Level0Rect;

use super::{AtomicFile, OutputError, Written};

/// The columns that place a tile.
const PLACE: [&str; 4] = ["minx", "miny", "width", "height"];

/// Streams tiles into a CSV file.
#[derive(Debug)]
pub struct TileCsvWriter {
    csv: csv::Writer<AtomicFile>,
    path: PathBuf,
    class_count: usize,
}

impl TileCsvWriter {
    /// Starts the file with its header; without `classes` it holds coordinates only.
    ///
    /// # Errors
    /// [`OutputError::Write`].
    pub fn create(path: &Path, classes: &[String]) -> Result<Self, OutputError> {
        let mut csv = csv::Writer::from_writer(AtomicFile::create(path)?);
        let header = PLACE.iter().map(|name| (*name).to_owned());
        let header = header.chain(classes.iter().map(|class| format!("prob_{class}")));
        csv.write_record(header).map_err(|error| OutputError::write(path)(error.into()))?;
        Ok(Self { csv, path: path.to_owned(), class_count: classes.len() })
    }

    /// Appends a tile with one probability per class; callers go in ascending (x, y).
    ///
    /// Probabilities are written with as few digits as give the same `f32` back.
    ///
    /// # Errors
    /// [`OutputError::RowLength`] if the numbers of classes and probabilities differ, [`OutputError::Write`].
    pub fn append(&mut self, tile: Level0Rect, probabilities: &[f32]) -> Result<(), OutputError> {
        if probabilities.len() != self.class_count {
            let (expected, found) = (self.class_count, probabilities.len());
            return Err(OutputError::RowLength { path: self.path.clone(), expected, found });
        }
        let place = [tile.x, tile.y, tile.width, tile.height].map(|value| value.to_string());
        // Debug form: 1e-12 instead of twelve zeros.
        let row = place.into_iter().chain(probabilities.iter().map(|value| format!("{value:?}")));
        self.csv.write_record(row).map_err(|error| OutputError::write(&self.path)(error.into()))
    }

    /// Completes the file.
    ///
    /// # Errors
    /// [`OutputError::Write`].
    pub fn finish(self) -> Result<Written, OutputError> {
        let file = self.csv.into_inner().map_err(|error| OutputError::write(&self.path)(error.into_error()))?;
        file.commit()
    }
}

/// What is wrong with a line of a coordinate table.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CoordsProblem {
    /// The header lacks a column.
    #[error("no column `{0}`")]
    MissingColumn(&'static str),
    /// A field holds no whole number.
    #[error("{text:?} in column `{column}` is no whole number")]
    NotWhole {
        /// The column.
        column: &'static str,
        /// The field.
        text: String,
    },
    /// A tile without extent.
    #[error("width and height must be at least 1")]
    Empty,
    /// The line is not CSV of the header's width, or not UTF-8.
    #[error("not a row like the header")]
    Malformed,
}

/// Reads the tiles of a table with the columns `minx`, `miny`, `width` and `height`, in any order; others are ignored.
///
/// # Errors
/// [`OutputError::Read`], or [`OutputError::CoordsLine`] naming the line.
pub fn read_coords_csv(path: &Path) -> Result<Vec<Level0Rect>, OutputError> {
    let file = std::fs::File::open(path).map_err(OutputError::read(path))?;
    let at = |line, problem| OutputError::CoordsLine { path: path.to_owned(), line, problem };
    let malformed = |error: csv::Error| {
        let line = error.position().map_or(1, csv::Position::line);
        match error.into_kind() {
            csv::ErrorKind::Io(source) => OutputError::read(path)(source),
            _ => at(line, CoordsProblem::Malformed),
        }
    };
    let mut reader = csv::ReaderBuilder::new().trim(csv::Trim::All).from_reader(file);
    let header = reader.headers().map_err(malformed)?.clone();
    let mut columns = [0; 4];
    for (name, column) in PLACE.into_iter().zip(&mut columns) {
        let found = header.iter().position(|field| field.trim_start_matches('\u{feff}') == name);
        *column = found.ok_or_else(|| at(1, CoordsProblem::MissingColumn(name)))?;
    }
    let mut tiles = Vec::new();
    for record in reader.records() {
        let record = record.map_err(malformed)?;
        let line = record.position().map_or(0, csv::Position::line);
        let mut values = [0; 4];
        for ((name, column), value) in PLACE.into_iter().zip(columns).zip(&mut values) {
            let text = record.get(column).unwrap_or_default();
            let problem = || at(line, CoordsProblem::NotWhole { column: name, text: text.to_owned() });
            *value = whole(text).ok_or_else(problem)?;
        }
        let [x, y, width, height] = values;
        if width < 1 || height < 1 {
            return Err(at(line, CoordsProblem::Empty));
        }
        tiles.push(Level0Rect { x, y, width, height });
    }
    Ok(tiles)
}

/// A whole number, also as `512.0`, which pandas makes of a column that once held a gap.
fn whole(text: &str) -> Option<i64> {
    let limit = 2f64.powi(52);
    let whole = text.parse::<i64>().ok().or_else(|| {
        let value: f64 = text.parse().ok()?;
        #[expect(clippy::cast_possible_truncation, reason = "whole and below 2^52")]
        let whole = (value.fract() == 0.0 && value.abs() < limit).then_some(value as i64);
        whole
    })?;
    // Sums of two coordinates must not overflow.
    (whole.unsigned_abs() < 1 << 52).then_some(whole)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rect(x: i64, y: i64, width: i64, height: i64) -> Level0Rect {
        Level0Rect { x, y, width, height }
    }

    #[test]
    fn rows_are_written_and_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s.csv");
        let mut writer = TileCsvWriter::create(&path, &["tumor".into(), "rest, \"other\"".into()]).unwrap();
        writer.append(rect(0, -3, 512, 512), &[0.1, 1.0]).unwrap();
        writer.append(rect(512, 0, 512, 511), &[1e-12, 0.333_333_34]).unwrap();
        writer.finish().unwrap();
        assert_eq!(
            std::fs::read_to_string(&path).unwrap(),
            "minx,miny,width,height,prob_tumor,\"prob_rest, \"\"other\"\"\"\n0,-3,512,512,0.1,1.0\n512,0,512,511,1e-12,0.33333334\n"
        );
        assert_eq!(read_coords_csv(&path).unwrap(), [rect(0, -3, 512, 512), rect(512, 0, 512, 511)]);
    }

    #[test]
    fn without_classes_there_are_coordinates_only() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s.csv");
        let mut writer = TileCsvWriter::create(&path, &[]).unwrap();
        writer.append(rect(1, 2, 3, 4), &[]).unwrap();
        assert!(matches!(writer.append(rect(1, 2, 3, 4), &[0.5]), Err(OutputError::RowLength { .. })));
        writer.finish().unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "minx,miny,width,height\n1,2,3,4\n");
    }

    #[test]
    fn coordinates_of_others_are_read_or_refused_by_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("c.csv");
        let read = |text: &str| {
            std::fs::write(&path, text).unwrap();
            read_coords_csv(&path).map_err(|error| error.to_string().replace(&path.display().to_string(), "c.csv"))
        };
        assert_eq!(read("\u{feff}height,width,label,miny,minx\n4, 3.0 ,x,2,1\n"), Ok(vec![rect(1, 2, 3, 4)]));
        assert_eq!(read("minx,miny,width,height\n"), Ok(vec![]));
        for (text, message) in [
            ("", "c.csv: line 1: no column `minx`"),
            ("minx,miny,width\n", "c.csv: line 1: no column `height`"),
            ("minx,miny,width,height\n1,2,3,4\n1,x,3,4\n", "c.csv: line 3: \"x\" in column `miny` is no whole number"),
            ("minx,miny,width,height\n1,2,3.5,4\n", "c.csv: line 2: \"3.5\" in column `width` is no whole number"),
            ("minx,miny,width,height\n1e300,2,3,4\n", "c.csv: line 2: \"1e300\" in column `minx` is no whole number"),
            ("minx,miny,width,height\n1,2,0,4\n", "c.csv: line 2: width and height must be at least 1"),
            ("minx,miny,width,height\n1,2,3\n", "c.csv: line 2: not a row like the header"),
        ] {
            assert_eq!(read(text), Err(message.to_owned()), "{text:?}");
        }
    }

    #[test]
    fn a_missing_table_has_a_hint() {
        let error = read_coords_csv(Path::new("/nowhere/c.csv")).unwrap_err();
        assert_eq!(error.to_string(), "/nowhere/c.csv: can't be read");
        assert_eq!(error.hint(), Some("check the path"));
    }
}
