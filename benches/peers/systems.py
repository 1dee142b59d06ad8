"""The systems: for each the command that runs a job, and the variables that it wants in its environment.

A job has `slide`, `model`, `tiles` (the list) and `out`; every system leaves its table in OUT/model-outputs-csv. What a
system can't do raises `Cannot`.
"""
import os

from models import MODELS
from prepare import HERE, Cannot


def slidestream(setup, job, precision="fp32", target="cpu", more=()):
    folder, variant = setup.variant(job.model, precision, target)
    # Every system that gives maps writes them; a tile table alone would spare slidestream the stitching.
    kinds = "csv,tiff" if MODELS[job.model].is_map else "csv"
    command = [setup.slidestream, "run", job.slide, "--model", folder, "--variant", variant, "--device", "cpu",
               "--provider", target, "--coords", job.tiles, "--out", job.out, "--quiet", "--emit", kinds, *more]
    return command, setup.libraries(target)


def slidestream_int8(setup, job):
    return slidestream(setup, job, "int8")


def slidestream_openvino(setup, job):
    return slidestream(setup, job, target="openvino")


def slidestream_openvino_int8(setup, job):
    return slidestream(setup, job, "int8", "openvino")


def through_openslide(setup, job):
    """Not timed: what slidestream finds on the pixels of the reader that the peers have."""
    return slidestream(setup, job, more=["--reader", "openslide"])


def script(setup, job):
    # A network this small is faster on one thread, while the other cores read. ONNX Runtime's own choice would count all
    # physical cores, also those that this process may not use.
    threads = 1 if job.model == "tinycnn" else len(os.sched_getaffinity(0))
    return [setup.environment("script"), HERE / "run_script.py", *inputs(setup, job), threads], {}


def wsinfer(setup, job):
    if MODELS[job.model].is_map:
        raise Cannot("WSInfer runs classifiers only")
    return [setup.environment("wsinfer"), HERE / "run_wsinfer.py", *inputs(setup, job)], {"WSINFER_FORCE_CPU": "1"}


def tiatoolbox(setup, job):
    return [setup.environment("tiatoolbox"), HERE / "run_tiatoolbox.py", *inputs(setup, job)], {}


def fast_openvino(setup, job):
    return [setup.fast(), HERE / "run_fast.py", *inputs(setup, job), "OpenVINO"], {}


def fast_onnxruntime(setup, job):
    return [setup.fast(), HERE / "run_fast.py", *inputs(setup, job), "ONNXRuntime"], {}


def inputs(setup, job):
    return [job.slide, setup.models() / job.model, job.tiles, job.out]


REFERENCE = "slidestream"
SYSTEMS = {
    REFERENCE: slidestream,
    "slidestream-int8": slidestream_int8,
    "slidestream-openvino": slidestream_openvino,
    "slidestream-openvino-int8": slidestream_openvino_int8,
    "script": script,
    "wsinfer": wsinfer,
    "tiatoolbox": tiatoolbox,
    "fast-openvino": fast_openvino,
    "fast-onnxruntime": fast_onnxruntime,
}
