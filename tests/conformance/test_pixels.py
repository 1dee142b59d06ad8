"""Tiles as models see them, handed out by a model that passes pixels through, against OpenSlide's Python and Pillow."""

import json

import h5py
import numpy as np
import openslide
import pytest
from conftest import TILE, card
from PIL import Image

import reference


@pytest.fixture(scope="module")
def tiles_of(slidestream, pixels_model):
    """Runs over a slide; gives the results, the tiles' level-0 corners and their pixels."""

    def run(slide, mpp, *arguments, model=None):
        bare = ("--task", "features", "--target-mpp", mpp) if model is None else ()
        tissue = ("--tissue", "none", "--emit", "csv,h5")
        results = slidestream("run", slide, "--model", model or pixels_model, *bare, *tissue, *arguments)
        with h5py.File(results.path("features", "h5")) as file:
            pixels = file["features"][:]
        side = round((pixels.shape[1] / 3) ** 0.5)
        return results, results.rows()[0], pixels.reshape(-1, side, side, 3)

    return run


def test_both_sides_use_the_same_openslide(tiles_of, even_slide):
    results, *_ = tiles_of(even_slide, 0.5, "--max-tiles", 1)
    libraries = json.loads((results.folder / "run.json").read_text())["libraries"]
    assert libraries["openslide"]["version"] == openslide.__library_version__


@pytest.mark.parametrize(
    ("name", "mpp", "level", "where"),
    [
        ("svs", 0.5, 0, "700,900,500,300"),
        # Beyond the right and lower edge of the slide.
        ("svs", 0.499, 0, "2050,2800,170,167"),
        ("even_slide", 0.5, 1, "600,500,512,384"),
        # A corner between two pixels of the level.
        ("even_slide", 0.5, 1, "601,503,512,384"),
        ("even_slide", 1.0, 2, "1203,1001,407,329"),
        ("steep_slide", 1.0, 1, "0,0,1610,1330"),
    ],
)
def test_tiles_of_a_level_equal_read_region(request, tiles_of, name, mpp, level, where):
    """Exactly: the same library decodes, and nothing is computed after it.

    Only where a level's edge falls within a pixel, which is then half transparent, the two round differently, by up to
    two grey levels: OpenSlide's Python divides by the opacity before one can lay the pixel over the background.
    """
    results, rects, tiles = tiles_of(request.getfixturevalue(name), mpp, "--region", where)
    assert len(tiles) > 3
    for (x, y, *_), tile in zip(rects, tiles):
        window = ((int(x), int(y)), level, (TILE, TILE))
        opacity = np.asarray(results.slide.read_region(*window))[..., 3]
        difference = np.abs(tile - reference.region(results.slide, *window)).max(axis=2)
        is_partial = (opacity > 0) & (opacity < 255)
        assert difference[~is_partial].max() == 0, f"tile at {x},{y}"
        assert difference[is_partial].max(initial=0) <= 2, f"tile at {x},{y}"


@pytest.mark.parametrize(("name", "mpp", "level"), [("svs", 0.5, 0), ("even_slide", 0.5, 1)])
def test_the_native_reader_agrees_with_read_region(request, tiles_of, name, mpp, level):
    """To within what two sound JPEG decoders round differently."""
    results, rects, tiles = tiles_of(request.getfixturevalue(name), mpp, "--region", "600,900,512,384", "--reader", "native")
    assert results.record()["reading"]["reader"] == "native"
    for (x, y, *_), tile in zip(rects, tiles):
        difference = np.abs(tile - reference.region(results.slide, (int(x), int(y)), level, (TILE, TILE)))
        assert difference.max() <= 4 and difference.mean() <= 0.5, f"tile at {x},{y}"


@pytest.mark.parametrize(
    ("name", "mpp", "where", "tolerance"),
    [
        # By a whole factor: exactly.
        ("steep_slide", 0.5, "500,300,640,512", 0),
        # The filters' weights are rounded to fixed point, differently, and the values twice.
        ("steep_slide", 0.37, "500,300,640,512", 1),
        ("svs", 0.77, "700,900,500,400", 2),
        # Enlarged.
        ("svs", 0.31, "900,1200,100,100", 2),
        # Beyond the lower right corner.
        ("steep_slide", 0.5, "1400,1100,210,230", 1),
    ],
)
def test_resampled_tiles_equal_pillows_bicubic(request, tiles_of, name, mpp, where, tolerance):
    results, rects, tiles = tiles_of(request.getfixturevalue(name), mpp, "--region", where)
    assert len(tiles) > 3
    left, top, *_ = (int(number) for number in where.split(","))
    factor = mpp / float(results.slide.properties["openslide.mpp-x"])
    worst = 0
    for (x, y, *_), tile in zip(rects, tiles):
        # The table rounds to whole level-0 pixels; the exact corner is a whole number of tiles away.
        stride = factor * TILE
        exact = (left + round((x - left) / stride) * stride, top + round((y - top) / stride) * stride)
        expected = reference.resampled(results.slide, exact, factor, TILE)
        worst = max(worst, np.abs(tile - expected).max())
    assert worst <= tolerance


def test_tiles_resized_for_the_model_equal_pillows_bilinear(tiles_of, tmp_path, pixels_model, svs):
    """A card's `resize` is torchvision's, which is Pillow's: to one grey level."""
    keys = {"task": "features", "tile_size": 150, "mpp": 0.5, "mean": [0.0] * 3, "std": [1.0] * 3, "resize": TILE}
    model = card(tmp_path / "resized", pixels_model, **keys)
    results, rects, tiles = tiles_of(svs, None, "--region", "700,900,450,300", model=model)
    assert len(tiles) == 6
    for (x, y, *_), tile in zip(rects, tiles):
        source = Image.fromarray(reference.region(results.slide, (int(x), int(y)), 0, (150, 150)))
        expected = np.asarray(source.resize((TILE, TILE), Image.Resampling.BILINEAR))
        assert np.abs(tile - expected).max() <= 1
