#!/usr/bin/env python3
"""INT8 variants that `slidestream optimize` makes, against ONNX Runtime FP32 and its Python quantiser, on the CPU.

    benches/cpu_models.py --slidestream target/release/slidestream --slide SLIDE --out benches/results/cpu-models.json

Needs onnxruntime, onnx, timm, torch, openslide and Pillow. Per model: the original with all optimisations of ONNX
Runtime, its quantiser's static and dynamic variant (per channel, U8S8, QDQ, min-max, after its preprocessing; static
of products with weights only, for transformers), and ours; in turns, two threads, real tissue. Half of the tiles
calibrate, the others are compared. `unet32` is cells-unet widened to base 32: every channel twice, with its weights
split unevenly, so that it computes the same as the trained net; `vit_small` is timm's with random weights.
"""
import argparse
import json
import pathlib
import platform
import statistics
import subprocess
import sys
import time

import numpy as np
import onnx
import onnxruntime as ort
import openslide
import timm
import torch
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

ROOT = pathlib.Path(__file__).resolve().parent.parent
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--slidestream", required=True)
parser.add_argument("--slide", required=True)
parser.add_argument("--work", default="/tmp/cpu-models")
parser.add_argument("--out", required=True)
parser.add_argument("--rounds", type=int, default=15)
parser.add_argument("--models", default="cells-unet,unet32,cells-vit,vit_small")
parser.add_argument("--runtime", help="name of the ONNX Runtime provider to time besides, such as OpenVINOExecutionProvider")
arguments = parser.parse_args()
work = pathlib.Path(arguments.work)
work.mkdir(parents=True, exist_ok=True)
THREADS = 2
CALIBRATION = 24
ort.set_default_logger_severity(3)


def tissue(side, count, seed=0):
    """Normalised tiles `[count, 3, side, side]` of the slide that are not glass."""
    slide = openslide.OpenSlide(arguments.slide)
    image = np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))
    random = np.random.default_rng(seed)
    tiles = []
    while len(tiles) < count:
        y, x = random.integers(0, image.shape[0] - side + 1), random.integers(0, image.shape[1] - side + 1)
        tile = image[y : y + side, x : x + side]
        if tile.std() > 12:
            tiles.append(((tile.astype(np.float32) / 255 - 0.5) / 0.5).transpose(2, 0, 1))
    return np.stack(tiles)


def widen(source, path):
    """cells-unet with every channel twice: what it computes stays, what its kernels do is that of a base-32 net."""
    model, random = onnx.load(source), np.random.default_rng(1)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    layers = [node for node in model.graph.node if node.op_type in ("Conv", "ConvTranspose")]

    def put(name, values):
        weights[name].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values, dtype=np.float32), name))

    for layer in layers:
        weight, is_up = numpy_helper.to_array(weights[layer.input[1]]), layer.op_type == "ConvTranspose"
        weight = weight.transpose(1, 0, 2, 3) if is_up else weight
        if weight.shape[1] != 3:  # each copy of an input gets its own share of the weight
            share = random.uniform(0.2, 0.8, weight.shape[:2] + (1, 1))
            shape = (weight.shape[0], 2 * weight.shape[1]) + weight.shape[2:]
            weight = np.stack([weight * share, weight * (1 - share)], 2).reshape(shape)
        if layer is not layers[-1]:
            weight = np.repeat(weight, 2, 0)
            if len(layer.input) > 2:
                put(layer.input[2], np.repeat(numpy_helper.to_array(weights[layer.input[2]]), 2))
        put(layer.input[1], weight.transpose(1, 0, 2, 3) if is_up else weight)
    del model.graph.value_info[:]
    onnx.save(model, path)


def vit_small(path):
    torch.manual_seed(0)
    net = timm.create_model("vit_small_patch16_224", num_classes=0).eval()
    axes = {"input": {0: "batch"}, "output": {0: "batch"}}
    torch.onnx.export(net, (torch.randn(2, 3, 224, 224),), str(path), input_names=["input"], output_names=["output"],
                      dynamic_axes=axes, opset_version=18, dynamo=False)


class Reader(CalibrationDataReader):
    def __init__(self, tiles, name):
        self.batches = ({name: tiles[index : index + 1]} for index in range(len(tiles)))

    def get_next(self):
        return next(self.batches, None)


def pythons(source, tiles, is_transformer):
    """The variants of ONNX Runtime's own quantiser: name to file."""
    name = onnx.load(source).graph.input[0].name
    clean = onnx.load(source)
    del clean.graph.value_info[:]
    prepared = work / "prepared.onnx"
    onnx.save(clean, prepared)
    quant_pre_process(prepared, prepared, skip_symbolic_shape=True)
    files = {"python_static": work / f"{source.stem}-static.onnx"}
    only = None
    if is_transformer:
        graph = onnx.load(prepared).graph
        constants = {tensor.name for tensor in graph.initializer}
        only = [node.name for node in graph.node if node.op_type in ("MatMul", "Gemm") and node.input[1] in constants]
        files["python_dynamic"] = work / f"{source.stem}-dynamic.onnx"
        quantize_dynamic(prepared, files["python_dynamic"], per_channel=True, weight_type=QuantType.QInt8,
                         op_types_to_quantize=["MatMul", "Gemm"])
    quantize_static(prepared, files["python_static"], Reader(tiles, name), quant_format=QuantFormat.QDQ, per_channel=True,
                    activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, nodes_to_quantize=only)
    return files


def ours(model, folder, flags):
    command = [arguments.slidestream, "optimize", str(model), "--to", "fp32,int8", "--calibrate", arguments.slide,
               "--tiles", str(CALIBRATION), "--quiet", "--out", str(folder)] + flags
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode:
        sys.exit(made.stderr)
    print(made.stdout, file=sys.stderr)
    record = json.load(open(folder / "optimize.json"))
    return {f"slidestream_{v['name']}": folder / v["file"] for v in record["variants"] if v["file"]}


def opened(path):
    options = ort.SessionOptions()
    options.intra_op_num_threads = THREADS
    return ort.InferenceSession(str(path), options, providers=[arguments.runtime or "CPUExecutionProvider"])


BARE = ["--task", "features", "--tile-size", "224", "--mean", "0.5,0.5,0.5", "--std", "0.5,0.5,0.5", "--target-mpp", "0.5",
        "--activation", "none"]
results = {"command": " ".join(sys.argv), "machine": platform.processor(), "threads": THREADS, "onnxruntime": ort.__version__,
           "provider": arguments.runtime or "CPUExecutionProvider", "timm": timm.__version__, "models": {}}
results["cpu"] = next(line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
for name in arguments.models.split(","):
    side, batch, is_transformer = {"cells-unet": (256, 1, False), "unet32": (256, 1, False), "cells-vit": (96, 8, True),
                                   "vit_small": (224, 4, True)}[name]
    flags = []
    if name.startswith("cells"):
        model = ROOT / "models" / name
        source = model / f"{name}.onnx"
    elif name == "unet32":
        source = model = work / "unet32.onnx"
        widen(ROOT / "models/cells-unet/cells-unet.onnx", source)
        flags = ["--task", "segmentation", "--tile-size", "256", "--mean", "0.5,0.5,0.5", "--std", "0.5,0.5,0.5",
                 "--target-mpp", "0.5", "--activation", "softmax", "--class-names", "a,b,c,d"]
    else:
        source = model = work / "vit_small.onnx"
        vit_small(source)
        flags = BARE
    tiles = tissue(side, 2 * CALIBRATION)
    files = {"fp32": source, **pythons(source, tiles[:CALIBRATION], is_transformer), **ours(model, work / f"{name}-made", flags)}
    sessions = {key: opened(path) for key, path in files.items()}
    test = tiles[CALIBRATION:]
    predict = lambda session, images: session.run(None, {session.get_inputs()[0].name: images})[0]  # noqa: E731
    seconds, outputs = {key: [] for key in files}, {}
    for key, session in sessions.items():
        outputs[key] = np.concatenate([predict(session, test[i : i + batch]) for i in range(0, len(test), batch)])
    for _ in range(arguments.rounds):
        for key, session in sessions.items():
            begin = time.perf_counter()
            predict(session, test[:batch])
            seconds[key].append(time.perf_counter() - begin)
    reference = outputs["fp32"].reshape(len(test), -1).astype(np.float64)

    def cosines(key):
        other = outputs[key].reshape(len(test), -1).astype(np.float64)
        values = (reference * other).sum(1) / np.linalg.norm(reference, axis=1) / np.linalg.norm(other, axis=1)
        return {"mean": float(values.mean()), "least": float(values.min())}

    ratio = {key: statistics.median(a / b for a, b in zip(seconds["fp32"], seconds[key])) for key in files}
    best = max((key for key in ratio if key.startswith("python")), key=ratio.get)
    mine = seconds["slidestream_int8"]
    results["models"][name] = {
        "side": side, "batch": batch, "times_fp32": ratio, "cosine": {key: cosines(key) for key in files},
        "best_of_python": best, "int8_against_it": statistics.median(a / b for a, b in zip(seconds[best], mine)),
        "seconds": seconds,
    }
    print(json.dumps({name: {k: v for k, v in results["models"][name].items() if k != "seconds"}}), flush=True)
    pathlib.Path(arguments.out).write_text(json.dumps(results, indent=1) + "\n")
