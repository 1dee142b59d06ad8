//! Weights that lie in files beside the model: reads them in, and writes them out where one file can't hold them.
//!
//! Protobuf ends at 2 GiB, so larger models keep their weights outside.

use std::fs::File;
use std::io::{BufWriter, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::Path;

use prost::Message as _;

use super::proto::tensor_proto::DataLocation;
use super::proto::{StringStringEntryProto, TensorProto};
use super::{Model, OnnxError, external_location, save_atomically};

/// Where a model file is split: protobuf readers end at 2³¹ bytes, and the graph itself needs room.
const LARGEST_FILE: usize = 1_900_000_000;
/// Smaller constants stay in the model file: shapes and axes, which readers want to see without another file.
const SMALLEST_OUTSIDE: usize = 1024;
/// So that a reader can map the weights into memory; the ONNX documentation recommends a page.
const ALIGNMENT: u64 = 4096;

impl Model {
    /// Reads all weights that lie in files beside the model at `path` into the model.
    ///
    /// # Errors
    /// [`OnnxError`] if a file is outside the model's folder, can't be read, or is shorter than the model says.
    pub fn embed_weights(&mut self, path: &Path) -> Result<(), OnnxError> {
        // Checks that all of them lie in the folder.
        self.weight_files(path)?;
        let folder = path.parent().unwrap_or(Path::new("")).to_owned();
        let Some(graph) = &mut self.proto_mut().graph else { return Ok(()) };
        for tensor in &mut graph.initializer {
            let Some(location) = external_location(tensor) else { continue };
            let file = folder.join(location);
            let bytes = read_range(&file, tensor).map_err(|source| OnnxError::Read { path: file, source })?;
            tensor.raw_data = Some(bytes);
            tensor.external_data.clear();
            tensor.data_location = None;
        }
        Ok(())
    }

    /// Writes the model to `path`, and its weights to `<path>.data` if one file can't hold them. Both are written under
    /// temporary names first.
    ///
    /// # Errors
    /// [`OnnxError::Write`] with the system's reason.
    pub fn save_with_weights(self, path: &Path) -> Result<(), OnnxError> {
        self.save_split_above(path, LARGEST_FILE)
    }

    fn save_split_above(mut self, path: &Path, largest: usize) -> Result<(), OnnxError> {
        if self.proto().encoded_len() <= largest {
            return self.save(path);
        }
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(".data");
        let weights = path.with_file_name(&name);
        let location = name.to_string_lossy().into_owned();
        let Some(graph) = &mut self.proto_mut().graph else { return self.save(path) };
        let outside =
            |tensor: &&mut TensorProto| tensor.raw_data.as_ref().is_some_and(|bytes| bytes.len() >= SMALLEST_OUTSIDE);
        save_atomically(&weights, |file| {
            let mut file = BufWriter::new(file);
            let mut offset = 0u64;
            for tensor in graph.initializer.iter_mut().filter(outside) {
                let padding = offset.next_multiple_of(ALIGNMENT) - offset;
                file.write_all(&vec![0; usize::try_from(padding).unwrap_or(0)])?;
                offset += padding;
                let bytes = tensor.raw_data.take().unwrap_or_default();
                file.write_all(&bytes)?;
                tensor.data_location = Some(DataLocation::External.into());
                tensor.external_data = entries(&location, offset, bytes.len());
                offset += bytes.len() as u64;
            }
            file.flush()
        })?;
        self.save(path)
    }
}

fn entries(location: &str, offset: u64, length: usize) -> Vec<StringStringEntryProto> {
    let entry = |key: &str, value: String| StringStringEntryProto { key: Some(key.to_owned()), value: Some(value) };
    vec![
        entry("location", location.to_owned()),
        entry("offset", offset.to_string()),
        entry("length", length.to_string()),
    ]
}

/// The bytes of one tensor; without `length`, to the end of the file.
fn read_range(path: &Path, tensor: &TensorProto) -> std::io::Result<Vec<u8>> {
    let number = |key: &str| {
        let entry = tensor.external_data.iter().find(|entry| entry.key() == key)?;
        entry.value().parse::<u64>().ok()
    };
    let mut file = File::open(path)?;
    let size = file.metadata()?.len();
    let offset = number("offset").unwrap_or(0);
    let length = number("length").unwrap_or(size.saturating_sub(offset));
    if offset.checked_add(length).is_none_or(|end| end > size) {
        let reason = format!("weights {:?} end beyond the file's {size} bytes", tensor.name());
        return Err(std::io::Error::new(std::io::ErrorKind::UnexpectedEof, reason));
    }
    file.seek(SeekFrom::Start(offset))?;
    let mut bytes = Vec::new();
    file.take(length).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::super::build::Graph;
    use super::super::{ElementType, Tensor};
    use super::*;

    fn model() -> Model {
        let mut graph = Graph::new("large");
        let x = graph.input("x", ElementType::F32, &["n".into(), 2.into()]);
        let values: Vec<f32> = (0..600).map(|value| value as f32).collect();
        let large = graph.weights("large", &[2, 300], &values);
        let product = graph.node("MatMul", &[&x, &large], &[]);
        let other = graph.weights("other", &[300, 1], &values[300..]);
        let product = graph.node("MatMul", &[&product, &other], &[]);
        let small = graph.weights("small", &[1], &[3.0]);
        let sum = graph.node("Add", &[&product, &small], &[]);
        graph.output("y", &sum, ElementType::F32, &["n".into(), 1.into()]);
        graph.finish()
    }

    #[test]
    fn weights_leave_and_come_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.onnx");
        model().save_split_above(&path, 1000).unwrap();
        let mut loaded = Model::load(&path).unwrap();
        assert_eq!(loaded.weight_files(&path).unwrap(), [folder.path().join("m.onnx.data")]);
        let graph = loaded.proto().graph.as_ref().unwrap();
        assert_eq!(Tensor::from_proto(&graph.initializer[2]).unwrap().to_f32(), Some(vec![3.0]));
        assert!(Tensor::from_proto(&graph.initializer[0]).is_err());
        assert_eq!(graph.initializer[1].external_data[1].value(), "4096");
        loaded.embed_weights(&path).unwrap();
        assert_eq!(loaded, model());

        // Cut short: told, with the constant's name.
        File::options().write(true).open(folder.path().join("m.onnx.data")).unwrap().set_len(5000).unwrap();
        let error = Model::load(&path).unwrap().embed_weights(&path).unwrap_err();
        let reason = std::error::Error::source(&error).unwrap().to_string();
        assert!(reason.contains("\"other\" end beyond the file's 5000 bytes"), "{reason}");
    }

    #[test]
    fn what_fits_stays_one_file() {
        let folder = tempfile::tempdir().unwrap();
        model().save_with_weights(&folder.path().join("m.onnx")).unwrap();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
