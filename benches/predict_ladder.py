#!/usr/bin/env python3
"""What each step brings to classifying an image tile by tile on the CPU: batches, sampling, INT8, all of them.

    benches/predict_ladder.py --slidestream target/release/slidestream --slide SLIDE --out benches/results/predict-ladder.json

Needs timm, torch, onnx, openslide and Pillow. The image is the slide's level 0 as PNG, cut into tiles of 224 px;
the classifiers are timm's resnet50 and vit_small_patch16_224 with two classes and random weights (their label means
nothing, their cost does; what steps change of the probabilities is told). A step is `slidestream predict` of that
image; besides runs PyTorch as such predictors are usually written, one tile at a time. Steps take turns, and each is
a process of its own: `seconds` are of the whole process, `warm` of the model alone with everything loaded.
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
import openslide
import timm
import torch
from PIL import Image

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--slidestream", required=True)
parser.add_argument("--slide", required=True)
parser.add_argument("--work", default="/tmp/predict-ladder")
parser.add_argument("--out", required=True)
parser.add_argument("--rounds", type=int, default=3)
parser.add_argument("--models", default="resnet50,vit_small_patch16_224")
arguments = parser.parse_args()
work = pathlib.Path(arguments.work)
work.mkdir(parents=True, exist_ok=True)
SIDE, BATCH, SAMPLED = 224, 16, 25
BARE = ["--task", "classification", "--tile-size", str(SIDE), "--target-mpp", "0.5", "--mean", "0.485,0.456,0.406",
        "--std", "0.229,0.224,0.225", "--class-names", "benign,malignant", "--activation", "softmax"]
# Step: variant, tiles per batch, most tiles (0 for all).
STEPS = {
    "one tile at a time": ("fp32", 1, 0),
    "batches of 16": ("fp32", BATCH, 0),
    "25 sampled tiles": ("fp32", 1, SAMPLED),
    "INT8": ("int8", 1, 0),
    "all": ("int8", BATCH, SAMPLED),
}


def image_of(slide):
    path = work / "image.png"
    opened = openslide.OpenSlide(slide)
    opened.read_region((0, 0), 0, opened.dimensions).convert("RGB").save(path)
    return path


def export(name, path, image):
    torch.manual_seed(0)
    # Without it the last norm of each block of an untrained ResNet is 0, and so is all that comes before it.
    more = {"zero_init_last": False} if name.startswith("resnet") else {}
    net = timm.create_model(name, num_classes=2, **more)
    # Norms as after training: statistics of real activations, not the initial 0 and 1.
    net.train()
    with torch.no_grad():
        for seed in range(4):
            net(normalised(cut(image, seed)))
    net.eval()
    axes = {"input": {0: "batch"}, "output": {0: "batch"}}
    torch.onnx.export(net, (torch.randn(2, 3, SIDE, SIDE),), str(path), input_names=["input"], output_names=["output"],
                      dynamic_axes=axes, opset_version=18, dynamo=False)
    return net


def cut(image, seed):
    """16 tiles of tissue at random places, RGB bytes."""
    pixels, random = np.asarray(Image.open(image)), np.random.default_rng(seed)
    tiles = []
    while len(tiles) < BATCH:
        y, x = random.integers(0, pixels.shape[0] - SIDE + 1), random.integers(0, pixels.shape[1] - SIDE + 1)
        tile = pixels[y : y + SIDE, x : x + SIDE]
        if tile.std() > 12:
            tiles.append(tile)
    return torch.from_numpy(np.stack(tiles))


def normalised(tiles):
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((tiles.float() / 255 - mean) / std).permute(0, 3, 1, 2)


def optimized(source, folder):
    command = [arguments.slidestream, "optimize", str(source), "--to", "fp32,int8", "--calibrate", arguments.slide,
               "--tiles", "24", "--quiet", "--out", str(folder)] + BARE
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode:
        sys.exit(made.stderr)
    print(made.stdout, file=sys.stderr)


def predict(folder, image, step):
    """Seconds of the process, and what it found."""
    variant, batch, most = STEPS[step]
    command = [arguments.slidestream, "predict", str(image), "--model", str(folder), "--variant", variant, "--device", "cpu",
               "--batch-size", str(batch), "--max-tiles", str(most), "--json", "--quiet"]
    begin = time.perf_counter()
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    return time.perf_counter() - begin, json.loads(ran.stdout)


def pytorch(net, image):
    """Seconds of a loop over tiles as it is usually written, the model being loaded, and its mean probabilities."""
    pixels = np.asarray(Image.open(image))
    begin = time.perf_counter()
    rows = []
    with torch.inference_mode():
        for y in range(0, pixels.shape[0] - SIDE + 1, SIDE):
            for x in range(0, pixels.shape[1] - SIDE + 1, SIDE):
                tile = torch.from_numpy(pixels[y : y + SIDE, x : x + SIDE].copy())[None]
                rows.append(torch.softmax(net(normalised(tile)), 1)[0])
    return time.perf_counter() - begin, torch.stack(rows).mean(0).tolist()


image = image_of(arguments.slide)
results = {"command": " ".join(["benches/predict_ladder.py"] + sys.argv[1:]), "machine": platform.processor(),
           "torch": torch.__version__, "timm": timm.__version__, "cores": torch.get_num_threads(), "models": {}}
results["cpu"] = next(line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
for name in arguments.models.split(","):
    source, folder = work / f"{name}.onnx", work / name
    net = export(name, source, image)
    optimized(source, folder)
    seconds, warm, probabilities = {}, {}, {}
    for number in range(arguments.rounds + 1):
        for step in STEPS:
            took, record = predict(folder, image, step)
            if number:  # the first round fills the file cache
                seconds.setdefault(step, []).append(took)
                warm.setdefault(step, []).append(len(record["images"][0]["tiles"]) / record["pace"]["tiles_per_sec"])
            probabilities[step] = [entry["probability"] for entry in record["images"][0]["classes"]]
        took, probabilities["PyTorch, one tile at a time"] = pytorch(net, image)
        if number:
            warm.setdefault("PyTorch, one tile at a time", []).append(took)
    version, libraries = record["version"], record["libraries"]
    first = next(iter(STEPS))

    def times(samples):
        return {step: statistics.median(a / b for a, b in zip(samples[first], samples[step])) for step in samples}

    results["models"][name] = {
        "tiles": record["images"][0]["grid_tiles"], "image": [record["images"][0]["width"], record["images"][0]["height"]],
        "median_seconds": {step: statistics.median(values) for step, values in seconds.items()}, "times": times(seconds),
        "median_warm": {step: statistics.median(values) for step, values in warm.items()}, "times_warm": times(warm),
        "probability_change": {step: abs(values[0] - probabilities[first][0]) for step, values in probabilities.items()},
        "seconds": seconds, "warm": warm,
    }
    results.update(version=version, libraries={key: value["version"] for key, value in libraries.items()})
    print(json.dumps({name: {k: v for k, v in results["models"][name].items() if k not in ("seconds", "warm")}}), flush=True)
    pathlib.Path(arguments.out).write_text(json.dumps(results, indent=1) + "\n")
