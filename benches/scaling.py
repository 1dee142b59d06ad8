#!/usr/bin/env python3
"""Tiles per second of `slidestream run` against the number of cores and the batch size, in turns.

    benches/scaling.py --slide SLIDE --model DIR [--variant NAME] [--device cpu] [--cores 1,2] [--batch-sizes 1,4,16] --name NAME

A run gets its cores by taskset, and its own choice of readers and sessions. Its rate is that of its record: tissue tiles by
the seconds from the first tile to the last output. Every round runs all combinations, beginning with another one each time.
benches/results/NAME.json gets every sample with versions, hardware and the command, NAME.svg the chart of the medians.
"""
import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benches/peers"))
from chart import chart  # noqa: E402
from measure import in_turn  # noqa: E402

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--slidestream", default=str(ROOT / "target/release/slidestream"))
parser.add_argument("--slide", required=True)
parser.add_argument("--model", required=True)
parser.add_argument("--variant")
parser.add_argument("--device", default="cpu")
parser.add_argument("--cores", default="1,2")
parser.add_argument("--batch-sizes", default="1,4,16")
parser.add_argument("--max-tiles", help="take only so many tiles, evenly sampled")
parser.add_argument("--emit", default="csv")
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--name", required=True, help="of the result files")
parser.add_argument("--out", default=str(ROOT / "benches/results"), help="where the result files go")
arguments = parser.parse_args()
CORES = sorted(os.sched_getaffinity(0))
cores = [int(count) for count in arguments.cores.split(",")]
sizes = [int(size) for size in arguments.batch_sizes.split(",")]


def run(core_count, batch_size):
    """The run's record, and the slide's."""
    with tempfile.TemporaryDirectory() as out:
        command = ["taskset", "--cpu-list", ",".join(map(str, CORES[:core_count])), arguments.slidestream, "run", arguments.slide, "--quiet",
                   "--model", arguments.model, "--device", arguments.device, "--batch-size", str(batch_size),
                   "--emit", arguments.emit, "--out", out]
        command += ["--variant", arguments.variant] if arguments.variant else []
        command += ["--max-tiles", arguments.max_tiles] if arguments.max_tiles else []
        ran = subprocess.run(command, capture_output=True, text=True)
        if ran.returncode:
            sys.exit(f"{' '.join(command)}\n{ran.stderr}")
        (record,) = pathlib.Path(out, "slides").glob("*.json")
        return json.loads(pathlib.Path(out, "run.json").read_text()), json.loads(record.read_text())


points = [(core_count, size) for core_count in cores for size in sizes]
samples = {point: [] for point in points}
for number in range(arguments.rounds):
    for point in in_turn(points, number):
        about, slide = run(*point)
        samples[point].append(slide["timing"]["tiles_per_sec"])
        print(f"round {number + 1}: {point[0]} cores, batches of {point[1]}: {samples[point][-1]:.1f} tiles/s", file=sys.stderr, flush=True)

results = [{"cores": core_count, "batch_size": size, "tiles_per_sec": statistics.median(rates), "samples": rates}
           for (core_count, size), rates in samples.items()]
command = " ".join(["benches/scaling.py"] + [pathlib.Path(word).name if "/" in word else word for word in sys.argv[1:]])
# The last run was told of as many cores as it got.
record = {"command": command, "version": about["version"], "hardware": {**about["hardware"], "cores": len(CORES)},
          "libraries": {name: library["version"] for name, library in about["libraries"].items()},
          "tiles": slide["coverage"]["inferred"], "results": results}
out = pathlib.Path(arguments.out)
(out / f"{arguments.name}.json").write_text(json.dumps(record, indent=1) + "\n")
panels = [(f"{count} core{'s' if count > 1 else ''}",
           [(f"batch {entry['batch_size']}", entry["tiles_per_sec"], True) for entry in results if entry["cores"] == count])
          for count in cores]
machine = ", ".join([about["hardware"]["cpu"], *about["hardware"]["gpus"]])
note = f"{pathlib.Path(arguments.model).name} over {record['tiles']:,} tiles, median of {arguments.rounds}; {machine}"
most = max(entry["tiles_per_sec"] for entry in results)
(out / f"{arguments.name}.svg").write_text(chart("Tiles per second by cores and batch size", note, [panels[index:index + 3] for index in range(0, len(panels), 3)], most))
for entry in results:
    print(f"{entry['cores']:>3} cores  batch {entry['batch_size']:>3}  {entry['tiles_per_sec']:>8.1f} tiles/s")
