#!/usr/bin/env python3
"""`slidestream run` against what `slidestream simulate` promises of the same model and slide, in turns.

    benches/simulate_run.py --slide SLIDE --model DIR [--variant NAME] [--device cuda] [--region X,Y,W,H] [--rounds 5] --name NAME

With `--slide`, `simulate` measures the inference alone and the reading of this slide alone. On a GPU the promise is the
lower of the two; on a CPU, where the stages share the cores, it is what `simulate` makes of both. A run's rate is that of
its record: tissue tiles by the seconds from the first tile to the last output; finding the tissue and loading the model
come before. Everything measured is written to benches/results/, with versions, hardware and the command.
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
parser.add_argument("--slidestream", default=str(ROOT / "target/release/slidestream"))
parser.add_argument("--slide", required=True)
parser.add_argument("--model", required=True)
parser.add_argument("--variant")
parser.add_argument("--device", default="cpu")
parser.add_argument("--batch-size", help="of both; the device's own without")
parser.add_argument("--region", help="the runs go over this part of the slide only, X,Y,W,H")
parser.add_argument("--emit", help="of the runs")
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--seconds", default="6", help="of each measurement of `simulate`")
parser.add_argument("--name", required=True, help="of the result file")
parser.add_argument("--out", default=str(ROOT / "benches/results"), help="where the result file goes")
arguments = parser.parse_args()

both = ["--model", arguments.model, "--device", arguments.device, "--quiet"]
both += ["--variant", arguments.variant] if arguments.variant else []


def printed(command):
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        sys.exit(f"{' '.join(command)}\n{ran.stderr}")
    return ran.stdout


def simulate():
    sizes = ["--batch-sizes", arguments.batch_size] if arguments.batch_size else []
    command = [arguments.slidestream, "simulate", *both, "--slide", arguments.slide, "--seconds", arguments.seconds, "--json"]
    return json.loads(printed(command + sizes))


def run():
    options = ["--batch-size", arguments.batch_size] if arguments.batch_size else []
    options += ["--region", arguments.region] if arguments.region else []
    options += ["--emit", arguments.emit] if arguments.emit else []
    with tempfile.TemporaryDirectory() as out:
        printed([arguments.slidestream, "run", arguments.slide, *both, "--out", out, *options])
        (record,) = glob.glob(out + "/slides/*.json")
        return json.load(open(record)), json.load(open(out + "/run.json"))


def reading_cores(record):
    """Cores that decoding kept busy on average."""
    (read,) = [stage for stage in record["timing"]["stages"] if stage["name"] == "read"]
    return read["busy_secs"] / record["timing"]["pipeline_seconds"]


rounds = []
for number in range(arguments.rounds):
    simulated = simulate()
    record, about = run()
    promised, reached = simulated["slide"]["tiles_per_sec"], record["timing"]["tiles_per_sec"]
    rounds.append({
        "simulated": {key: simulated["slide"][key] for key in ("inference_tiles_per_sec", "reading_tiles_per_sec", "tiles_per_sec")},
        "run": record["timing"], "coverage": record["coverage"], "ratio": reached / promised,
        "reading_cores": reading_cores(record),
    })
    print(f"round {number + 1}: {reached:.1f} of {promised:.1f} tiles/s, {reached / promised:.3f}; reading kept "
          f"{reading_cores(record):.1f} cores, GPUs {record['timing'].get('gpu_busy', {})}", file=sys.stderr, flush=True)

result = {
    "command": " ".join(["benches/simulate_run.py"] + [os.path.basename(a) if "/" in a else a for a in sys.argv[1:]]),
    "version": about["version"],
    "libraries": {name: library["version"] for name, library in about["libraries"].items()},
    "hardware": about["hardware"],
    "execution": about["execution"],
    "simulated_tiles_per_sec": statistics.median(entry["simulated"]["tiles_per_sec"] for entry in rounds),
    "tiles_per_sec": statistics.median(entry["run"]["tiles_per_sec"] for entry in rounds),
    "ratio": statistics.median(entry["ratio"] for entry in rounds),
    "rounds": rounds,
}
(pathlib.Path(arguments.out) / f"{arguments.name}.json").write_text(json.dumps(result, indent=1) + "\n")
print(json.dumps({key: result[key] for key in ("simulated_tiles_per_sec", "tiles_per_sec", "ratio")}))
