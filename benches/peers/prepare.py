"""Sets up what a comparison needs, once: environments of pinned packages, models, slidestream's variants of them.

Everything lies under one root and has a stamp of what it was made from; what is there with the right stamp is taken as it
is. What can't be made here raises `Cannot` with the reason, and is not tried again in the same run.
"""
import functools
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys

from measure import why
from models import MODELS, MPP
from tiles import read_places, write_places

HERE = pathlib.Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
UV = "uv==0.13.9"
PYTHON = "3.11"
# FAST's libraries link against these, and compute through OpenCL.
FAST_NEEDS = ["pocl-opencl-icd", "libgl1", "libopengl0", "libglib2.0-0", "libusb-1.0-0"]
OPENTILE_NEEDS = ["libturbojpeg0"]
# Most weights are random, and untrained networks lose more by INT8 than trained ones: less than the usual 0.999 is asked.
INT8_COSINE = "0.99"


class Cannot(Exception):
    """Something can't be set up or run here; the text says why."""


def once(make):
    """Remembers what `make` gave for its arguments, failures too."""
    known = {}

    @functools.wraps(make)
    def remembering(*arguments):
        if arguments not in known:
            try:
                known[arguments] = make(*arguments)
            except Cannot as reason:
                known[arguments] = reason
        if isinstance(known[arguments], Cannot):
            raise known[arguments]
        return known[arguments]

    return remembering


def call(command, **options):
    """Runs a command of the set-up."""
    print("+", " ".join(map(str, command)), file=sys.stderr, flush=True)
    made = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, **options)
    if made.returncode:
        raise Cannot(f"{pathlib.Path(command[0]).name}: {why(made.returncode, made.stdout + made.stderr)}")


def is_made_from(folder, stamp):
    file = folder / "made-from.txt"
    return file.exists() and file.read_text() == stamp


def digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Setup:
    def __init__(self, root, slidestream, calibration_slide):
        self.root = pathlib.Path(root).expanduser().resolve()
        self.slidestream = pathlib.Path(slidestream).resolve()
        self.calibration_slide = calibration_slide
        self.root.mkdir(parents=True, exist_ok=True)

    @once
    def uv(self):
        folder = self.root / "uv"
        if not is_made_from(folder, UV):
            call([sys.executable, "-m", "venv", "--clear", folder])
            call([folder / "bin/pip", "install", "--quiet", UV])
            (folder / "made-from.txt").write_text(UV)
        return folder / "bin/uv"

    @once
    def environment(self, name):
        """The Python of the environment of `requirements/NAME.txt`."""
        folder, pins = self.root / name, HERE / "requirements" / f"{name}.txt"
        if not is_made_from(folder, pins.read_text()):
            env = {**os.environ, "UV_CACHE_DIR": str(self.root / "uv-cache")}
            call([self.uv(), "venv", "--quiet", "--clear", "--python", PYTHON, folder], env=env)
            # Compiled here, so that no system pays for it in its first run.
            call([self.uv(), "pip", "install", "--quiet", "--no-deps", "--compile-bytecode", "--python", folder / "bin/python",
                  "--requirement", pins], env=env)
            (folder / "made-from.txt").write_text(pins.read_text())
        return folder / "bin/python"

    @once
    def fast(self):
        return self.with_libraries("fast", "import fast, os; os._exit(0)", FAST_NEEDS)

    @once
    def opentile(self):
        return self.with_libraries("readers", "import turbojpeg; turbojpeg.TurboJPEG()", OPENTILE_NEEDS)

    def with_libraries(self, name, check, packages):
        """The Python of an environment that needs libraries of the system; `check` fails without them."""
        python = self.environment(name)
        try:
            call([python, "-c", check])
        except Cannot as missing:
            install = ["apt-get", "install", "--yes", "--quiet", *packages]
            if os.geteuid() != 0 or not shutil.which("apt-get"):
                raise Cannot(f"{missing}; on Debian as root: {' '.join(install)}") from missing
            call(["apt-get", "update", "--quiet"])
            call(install)
            call([python, "-c", check])
        return python

    @once
    def models(self):
        """The folder with the models of `make_models.py`."""
        python, folder = self.environment("tiatoolbox"), self.root / "models"
        programs = ("make_models.py", "models.py", "networks.py", "onnx_weights.py", "requirements/tiatoolbox.txt")
        made_by = [*(HERE / name for name in programs), REPOSITORY / "models/train/nets.py"]
        made_by += [REPOSITORY / model.committed for model in MODELS.values() if model.committed]
        stamp = "\n".join(map(digest, made_by))
        if not is_made_from(folder, stamp):
            call([python, HERE / "make_models.py", folder])
            (folder / "made-from.txt").write_text(stamp)
        return folder

    @once
    def variant(self, name, precision, target):
        """The model folder that `slidestream optimize --for TARGET` makes at a precision, and the variant to run."""
        source, folder = self.models() / f"{name}.onnx", self.root / "optimized" / f"{name}-{precision}-{target}"
        model = MODELS[name]
        command = [self.slidestream, "optimize", source, "--for", target, "--to", precision, "--out", folder, "--quiet",
                   "--calibrate", self.calibration_slide, "--tiles", "24", "--min-cosine", INT8_COSINE,
                   "--tile-size", str(model.side), "--target-mpp", str(MPP), "--mean", "0.5,0.5,0.5", "--std", "0.5,0.5,0.5",
                   "--task", "segmentation" if model.is_map else "classification",
                   "--class-names", ",".join(model.class_names), "--activation", "sigmoid" if model.classes == 1 else "softmax"]
        libraries = self.libraries(target)
        stamp = " ".join(map(str, command)) + f" {libraries}\n" + "\n".join(
            digest(file) for file in [source, self.slidestream, self.calibration_slide, HERE / "requirements/openvino.txt"])
        if not is_made_from(folder, stamp):
            shutil.rmtree(folder, ignore_errors=True)
            call(command, env={**os.environ, **libraries})
            (folder / "made-from.txt").write_text(stamp)
        found = json.loads((folder / "optimize.json").read_text())["variants"]
        recommended = [variant["name"] for variant in found if variant["file"] and variant["is_recommended"]]
        if recommended:
            return folder, recommended[0]
        if precision == "fp32":
            return folder, "fp32"
        raise Cannot("`slidestream optimize`: " + found[-1]["note"].split("; ")[-1])

    def libraries(self, target):
        """The variables by which slidestream finds an ONNX Runtime for `cpu` or `openvino`."""
        return {"ORT_DYLIB_PATH": str(self.openvino())} if target == "openvino" else {}

    @once
    def openvino(self):
        """ONNX Runtime's library, built with OpenVINO."""
        python = self.environment("openvino")
        found = sorted(python.parents[1].glob("lib/python*/site-packages/onnxruntime/capi/libonnxruntime.so.*"))
        if not found:
            raise Cannot("the package onnxruntime-openvino has no libonnxruntime.so")
        return found[0]

    def ask(self, *words):
        """What slidestream prints."""
        command = [self.slidestream, *map(str, words)]
        return subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.PIPE, text=True).stdout

    @once
    def tile_list(self, slide, side, max_tiles):
        """The file with the tissue tiles that lie wholly in the slide: what is beyond its edge, systems fill differently."""
        folder = self.root / "tiles" / str(side)
        limit = ["--max-tiles", max_tiles] if max_tiles else []
        self.ask("tiles", slide, "--tile-size", side, "--target-mpp", MPP, "--out", folder, *limit)
        width, height = json.loads(self.ask("inspect", slide, "--json"))["dimensions"]
        places = read_places(folder / "coords" / f"{slide.stem}.csv")
        inside = [(x, y, w, h) for x, y, w, h in places if x + w <= width and y + h <= height]
        if not inside:
            raise Cannot(f"{slide.name} has no tissue tile of {side} px wholly inside")
        write_places(folder / f"{slide.stem}.csv", inside)
        return folder / f"{slide.stem}.csv"
