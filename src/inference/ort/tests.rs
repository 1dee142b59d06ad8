//! Tiny models through the real ONNX Runtime, with answers worked out by hand.

use std::collections::BTreeMap;
use std::time::Duration;

use super::*;
use crate::geometry::Mpp;
use crate::inference::card::{self, Activation, BareModel, Pool};
use crate::inference::error::ModelError;
use crate::onnx::build::{Graph, ints};
use crate::onnx::{Dim, ElementType, Model};

const SIDE: usize = 4;
const HALF: [f32; 3] = [0.5; 3];

/// What differs from a float NCHW model with a free batch.
#[derive(Clone)]
struct Shape {
    layout: Layout,
    element: ElementType,
    batch: Dim,
    channels: usize,
}

impl Default for Shape {
    fn default() -> Self {
        Self { layout: Layout::Nchw, element: ElementType::F32, batch: "n".into(), channels: 3 }
    }
}

/// The image input as f32 NCHW, whatever the model itself takes.
fn image(graph: &mut Graph, shape: &Shape) -> String {
    let (side, channels) = (Dim::Fixed(SIDE), Dim::Fixed(shape.channels));
    let dims = match shape.layout {
        Layout::Nchw => [shape.batch.clone(), channels, side.clone(), side],
        Layout::Nhwc => [shape.batch.clone(), side.clone(), side, channels],
    };
    let mut image = graph.input("image", shape.element, &dims);
    if shape.element != ElementType::F32 {
        image = graph.node("Cast", &[&image], &[("to", i64::from(ElementType::F32.number()).into())]);
    }
    match shape.layout {
        Layout::Nchw => image,
        Layout::Nhwc => graph.node("Transpose", &[&image], &[("perm", ints(&[0, 3, 1, 2]))]),
    }
}

fn finish(mut graph: Graph, scores: &str, shape: &Shape, dims: &[Dim]) -> Model {
    let dims: Vec<_> = std::iter::once(shape.batch.clone()).chain(dims.iter().cloned()).collect();
    if shape.element == ElementType::F16 {
        let scores = graph.node("Cast", &[scores], &[("to", i64::from(ElementType::F16.number()).into())]);
        graph.output("scores", &scores, ElementType::F16, &dims);
    } else {
        graph.output("scores", scores, ElementType::F32, &dims);
    }
    graph.finish()
}

/// Two logits: the mean red, and twice the mean green plus 1.
fn classifier(shape: &Shape) -> Model {
    let mut graph = Graph::new("classifier");
    let image = image(&mut graph, shape);
    let axes = graph.indices("axes", &[2, 3]);
    let means = graph.node("ReduceMean", &[&image, &axes], &[("keepdims", 0.into())]);
    let weights = graph.weights("w", &[2, 3], &[1.0, 0.0, 0.0, 0.0, 2.0, 0.0]);
    let bias = graph.weights("b", &[2], &[0.0, 1.0]);
    let logits = graph.node("Gemm", &[&means, &weights, &bias], &[("transB", 1.into())]);
    finish(graph, &logits, shape, &[2.into()])
}

/// A logit per pixel and class; `weights` are `[classes, 3]`.
fn segmenter(shape: &Shape, weights: &[f32]) -> Model {
    let mut graph = Graph::new("segmenter");
    let image = image(&mut graph, shape);
    let classes = weights.len() / 3;
    let weights = graph.weights("w", &[i64::try_from(classes).unwrap(), 3, 1, 1], weights);
    let logits = graph.node("Conv", &[&image, &weights], &[]);
    finish(graph, &logits, shape, &[classes.into(), SIDE.into(), SIDE.into()])
}

/// A map of one class without its own dimension.
fn one_class_segmenter(shape: &Shape) -> Model {
    let mut graph = Graph::new("one class");
    let image = image(&mut graph, shape);
    let axes = graph.indices("axes", &[1]);
    let mean = graph.node("ReduceMean", &[&image, &axes], &[("keepdims", 0.into())]);
    finish(graph, &mean, shape, &[SIDE.into(), SIDE.into()])
}

/// The pixels as tokens: `[n, 16, 3]`.
fn tokens(shape: &Shape) -> Model {
    let mut graph = Graph::new("tokens");
    let image = image(&mut graph, shape);
    let to = graph.indices("to", &[0, 3, -1]);
    let planes = graph.node("Reshape", &[&image, &to], &[]);
    let tokens = graph.node("Transpose", &[&planes], &[("perm", ints(&[0, 2, 1]))]);
    finish(graph, &tokens, shape, &[(SIDE * SIDE).into(), 3.into()])
}

/// The mean colour.
fn features(shape: &Shape) -> Model {
    let mut graph = Graph::new("features");
    let image = image(&mut graph, shape);
    let axes = graph.indices("axes", &[2, 3]);
    let means = graph.node("ReduceMean", &[&image, &axes], &[("keepdims", 0.into())]);
    finish(graph, &means, shape, &[3.into()])
}

/// 1 / red: infinite for a tile without red.
fn reciprocal(shape: &Shape) -> Model {
    let mut graph = Graph::new("reciprocal");
    let image = image(&mut graph, shape);
    let inverse = graph.node("Reciprocal", &[&image], &[]);
    finish(graph, &inverse, shape, &[3.into(), SIDE.into(), SIDE.into()])
}

/// Many convolutions, to be interrupted.
fn slow() -> Model {
    let mut graph = Graph::new("slow");
    let mut value = image(&mut graph, &Shape::default());
    let weights = graph.weights("w", &[3, 3, 1, 1], &[0.3; 9]);
    for _ in 0..3000 {
        value = graph.node("Conv", &[&value, &weights], &[]);
    }
    finish(graph, &value, &Shape::default(), &[3.into(), SIDE.into(), SIDE.into()])
}

fn bare(task: Task, classes: &[&str], activation: Activation) -> BareModel {
    BareModel {
        task: Some(task),
        target_mpp: Some(Mpp::new(0.5).unwrap()),
        class_names: (task != Task::Features).then(|| classes.iter().map(|&name| name.to_owned()).collect()),
        mean: Some(HALF),
        std: Some(HALF),
        activation: Some(activation),
        ..BareModel::default()
    }
}

const ON_CPU: SessionOptions =
    SessionOptions { device: Device::Cpu, provider: Provider::Cpu, intra_threads: NonZeroUsize::new(1) };

/// A saved model, which its card and sessions need to stay.
struct Saved {
    folder: tempfile::TempDir,
    card: Result<ModelCard, ModelError>,
}

fn save(model: &Model, bare: &BareModel) -> Saved {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.onnx");
    model.save(&path).unwrap();
    Saved { card: ModelCard::load(&path, bare), folder }
}

impl Saved {
    fn factory(&self) -> Result<SessionFactory, SessionError> {
        let card = self.card.as_ref().unwrap();
        SessionFactory::new(card, card.default_variant().unwrap(), ON_CPU)
    }
}

fn predict(model: &Model, bare: &BareModel, tiles: &[&[u8]]) -> Prediction {
    save(model, bare).factory().unwrap().open().unwrap().predict(tiles).unwrap()
}

fn tile(rgb: [u8; 3]) -> Vec<u8> {
    rgb.repeat(SIDE * SIDE)
}

/// Compares with the tolerance that half precision needs; values are of the order of 1.
fn assert_near(actual: impl IntoIterator<Item = f32>, expected: &[f32], tolerance: f32) {
    let actual: Vec<_> = actual.into_iter().collect();
    assert_eq!(actual.len(), expected.len());
    let is_near = actual.iter().zip(expected).all(|(actual, expected)| (actual - expected).abs() <= tolerance);
    assert!(is_near, "{actual:?} instead of {expected:?}");
}

fn classes(prediction: Prediction) -> Array2<f32> {
    match prediction {
        Prediction::Classes(scores) => scores,
        other => panic!("{other:?}"),
    }
}

fn map(prediction: Prediction) -> Array4<f32> {
    match prediction {
        Prediction::Map(map) => map,
        other => panic!("{other:?}"),
    }
}

fn vectors(prediction: Prediction) -> Array2<f32> {
    match prediction {
        Prediction::Features(vectors) => vectors,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_classifier_gives_one_row_per_tile() {
    // (255 / 255 - 0.5) / 0.5 = 1 and (0 - 0.5) / 0.5 = -1, so a red tile's logits are 1 and 2 × -1 + 1 = -1, and a
    // yellow tile's are 1 and 3.
    let (red, yellow) = (tile([255, 0, 0]), tile([255, 255, 0]));
    let raw = bare(Task::Classification, &["a", "b"], Activation::None);
    let shapes = [
        Shape::default(),
        Shape { layout: Layout::Nhwc, ..Shape::default() },
        Shape { element: ElementType::F16, ..Shape::default() },
        Shape { batch: 1.into(), ..Shape::default() },
        Shape { batch: 4.into(), ..Shape::default() },
        Shape { batch: Dim::Unknown, layout: Layout::Nhwc, element: ElementType::F16, ..Shape::default() },
    ];
    for shape in shapes {
        let scores = classes(predict(&classifier(&shape), &raw, &[&red, &yellow, &red, &red, &yellow]));
        assert_near(scores, &[1.0, -1.0, 1.0, 3.0, 1.0, -1.0, 1.0, -1.0, 1.0, 3.0], 1e-3);
    }
    // e² / (1 + e²) = 0.880797
    let softmax = bare(Task::Classification, &["a", "b"], Activation::Softmax);
    let scores = classes(predict(&classifier(&Shape::default()), &softmax, &[&red, &yellow]));
    assert_near(scores, &[0.880_797, 0.119_203, 0.119_203, 0.880_797], 1e-6);
}

#[test]
fn a_kept_graph_is_taken_the_next_time_and_gives_the_same_bytes() {
    let raw = bare(Task::Segmentation, &["red", "yellow"], Activation::Softmax);
    let saved = save(&segmenter(&Shape::default(), &[1.0, 0.0, 0.3, 0.5, 0.7, 0.0]), &raw);
    let (first, second) = (tile([200, 30, 7]), tile([3, 90, 255]));
    let tiles: [&[u8]; 2] = [&first, &second];
    let expected = map(saved.factory().unwrap().open().unwrap().predict(&tiles).unwrap());
    let folder = tempfile::tempdir().unwrap();
    let cache = folder.path().join("graphs");
    let keeping = || saved.factory().unwrap().keeping_graph(&cache).unwrap();
    let files = || std::fs::read_dir(&cache).unwrap().map(|entry| entry.unwrap().path()).collect::<Vec<_>>();
    let predictions = |factory: &SessionFactory| -> Vec<_> {
        let sessions = factory.open_all(3).unwrap();
        sessions.into_iter().map(|mut session| map(session.predict(&tiles).unwrap())).collect()
    };
    let factory = keeping();
    assert_eq!(factory.kept_graph(), None);
    assert_eq!(predictions(&factory), [expected.clone(), expected.clone(), expected.clone()]);
    let [kept] = &files()[..] else { panic!("{:?}", files()) };
    assert!(kept.file_name().unwrap().to_str().unwrap().starts_with("model-"), "{kept:?}");
    let factory = keeping();
    assert_eq!(factory.kept_graph(), Some(kept.as_path()));
    assert_eq!(predictions(&factory), [expected.clone(), expected.clone(), expected]);
    assert_eq!(files(), std::slice::from_ref(kept));
    std::fs::write(kept, "damaged").unwrap();
    let Err(error) = keeping().open() else { panic!("a damaged graph was opened") };
    assert!(
        matches!(&error, SessionError::KeptGraph { path, .. } if path == kept) && error.hint().is_some(),
        "{error}"
    );
}

#[test]
fn graphs_are_kept_in_a_folder_and_for_the_cpu_alone() {
    let saved = save(&classifier(&Shape::default()), &bare(Task::Classification, &["a", "b"], Activation::None));
    let card = saved.card.as_ref().unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    let refused = saved.factory().unwrap().keeping_graph(file.path()).err().unwrap();
    assert!(
        matches!(&refused, SessionError::GraphCache { folder, .. } if folder == file.path())
            && refused.hint().is_some()
    );
    let openvino = SessionOptions { provider: Provider::OpenVino, ..ON_CPU };
    let factory = SessionFactory::new(card, card.default_variant().unwrap(), openvino).unwrap();
    let refused = factory.keeping_graph(Path::new("graphs")).err().unwrap();
    assert!(matches!(refused, SessionError::NoGraphCache(Provider::OpenVino)));
    assert!(!Path::new("graphs").exists());
    // Weights beside the model would be looked for beside its graph.
    let mut factory = saved.factory().unwrap();
    Arc::get_mut(&mut factory.shared).unwrap().is_whole = false;
    let refused = factory.keeping_graph(&saved.folder.path().join("graphs")).err().unwrap();
    assert!(matches!(&refused, SessionError::GraphCache { source, .. } if source.to_string().contains("of their own")));
}

#[test]
fn a_model_that_takes_bytes_is_given_them_as_they_are() {
    let shape = Shape { layout: Layout::Nhwc, element: ElementType::U8, ..Shape::default() };
    let settings = BareModel { mean: None, std: None, ..bare(Task::Classification, &["a", "b"], Activation::None) };
    let scores = classes(predict(&classifier(&shape), &settings, &[&tile([200, 7, 0])]));
    assert_near(scores, &[200.0, 15.0], 0.0);
}

#[test]
fn each_channel_has_its_own_mean_and_deviation() {
    let settings = BareModel {
        mean: Some([0.0, 0.2, 0.4]),
        std: Some([1.0, 0.5, 0.25]),
        ..bare(Task::Features, &[], Activation::None)
    };
    let values = vectors(predict(&features(&Shape::default()), &settings, &[&tile([51, 102, 255])]));
    assert_near(values, &[0.2, 0.4, 2.4], 1e-6);
}

#[test]
fn a_segmenter_gives_every_pixel_its_own_scores() {
    // Logits: red, and minus red. Only the pixel at row 1, column 2 is red; elsewhere red is -1.
    let mut pixels = tile([0, 0, 0]);
    pixels[(SIDE + 2) * 3] = 255;
    let model = segmenter(&Shape::default(), &[1.0, 0.0, 0.0, -1.0, 0.0, 0.0]);
    let settings = bare(Task::Segmentation, &["red", "not red"], Activation::Softmax);
    let scores = map(predict(&model, &settings, &[&tile([0, 0, 0]), &pixels]));
    assert_eq!(scores.dim(), (2, 2, SIDE, SIDE));
    for ((n, class, y, x), &score) in scores.indexed_iter() {
        let is_red = (n, y, x) == (1, 1, 2);
        let expected = if is_red == (class == 0) { 0.880_797 } else { 0.119_203 };
        assert!((score - expected).abs() < 1e-6, "{n} {class} {y} {x}: {score}");
    }
}

#[test]
fn one_class_may_do_without_its_dimension() {
    // The mean of 1, -1 and -1 is -1/3; sigmoid(-1/3) = 0.417430.
    let settings = bare(Task::Segmentation, &["red"], Activation::Sigmoid);
    let scores = map(predict(&one_class_segmenter(&Shape::default()), &settings, &[&tile([255, 0, 0])]));
    assert_eq!(scores.dim(), (1, 1, SIDE, SIDE));
    assert_near(scores, &[0.417_430; SIDE * SIDE], 1e-6);
    let scores = map(predict(&segmenter(&Shape::default(), &[1.0, 0.0, 0.0]), &settings, &[&tile([255, 0, 0])]));
    assert_near(scores, &[0.731_059; SIDE * SIDE], 1e-6);
}

#[test]
fn tokens_are_pooled_as_the_card_says() {
    // Token i is the pixel i: 1 for the first (class token), -1 for the next two (registers), 1 and 13 × -1 after.
    let mut pixels = tile([0, 0, 0]);
    pixels[..3].fill(255);
    pixels[9..12].fill(255);
    let mean = -11.0 / 13.0;
    let cases = [
        (Pool::Cls, vec![1.0; 3]),
        (Pool::Mean, vec![mean; 3]),
        (Pool::ClsAndMean, [vec![1.0; 3], vec![mean; 3]].concat()),
    ];
    for element in [ElementType::F32, ElementType::F16] {
        for (pool, expected) in &cases {
            let settings = BareModel {
                pool: Some(*pool),
                register_tokens: Some(2),
                ..bare(Task::Features, &[], Activation::None)
            };
            let model = tokens(&Shape { element, ..Shape::default() });
            let values = vectors(predict(&model, &settings, &[&pixels, &pixels]));
            assert_eq!(values.dim(), (2, expected.len()));
            assert_near(values.row(1).to_vec(), expected, 1e-6);
        }
    }
}

#[test]
fn a_tile_is_resized_to_what_the_model_sees() {
    let settings = BareModel { tile_size: Some(8), resize: Some(4), ..bare(Task::Features, &[], Activation::None) };
    let pixels = [255, 0, 0].repeat(8 * 8);
    let values = vectors(predict(&features(&Shape::default()), &settings, &[&pixels]));
    assert_near(values, &[1.0, -1.0, -1.0], 1e-6);
}

#[test]
fn what_is_not_finite_is_counted_per_tile() {
    // Gray 127.5 would be 0; with mean 0 and deviation 1 black is: 1 / 0.
    let settings = |activation| BareModel {
        mean: Some([0.0; 3]),
        std: Some([1.0; 3]),
        ..bare(Task::Segmentation, &["r", "g", "b"], activation)
    };
    let model = reciprocal(&Shape::default());
    let mut pixels = tile([255, 255, 255]);
    pixels[0] = 0;
    let tiles: [&[u8]; 2] = [&tile([255, 255, 255]), &pixels];
    let cases = [(Activation::None, 1), (Activation::Sigmoid, 1), (Activation::Softmax, 3)];
    for (activation, expected) in cases {
        let counts = predict(&model, &settings(activation), &tiles).nonfinite_per_tile();
        assert_eq!(counts, [0, expected], "{activation}");
    }
}

#[test]
fn a_batch_is_checked_before_it_runs() {
    let saved = save(&features(&Shape::default()), &bare(Task::Features, &[], Activation::None));
    let mut session = saved.factory().unwrap().open().unwrap();
    assert!(matches!(session.predict(&[]), Err(SessionError::EmptyBatch)));
    let error = session.predict(&[&tile([0; 3]), &[0; 3]]).unwrap_err();
    assert_eq!(error.to_string(), "tile 1 of the batch has 3 bytes instead of 48");
}

#[test]
fn a_card_that_contradicts_its_model_is_refused() {
    let classification = |names: &[&str]| bare(Task::Classification, names, Activation::None);
    let classifier_of = |shape: Shape| classifier(&shape);
    let any = Shape::default;
    let map_of_two = || segmenter(&any(), &[0.0; 6]);
    let with = |change: fn(&mut BareModel)| {
        let mut settings = bare(Task::Features, &[], Activation::None);
        change(&mut settings);
        settings
    };
    let cases = [
        (classifier_of(any()), classification(&["a"]), "`classes` contradicts the model: the card names 1"),
        (classifier_of(any()), BareModel { tile_size: Some(8), ..classification(&["a", "b"]) }, "`tile_size` contrad"),
        (classifier_of(any()), BareModel { resize: Some(8), ..classification(&["a", "b"]) }, "`resize` contradicts"),
        (classifier_of(any()), bare(Task::Segmentation, &["a", "b"], Activation::None), "`task` contradicts the model"),
        (classifier_of(any()), with(|bare| bare.pool = Some(Pool::Cls)), "`pool` contradicts the model: the card says"),
        (map_of_two(), classification(&["a", "b"]), "`task` contradicts the model: the card says classification"),
        (
            classifier_of(Shape { channels: 4, ..any() }),
            BareModel { tile_size: Some(4), ..classification(&["a", "b"]) },
            "is no batch of RGB images",
        ),
    ];
    for (model, settings, expected) in cases {
        let error = save(&model, &settings).factory().err().unwrap();
        assert!(error.to_string().contains(expected), "{error} instead of {expected}");
    }
}

#[test]
fn sizes_that_the_graph_leaves_open_are_checked_when_it_runs() {
    let mut model = segmenter(&Shape::default(), &[0.0; 6]);
    let graph = model.proto_mut().graph.as_mut().unwrap();
    for info in graph.input.iter_mut().chain(&mut graph.output) {
        let kind = info.r#type.as_mut().unwrap().value.as_mut().unwrap();
        let crate::onnx::proto::type_proto::Value::TensorType(tensor) = kind else { panic!() };
        for dim in &mut tensor.shape.as_mut().unwrap().dim {
            dim.value = None;
        }
    }
    let settings = BareModel { tile_size: Some(4), ..bare(Task::Segmentation, &["a", "b", "c"], Activation::Softmax) };
    let saved = save(&model, &settings);
    let error = saved.factory().unwrap().open().unwrap().predict(&[&tile([0; 3])]).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("output scores is f32 [1, 2, 4, 4], but float [1, 3, 4, 4] is needed"), "{text}");
    let two = BareModel { class_names: Some(vec!["a".to_owned(), "b".to_owned()]), ..settings };
    assert_eq!(map(predict(&model, &two, &[&tile([0; 3])])).dim(), (1, 2, 4, 4));
}

#[test]
fn a_bare_model_asks_for_all_that_its_graph_does_not_tell() {
    let asks = |model: &Model, settings: &BareModel| match save(model, settings).card {
        Err(ModelError::Missing { settings, .. }) => settings.join(" "),
        other => panic!("{other:?}"),
    };
    let nothing = BareModel::default();
    let any = Shape::default();
    assert_eq!(asks(&classifier(&any), &nothing), "task target_mpp class_names mean std activation");
    assert_eq!(asks(&segmenter(&any, &[0.0; 6]), &nothing), "target_mpp class_names mean std activation");
    let features = BareModel { task: Some(Task::Features), ..nothing.clone() };
    assert_eq!(asks(&tokens(&any), &features), "target_mpp mean std pool");
    let bytes = Shape { element: ElementType::U8, layout: Layout::Nhwc, ..any };
    assert_eq!(asks(&classifier(&bytes), &nothing), "task target_mpp class_names activation");
}

#[test]
fn changed_weights_are_refused() {
    let saved = save(&features(&Shape::default()), &bare(Task::Features, &[], Activation::None));
    let file = &saved.card.as_ref().unwrap().default_variant().unwrap().file;
    classifier(&Shape::default()).save(file).unwrap();
    let error = saved.factory().err().unwrap();
    assert!(matches!(&error, SessionError::Model(ModelError::Changed { .. })), "{error}");
    assert!(error.hint().unwrap().contains("sha256"));
    std::fs::write(file, "<html>").unwrap();
    assert!(saved.factory().err().unwrap().to_string().ends_with("is no ONNX model but a web page"));
}

#[test]
fn a_broken_graph_is_an_error_and_no_panic() {
    let mut model = features(&Shape::default());
    model.proto_mut().graph.as_mut().unwrap().node[0].op_type = Some("NoSuchOperator".to_owned());
    let saved = save(&model, &bare(Task::Features, &[], Activation::None));
    let error = saved.factory().unwrap().open().err().unwrap();
    assert!(matches!(error, SessionError::Open { provider: Provider::Cpu, .. }));
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert!(source.contains("NoSuchOperator"), "{source}");
}

#[test]
fn options_go_where_they_belong() {
    let saved = save(&features(&Shape::default()), &bare(Task::Features, &[], Activation::None));
    let card = saved.card.as_ref().unwrap();
    let mut variant = card.default_variant().unwrap().clone();
    variant.options = BTreeMap::from(
        [("session.set_denormal_as_zero", "1"), ("prefer_nhwc", "1")].map(|(k, v)| (k.to_owned(), v.to_owned())),
    );
    variant.provider = Some(Provider::Cuda);
    let factory = SessionFactory::new(card, &variant, ON_CPU).unwrap();
    assert_eq!(factory.ignored_options(), ["prefer_nhwc"]);
    assert!(factory.open().is_ok());
    let on_gpu = SessionOptions { provider: Provider::Cuda, ..ON_CPU };
    assert!(matches!(SessionFactory::new(card, &variant, on_gpu), Err(SessionError::Mismatch { .. })));
}

#[test]
fn a_stop_ends_the_running_batch_and_all_later_ones() {
    let saved = save(&slow(), &bare(Task::Segmentation, &["a", "b", "c"], Activation::None));
    let factory = saved.factory().unwrap();
    let mut session = factory.open().unwrap();
    let pixels = tile([9; 3]);
    let tiles = vec![&pixels[..]; 256];
    let start = std::time::Instant::now();
    assert!(session.predict(&tiles).is_ok());
    let whole = start.elapsed();
    let stop = factory.stop_handle();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            std::thread::sleep(whole / 4);
            stop.stop();
        });
        let start = std::time::Instant::now();
        let result = session.predict(&tiles);
        assert!(matches!(result, Err(SessionError::Stopped)), "{result:?}");
        assert!(start.elapsed() < whole + Duration::from_secs(1));
    });
    assert!(matches!(factory.open().unwrap().predict(&tiles[..1]), Err(SessionError::Stopped)));
}

#[test]
fn a_profiled_first_batch_tells_the_placement_and_later_ones_run_on() {
    let saved = save(&classifier(&Shape::default()), &bare(Task::Classification, &["a", "b"], Activation::None));
    let mut factory = saved.factory().unwrap();
    Arc::get_mut(&mut factory.shared).unwrap().wants_placement = true;
    let mut session = factory.open().unwrap();
    assert_eq!(factory.placement(), None);
    let first = session.predict(&[&tile([255, 0, 0])]).unwrap();
    let nodes = &factory.placement().unwrap().nodes;
    assert_eq!(nodes.keys().collect::<Vec<_>>(), ["CPUExecutionProvider"]);
    assert_eq!(nodes["CPUExecutionProvider"]["Gemm"], 1);
    assert_eq!(factory.placement().unwrap().heavy_on_cpu(Provider::Cuda).as_deref(), Some("Gemm 1"));
    assert_eq!(session.predict(&[&tile([255, 0, 0])]).unwrap(), first);
    assert!(factory.open().unwrap().profile.is_none());
}

#[test]
fn sessions_of_one_factory_agree() {
    let saved =
        save(&segmenter(&Shape::default(), &[0.3; 6]), &bare(Task::Segmentation, &["a", "b"], Activation::None));
    let factory = saved.factory().unwrap();
    let (mut one, mut two) = (factory.open().unwrap(), factory.open().unwrap());
    let pixels = tile([1, 2, 3]);
    assert_eq!(one.predict(&[&pixels]).unwrap(), two.predict(&[&pixels]).unwrap());
    assert_eq!((factory.auto_batch_size(1).unwrap(), factory.max_batch()), (CPU_BATCH, None));
}

#[test]
fn batches_are_fitted_to_memory() {
    let gib = 1 << 30;
    let cases = [(gib, 80 * gib, 256, 32), (gib / 8, 80 * gib, 256, 256), (gib, gib, 32, 1), (0, 0, 32, 1)];
    for (per_tile, free, cap, expected) in cases {
        assert_eq!(fit_batch(per_tile, free, cap), expected, "{per_tile} of {free}");
    }
}

#[test]
fn a_gpu_sees_batches_of_one_size() {
    let gpu = Device::Cuda { index: 0 };
    for (device, tiles, largest, images) in
        [(gpu, 3, 32, 32), (gpu, 32, 8, 32), (gpu, 8, 0, 8), (Device::Cpu, 3, 32, 3)]
    {
        assert_eq!(filled_up(device, tiles, largest), images);
    }
}

#[test]
fn out_of_memory_is_recognised_in_every_dialect() {
    let yes = [
        "BFCArena::AllocateRawInternal(size_t) Failed to allocate memory for requested buffer of size 17179869184",
        "Available memory of 0 is smaller than requested bytes of 256",
        "CUDA failure 2: out of memory ; GPU=0 ; hostname=x ; expr=cudaMalloc((void**)&p, size);",
        "CUDNN failure 4002: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED",
        "CUBLAS failure 3: the resource allocation failed ; GPU=0 ; expr=cublasCreate(&cublas_handle_);",
        "std::bad_alloc",
    ];
    for message in yes {
        assert!(is_out_of_memory(message), "{message}");
    }
    assert!(!is_out_of_memory("Got invalid dimensions for input: image"));
}

#[test]
fn weights_in_a_second_file_are_hashed_with_the_first() {
    let folder = tempfile::tempdir().unwrap();
    let mut model = features(&Shape::default());
    let graph = model.proto_mut().graph.as_mut().unwrap();
    let weights = &mut graph.initializer[0];
    std::fs::write(folder.path().join("model.data"), weights.raw_data.take().unwrap()).unwrap();
    weights.data_location = Some(crate::onnx::proto::tensor_proto::DataLocation::External.into());
    weights.external_data = vec![crate::onnx::proto::StringStringEntryProto {
        key: Some("location".to_owned()),
        value: Some("model.data".to_owned()),
    }];
    let path = folder.path().join("model.onnx");
    model.save(&path).unwrap();
    let (_, before) = card::load_hashed(&path).unwrap();
    std::fs::write(folder.path().join("model.data"), [0; 16]).unwrap();
    assert_ne!(card::load_hashed(&path).unwrap().1, before);
    std::fs::remove_file(folder.path().join("model.data")).unwrap();
    assert!(matches!(card::load_hashed(&path), Err(ModelError::Read { .. })));
}
