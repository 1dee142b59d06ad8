#!/usr/bin/env python3
"""The native reader against OpenSlide, both through slidestream: tissue tiles of a slide in the order of rows, in turns.

    benches/readers.py SLIDE… [--sizes 224,256,512] [--rounds 5] --name NAME

`slidestream tiles` makes the lists; examples/read_tiles.rs reads each with one thread, pinned to a core, and with as many
as there are cores. Megapixels are those of the tiles, by seconds of the clock and by seconds of the CPU: on a machine
that does other things too, the latter tell more. Opening the slide is not counted. Everything measured is written to
benches/results/, with hardware and the command.
"""
import argparse
import csv
import glob
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("slides", nargs="+")
parser.add_argument("--sizes", default="224,256,512")
parser.add_argument("--most", type=int, default=3000, help="tiles of a list")
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--name", required=True, help="of the result file")
arguments = parser.parse_args()
cores = len(os.sched_getaffinity(0))
first_core = str(min(os.sched_getaffinity(0)))


def tile_list(slide, size, folder):
    out = f"{folder}/{pathlib.Path(slide).stem}-{size}"
    command = [str(ROOT / "target/release/slidestream"), "tiles", slide, "--tile-size", str(size), "--target-mpp", "0.5", "--out", out]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    (table,) = [path for path in glob.glob(f"{out}/**/*.csv", recursive=True) if "process_list" not in path]
    rows = [(row["minx"], row["miny"]) for row in csv.DictReader(open(table))][: arguments.most]
    path = pathlib.Path(f"{out}.csv")
    path.write_text("".join(f"{x},{y}\n" for x, y in rows))
    return str(path)


def read(slide, tiles, size, threads, reader):
    command = [str(ROOT / "target/release/examples/read_tiles"), slide, tiles, str(size), str(threads), reader]
    pinned = ["taskset", "-c", first_core] if threads == 1 else []
    return json.loads(subprocess.run(pinned + command, check=True, capture_output=True, text=True).stdout)


results = []
with tempfile.TemporaryDirectory() as folder:
    for slide in arguments.slides:
        for size in map(int, arguments.sizes.split(",")):
            tiles = tile_list(slide, size, folder)
            for threads in dict.fromkeys([1, cores]):
                samples = {"openslide": [], "native": []}
                for number in range(arguments.rounds):
                    for reader in sorted(samples, reverse=number % 2 == 1):
                        samples[reader].append(read(slide, tiles, size, threads, reader))
                count = samples["native"][0]["tiles"]
                rate = {reader: {by: statistics.median(count * size * size / 1e6 / sample[by] for sample in taken) for by in ("s", "cpu")}
                        for reader, taken in samples.items()}
                ratios = {by: statistics.median(theirs[by] / ours[by] for theirs, ours in zip(samples["openslide"], samples["native"]))
                          for by in ("s", "cpu")}
                results.append({"slide": os.path.basename(slide), "size": size, "threads": threads, "tiles": count,
                                "megapixels_per_sec": {reader: found["s"] for reader, found in rate.items()},
                                "megapixels_per_cpu_sec": {reader: found["cpu"] for reader, found in rate.items()},
                                "times_openslide": ratios["s"], "times_openslide_by_cpu": ratios["cpu"], "samples": samples})
                last = {key: value for key, value in results[-1].items() if key != "samples"}
                print(json.dumps(last), file=sys.stderr, flush=True)

record = {"command": " ".join(["benches/readers.py"] + [os.path.basename(a) if "/" in a else a for a in sys.argv[1:]]),
          "hardware": {"cores": cores, "machine": platform.machine()}, "results": results}
(ROOT / "benches/results" / f"{arguments.name}.json").write_text(json.dumps(record, indent=1) + "\n")
