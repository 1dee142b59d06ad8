"""Slides, models and runs that the tests share: each is made once, in a temporary folder."""

import csv
import hashlib
import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import openslide
import pytest
import tifffile
from onnx import TensorProto, helper, numpy_helper

import reference

ROOT = Path(__file__).resolve().parents[2]
TILE = 64


@dataclass(frozen=True)
class Results:
    """What one run wrote, and what it ran on."""

    folder: Path
    slide: openslide.OpenSlide
    id: str

    def path(self, folder, suffix):
        return self.folder / folder / f"{self.id}.{suffix}"

    def rows(self, folder="model-outputs-csv"):
        """The tile table: level-0 rectangles `[tiles, 4]`, probabilities `[tiles, classes]`, names of the columns."""
        with open(self.path(folder, "csv"), newline="") as file:
            header, *rows = csv.reader(file)
        rects = np.array([[int(value) for value in row[:4]] for row in rows]).reshape(-1, 4)
        return rects, np.array([[float(value) for value in row[4:]] for row in rows]), header

    def record(self):
        return json.loads(self.path("slides", "json").read_text())


@pytest.fixture(scope="session")
def slidestream(tmp_path_factory):
    """Calls the program on a slide: `slidestream("run", slide, "--model", …)`."""

    def call(command, slide, *arguments):
        out = tmp_path_factory.mktemp("out")
        binary = os.environ.get("SLIDESTREAM", ROOT / "target/debug/slidestream")
        quiet = ["--quiet", "--device", "cpu", "--provider", "cpu"] if command == "run" else []
        # The references read through OpenSlide: what is compared bit for bit does so too.
        reader = [] if "--reader" in arguments else ["--reader", "openslide"]
        line = [binary, command, slide, "--out", out, *quiet, *reader, *arguments]
        done = subprocess.run([str(word) for word in line], cwd=ROOT, text=True, capture_output=True, timeout=300)
        assert done.returncode == 0, f"{line}: {done.stderr}"
        return Results(out, openslide.OpenSlide(slide), Path(slide).stem)

    return call


@pytest.fixture(scope="session")
def svs():
    """CMU-1-Small-Region (CC0, Aperio, 0.499 µm/px), which lies in the package of the crate openslide-rs."""
    line = ["cargo", "metadata", "--format-version", "1", "--locked"]
    packages = json.loads(subprocess.run(line, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout)["packages"]
    package = next(package for package in packages if package["name"] == "openslide-rs")
    return Path(package["manifest_path"]).parent / "tests/assets/default.svs"


def painted(width, height):
    """A stained slide: a blob of tissue with nuclei, a hole, and noise of one pixel, which filters can't hide."""
    random = np.random.default_rng(7)
    y, x = np.mgrid[0:height, 0:width]
    radius = np.hypot((x - width * 0.55) / width, (y - height * 0.5) / height)
    image = np.full((height, width, 3), 243.0)
    tissue = (radius < 0.38) & (np.hypot(x - width * 0.6, y - height * 0.55) > 130)
    image[tissue] = (214, 150, 190)
    for centre_x, centre_y in random.integers(0, (width, height), (900, 2)):
        part = np.s_[max(centre_y - 9, 0) : centre_y + 10, max(centre_x - 9, 0) : centre_x + 10]
        nucleus = np.hypot(x[part] - centre_x, y[part] - centre_y) < 8
        image[part][nucleus & tissue[part]] = (92, 58, 140)
    image += random.normal(0, 1, image.shape) * np.where(tissue, 14, 2)[..., None]
    return image.clip(0, 255).round().astype(np.uint8)


def write_pyramid(path, image, downsamples, mpp):
    with tifffile.TiffWriter(path) as tiff:
        for factor in downsamples:
            height, width = (side // factor * factor for side in image.shape[:2])
            blocks = image[:height, :width].reshape(height // factor, factor, width // factor, factor, 3)
            level = blocks.mean(axis=(1, 3)).round().astype(np.uint8)
            tiff.write(
                level, tile=(256, 256), compression="zlib", photometric="rgb", resolutionunit="CENTIMETER",
                resolution=(1e4 / (mpp * factor),) * 2, subfiletype=int(factor > 1), metadata=None,
            )  # fmt: skip
    return path


@pytest.fixture(scope="session")
def steep_slide(tmp_path_factory):
    """0.25 µm/px with levels 1, 4 and 16, all lossless: 0.5 µm/px must be resampled."""
    return write_pyramid(tmp_path_factory.mktemp("slides") / "steep.tif", painted(1610, 1330), (1, 4, 16), 0.25)


@pytest.fixture(scope="session")
def even_slide(tmp_path_factory):
    """0.25 µm/px with levels 1, 2 and 4, all lossless: 0.5 µm/px is level 1."""
    return write_pyramid(tmp_path_factory.mktemp("slides") / "even.tif", painted(1610, 1330), (1, 2, 4), 0.25)


def save(path, nodes, input_info, output_info, weights=()):
    initializers = [numpy_helper.from_array(value, name) for name, value in weights]
    graph = helper.make_graph(nodes, path.stem, [input_info], [output_info], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


@pytest.fixture(scope="session")
def pixels_model(tmp_path_factory):
    """Hands a tile's bytes through as its features, `[n, side · side · 3]`, in the order row, column, channel."""
    return save(
        tmp_path_factory.mktemp("models") / "pixels.onnx",
        [
            helper.make_node("Cast", ["tile"], ["numbers"], to=TensorProto.FLOAT),
            helper.make_node("Flatten", ["numbers"], ["features"], axis=1),
        ],
        helper.make_tensor_value_info("tile", TensorProto.UINT8, ["n", TILE, TILE, 3]),
        helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", 3 * TILE * TILE]),
    )


@pytest.fixture(scope="session")
def colour_classifier(tmp_path_factory):
    """Three scores from the mean colour of a tile."""
    weights = np.array([[1.5, -0.7, 0.2], [-1.1, 0.4, 0.9], [0.3, 1.2, -1.6]], np.float32)
    return save(
        tmp_path_factory.mktemp("models") / "colours.onnx",
        [
            helper.make_node("GlobalAveragePool", ["tile"], ["means"]),
            helper.make_node("Flatten", ["means"], ["colour"], axis=1),
            helper.make_node("Gemm", ["colour", "weights", "bias"], ["scores"]),
        ],
        helper.make_tensor_value_info("tile", TensorProto.FLOAT, ["n", 3, TILE, TILE]),
        helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", 3]),
        [("weights", weights), ("bias", np.array([0.1, -0.2, 0.05], np.float32))],
    )


@pytest.fixture(scope="session")
def colour_segmenter(tmp_path_factory):
    """Three scores from the colour of each pixel: glass, nucleus, the rest."""
    weights = np.array([[4, 4, 4], [-4, -2, 1], [0, -4, 0]], np.float32).reshape(3, 3, 1, 1)
    return save(
        tmp_path_factory.mktemp("models") / "maps.onnx",
        [helper.make_node("Conv", ["tile", "weights", "bias"], ["scores"])],
        helper.make_tensor_value_info("tile", TensorProto.FLOAT, ["n", 3, 256, 256]),
        helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", 3, 256, 256]),
        [("weights", weights), ("bias", np.array([-6, 0.5, 1.5], np.float32))],
    )


# No pictures: nothing here looks at them.
EMIT = ("--emit", "csv,geojson,tiff")
NORMALISED = ("--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225")


def card(folder, model, **keys):
    """Writes a model card beside a copy of `model`."""
    folder.mkdir(parents=True, exist_ok=True)
    content = model.read_bytes()
    (folder / model.name).write_bytes(content)
    lines = [f"{key} = {json.dumps(value)}" for key, value in {"schema": 1, "name": folder.name, **keys}.items()]
    digest = hashlib.sha256(content).hexdigest()
    lines += ["[variants.fp32]", f'file = "{model.name}"', f'sha256 = "{digest}"']
    (folder / "card.toml").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def unet_run(slidestream, svs):
    """The UNet over nine overlapping tiles, the last of which reach beyond the region and the slide."""
    region = "1000,2400,600,567"
    return slidestream("run", svs, "--model", ROOT / "models/cells-unet", "--region", region, "--tissue", "none", *EMIT)


@pytest.fixture(scope="session")
def unet_maps(unet_run):
    """Probabilities of the UNet's tiles, `[tile, class, 256, 256]`, by ONNX Runtime's Python."""
    batch = reference.normalised(reference.tiles(unet_run.slide, unet_run.rows()[0], 256), 0.5, 0.5)
    return reference.softmax(reference.scores(ROOT / "models/cells-unet/cells-unet.onnx", batch))


@pytest.fixture(scope="session")
def vit_run(slidestream, svs):
    """The ViT over forty tiles of the tissue."""
    return slidestream("run", svs, "--model", ROOT / "models/cells-vit", "--max-tiles", 40, *EMIT)


@pytest.fixture(scope="session")
def map_run(slidestream, svs, colour_segmenter):
    """A map of the whole slide, large enough for four levels."""
    return slidestream(
        "run", svs, "--model", colour_segmenter, "--task", "segmentation", "--target-mpp", "0.499", *NORMALISED,
        "--activation", "softmax", "--class-names", "glass,nucleus,stroma", "--overlap", "25%", "--emit", "tiff",
    )  # fmt: skip


@pytest.fixture(scope="session")
def resampled_map_run(slidestream, steep_slide, colour_segmenter):
    """A map at a resolution between two levels, whose cells don't fit the slide's edge."""
    return slidestream(
        "run", steep_slide, "--model", colour_segmenter, "--task", "segmentation", "--target-mpp", "0.37", *NORMALISED,
        "--activation", "sigmoid", "--class-names", "glass,nucleus,stroma", "--overlap", "32px", *EMIT,
    )  # fmt: skip
