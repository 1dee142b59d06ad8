//! A workplace for one test: made-up slides, tiny models and the program itself, in a folder of its own.

#![allow(dead_code, reason = "every test binary uses a part of it")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use sha2::{Digest, Sha256};
use slidestream::onnx::build::{Graph, ints};
use slidestream::onnx::{Dim, ElementType, Model};
use slidestream::slide::synthetic::{Encoding, MppField, SvsOptions, SyntheticSlide, Tissue};
use tempfile::TempDir;

/// Side of the models' tiles.
pub(crate) const TILE: u32 = 128;
/// A run that takes longer hangs.
const DEADLINE: Duration = Duration::from_secs(300);
/// Between two looks at a condition.
const POLL: Duration = Duration::from_millis(5);

/// The weights of [`Kind::Classifier`], from mean red, green and blue (0 to 1) to the logits of two classes.
pub(crate) const WEIGHTS: [[f32; 2]; 3] = [[-2.0, 4.0], [3.0, -5.0], [1.0, 2.0]];
/// Added to the logits.
pub(crate) const BIAS: [f32; 2] = [-1.5, 0.5];

/// A tiny model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The tile's mean colour through a linear layer: classes `pale` and `deep`, softmax.
    Classifier,
    /// The same for exactly one tile at a time.
    OneAtATime,
    /// The same after a large convolution without influence: tens of milliseconds a tile.
    Slow,
    /// Square roots of mean colours less a tenth: NaN where a tile is nearly black.
    NotFinite,
    /// Red, green and blue of each pixel as its probabilities: classes `red`, `green` and `blue`, no activation.
    Segmentation,
    /// The tile's mean red, green and blue.
    Features,
    /// Asks for images of four channels.
    FourChannels,
}

impl Kind {
    fn graph(self) -> Model {
        let mut graph = Graph::new("test");
        let batch = if self == Self::OneAtATime { Dim::Fixed(1) } else { Dim::Symbolic("n".to_owned()) };
        let channels = if self == Self::FourChannels { 4 } else { 3 };
        let side = Dim::Fixed(TILE as usize);
        let dims = [batch.clone(), Dim::Fixed(channels), side.clone(), side.clone()];
        let mut image = graph.input("image", ElementType::F32, &dims);
        if self == Self::Segmentation {
            let identity = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0];
            let weights = graph.weights("kernel", &[3, 3, 1, 1], &identity);
            let map = graph.node("Conv", &[&image, &weights], &[]);
            graph.output("map", &map, ElementType::F32, &dims);
            return graph.finish();
        }
        if self == Self::Slow {
            let weights = graph.weights("large", &[3, 3, 25, 25], &[0.0; 3 * 3 * 25 * 25]);
            let pads = ints(&[12, 12, 12, 12]);
            let nothing = graph.node("Conv", &[&image, &weights], &[("pads", pads)]);
            image = graph.node("Add", &[&image, &nothing], &[]);
        }
        let axes = graph.indices("axes", &[2, 3]);
        let means = graph.node("ReduceMean", &[&image, &axes], &[("keepdims", 0.into())]);
        if self == Self::Features {
            graph.output("features", &means, ElementType::F32, &[batch, Dim::Fixed(3)]);
            return graph.finish();
        }
        let scores = if self == Self::NotFinite {
            let least = graph.weights("least", &[1], &[0.1]);
            let above = graph.node("Sub", &[&means, &least], &[]);
            let roots = graph.node("Sqrt", &[&above], &[]);
            let pair = graph.weights("pair", &[3, 2], &[1.0, 0.0, 0.0, 1.0, 0.0, 0.0]);
            graph.node("MatMul", &[&roots, &pair], &[])
        } else {
            // A fourth channel has no influence.
            let mut weights = WEIGHTS.concat();
            weights.resize(channels * 2, 0.0);
            let rows = i64::try_from(channels).unwrap();
            let weights = graph.weights("weights", &[rows, 2], &weights);
            let bias = graph.weights("bias", &[2], &BIAS);
            graph.node("Gemm", &[&means, &weights, &bias], &[])
        };
        graph.output("scores", &scores, ElementType::F32, &[batch, Dim::Fixed(2)]);
        graph.finish()
    }

    fn task(self) -> &'static str {
        match self {
            Self::Segmentation => "segmentation",
            Self::Features => "features",
            _ => "classification",
        }
    }

    fn card(self, sha256: &str) -> String {
        let task = self.task();
        let rest = match self {
            Self::Features => "",
            Self::Segmentation => {
                "activation = \"none\"\n\
                 classes = [{ name = \"red\", color = \"#ff0000\" }, { name = \"green\", color = \"#00ff00\" }, \
                 { name = \"blue\", color = \"#0000ff\" }]\n"
            }
            _ => {
                "activation = \"softmax\"\nbackground = \"pale\"\n\
                 classes = [{ name = \"pale\", color = \"#e8e8e8\" }, { name = \"deep\", color = \"#aa00aa\" }]\n"
            }
        };
        format!(
            "schema = 1\nname = \"{task} for tests\"\ntask = \"{task}\"\ntile_size = {TILE}\nmpp = 0.5\n\
             mean = [0.0, 0.0, 0.0]\nstd = [1.0, 1.0, 1.0]\n{rest}\
             [variants.fp32]\nfile = \"model.onnx\"\nsha256 = \"{sha256}\"\n"
        )
    }
}

/// The probabilities of [`Kind::Classifier`] for a tile, computed by hand from its RGB pixels.
pub(crate) fn classify(rgb: &[u8]) -> [f64; 2] {
    let mut sums = [0_u64; 3];
    for pixel in rgb.chunks_exact(3) {
        for (sum, value) in sums.iter_mut().zip(pixel) {
            *sum += u64::from(*value);
        }
    }
    let means = sums.map(|sum| sum as f64 / (rgb.len() / 3) as f64 / 255.0);
    let logit = |class: usize| {
        let terms = means.iter().zip(WEIGHTS).map(|(mean, weights)| mean * f64::from(weights[class]));
        terms.sum::<f64>() + f64::from(BIAS[class])
    };
    let [pale, deep] = [logit(0).exp(), logit(1).exp()];
    [pale / (pale + deep), deep / (pale + deep)]
}

/// A lossless Aperio-like slide, so that pixels are known.
pub(crate) fn lossless() -> SvsOptions {
    SvsOptions { encoding: Encoding::Deflate, ..SvsOptions::default() }
}

/// The options of a slide that says this of its resolution.
pub(crate) fn with_mpp(mpp: MppField) -> SvsOptions {
    SvsOptions { mpp, ..SvsOptions::default() }
}

/// A slide of 1500 × 1200 px with two pieces of tissue.
pub(crate) fn two_pieces() -> SyntheticSlide {
    SyntheticSlide::new(1500, 1200, 7)
}

/// A slide of 6 × 5 tiles that is tissue everywhere.
pub(crate) fn small() -> SyntheticSlide {
    SyntheticSlide { tissue: Tissue::Everywhere, ..SyntheticSlide::new(6 * TILE, 5 * TILE, 3) }
}

/// A folder of a test's own, removed at its end.
pub(crate) struct Workplace {
    folder: TempDir,
}

impl Workplace {
    pub(crate) fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    /// A path in the folder.
    pub(crate) fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes a file, with the folders above it.
    pub(crate) fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.at(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        path
    }

    /// Writes a slide.
    pub(crate) fn slide(&self, name: &str, slide: &SyntheticSlide, options: &SvsOptions) -> PathBuf {
        let path = self.write(name, "");
        slide.write(&path, options).unwrap();
        path
    }

    /// Writes a model with its card into a folder, which is returned.
    pub(crate) fn model(&self, kind: Kind) -> PathBuf {
        let name = format!("{kind:?}");
        let bytes = kind.graph().to_bytes();
        self.write(&format!("{name}/model.onnx"), &bytes);
        self.write(&format!("{name}/card.toml"), kind.card(&sha256(&bytes))).parent().unwrap().to_owned()
    }

    /// Writes a model whose card has `from` replaced by `to`.
    pub(crate) fn model_with(&self, kind: Kind, from: &str, to: &str) -> PathBuf {
        let folder = self.model(kind);
        let card = fs::read_to_string(folder.join("card.toml")).unwrap();
        assert!(card.contains(from), "{card}");
        fs::write(folder.join("card.toml"), card.replace(from, to)).unwrap();
        folder
    }

    /// `slidestream` with these arguments, to be run in this folder.
    pub(crate) fn command<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_slidestream"));
        command.args(arguments).current_dir(self.folder.path());
        command
    }

    /// Runs `slidestream` to its end.
    pub(crate) fn slidestream<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Finished {
        self.start(&mut self.command(arguments)).wait()
    }

    /// Runs a model over slides into `out`.
    pub(crate) fn run(&self, model: &Path, slides: &[&Path], out: &Path, flags: &[&str]) -> Finished {
        self.start(&mut self.run_command(model, slides, out, flags)).wait()
    }

    /// The command of [`Self::run`].
    pub(crate) fn run_command(&self, model: &Path, slides: &[&Path], out: &Path, flags: &[&str]) -> Command {
        let mut command = self.command(["run"]);
        command.args(slides).arg("--model").arg(model).arg("--out").arg(out).args(flags);
        command
    }

    /// Starts a command; its output goes to files, so that it never waits for a reader.
    pub(crate) fn start(&self, command: &mut Command) -> Started {
        let output = || tempfile::Builder::new().prefix("output").tempfile_in(self.folder.path()).unwrap();
        let (stdout, stderr) = (output(), output());
        command.stdin(Stdio::null());
        command.stdout(stdout.reopen().unwrap()).stderr(stderr.reopen().unwrap());
        let child = command.spawn().unwrap();
        Started { child, stdout: stdout.into_temp_path(), stderr: stderr.into_temp_path() }
    }
}

/// A program at work; killed if the test ends before it.
pub(crate) struct Started {
    child: Child,
    stdout: tempfile::TempPath,
    stderr: tempfile::TempPath,
}

impl Started {
    /// Waits until `condition` holds; fails if the program ends before.
    pub(crate) fn until(&mut self, what: &str, condition: impl Fn() -> bool) {
        let start = Instant::now();
        while !condition() {
            let ended = self.child.try_wait().unwrap();
            assert!(ended.is_none(), "ended ({ended:?}) before {what}:\n{}", fs::read_to_string(&self.stderr).unwrap());
            assert!(start.elapsed() < DEADLINE, "never: {what}");
            thread::sleep(POLL);
        }
    }

    /// Sends a signal such as `INT`.
    pub(crate) fn signal(&self, name: &str) {
        let status = Command::new("kill").arg(format!("-{name}")).arg(self.child.id().to_string()).status();
        assert!(status.unwrap().success());
    }

    /// Waits for the end.
    pub(crate) fn wait(mut self) -> Finished {
        let start = Instant::now();
        let status = loop {
            match self.child.try_wait().unwrap() {
                Some(status) => break status,
                None => {
                    let stderr = || fs::read_to_string(&self.stderr).unwrap();
                    assert!(start.elapsed() < DEADLINE, "hangs:\n{}", stderr());
                    thread::sleep(POLL);
                }
            }
        };
        let text = |path: &Path| String::from_utf8(fs::read(path).unwrap()).unwrap();
        let finished = Finished { code: status.code(), stdout: text(&self.stdout), stderr: text(&self.stderr) };
        assert!(!finished.stderr.contains("panicked"), "{}", finished.stderr);
        finished
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// What a program left behind.
#[derive(Debug)]
pub(crate) struct Finished {
    /// `None` if a signal ended it.
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Finished {
    /// Asserts the exit code.
    #[track_caller]
    pub(crate) fn code(self, expected: i32) -> Self {
        assert_eq!(self.code, Some(expected), "stderr:\n{}\nstdout:\n{}", self.stderr, self.stdout);
        self
    }

    /// What stdout holds, as JSON.
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap()
    }

    /// Asserts that stderr has each of these texts.
    #[track_caller]
    pub(crate) fn says(self, texts: &[&str]) -> Self {
        for text in texts {
            assert!(self.stderr.contains(text), "no {text:?} in\n{}", self.stderr);
        }
        self
    }

    /// Asserts that stdout has each of these texts.
    #[track_caller]
    pub(crate) fn shows(self, texts: &[&str]) -> Self {
        for text in texts {
            assert!(self.stdout.contains(text), "no {text:?} in\n{}", self.stdout);
        }
        self
    }
}

/// A JSON file's content.
pub(crate) struct Json(Value);

impl Deref for Json {
    type Target = Value;

    fn deref(&self) -> &Value {
        &self.0
    }
}

impl Json {
    #[track_caller]
    pub(crate) fn read(path: impl AsRef<Path>) -> Self {
        let path = path.as_ref();
        let bytes = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        Self(serde_json::from_slice(&bytes).unwrap())
    }

    /// The record of a slide.
    #[track_caller]
    pub(crate) fn of_slide(out: &Path, id: &str) -> Self {
        Self::read(out.join("slides").join(format!("{id}.json")))
    }

    /// A slide's coverage, asserted to sum to its grid.
    #[track_caller]
    pub(crate) fn coverage(&self) -> Coverage {
        let of = |name: &str| self.0["coverage"][name].as_u64().unwrap();
        let coverage = Coverage {
            grid: of("grid"),
            inferred: of("inferred"),
            background: of("background"),
            unsampled: of("unsampled"),
            failed: self.0["coverage"]["failed"].as_array().unwrap().len() as u64,
        };
        let Coverage { inferred, background, unsampled, failed, .. } = coverage;
        assert_eq!(inferred + background + unsampled + failed, coverage.grid, "{coverage:?}");
        coverage
    }
}

/// What became of a slide's tiles; sums to the grid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Coverage {
    pub(crate) grid: u64,
    pub(crate) inferred: u64,
    pub(crate) background: u64,
    pub(crate) unsampled: u64,
    pub(crate) failed: u64,
}

/// Every file below a folder by its relative path, with its bytes; none if there is no such folder.
pub(crate) fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = walkdir::WalkDir::new(folder).into_iter().flatten().filter(|entry| entry.file_type().is_file());
    let relative = |path: &Path| path.strip_prefix(folder).unwrap().to_string_lossy().into_owned();
    entries.filter_map(|entry| Some((relative(entry.path()), fs::read(entry.path()).ok()?))).collect()
}

/// The result files of a run: all but the accounts, which hold times, and the lock.
pub(crate) fn results(out: &Path) -> BTreeMap<String, Vec<u8>> {
    let is_account = |name: &str| {
        name.starts_with("slides/")
            || name.starts_with("logs/")
            || ["run.json", "process_list.csv", ".lock"].contains(&name)
    };
    files(out).into_iter().filter(|(name, _)| !is_account(name)).collect()
}

/// Asserts that both runs left the same result files, and some.
#[track_caller]
pub(crate) fn assert_same_results(one: &Path, other: &Path) {
    let (one, other) = (results(one), results(other));
    assert!(!one.is_empty());
    assert_eq!(one.keys().collect::<Vec<_>>(), other.keys().collect::<Vec<_>>());
    for (name, bytes) in &one {
        assert!(bytes == &other[name], "{name} differs");
    }
}

/// Asserts that a slide failed cleanly: recorded with its error, nothing half-written, nothing that looks finished.
#[track_caller]
pub(crate) fn assert_failed(out: &Path, id: &str, error: &str) {
    let record = Json::of_slide(out, id);
    assert_eq!(record["status"], "failed");
    let found = record["error"].as_str().unwrap();
    assert!(found.contains(error), "no {error:?} in {found:?}");
    assert_eq!(record["outputs"], Value::Array(Vec::new()));
    assert_no_results_of(out, id);
}

/// Asserts that there is no result of a slide, and nothing half-written of any.
#[track_caller]
pub(crate) fn assert_no_results_of(out: &Path, id: &str) {
    let of_slide =
        |name: &&String| Path::new(name).file_name().unwrap().to_string_lossy().starts_with(&format!("{id}."));
    let results = results(out);
    assert_eq!(results.keys().find(of_slide), None);
    assert_no_partial_files(out);
}

/// Asserts that nothing half-written is left.
#[track_caller]
pub(crate) fn assert_no_partial_files(out: &Path) {
    let files = files(out);
    assert_eq!(files.keys().find(|name| name.ends_with(".partial")), None);
}

/// Whether a file that is being written lies in a folder.
pub(crate) fn has_partial_file(folder: &Path) -> bool {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.into_iter().any(|entry| entry.file_name().to_string_lossy().ends_with(".partial"))
}

/// The rows of a tile table without its header.
#[track_caller]
pub(crate) fn table(path: &Path) -> Vec<Vec<f64>> {
    let mut reader = csv::Reader::from_path(path).unwrap();
    let number = |field: &str| field.parse().unwrap();
    reader.records().map(|record| record.unwrap().iter().map(number).collect()).collect()
}

/// The directories of a classic little-endian TIFF, to damage it in known places.
pub(crate) struct TiffMap {
    /// In the order of the file.
    pub(crate) directories: Vec<Directory>,
}

/// One directory.
pub(crate) struct Directory {
    /// Of each tag, how many values it has and where they stand.
    entries: BTreeMap<u16, (usize, usize)>,
    /// Where the offset of the next directory stands.
    pub(crate) next_at: usize,
}

impl TiffMap {
    pub(crate) fn of(bytes: &[u8]) -> Self {
        assert_eq!(bytes[..4], [b'I', b'I', 42, 0]);
        let mut directories = Vec::new();
        let mut at = long(bytes, 4);
        while at != 0 {
            let count = usize::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]));
            let entry = |index: usize| {
                let at = at + 2 + index * 12;
                let tag = u16::from_le_bytes([bytes[at], bytes[at + 1]]);
                let values = long(bytes, at + 4);
                // Only lists of longs are asked for: more than one lies elsewhere.
                (tag, (values, if values > 1 { long(bytes, at + 8) } else { at + 8 }))
            };
            let entries = (0..count).map(entry).collect();
            let next_at = at + 2 + count * 12;
            directories.push(Directory { entries, next_at });
            at = long(bytes, next_at);
        }
        Self { directories }
    }
}

impl Directory {
    /// Offsets and lengths of the tiles.
    pub(crate) fn tiles(&self, bytes: &[u8]) -> Vec<std::ops::Range<usize>> {
        let list = |tag: u16| {
            let (count, at) = self.entries[&tag];
            (0..count).map(move |index| long(bytes, at + 4 * index))
        };
        list(324).zip(list(325)).map(|(start, length)| start..start + length).collect()
    }
}

fn long(bytes: &[u8], at: usize) -> usize {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize
}

/// Changes a file's bytes.
pub(crate) fn edit(path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs::read(path).unwrap();
    change(&mut bytes);
    fs::write(path, bytes).unwrap();
}

/// Copies a file under a new name, cut to `percent` of its length.
pub(crate) fn truncated(from: &Path, to: &Path, percent: u64) {
    fs::copy(from, to).unwrap();
    let file = File::options().write(true).open(to).unwrap();
    file.set_len(file.metadata().unwrap().len() * percent / 100).unwrap();
}

pub(crate) fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Whether the tests run as root, for whom permissions don't count.
pub(crate) fn is_root() -> bool {
    let id = Command::new("id").arg("-u").output().unwrap();
    id.stdout.starts_with(b"0\n")
}
