"""Probabilities in the tile table against ONNX Runtime's Python, on pixels that OpenSlide's Python read."""

import json

import numpy as np
import onnxruntime
import pytest
from conftest import NORMALISED, ROOT, TILE

import reference

# Both sides compute in 32 bits, in batches of other sizes and with another softmax.
TOLERANCE = 1e-5


def test_both_sides_use_the_same_onnx_runtime(vit_run):
    libraries = json.loads((vit_run.folder / "run.json").read_text())["libraries"]
    assert libraries["onnxruntime"]["version"] == onnxruntime.__version__


def test_cells_vit(vit_run):
    rects, found, header = vit_run.rows()
    assert header[4:] == ["prob_lymphocyte", "prob_tumour-epithelial", "prob_stroma", "prob_glass"]
    assert len(rects) == 40
    batch = reference.normalised(reference.tiles(vit_run.slide, rects, 96), 0.5, 0.5)
    expected = reference.softmax(reference.scores(ROOT / "models/cells-vit/cells-vit.onnx", batch))
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


def test_cells_unet(unet_maps, unet_run):
    """The table holds a tile's mean over its part inside the region."""
    rects, found, _ = unet_run.rows()
    assert len(rects) == 9
    for (x, y, *_), one, row in zip(rects, unet_maps, found):
        expected = one[:, : 2967 - y, : 1600 - x].mean(axis=(1, 2))
        np.testing.assert_allclose(row, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_a_model_without_a_card(slidestream, svs, colour_classifier, activation):
    results = slidestream(
        "run", svs, "--model", colour_classifier, "--task", "classification", "--target-mpp", 0.5, *NORMALISED,
        "--class-names", "a,b,c", "--activation", activation, "--max-tiles", 100, "--emit", "csv",
    )  # fmt: skip
    rects, found, _ = results.rows()
    mean, std = (np.array(text.split(","), float) for text in NORMALISED[1::2])
    batch = reference.normalised(reference.tiles(results.slide, rects, TILE), mean, std)
    logits = reference.scores(colour_classifier, batch)
    expected = reference.softmax(logits) if activation == "softmax" else 1 / (1 + np.exp(-logits.astype(float)))
    assert len(rects) == 100
    assert np.ptp(found, axis=0).min() > 0.1, "all tiles look alike"
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
