#!/usr/bin/env python3
"""slidestream beside WSInfer, TIAToolbox, FAST, and the short script that many write instead, on the CPU.

    benches/peers/compare.py SLIDE… [--slidestream target/release/slidestream] [--rounds 5] [--max-tiles N]

One command sets everything up (`prepare.py`: each system in an environment of its own, pinned; FAST's system libraries by
apt-get where it runs as root; models with random weights and the committed ones, the same weights for all; slidestream's
variants of them by its own `optimize`) and measures. Needs python3, 10 GB under --root and a built slidestream;
`native/setup.sh` must have run.

A run is a process from start to end: importing, opening the slide and the model, reading, inference, writing. All get the
same tiles: the tissue tiles of `slidestream tiles` that lie wholly in the slide, so nobody looks for tissue. The script
and slidestream take the list, WSInfer as its own patch file, TIAToolbox and FAST as a mask. Each has the settings that are
best for it (systems.py and run_*.py say which). Classifiers leave a table of tiles; UNets a map of classes at full
resolution besides, which WSInfer can't, and which each writes in its own format; slidestream also one for each class.

Every round runs all systems one after the other, beginning with another one each time; the slide is read through before a
round, so that it lies in the page cache for all. Before the first, each runs once uncounted: caches that a first run fills
(fonts, OpenCL kernels) are no part of the comparison, and sampling the peak memory costs time. Measured are the wall time
and the CPU time of the process and its children (measure.py). Δ is the largest difference of a probability from slidestream's FP32, of all
tiles of the same place, classes and rounds: from the runs that are timed, whose reader may differ from OpenSlide by a few
of 255, and from one that reads through OpenSlide as most peers do, so on the same pixels. What can't run says why.

The result goes to --out as JSON, beside it as a chart (.svg), and as a table to stdout.
"""
import argparse
import json
import pathlib
import re
import shutil
import statistics
import sys
from typing import NamedTuple

from chart import chart
from measure import hardware, in_turn, measured, read_through, why
from models import MODELS
from prepare import HERE, REPOSITORY, Cannot, Setup
from systems import REFERENCE, SYSTEMS, through_openslide
from tiles import read_table, table_of

TOLD = re.compile(r"(onnxruntime|onnxruntime-openvino|openslide-.*|pyfast|tiatoolbox|timm|torch|torchvision|wsinfer)==(.*)")


class Job(NamedTuple):
    slide: pathlib.Path
    model: str
    tiles: pathlib.Path
    out: pathlib.Path


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slides", nargs="+", type=pathlib.Path, metavar="SLIDE", help="the first one also calibrates INT8")
    parser.add_argument("--slidestream", default=REPOSITORY / "target/release/slidestream", type=pathlib.Path)
    parser.add_argument("--root", default="~/.cache/slidestream-peers", help="where environments, models and runs lie")
    parser.add_argument("--out", default=REPOSITORY / "benches/results/peers.json", type=pathlib.Path)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--only", default=",".join(SYSTEMS), help="systems to run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-tiles", type=int, help="take only so many tiles of a slide, evenly sampled")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds after which a run is ended")
    chosen = parser.parse_args()
    chosen.models, chosen.only = chosen.models.split(","), chosen.only.split(",")
    for given, known in ((chosen.models, MODELS), (chosen.only, SYSTEMS)):
        for name in given:
            if name not in known:
                parser.error(f"{name} is none of {', '.join(known)}")
    for path in [*chosen.slides, chosen.slidestream]:
        if not path.is_file():
            parser.error(f"{path} is no file")
    chosen.slides = [slide.resolve() for slide in chosen.slides]
    return chosen


def job(setup, slide, model, name, max_tiles):
    tiles = setup.tile_list(slide, MODELS[model].side, max_tiles)
    return Job(slide, model, tiles, setup.root / "runs" / slide.stem / model / name)


def run(setup, system, job, timeout, samples_memory=False):
    """What a run cost, and its table; raises `Cannot` if it failed."""
    command, environment = system(setup, job)
    shutil.rmtree(job.out, ignore_errors=True)
    job.out.mkdir(parents=True)
    log = job.out.with_suffix(".log")
    cost = measured(command, environment, timeout, log, REPOSITORY, samples_memory)
    if cost["seconds"] >= timeout:
        raise Cannot(f"ended after {timeout:.0f} s (--timeout)")
    table = table_of(job.out, job.slide)
    if cost["exit_code"] or not table.exists():
        raise Cannot(f"{why(cost['exit_code'], log.read_text(errors='replace'))} ({log})")
    return cost, read_table(table)


def rounds(setup, slide, model, chosen):
    """Costs and tables of every system, a list of rounds of which the first does not count, or the reason why it has none."""
    jobs = {system: job(setup, slide, model, system, chosen.max_tiles) for system in chosen.only}
    done, cannot = {system: [] for system in chosen.only}, {}
    for system in chosen.only:  # what must be set up is, before anything is measured
        try:
            SYSTEMS[system](setup, jobs[system])
        except Cannot as reason:
            cannot[system] = str(reason)
    for number in range(chosen.rounds + 1):
        read_through(slide)
        for system in in_turn(chosen.only, number):
            if system in cannot:
                continue
            try:
                done[system].append(run(setup, SYSTEMS[system], jobs[system], chosen.timeout, samples_memory=number == 0))
            except Cannot as reason:
                cannot[system] = str(reason)
                continue
            cost, table = done[system][-1]
            print(f"{slide.name} {model} round {number} {system}: {len(table)} tiles in {cost['seconds']:.2f} s",
                  file=sys.stderr, flush=True)
    return done, cannot


def difference(table, reference):
    """The largest of a probability on the tiles that both have; None where there is nothing to compare."""
    shared = table.keys() & reference.keys()
    return max((abs(a - b) for place in shared for a, b in zip(table[place], reference[place])), default=None)


def summary(done, own, openslide):
    """`own` and `openslide` are slidestream's FP32 tables, through its own choice of a reader and through OpenSlide."""
    (first, _), counted = done[0], done[1:]
    seconds, tables = [cost["seconds"] for cost, _ in counted], [table for _, table in counted]
    tiles = len(tables[-1])
    return {
        "tiles": tiles,
        "tiles_of_list": len(tables[-1].keys() & openslide.keys()),
        "tiles_per_sec": tiles / statistics.median(seconds),
        "seconds": seconds,
        "cpu_seconds": [cost["cpu_seconds"] for cost, _ in counted],
        "peak_mib": first["peak_mib"],
        "largest_difference": largest(difference(table, own) for table in tables) if own else None,
        "largest_difference_openslide": largest(difference(table, openslide) for table in tables),
    }


def largest(values):
    return max((value for value in values if value is not None), default=None)


def compared(setup, slide, model, chosen):
    same_pixels = job(setup, slide, model, "through-openslide", chosen.max_tiles)
    _, openslide = run(setup, through_openslide, same_pixels, chosen.timeout)
    done, cannot = rounds(setup, slide, model, chosen)
    own = done[REFERENCE][-1][1] if done.get(REFERENCE) else None
    for system in chosen.only:
        entry = {"slide": slide.name, "model": model, "system": system}
        if system in cannot:
            yield {**entry, "cannot": cannot[system]}
        else:
            yield {**entry, **summary(done[system], own, openslide)}


def versions(setup):
    pins = {file.stem: dict(TOLD.fullmatch(line).groups() for line in file.read_text().splitlines() if TOLD.fullmatch(line))
            for file in sorted((HERE / "requirements").glob("*.txt")) if file.stem != "readers"}
    return {"slidestream": setup.ask("--version").split()[1], **pins}


def table(results):
    lines = ["| slide | model | system | tiles | tiles/s | seconds (range) | CPU s | peak MiB | Δ | Δ through OpenSlide |",
             "|---|---|---|---|---|---|---|---|---|---|"]
    for found in results:
        head = f"| {found['slide']} | {MODELS[found['model']].title} | {found['system']} |"
        if "cannot" in found:
            lines.append(f"{head} – | – | {found['cannot']} | | | | |")
            continue
        seconds = found["seconds"]
        lines.append(f"{head} {found['tiles']} | {found['tiles_per_sec']:.1f} | {statistics.median(seconds):.2f} "
                     f"({min(seconds):.2f}–{max(seconds):.2f}) | {statistics.median(found['cpu_seconds']):.1f} "
                     f"| {found['peak_mib']:.0f} | {told(found['largest_difference'])} "
                     f"| {told(found['largest_difference_openslide'])} |")
    return "\n".join(lines)


def told(number):
    return "–" if number is None else f"{number:.1e}"


def picture(results, machine):
    panels = {}
    for found in results:
        heading = f"{found['slide']}, {MODELS[found['model']].title}"
        values = panels.setdefault(found["slide"], {}).setdefault(heading, [])
        values.append((found["system"], found.get("tiles_per_sec"), found["system"].startswith(REFERENCE)))
    note = f"tiles/s of a whole run, start-up included, median; {machine['cores']} cores, {machine['cpu']}; longer is better"
    return chart("Tiles per second", note, [list(row.items()) for row in panels.values()])


def main():
    chosen = arguments()
    setup = Setup(chosen.root, chosen.slidestream, chosen.slides[0])
    words = [pathlib.Path(word).name if "/" in word else word for word in sys.argv[1:]]
    record = {"command": " ".join(["benches/peers/compare.py"] + words), "hardware": hardware(), "versions": versions(setup),
              "rounds": chosen.rounds, "max_tiles": chosen.max_tiles}
    results = []
    for slide in chosen.slides:
        for model in chosen.models:
            results += compared(setup, slide, model, chosen)
            record.update(models=json.loads((setup.models() / "models.json").read_text()), results=results)
            chosen.out.write_text(json.dumps(record, indent=1) + "\n")
            chosen.out.with_suffix(".svg").write_text(picture(results, record["hardware"]))
    print(table(results))


try:
    main()
except Cannot as reason:
    sys.exit(f"benches/peers/compare.py: {reason}")
