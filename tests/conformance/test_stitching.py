"""The stitched maps against NumPy: nine overlapping tiles of the UNet, inferred by ONNX Runtime's Python and blended
in 64 bits by a window that sums to one."""

import numpy as np
import pytest
import tifffile

import reference

SIDE, OVERLAP = 256, 64
# The engine rounds probabilities to 4095 steps before it sums them.
STEP = 1 / 4095


@pytest.fixture(scope="module")
def corners(unet_run):
    rects, *_ = unet_run.rows()
    return [(int(x) - 1000, int(y) - 2400) for x, y, *_ in rects]


@pytest.fixture(scope="module")
def engine_window():
    """The engine's weights are whole 64ths and never 0."""
    return np.maximum(np.round(64 * reference.blend_window(SIDE, OVERLAP)), 1)


@pytest.fixture(scope="module")
def probabilities(unet_run):
    names = ["background", "lymphocyte", "tumour-epithelial", "stroma"]
    maps = [tifffile.imread(unet_run.path("heatmaps", f"{name}.tif"), key=0) for name in names]
    return np.array(maps, float)


def test_probability_maps_equal_the_reference(corners, unet_maps, engine_window, probabilities):
    """To half a grey level, by which the file rounds, and half a step; 0.01 is for 32-bit inference."""
    expected = 255 * reference.stitched(corners, unet_maps, (567, 600), engine_window)
    assert np.ptp(expected, axis=(1, 2)).min() > 200, "the maps show nothing"
    assert np.abs(probabilities - expected).max() <= 0.5 + 255 * STEP / 2 + 0.01


def test_the_window_is_a_raised_cosine(corners, unet_maps, probabilities):
    """Weights in 64ths move the mean of tiles that contradict each other by up to 1/64 of their difference each way."""
    exact = reference.blend_window(SIDE, OVERLAP)
    np.testing.assert_allclose(exact[:OVERLAP] + exact[-OVERLAP:], 1, atol=1e-12)
    difference = np.abs(probabilities - 255 * reference.stitched(corners, unet_maps, (567, 600), exact))
    assert difference.max() <= 4.5
    assert difference.mean() <= 0.3


def test_class_map_equals_the_reference(unet_run, corners, unet_maps, engine_window):
    """Wherever the two best classes differ by more than the engine's step, that is nearly everywhere."""
    expected = reference.stitched(corners, unet_maps, (567, 600), engine_window)
    runner_up, best = np.sort(expected, axis=0)[-2:]
    is_clear = best - runner_up > 1.01 * STEP
    assert is_clear.mean() > 0.99
    classes = tifffile.imread(unet_run.path("classes", "tif"), key=0)
    np.testing.assert_array_equal(classes[is_clear], expected.argmax(axis=0)[is_clear] + 1)
