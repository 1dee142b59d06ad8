"""The tile table is in order, and the GeoJSON of tiles, regions and tissue is valid geometry by shapely that says what
the tables and maps say."""

import json
from uuid import UUID

import numpy as np
import pytest
import shapely
import tifffile
from shapely.geometry import shape

RUNS = ["unet_run", "vit_run", "resampled_map_run"]


@pytest.fixture(params=RUNS)
def results(request):
    return request.getfixturevalue(request.param)


def features_of(path):
    """The features of a collection, each checked for what GeoJSON asks of all of them."""
    collection = json.loads(path.read_text())
    assert collection["type"] == "FeatureCollection"
    features = collection["features"]
    for feature in features:
        assert feature["type"] == "Feature"
        assert feature["geometry"]["type"] == "Polygon"
        assert UUID(feature["id"]).version == 5
        for ring in feature["geometry"]["coordinates"]:
            assert len(ring) >= 4
            assert ring[0] == ring[-1]
        polygon = shape(feature["geometry"])
        assert polygon.is_valid, shapely.is_valid_reason(polygon)
        # RFC 7946: exteriors counterclockwise, holes clockwise, by their numbers.
        assert polygon.exterior.is_ccw
        assert not any(hole.is_ccw for hole in polygon.interiors)
    assert len({feature["id"] for feature in features}) == len(features)
    return features


def names_of(results):
    return [name.removeprefix("prob_") for name in results.rows()[2][4:]]


def extent(results):
    return shapely.box(0, 0, *results.slide.dimensions)


def mm_per_px(results):
    return float(results.slide.properties["openslide.mpp-x"]) / 1000


def test_rows_are_sorted_and_sum_to_one(results, request):
    rects, probabilities, _ = results.rows()
    order = [(y, x) for x, y, *_ in rects.tolist()]
    assert order == sorted(set(order))
    assert ((probabilities >= 0) & (probabilities <= 1)).all()
    if request.node.callspec.params["results"] != "resampled_map_run":
        # Of three or four numbers of 32 bits.
        np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-6)


def test_tiles_are_the_rows_of_the_table(results):
    rects, probabilities, _ = results.rows()
    features = features_of(results.path("model-outputs-geojson", "geojson"))
    assert len(features) == len(rects) > 0
    for feature, (x, y, width, height), row in zip(features, rects, probabilities):
        polygon = shape(feature["geometry"])
        assert polygon.equals(shapely.box(x, y, x + width, y + height))
        assert polygon.intersection(extent(results)).area > 0
        properties = feature["properties"]
        assert (properties["isLocked"], properties["objectType"]) == (True, "tile")
        assert list(properties["measurements"]) == names_of(results)
        # The same 32-bit numbers, in other words.
        np.testing.assert_array_equal(np.float32(list(properties["measurements"].values())), np.float32(row))


def test_regions_lie_within_the_slide_and_tell_their_area(results):
    features = features_of(results.path("regions", "geojson"))
    assert features
    for feature in features:
        polygon, properties = shape(feature["geometry"]), feature["properties"]
        assert extent(results).covers(polygon)
        assert properties["objectType"] == "annotation"
        assert properties["classification"]["name"] in names_of(results)
        assert all(0 <= part <= 255 for part in properties["classification"]["color"])
        # Corners are written to a thousandth of a pixel.
        assert properties["area_mm2"] == pytest.approx(polygon.area * mm_per_px(results) ** 2, rel=1e-4)
        assert properties["measurements"] == {"Area mm^2": properties["area_mm2"]}
        # A tenth of a typical cell.
        assert properties["area_mm2"] >= 100e-6


def test_regions_of_classes_do_not_overlap(results):
    polygons = [shape(feature["geometry"]) for feature in features_of(results.path("regions", "geojson"))]
    total = sum(polygon.area for polygon in polygons)
    # Corners between pixels are rounded to a thousandth.
    assert shapely.unary_union(polygons).area == pytest.approx(total, rel=1e-5)


def dust(cells):
    """The sizes of edge-connected groups in a set of (row, column)."""
    sizes = []
    while cells:
        front, size = [cells.pop()], 0
        while front:
            row, column = front.pop()
            size += 1
            for neighbour in [(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]:
                if neighbour in cells:
                    cells.remove(neighbour)
                    front.append(neighbour)
        sizes.append(size)
    return sizes


def test_regions_cover_the_sure_cells_of_the_class_map(unet_run):
    """Cell by cell: all of probability 0.5 or more but the background, and groups below 100 µm²."""
    classes = tifffile.imread(unet_run.path("classes", "tif"), key=0)
    features = features_of(unet_run.path("regions", "geojson"))
    pixel_um2 = (1000 * mm_per_px(unet_run)) ** 2
    rows, columns = np.indices(classes.shape)
    covered = 0
    for value, name in enumerate(names_of(unet_run), start=1):
        map = tifffile.imread(unet_run.path("heatmaps", f"{name}.tif"), key=0)
        is_sure = (classes == value) & (map >= 128)
        polygons = [shape(f["geometry"]) for f in features if f["properties"]["classification"]["name"] == name]
        if name == "background":
            assert not polygons
            continue
        union = shapely.unary_union(polygons)
        shapely.prepare(union)
        is_in_region = shapely.contains_xy(union, columns + 1000.5, rows + 2400.5)
        assert not (is_in_region & ~is_sure).any()
        assert sum(polygon.area for polygon in polygons) == is_in_region.sum()
        left_out = {(int(row), int(column)) for row, column in np.argwhere(is_sure & ~is_in_region)}
        assert max(dust(left_out), default=0) * pixel_um2 < 100
        covered += is_in_region.sum()
    assert covered > 2_000


@pytest.mark.parametrize("name", ["vit_run", "resampled_map_run"])
def test_tissue_lies_within_the_slide_and_under_the_tiles(request, name):
    results = request.getfixturevalue(name)
    polygons = [shape(feature["geometry"]) for feature in features_of(results.path("masks", "geojson"))]
    assert polygons
    assert all(extent(results).covers(polygon) for polygon in polygons)
    tissue = shapely.unary_union(polygons)
    for x, y, width, height in results.rows()[0].tolist():
        tile = shapely.box(x, y, x + width, y + height).intersection(extent(results))
        # A tile is taken from 10 % of tissue on, counted in whole cells of the mask.
        assert tile.intersection(tissue).area >= 0.09 * tile.area
