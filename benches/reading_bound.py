#!/usr/bin/env python3
"""`slidestream run` with a model that does nothing, against the bare rate of its reader on the same tiles, in turns.

    benches/reading_bound.py --slide SLIDE [--tile-size 224] [--rounds 5] --name NAME

Needs onnx, and `cargo build --release --examples`. The model takes bytes and gives the colour of one pixel, so that what a
run costs beyond reading is nearly the engine's alone: what its sessions still cost, copying the bytes, `simulate` measures.
The reader reads all tissue tiles on a thread per core (`examples/read_tiles.rs`); a run's rate is that of its record, from
the first tile to the last output, of which there is the tile table alone. `of_ideal` is the share of what both costs allow.
Everything measured is written to benches/results/, with versions, hardware and the command.
"""
import argparse
import csv
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

from onnx import TensorProto, helper, save

ROOT = pathlib.Path(__file__).resolve().parent.parent
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--slide", required=True)
parser.add_argument("--tile-size", type=int, default=224)
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--name", required=True, help="of the result file")
parser.add_argument("--out", default=str(ROOT / "benches/results"), help="where the result file goes")
arguments = parser.parse_args()
slide, side = pathlib.Path(arguments.slide).resolve(), arguments.tile_size
slidestream, read_tiles = ROOT / "target/release/slidestream", ROOT / "target/release/examples/read_tiles"
threads = len(os.sched_getaffinity(0))


def one_pixel(path):
    bounds = [("starts", [0, 0]), ("ends", [1, 1]), ("axes", [1, 2]), ("shape", [-1, 3])]
    nodes = [helper.make_node("Slice", ["image", "starts", "ends", "axes"], ["pixel"]),
             helper.make_node("Cast", ["pixel"], ["colour"], to=TensorProto.FLOAT),
             helper.make_node("Reshape", ["colour", "shape"], ["scores"])]
    graph = helper.make_graph(
        nodes, "one pixel", [helper.make_tensor_value_info("image", TensorProto.UINT8, ["n", side, side, 3])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", 3])],
        [helper.make_tensor(name, TensorProto.INT64, [len(values)], values) for name, values in bounds])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def printed(*command):
    ran = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT)
    if ran.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{ran.stderr}")
    return ran.stdout


def model(folder):
    return ["--model", folder / "one_pixel.onnx", "--task", "classification", "--tile-size", side, "--target-mpp", "0.5",
            "--class-names", "r,g,b", "--mean", "0,0,0", "--std", "1,1,1", "--activation", "softmax", "--device", "cpu",
            "--quiet"]


def infer(folder):
    record = json.loads(printed(slidestream, "simulate", *model(folder), "--batch-sizes", "1", "--seconds", "1", "--json"))
    return record["points"][0]["tiles_per_sec"]["value"]


def run(folder, number):
    out = folder / f"out{number}"
    printed(slidestream, "run", slide, *model(folder), "--coords", folder / "tiles.csv", "--out", out, "--emit", "csv")
    (slide_record,) = (out / "slides").glob("*.json")
    return json.loads((out / "run.json").read_text()), json.loads(slide_record.read_text())["timing"]


with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    one_pixel(folder / "one_pixel.onnx")
    printed(slidestream, "tiles", slide, "--tile-size", side, "--target-mpp", "0.5", "--out", folder)
    (folder / "coords" / f"{slide.stem}.csv").rename(folder / "tiles.csv")
    with open(folder / "tiles.csv", newline="") as file:
        corners = [(row["minx"], row["miny"]) for row in csv.DictReader(file)]
    (folder / "corners.csv").write_text("".join(f"{x},{y}\n" for x, y in corners))
    reading, inference, timings = [], [], []
    for number in range(arguments.rounds + 1):
        read = json.loads(printed(read_tiles, slide, folder / "corners.csv", side, threads, "auto"))
        record, timing = run(folder, number)
        if number:  # the first round warms caches up
            reading.append(read["tiles"] / read["s"])
            inference.append(infer(folder))
            timings.append(timing)

rates = [timing["tiles_per_sec"] for timing in timings]
read, inferred, reached = map(statistics.median, (reading, inference, rates))
of_reading, of_ideal = reached / read, reached * (1 / read + 1 / inferred)
words = [pathlib.Path(word).name if "/" in word else word for word in sys.argv[1:]]
result = {
    "command": " ".join(["benches/reading_bound.py", *words]),
    **{key: record[key] for key in ("version", "hardware", "execution")},
    "libraries": {name: library["version"] for name, library in record["libraries"].items()},
    "tiles": len(corners), "run_tiles_per_sec": rates, "reading_tiles_per_sec": reading,
    "inference_tiles_per_sec": inference, "of_reading": of_reading, "of_ideal": of_ideal,
    "stages": [timing["stages"] for timing in timings],
}
(pathlib.Path(arguments.out) / f"{arguments.name}.json").write_text(json.dumps(result, indent=1) + "\n")
print(f"run {reached:.0f} of {read:.0f} tiles/s read: {of_reading:.3f}; with sessions of {inferred:.0f}: {of_ideal:.3f}")
