#!/usr/bin/env python3
"""`slidestream run` against the sum of its stages, each measured alone: how much of the machine a run uses.

    benches/end_to_end.py SLIDE MODEL --region X,Y,W,H [--rounds 3]

Rounds alternate between the two, so that a noisy machine is noisy for both. Ideal is cores / (sum of the stages'
median core-seconds per tile); the ratio is the median rate of the runs over it. Everything measured is written to
benches/results/, with versions, hardware and the command.
"""
import argparse
import glob
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("slide")
parser.add_argument("model")
parser.add_argument("--rounds", type=int, default=3)
parser.add_argument("--region", required=True, help="both go over this part of the slide, X,Y,W,H")
parser.add_argument("--emit", help="of the runs; pictures are no stage, and cost a small network's run a fifth")
parser.add_argument("--name", help="of the result file")
arguments = parser.parse_args()

subprocess.run(["cargo", "build", "--release", "--locked", "-q"], cwd=ROOT, check=True)
subprocess.run(["cargo", "bench", "--bench", "stages", "--locked", "-q", "--no-run"], cwd=ROOT, check=True)
stages_binary = max(
    (path for path in glob.glob(str(ROOT / "target/release/deps/stages-*")) if os.access(path, os.X_OK)),
    key=os.path.getmtime,
)
slidestream = str(ROOT / "target/release/slidestream")
slide, model = os.path.abspath(arguments.slide), os.path.abspath(arguments.model)

rounds = []
for number in range(arguments.rounds):
    stages = json.loads(subprocess.run([stages_binary, slide, model, arguments.region], check=True, capture_output=True, cwd=ROOT).stdout)
    with tempfile.TemporaryDirectory() as out:
        command = [slidestream, "run", slide, "--model", model, "--region", arguments.region, "--out", out, "--quiet"]
        command += ["--emit", arguments.emit] if arguments.emit else []
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
        (record,) = glob.glob(out + "/slides/*.json")
        record, run = json.load(open(record)), json.load(open(out + "/run.json"))
    rounds.append({"stages": stages["secs_per_tile"], "timing": record["timing"], "coverage": record["coverage"]})
    print(f"round {number + 1}: {record['timing']['tiles_per_sec']:.2f} tiles/s", file=sys.stderr)

cores = len(os.sched_getaffinity(0))
per_stage = {
    stage: statistics.median(entry["stages"][stage] for entry in rounds) for stage in rounds[0]["stages"]
}
ideal = cores / sum(per_stage.values())
reached = statistics.median(entry["timing"]["tiles_per_sec"] for entry in rounds)
result = {
    "command": " ".join(["benches/end_to_end.py"] + [os.path.basename(a) if "/" in a else a for a in sys.argv[1:]]),
    "version": run["version"],
    "libraries": {name: library["version"] for name, library in run["libraries"].items()},
    "hardware": run["hardware"],
    "execution": run["execution"],
    "cores": cores,
    "core_secs_per_tile": per_stage,
    "ideal_tiles_per_sec": ideal,
    "tiles_per_sec": reached,
    "ratio": reached / ideal,
    "rounds": rounds,
}
name = arguments.name or f"end-to-end-{run['model']['name']}"
(ROOT / "benches/results" / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
print(json.dumps({key: result[key] for key in ("core_secs_per_tile", "ideal_tiles_per_sec", "tiles_per_sec", "ratio")}))
