#!/usr/bin/env python3
"""What decoding JPEG tiles at a half or a quarter of their size would save, against decoding them whole and averaging.

    scaled_decoding.py JPEGS OUT.json [--rounds 5]

JPEGS is a file of stored_tiles.py. Both ways are libjpeg-turbo's, through libvips on one thread, so that nothing but the way
differs: shrink-on-load, and the whole tile followed by a box average. In turns; the difference is that of their pixels, for
which a way of making a missing level must be right, not only fast.
"""
import argparse
import json
import os
import statistics
import struct
import sys
import time

os.environ["VIPS_CONCURRENCY"] = "1"

import numpy as np
import pyvips

from measure import hardware

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("jpegs")
parser.add_argument("out")
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--most", type=int, default=400, help="JPEGs of the file that are read")
chosen = parser.parse_args()
pyvips.cache_set_max(0)


def stored():
    tiles = []
    with open(chosen.jpegs, "rb") as file:
        while len(tiles) < chosen.most and (head := file.read(5)):
            length, is_rgb = struct.unpack("<IB", head)
            if is_rgb:
                sys.exit("scaled_decoding.py: JPEGs of R, G and B would be converted, and so not be compared fairly")
            tiles.append(file.read(length))
    return tiles


def scaled(jpeg, factor):
    return pyvips.Image.jpegload_buffer(jpeg, shrink=factor).numpy()


def averaged(jpeg, factor):
    return pyvips.Image.jpegload_buffer(jpeg).shrink(factor, factor).numpy()


def seconds(way, tiles, factor):
    start = time.perf_counter()
    for tile in tiles:
        way(tile, factor)
    return time.perf_counter() - start


tiles = stored()
results = []
for factor in (2, 4):
    samples = {scaled: [], averaged: []}
    for number in range(chosen.rounds + 1):
        for way in (scaled, averaged) if number % 2 else (averaged, scaled):
            taken = seconds(way, tiles, factor)
            if number:  # the first round warms up
                samples[way].append(taken)
    ratio = statistics.median(samples[averaged]) / statistics.median(samples[scaled])
    differences = [np.abs(scaled(tile, factor).astype(int) - averaged(tile, factor)) for tile in tiles[:50]]
    results.append({"factor": factor, "scaled_s": samples[scaled], "averaged_s": samples[averaged], "times_faster": ratio,
                    "mean_difference": float(np.mean([d.mean() for d in differences])),
                    "largest_difference": int(max(d.max() for d in differences))})
    print(f"1/{factor}: scaled decoding {ratio:.2f} x as fast, pixels differ by {results[-1]['mean_difference']:.2f} in the mean, "
          f"{results[-1]['largest_difference']} at most")
record = {"command": "benches/peers/scaled_decoding.py JPEGS OUT.json", "hardware": hardware(), "tiles": len(tiles),
          "libvips": ".".join(str(pyvips.version(part)) for part in range(3)), "results": results}
with open(chosen.out, "w") as out:
    json.dump(record, out, indent=1)
