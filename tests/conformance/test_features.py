"""Features and coordinates in HDF5: h5py reads them, and CLAM and TRIDENT, by their way, find the tiles' pixels."""

import h5py
import numpy as np
import pytest
from conftest import TILE
from PIL import Image

import reference

ARGUMENTS = ("--task", "features", "--target-mpp", 0.5, "--region", "400,300,896,640", "--emit", "csv,h5")


def clam_tiles(path, slide):
    """As CLAM's dataset of coordinates reads a file."""
    with h5py.File(path) as file:
        coords = file["coords"]
        level, size = coords.attrs["patch_level"], coords.attrs["patch_size"]
        return [np.asarray(slide.read_region(coord, level, (size, size)).convert("RGB")) for coord in coords[:]]


def trident_tiles(path, slide):
    """As TRIDENT's patcher reads a file: by the magnifications, from the best level, resized by Pillow."""
    with h5py.File(path) as file:
        attrs, coords = dict(file["coords"].attrs), file["coords"][:]
    downsample = attrs["level0_magnification"] / attrs["target_magnification"]
    levels = list(enumerate(slide.level_downsamples))
    exact = [level for level, factor in levels if abs(factor - downsample) <= 0.1]
    level = exact[0] if exact else max(level for level, factor in levels if factor <= downsample)
    target = attrs["patch_size"]
    side = round(round(target * downsample) / int(slide.level_downsamples[level]))
    tiles = [slide.read_region((x, y), level, (side, side)).convert("RGB") for x, y in coords]
    return [np.asarray(tile.resize((target, target))) for tile in tiles]


@pytest.fixture(scope="module")
def direct(slidestream, even_slide, pixels_model):
    return slidestream("run", even_slide, "--model", pixels_model, *ARGUMENTS)


@pytest.fixture(scope="module")
def resampled(slidestream, steep_slide, pixels_model):
    return slidestream("run", steep_slide, "--model", pixels_model, *ARGUMENTS)


def pixels(results):
    with h5py.File(results.path("features", "h5")) as file:
        return file["features"][:].reshape(-1, TILE, TILE, 3)


def test_features_and_coords_are_what_mil_code_loads(direct):
    rects, _, header = direct.rows()
    assert header == ["minx", "miny", "width", "height"]
    with h5py.File(direct.path("features", "h5")) as file:
        features, coords = file["features"], file["coords"]
        assert (features.dtype, features.shape) == (np.float32, (len(rects), 3 * TILE * TILE))
        assert (coords.dtype, coords.shape) == (np.int64, (len(rects), 2))
        np.testing.assert_array_equal(coords[:], rects[:, :2])
        assert features.attrs["name"] == coords.attrs["name"] == "even"
    assert len(rects) > 10


def test_a_grid_on_a_level_has_the_attributes_of_both_tools(direct):
    with h5py.File(direct.path("features", "h5")) as file:
        attrs = dict(file["coords"].attrs)
    assert (attrs["patch_size"], attrs["patch_level"], attrs["patch_size_level0"]) == (TILE, 1, 2 * TILE)
    assert (attrs["level0_magnification"], attrs["target_magnification"], attrs["overlap"]) == (40, 20, 0)
    assert (attrs["level0_width"], attrs["level0_height"]) == direct.slide.dimensions
    np.testing.assert_array_equal(attrs["downsample"], [2, 2])
    np.testing.assert_array_equal(attrs["level_dim"], direct.slide.level_dimensions[1])
    np.testing.assert_array_equal(attrs["downsampled_level_dim"], direct.slide.level_dimensions[1])
    folder = str(direct.folder / "features")
    assert attrs["savetodir"] == attrs["save_path"] == folder


@pytest.mark.parametrize("read", [clam_tiles, trident_tiles])
def test_on_a_level_the_tools_read_exactly_the_tiles(direct, read):
    np.testing.assert_array_equal(read(direct.path("features", "h5"), direct.slide), pixels(direct))


def test_on_a_resampled_grid_trident_reads_the_tiles(resampled):
    """Inside to one grey level, for rounding; at the edges TRIDENT's filter ends with the patch, ours sees beyond."""
    read = np.array(trident_tiles(resampled.path("features", "h5"), resampled.slide), int)
    inside = np.s_[:, 2:-2, 2:-2]
    assert np.abs(read - pixels(resampled))[inside].max() <= 1


def test_on_a_resampled_grid_clam_does_not_read_what_is_meant_for_trident(resampled):
    with pytest.raises(KeyError):
        clam_tiles(resampled.path("features", "h5"), resampled.slide)


@pytest.mark.parametrize("profile", ["clam", "trident"])
@pytest.mark.parametrize("name", ["even_slide", "steep_slide"])
def test_coordinates_without_a_model_are_read_by_their_tool(request, slidestream, name, profile):
    """CLAM reads a resampled grid at level 0, in pixels of level 0; the tile is what Pillow makes of them, as above."""
    slide = request.getfixturevalue(name)
    region = ("--region", "400,300,896,640")
    results = slidestream(
        "tiles", slide, "--tile-size", TILE, "--target-mpp", 0.5, "--profile", profile, "--overlap", "16px", *region
    )
    path = results.path("coords", "h5")
    rects, _, header = results.rows("coords")
    assert header == ["minx", "miny", "width", "height"]
    with h5py.File(path) as file:
        assert list(file) == ["coords"]
        assert file["coords"].dtype == np.int64
        np.testing.assert_array_equal(file["coords"][:], rects[:, :2])
    assert len(rects) > 10
    read = (clam_tiles if profile == "clam" else trident_tiles)(path, results.slide)
    for (x, y, width, height), tile in zip(rects.tolist(), read):
        assert (width, height) == (2 * TILE, 2 * TILE)
        if name == "even_slide":
            np.testing.assert_array_equal(tile, reference.region(results.slide, (x, y), 1, (TILE, TILE)))
            continue
        if profile == "clam":
            assert tile.shape == (2 * TILE, 2 * TILE, 3)
            tile = np.asarray(Image.fromarray(tile).resize((TILE, TILE)))
        expected = reference.resampled(results.slide, (x, y), 2.0, TILE)
        assert np.abs(tile.astype(int) - expected)[2:-2, 2:-2].max() <= 1


def test_coordinates_of_a_file_give_the_same_features(slidestream, even_slide, pixels_model, direct):
    """What `tiles` writes, and other tools could have written, is taken back."""
    results = slidestream(
        "run", even_slide, "--model", pixels_model, "--task", "features", "--target-mpp", 0.5, "--emit", "h5",
        "--coords", direct.path("features", "h5"),
    )  # fmt: skip
    np.testing.assert_array_equal(pixels(results), pixels(direct))
