"""Probability and class maps as TIFF: openslide-python and tifffile read the same pixels, with the right resolution."""

import numpy as np
import openslide
import pytest
import tifffile

import reference

RUNS = ["map_run", "resampled_map_run", "unet_run", "vit_run"]


def maps_of(results):
    """Paths of the probability maps, then of the class map."""
    return [*sorted((results.folder / "heatmaps").iterdir()), results.path("classes", "tif")]


def levels_of(path):
    with tifffile.TiffFile(path) as tiff:
        return [page.asarray() for page in tiff.pages]


@pytest.fixture(params=RUNS)
def results(request):
    return request.getfixturevalue(request.param)


def test_openslide_knows_size_resolution_and_levels(results, request):
    """The mpp is a quotient of two 32-bit numbers in the file, so it is right to a few parts in 10⁹."""
    name = request.node.callspec.params["results"]
    mpp, cell, plane = {
        "map_run": (0.499, 1, (2220, 2967)),
        "unet_run": (0.499, 1, (600, 567)),
        "vit_run": (0.499, 96, (2220, 2967)),
        "resampled_map_run": (0.37, 1, (1610 * 0.25 / 0.37, 1330 * 0.25 / 0.37)),
    }[name]
    width, height = (int(np.ceil(side / cell)) for side in plane)
    paths = maps_of(results)
    assert len(paths) == {"unet_run": 5, "vit_run": 5}.get(name, 4)
    for path in paths:
        slide = openslide.OpenSlide(path)
        assert slide.properties["openslide.vendor"] == "generic-tiff"
        sizes = [(width, height)]
        while max(sizes[-1]) > 512:
            sizes.append(tuple((side + 1) // 2 for side in sizes[-1]))
        assert slide.level_dimensions == tuple(sizes)
        for axis in "xy":
            assert float(slide.properties[f"openslide.mpp-{axis}"]) == pytest.approx(mpp * cell, rel=1e-8)


def test_openslide_and_tifffile_read_the_same_pixels(results):
    for path in maps_of(results):
        slide = openslide.OpenSlide(path)
        for level, pixels in enumerate(levels_of(path)):
            read = reference.region(slide, (0, 0), level, slide.level_dimensions[level])
            np.testing.assert_array_equal(read, np.repeat(pixels[..., None], 3, axis=2))


def test_each_level_is_the_one_below_halved(results):
    *probabilities, classes = maps_of(results)
    for path in probabilities:
        levels = levels_of(path)
        for finer, coarser in zip(levels, levels[1:]):
            np.testing.assert_array_equal(coarser, reference.halved_by_mean(finer))
    levels = levels_of(classes)
    for finer, coarser in zip(levels, levels[1:]):
        np.testing.assert_array_equal(coarser, reference.halved_by_mode(finer))


def test_the_map_of_a_classification_holds_the_tile_table(vit_run):
    """A cell is a tile: to half a grey level, and half a step of 1/4095 in which probabilities are summed."""
    rects, probabilities, header = vit_run.rows()
    column, row = rects[:, 0] // 96, rects[:, 1] // 96
    inferred = np.zeros(levels_of(vit_run.path("classes", "tif"))[0].shape, bool)
    inferred[row, column] = True
    for name, expected in zip(header[4:], probabilities.T):
        (level,) = levels_of(vit_run.path("heatmaps", f"{name.removeprefix('prob_')}.tif"))
        assert np.abs(level[row, column] - 255 * expected).max() <= 0.5 + 0.5 * 255 / 4095 + 1e-4
        assert not level[~inferred].any()
    (classes,) = levels_of(vit_run.path("classes", "tif"))
    np.testing.assert_array_equal(classes[row, column], probabilities.argmax(axis=1) + 1)
    assert not classes[~inferred].any()
