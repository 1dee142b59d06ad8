#!/usr/bin/env python3
"""slidestream's reader beside those that Python has, on one list of tiles.

    benches/peers/readers.py SLIDE… [--tiles all] [--ours target/release/examples] [--rounds 5] [--megapixels 60]

The list has the tissue tiles of `slidestream tiles` that lie wholly in the slide, in the order of rows, or, with
`--tiles all`, every tile that does; of each, --sizes px are read at level 0. Every reader reads all of them on one thread
pinned to a core, and those of the first size also on two threads pinned to two, so that threads of its own count too;
readers take turns, beginning with another one each round. The time is that of reading alone, in a process that has opened
the slide and read a tile (read_tiles.py). Of `--ours`, read_tiles is called as `read_tiles SLIDE TILES.csv SIZE THREADS
READER` with the readers native and openslide, and prints the same line; decode_jpegs shows the bare rate of zune-jpeg, the
native reader's decoder. `pixels` says whether the sum over every 16th row and column of all tiles is that of
openslide-python; microtome-batch and zune-jpeg decode the stored tiles that the list touches, each once, and cut nothing:
their tiles per second are those of the list. What can't run says why.

The result goes to --out as JSON, beside it as a chart (.svg), and as a table to stdout. The set-up is that of compare.py.
"""
import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys

from chart import chart
from measure import hardware, in_turn, read_through, why
from prepare import HERE, REPOSITORY, Cannot, Setup
from tiles import read_places

OURS = {"slidestream-native": "native", "slidestream-openslide": "openslide"}
CEILING = "zune-jpeg"
REFERENCE = "openslide"
READERS = [*OURS, CEILING, REFERENCE, "tiffslide", "fastslide", "cucim", "cucim-batch", "pyvips", "large-image", "opentile", "microtome",
           "microtome-batch", "pyfast"]
CORES = sorted(os.sched_getaffinity(0))


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slides", nargs="+", type=pathlib.Path, metavar="SLIDE")
    parser.add_argument("--slidestream", default=REPOSITORY / "target/release/slidestream", type=pathlib.Path)
    parser.add_argument("--ours", default=REPOSITORY / "target/release/examples", type=pathlib.Path)
    parser.add_argument("--root", default="~/.cache/slidestream-peers", help="where the environments lie")
    parser.add_argument("--out", default=REPOSITORY / "benches/results/peers-readers.json", type=pathlib.Path)
    parser.add_argument("--sizes", default="224,256,512", help="sides of the tiles in pixels")
    parser.add_argument("--only", default=",".join(READERS), help="readers to run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiles", choices=["tissue", "all"], default="tissue", help="those of tissue, or of the whole slide")
    parser.add_argument("--megapixels", type=float, default=60, help="read only the first tiles of a list, so many in all")
    parser.add_argument("--timeout", type=float, default=300, help="seconds after which a run is ended")
    chosen = parser.parse_args()
    chosen.sizes, chosen.only = [int(size) for size in chosen.sizes.split(",")], chosen.only.split(",")
    for reader in chosen.only:
        if reader not in READERS:
            parser.error(f"{reader} is none of {', '.join(READERS)}")
    for path in [*chosen.slides, chosen.slidestream]:
        if not path.is_file():
            parser.error(f"{path} is no file")
    chosen.slides = [slide.resolve() for slide in chosen.slides]
    return chosen


def corners(setup, slide, size, chosen):
    """The file of the tiles' upper left corners, a line `x,y` each, and how many they are."""
    if chosen.tiles == "all":
        width, height = json.loads(setup.ask("inspect", slide, "--json"))["dimensions"]
        places = [(x, y) for y in range(0, height - size + 1, size) for x in range(0, width - size + 1, size)]
    else:
        places = [place[:2] for place in read_places(setup.tile_list(slide, size, None))]
    places = places[: int(chosen.megapixels * 1e6 / size**2)]
    path = setup.root / "tiles" / f"{slide.stem}-{size}-{chosen.tiles}-corners.csv"
    path.write_text("".join(f"{x},{y}\n" for x, y in places))
    return path, len(places)


def example(chosen, name):
    program = chosen.ours / name
    if not program.is_file():
        raise Cannot(f"{program} is not there; build it by `cargo build --release --examples`")
    return program.resolve()


def command(setup, reader, slide, tiles, size, threads, chosen):
    """What to call for a reader."""
    if reader == CEILING:
        jpegs = tiles.with_suffix(".jpegs")
        done = subprocess.run([setup.environment("readers"), HERE / "stored_tiles.py", slide, tiles, str(size), jpegs],
                              capture_output=True, text=True)
        if done.returncode:
            raise Cannot(why(done.returncode, done.stderr))
        return [example(chosen, "decode_jpegs"), jpegs, threads]
    if reader in OURS:
        return [example(chosen, "read_tiles"), slide, tiles, size, threads, OURS[reader]]
    special = {"pyfast": setup.fast, "opentile": setup.opentile}
    python = special[reader]() if reader in special else setup.environment("readers")
    return [python, HERE / "read_tiles.py", slide, tiles, size, threads, reader]


def read(setup, reader, slide, tiles, size, threads, chosen):
    """The line that a reader prints."""
    pinned = ["taskset", "--cpu-list", ",".join(map(str, CORES[:threads]))]
    words = [*pinned, *command(setup, reader, slide, tiles, size, threads, chosen)]
    try:
        ran = subprocess.run(list(map(str, words)), cwd=REPOSITORY, capture_output=True, text=True, timeout=chosen.timeout)
    except subprocess.TimeoutExpired:
        raise Cannot(f"ended after {chosen.timeout:.0f} s (--timeout)") from None
    lines = [line for line in ran.stdout.splitlines() if line.startswith("{")]
    if ran.returncode or not lines:
        raise Cannot(why(ran.returncode, ran.stderr))
    return json.loads(lines[-1])


def rounds(setup, slide, tiles, size, threads, chosen):
    """What every reader printed, a list of rounds, or the reason why it has none."""
    done, cannot = {reader: [] for reader in chosen.only}, {}
    for number in range(chosen.rounds):
        read_through(slide)
        for reader in in_turn(chosen.only, number):
            if reader in cannot:
                continue
            try:
                done[reader].append(read(setup, reader, slide, tiles, size, threads, chosen))
            except Cannot as reason:
                cannot[reader] = str(reason)
                continue
            print(f"{slide.name} {size} px, threads: {threads}, round {number + 1} {reader}: "
                  f"{done[reader][-1]['s']:.3f} s", file=sys.stderr, flush=True)
    return done, cannot


def compared(setup, slide, size, threads, chosen):
    tiles, count = corners(setup, slide, size, chosen)
    done, cannot = rounds(setup, slide, tiles, size, threads, chosen)
    expected = done[REFERENCE][-1]["checksum"] if done.get(REFERENCE) else None
    for reader in chosen.only:
        entry = {"slide": slide.name, "list": chosen.tiles, "size": size, "threads": threads, "reader": reader}
        if reader in cannot:
            yield {**entry, "cannot": cannot[reader]}
            continue
        last, seconds = done[reader][-1], [line["s"] for line in done[reader]]
        rate = count / statistics.median(seconds)
        cpu = [line["cpu"] for line in done[reader]]
        version = last.get("version") or setup.ask("--version").split()[1]
        times = statistics.median(line["s"] for line in done[REFERENCE]) / statistics.median(seconds) if expected else None
        yield {**entry, "version": version, "tiles": count, "tiles_per_sec": rate, "times_openslide": times,
               "mpx_per_sec": rate * size**2 / 1e6, "cpu_ms_per_tile": 1000 * statistics.median(cpu) / count,
               "seconds": seconds, "cpu_seconds": cpu, "checksum": last.get("checksum"),
               "pixels": pixels(last.get("checksum"), expected)}


def pixels(checksum, expected):
    """How the pixels of a reader compare with those of openslide-python, as far as their sums tell."""
    if checksum is None or expected is None:
        return "not compared"
    return "same sum" if checksum == expected else f"sum differs by {abs(checksum - expected) / expected:.1e} of it"


def table(results):
    lines = ["| slide | tile | threads | reader | tiles/s | Mpx/s | × openslide | CPU ms a tile | pixels |",
             "|---|---|---|---|---|---|---|---|---|"]
    for found in results:
        head = f"| {found['slide']} | {found['size']} px | {found['threads']} | {found['reader']}"
        if "cannot" in found:
            lines.append(f"{head} | {found['cannot']} | | | | |")
        else:
            times = f"{found['times_openslide']:.2f}" if found["times_openslide"] else ""
            lines.append(f"{head} {found['version']} | {found['tiles_per_sec']:.0f} | {found['mpx_per_sec']:.1f} | {times} "
                         f"| {found['cpu_ms_per_tile']:.2f} | {found['pixels']} |")
    return "\n".join(lines)


def picture(results, machine):
    rows = {}
    for found in results:
        heading = f"{found['slide']}, {found['size']} px, threads: {found['threads']}"
        values = rows.setdefault((found["slide"], found["threads"]), {}).setdefault(heading, [])
        values.append((found["reader"], found.get("mpx_per_sec"), found["reader"] in OURS))
    note = f"reading alone, median; {machine['cpu']}; longer is better; microtome-batch and zune-jpeg decode and cut nothing"
    return chart("Megapixels per second", note, [list(panels.items()) for panels in rows.values()])


def main():
    chosen = arguments()
    setup = Setup(chosen.root, chosen.slidestream, chosen.slides[0])
    words = [pathlib.Path(word).name if "/" in word else word for word in sys.argv[1:]]
    record = {"command": " ".join(["benches/peers/readers.py"] + words), "hardware": hardware(), "rounds": chosen.rounds}
    results = []
    for slide in chosen.slides:
        for threads, size in [*((1, size) for size in chosen.sizes), (2, chosen.sizes[0])]:
            results += compared(setup, slide, size, threads, chosen)
            chosen.out.write_text(json.dumps({**record, "results": results}, indent=1) + "\n")
            chosen.out.with_suffix(".svg").write_text(picture(results, record["hardware"]))
    print(table(results))


try:
    main()
except Cannot as reason:
    sys.exit(f"benches/peers/readers.py: {reason}")
