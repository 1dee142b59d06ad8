"""Figures of `evaluate` against scikit-learn's on the same predictions, and those predictions against ONNX Runtime's."""

import csv
import json
import os
import subprocess

import numpy as np
import pytest
from conftest import NORMALISED, ROOT, save
from onnx import TensorProto, helper
from PIL import Image
from sklearn import metrics

import reference

SIDE = 16
CLASSES = [f"class {index}" for index in range(7)]
# Unequal, so that balanced figures differ from the others.
SHARES = (0.3, 0.2, 0.15, 0.12, 0.1, 0.08, 0.05)
# Both sides add the same numbers of 64 bits, in other orders.
TOLERANCE = 1e-9


def call(command, *arguments):
    binary = os.environ.get("SLIDESTREAM", ROOT / "target/debug/slidestream")
    line = [binary, command, *arguments, "--quiet", "--device", "cpu", "--provider", "cpu"]
    done = subprocess.run([str(word) for word in line], cwd=ROOT, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, f"{line}: {done.stderr}"


@pytest.fixture(scope="module")
def classified(tmp_path_factory):
    """280 noisy tiles of seven classes, which a linear model of the mean colour tells apart badly: record and table."""
    folder, random = tmp_path_factory.mktemp("evaluate"), np.random.default_rng(3)
    centres = random.uniform(60, 200, (len(CLASSES), 3))
    rows = []
    for index in range(280):
        label = int(random.choice(len(CLASSES), p=SHARES))
        pixels = random.normal(centres[label] + random.normal(0, 35, 3), 12, (SIDE, SIDE, 3)).clip(0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
        rows.append((f"{index}.png", CLASSES[label], f"patient {index % 23}"))
    with open(folder / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image", "label", "group"), *rows])
    # Scores fall with the distance from a class's centre: −|x − c|² without the part that all classes share.
    weights, bias = (2 * centres.T / 255), -((centres / 255) ** 2).sum(axis=1)
    model = save(
        folder / "nearest.onnx",
        [
            helper.make_node("GlobalAveragePool", ["tile"], ["means"]),
            helper.make_node("Flatten", ["means"], ["colour"], axis=1),
            helper.make_node("Gemm", ["colour", "weights", "bias"], ["scores"]),
        ],
        helper.make_tensor_value_info("tile", TensorProto.FLOAT, ["n", 3, SIDE, SIDE]),
        helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", len(CLASSES)]),
        [("weights", (25 * weights).astype(np.float32)), ("bias", (25 * bias).astype(np.float32))],
    )
    described = (
        "--model", model, "--task", "classification", "--target-mpp", "0.5", "--activation", "softmax",
        "--class-names", ",".join(CLASSES), "--mean", "0,0,0", "--std", "1,1,1",
    )  # fmt: skip
    call("evaluate", folder / "labels.csv", *described, "--out", folder / "out")
    with open(folder / "out/predictions.csv", newline="") as file:
        table = list(csv.DictReader(file))
    return json.loads((folder / "out/evaluate.json").read_text()), table, model


@pytest.fixture(scope="module")
def columns(classified):
    """Labels, predicted classes and probabilities of the table."""
    _, table, _ = classified
    labels = np.array([CLASSES.index(row["label"]) for row in table])
    predicted = np.array([CLASSES.index(row["predicted"]) for row in table])
    probabilities = np.array([[float(row[f"prob_{name}"]) for name in CLASSES] for row in table])
    return labels, predicted, probabilities


def test_predictions_are_the_models(classified, columns):
    _, table, model = classified
    tiles = [np.asarray(Image.open(row["path"])) for row in table]
    expected = reference.softmax(reference.scores(model, reference.normalised(tiles, 0, 1)))
    np.testing.assert_allclose(columns[2], expected, rtol=0, atol=1e-5)
    assert (columns[1] == expected.argmax(axis=1)).all()


def test_figures_over_all_classes(classified, columns):
    figures, (labels, predicted, probabilities) = classified[0]["figures"], columns
    areas = [metrics.roc_auc_score(labels == index, probabilities[:, index]) for index in range(len(CLASSES))]
    every = range(len(CLASSES))
    expected = {
        "top1": metrics.accuracy_score(labels, predicted),
        "top5": metrics.top_k_accuracy_score(labels, probabilities, k=5, labels=every),
        "balanced_accuracy": metrics.balanced_accuracy_score(labels, predicted),
        "auc": np.mean(areas),
        "kappa": metrics.cohen_kappa_score(labels, predicted),
        "macro_f1": metrics.f1_score(labels, predicted, average="macro"),
    }
    assert set(labels) == set(every), "a class is missing"
    assert 0.3 < expected["top1"] < 0.9 < expected["top5"] < 1, "too easy or too hard to tell anything"
    for name, value in expected.items():
        assert figures[name]["value"] == pytest.approx(value, abs=TOLERANCE), name
        assert figures[name]["low"] < value < figures[name]["high"], name


def test_calibration_by_its_formula(classified, columns):
    """Guo et al. 2017, equation 3; scikit-learn has no ECE."""
    labels, predicted, probabilities = columns
    confidence, right = probabilities.max(axis=1), labels == predicted
    bins = np.digitize(confidence, np.linspace(0, 1, 16), right=True)
    gaps = [abs(right[bins == index].sum() - confidence[bins == index].sum()) for index in range(1, 16)]
    assert len(set(bins)) > 8
    assert classified[0]["figures"]["ece"]["value"] == pytest.approx(sum(gaps) / len(labels), abs=TOLERANCE)


def test_figures_of_each_class(classified, columns):
    labels, predicted, probabilities = columns
    found = classified[0]["classes"]
    expected = metrics.precision_recall_fscore_support(labels, predicted, labels=range(len(CLASSES)))
    for name, values in zip(("precision", "recall", "f1", "support"), expected):
        values_found = [one[name] if name == "support" else one[name]["value"] for one in found]
        np.testing.assert_allclose(values_found, values, rtol=0, atol=TOLERANCE, err_msg=name)
    iou = metrics.jaccard_score(labels, predicted, average=None)
    np.testing.assert_allclose([one["iou"]["value"] for one in found], iou, rtol=0, atol=TOLERANCE)
    matrix = metrics.confusion_matrix(labels, predicted)
    assert [row[:-1] for row in classified[0]["confusion"]] == matrix.tolist()


def test_an_interval_is_the_bootstrap_of_its_groups(classified, columns):
    """Another generator draws other groups: ends agree as well as 2,000 draws tell them."""
    labels, predicted, _ = columns
    groups = np.array([int(row["group"].split()[1]) for row in classified[1]])
    right = np.array([(labels == predicted)[groups == group].sum() for group in range(23)])
    size = np.bincount(groups)
    draws = np.random.default_rng(1).integers(0, 23, (20000, 23))
    low, high = np.percentile(right[draws].sum(axis=1) / size[draws].sum(axis=1), [2.5, 97.5])
    found = classified[0]["figures"]["top1"]
    assert found["low"] == pytest.approx(low, abs=0.01)
    assert found["high"] == pytest.approx(high, abs=0.01)


def test_one_class(tmp_path):
    """A single logit is judged as scikit-learn judges a binary classifier by its probability."""
    random, rows = np.random.default_rng(11), [("path", "label")]
    for index in range(120):
        is_tumour = bool(random.random() < 0.4)
        colour = random.normal(150 if is_tumour else 110, 30, 3)
        pixels = random.normal(colour, 12, (SIDE, SIDE, 3)).clip(0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"{index}.png")
        rows.append((f"{index}.png", "tumour" if is_tumour else "normal"))
    with open(tmp_path / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    model = save(
        tmp_path / "one.onnx",
        [
            helper.make_node("GlobalAveragePool", ["tile"], ["means"]),
            helper.make_node("Flatten", ["means"], ["colour"], axis=1),
            helper.make_node("Gemm", ["colour", "weights", "bias"], ["logit"]),
        ],
        helper.make_tensor_value_info("tile", TensorProto.FLOAT, ["n", 3, SIDE, SIDE]),
        helper.make_tensor_value_info("logit", TensorProto.FLOAT, ["n", 1]),
        [("weights", np.full((3, 1), 5, np.float32)), ("bias", np.array([-7.5], np.float32))],
    )
    described = (
        "--model", model, "--task", "classification", "--target-mpp", "0.5", "--activation", "sigmoid",
        "--class-names", "tumour", "--mean", "0,0,0", "--std", "1,1,1",
    )  # fmt: skip
    call("evaluate", tmp_path / "labels.csv", *described, "--out", tmp_path / "out")
    record = json.loads((tmp_path / "out/evaluate.json").read_text())
    with open(tmp_path / "out/predictions.csv", newline="") as file:
        table = list(csv.DictReader(file))
    labels = np.array([row["label"] == "tumour" for row in table])
    probabilities = np.array([float(row["prob_tumour"]) for row in table])
    predicted = probabilities >= 0.5
    assert {row["label"] for row in table} == {"tumour", "not tumour"}
    assert 0.6 < (labels == predicted).mean() < 0.95, "too easy or too hard to tell anything"
    for name, value in (
        ("top1", metrics.accuracy_score(labels, predicted)),
        ("balanced_accuracy", metrics.balanced_accuracy_score(labels, predicted)),
        ("auc", metrics.roc_auc_score(labels, probabilities)),
        ("kappa", metrics.cohen_kappa_score(labels, predicted)),
        ("macro_f1", metrics.f1_score(labels, predicted, average="macro")),
    ):
        assert record["figures"][name]["value"] == pytest.approx(value, abs=TOLERANCE), name
    tumour = metrics.precision_recall_fscore_support(labels, predicted, average="binary")[:3]
    found = [record["classes"][0][name]["value"] for name in ("precision", "recall", "f1")]
    np.testing.assert_allclose(found, tumour, rtol=0, atol=TOLERANCE)


def test_maps(tmp_path, colour_segmenter):
    """Masks that `predict` writes are what `evaluate` counts, and its figures are scikit-learn's."""
    random, names = np.random.default_rng(5), ["glass", "nucleus", "stroma"]
    described = (
        "--model", colour_segmenter, "--task", "segmentation", "--target-mpp", "0.5", "--activation", "softmax",
        "--class-names", ",".join(names), *NORMALISED,
    )  # fmt: skip
    rows = [("image", "mask")]
    for index in range(3):
        coarse = random.integers(0, 256, (20, 24, 3)).astype(np.uint8)
        Image.fromarray(coarse).resize((300 + 20 * index, 280)).save(tmp_path / f"{index}.png")
        rows.append((f"{index}.png", f"mask-{index}.png"))
    images = [tmp_path / f"{index}.png" for index in range(3)]
    call("predict", *images, *described, "--out", tmp_path / "masks")
    found = [np.asarray(Image.open(tmp_path / f"masks/{index}.mask.png")) for index in range(3)]
    labels = []
    for index, one in enumerate(found):
        # The model's own map with a third of the pixels drawn anew, and some without a label.
        mask = np.where(random.random(one.shape) < 0.33, random.integers(0, 3, one.shape), one).astype(np.uint8)
        mask[random.random(one.shape) < 0.05] = 255
        Image.fromarray(mask).save(tmp_path / f"mask-{index}.png")
        labels.append(mask)
    with open(tmp_path / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    call("evaluate", tmp_path / "labels.csv", *described, "--out", tmp_path / "out")
    record = json.loads((tmp_path / "out/evaluate.json").read_text())
    truth, seen = (np.concatenate([one.ravel() for one in maps]) for maps in (labels, found))
    truth, seen = truth[truth != 255], seen[truth != 255]
    assert set(seen) == {0, 1, 2}
    dice = metrics.f1_score(truth, seen, average=None)
    iou = metrics.jaccard_score(truth, seen, average=None)
    np.testing.assert_allclose([one["f1"]["value"] for one in record["classes"]], dice, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose([one["iou"]["value"] for one in record["classes"]], iou, rtol=0, atol=TOLERANCE)
    for name, value in (
        ("mean_dice", dice.mean()),
        ("mean_iou", iou.mean()),
        ("top1", metrics.accuracy_score(truth, seen)),
        ("kappa", metrics.cohen_kappa_score(truth, seen)),
    ):
        assert record["figures"][name]["value"] == pytest.approx(value, abs=TOLERANCE), name
    with open(tmp_path / "out/predictions.csv", newline="") as file:
        for index, row in enumerate(csv.DictReader(file)):
            known = labels[index] != 255
            expected = metrics.f1_score(labels[index][known], found[index][known], average=None)
            np.testing.assert_allclose([float(row[f"dice_{name}"]) for name in names], expected, rtol=0, atol=TOLERANCE)
