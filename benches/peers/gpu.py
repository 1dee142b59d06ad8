#!/usr/bin/env python3
"""slidestream beside PyTorch with a DataLoader on one GPU: ViT-B/16 in 16 bits over a slide, from start to end, in turns.

    benches/peers/gpu.py SLIDE [--slidestream target/release/slidestream] [--rounds 5] [--cores 16,8]

Runs in a Python that has PyTorch with CUDA, timm, torchvision, onnx and openslide-python (and cucim, where that peer is
wanted), and needs a slidestream that finds ONNX Runtime with CUDA. The weights are random and the same for all; the tiles
are those of `slidestream tiles` that lie wholly in the slide. slidestream runs its FP16 variant for CUDA, on all of the
cores and on fewer of them (taskset); PyTorch has a reading process per core, eager and compiled (run_torch.py).

`tiles_per_sec` is that of the process from start to end. `steady` leaves the start out: for PyTorch it counts from the
first batch of results, when its processes have read up to three batches each ahead already, for slidestream from the first
tile. Δ is the largest difference of a probability from PyTorch's,
which are computed in 16 bits too. The result goes to --out as JSON and as a table to stdout; what can't run says why.
"""
import argparse
import importlib.metadata
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys

import torch

from measure import hardware, in_turn, measured, read_through, why
from models import GPU_MODEL, MPP
from networks import build_vit, spread_logits
from tiles import read_places, read_table, table_of, write_places

HERE = pathlib.Path(__file__).resolve().parent
SIDE = GPU_MODEL.side
REFERENCE = "torch-openslide"
CORES = sorted(os.sched_getaffinity(0))


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slide", type=pathlib.Path, metavar="SLIDE")
    parser.add_argument("--slidestream", default=HERE.parents[1] / "target/release/slidestream", type=pathlib.Path)
    parser.add_argument("--root", default="~/.cache/slidestream-peers", type=pathlib.Path, help="where models and runs lie")
    parser.add_argument("--out", default=HERE.parents[1] / "benches/results/peers-gpu.json", type=pathlib.Path)
    parser.add_argument("--cores", default="16,8", help="numbers of cores that slidestream gets; PyTorch gets the first")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--timeout", type=float, default=300, help="seconds after which a run is ended")
    chosen = parser.parse_args()
    chosen.root = chosen.root.expanduser().resolve()
    chosen.cores = [int(cores) for cores in chosen.cores.split(",")]
    chosen.slide, chosen.slidestream = chosen.slide.resolve(), chosen.slidestream.resolve()
    return chosen


@torch.no_grad()
def make_model(chosen):
    """The weights for PyTorch, and slidestream's variants of the same network."""
    source, folder = chosen.root / "vit_base", chosen.root / "vit_base-cuda"
    torch.manual_seed(1)
    net = build_vit().eval()
    spread_logits(net, net.head, SIDE)
    torch.save(net.state_dict(), f"{source}.pth")
    axes = {"input": {0: "batch"}, "output": {0: "batch"}}
    torch.onnx.export(net, (torch.randn(2, 3, SIDE, SIDE),), f"{source}.onnx", input_names=["input"], output_names=["output"],
                      dynamic_axes=axes, opset_version=18, dynamo=False)
    shutil.rmtree(folder, ignore_errors=True)
    words = ["optimize", f"{source}.onnx", "--for", "cuda", "--to", "fp16", "--bytes", "--tiles", "8", "--out", folder, "--quiet",
             "--task", "classification", "--activation", "softmax", "--class-names", ",".join(GPU_MODEL.class_names),
             "--tile-size", SIDE, "--target-mpp", MPP, "--mean", "0.5,0.5,0.5", "--std", "0.5,0.5,0.5"]
    ask(chosen, *words)
    return source, folder


def ask(chosen, *words):
    """What slidestream prints."""
    command = [str(word) for word in (chosen.slidestream, *words)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def tile_list(chosen):
    folder = chosen.root / "tiles"
    ask(chosen, "tiles", chosen.slide, "--tile-size", SIDE, "--target-mpp", MPP, "--out", folder)
    width, height = json.loads(ask(chosen, "inspect", chosen.slide, "--json"))["dimensions"]
    places = read_places(folder / "coords" / f"{chosen.slide.stem}.csv")
    path = folder / f"{chosen.slide.stem}.csv"
    write_places(path, [(x, y, w, h) for x, y, w, h in places if x + w <= width and y + h <= height])
    return path


def systems(chosen, source, folder, tiles):
    """For each system its command, in which `{out}` stands for the folder of the results."""
    def on(cores, *words):
        return ["taskset", "--cpu-list", ",".join(map(str, CORES[:cores])), *words]

    def pytorch(reader, mode):
        return on(most, sys.executable, HERE / "run_torch.py", chosen.slide, source, tiles, "{out}", reader, most, mode)

    most = chosen.cores[0]
    ours = {f"slidestream, {cores} cores": on(cores, chosen.slidestream, "run", chosen.slide, "--model", folder, "--variant", "fp16",
                                             "--coords", tiles, "--out", "{out}", "--device", "cuda", "--emit", "csv", "--quiet")
            for cores in chosen.cores}
    peers = {REFERENCE: pytorch("openslide", "eager"), "torch-compile-openslide": pytorch("openslide", "compile"),
             "torch-cucim": pytorch("cucim", "eager")}
    return {**ours, **peers}


def run(chosen, name, command, samples_memory):
    """What a run cost, and its table."""
    out = chosen.root / "runs" / name.replace(", ", "-").replace(" ", "-")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    log = out.with_suffix(".log")
    cost = measured([str(word).replace("{out}", str(out)) for word in command], {}, chosen.timeout, log, HERE, samples_memory)
    table = table_of(out, chosen.slide)
    if cost["exit_code"] or not table.exists():
        return why(cost["exit_code"], log.read_text(errors="replace")), None
    record = out / "slides" / f"{chosen.slide.stem}.json"
    if record.exists():
        cost["steady_seconds"] = json.loads(record.read_text())["timing"]["pipeline_seconds"]
    else:
        seconds = json.loads((out / "seconds.json").read_text())
        cost.update(steady_seconds=seconds["steady"], to_first_batch=seconds["to_first_batch"], batch=seconds["batch"])
    return cost, read_table(table)


def main():
    chosen = arguments()
    chosen.root.mkdir(parents=True, exist_ok=True)
    source, folder = make_model(chosen)
    tiles = tile_list(chosen)
    commands = systems(chosen, source, folder, tiles)
    record = {"command": "benches/peers/gpu.py " + " ".join(map(os.path.basename, sys.argv[1:])), "hardware": hardware(),
              "gpu": torch.cuda.get_device_name(0), "versions": versions(chosen), "rounds": chosen.rounds}
    done, cannot, tables = {name: [] for name in commands}, {}, {}
    for number in range(chosen.rounds + 1):  # the first is not counted: it fills caches, and its memory is sampled
        read_through(chosen.slide)
        for name in in_turn(list(commands), number):
            if name in cannot:
                continue
            cost, table = run(chosen, name, commands[name], samples_memory=number == 0)
            if table is None:
                cannot[name] = cost
                continue
            print(f"round {number} {name}: {len(table)} tiles in {cost['seconds']:.2f} s, steady {cost['steady_seconds']:.2f} s, "
                  f"{cost['cpu_seconds']:.1f} CPU s", file=sys.stderr, flush=True)
            tables[name] = table
            done[name].append(cost)
    record["results"] = list(results(done, cannot, tables))
    chosen.out.write_text(json.dumps(record, indent=1) + "\n")
    print(table_text(record["results"]))


def versions(chosen):
    """Of what is there: a peer that can't run says so itself."""
    packages = ("torch", "timm", "openslide-python", "cucim-cu12", "cucim-cu13")
    found = {package: importlib.metadata.version(package) for package in packages if is_there(package)}
    return {"slidestream": ask(chosen, "--version").split()[1], **found}


def is_there(package):
    return any(True for _ in importlib.metadata.distributions(name=package))


def results(done, cannot, tables):
    for name, all_costs in done.items():
        if name in cannot:
            yield {"system": name, "cannot": cannot[name]}
            continue
        first, *costs = all_costs
        tiles, reference = tables[name], tables.get(REFERENCE, {})
        apart = [abs(a - b) for place in tiles.keys() & reference.keys() for a, b in zip(tiles[place], reference[place])]
        count = len(tiles)
        yield {"system": name, "tiles": count, "largest_difference": max(apart, default=None), "peak_mib": first["peak_mib"],
               "tiles_per_sec": count / statistics.median(cost["seconds"] for cost in costs),
               "tiles_per_sec_steady": steady(count, costs), "costs": costs}


def steady(count, costs):
    """For PyTorch its first batch is not in the seconds, so it is not in the tiles."""
    return (count - costs[0].get("batch", 0)) / statistics.median(cost["steady_seconds"] for cost in costs)


def table_text(found):
    lines = ["| system | tiles | tiles/s, whole | tiles/s, steady | seconds | CPU s | Δ |", "|---|---|---|---|---|---|---|"]
    for entry in found:
        if "cannot" in entry:
            lines.append(f"| {entry['system']} | – | – | {entry['cannot']} | | | |")
            continue
        median = {key: statistics.median(cost[key] for cost in entry["costs"]) for key in ("seconds", "cpu_seconds")}
        apart = entry["largest_difference"]
        lines.append(f"| {entry['system']} | {entry['tiles']} | {entry['tiles_per_sec']:,.0f} | {entry['tiles_per_sec_steady']:,.0f} "
                     f"| {median['seconds']:.2f} | {median['cpu_seconds']:.1f} | {'–' if apart is None else f'{apart:.1e}'} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
