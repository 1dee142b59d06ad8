#!/usr/bin/env python3
"""Reads every tile of a list with one of the readers that Python has, and prints a line of JSON.

    read_tiles.py SLIDE TILES.csv SIZE THREADS READER

TILES.csv has a line `x,y` for each tile, its upper left corner in level-0 pixels; SIZE px are read as RGB bytes. `s` and
`cpu` are seconds of reading, without the start of the process and after a first tile of every thread; `checksum` is the sum of every 16th row
and column of every tile, so that readers that give the same pixels show it. Each thread has a handle of its own where a
reader's handles can't be shared.
"""
import concurrent.futures
import csv
import importlib.metadata
import json
import os
import sys
import threading
import time

import numpy as np

slide, size, threads, reader = sys.argv[1], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
with open(sys.argv[2], newline="") as file:
    corners = [(int(x), int(y)) for x, y in csv.reader(file)]


def per_thread(make):
    mine = threading.local()

    def handle():
        if not hasattr(mine, "handle"):
            mine.handle = make()
        return mine.handle

    return handle


def stitched(corner, side, stored):
    """A tile out of the stored tiles of `side` px that it touches; `stored(column, row)` decodes one."""
    columns, rows = (range(start // side, (start + size - 1) // side + 1) for start in corner)
    canvas = np.empty((len(rows) * side, len(columns) * side, 3), np.uint8)
    for row in rows:
        for column in columns:
            tile = np.asarray(stored(column, row))
            y, x = (row - rows[0]) * side, (column - columns[0]) * side
            canvas[y : y + tile.shape[0], x : x + tile.shape[1]] = tile[..., :3]
    x, y = corner[0] - columns[0] * side, corner[1] - rows[0] * side
    return canvas[y : y + size, x : x + size]


# Each gives a function from the corner of a tile to its pixels.


def openslide():
    import openslide

    handle = per_thread(lambda: openslide.OpenSlide(slide))
    return lambda corner: np.asarray(handle().read_region(corner, 0, (size, size)))[..., :3]


def tiffslide():
    import tiffslide

    handle = per_thread(lambda: tiffslide.TiffSlide(slide))
    return lambda corner: handle().read_region(corner, 0, (size, size), as_array=True)


def fastslide():
    import fastslide

    shared = fastslide.FastSlide.from_file_path(slide)
    return lambda corner: shared.read_region(corner, 0, (size, size)).numpy()[..., :3]


def cucim():
    from cucim import CuImage

    shared = CuImage(slide)
    return lambda corner: np.asarray(shared.read_region(corner, (size, size), 0))


def pyvips():
    import pyvips

    pyvips.cache_set_max(0)
    handle = per_thread(lambda: pyvips.Region.new(pyvips.Image.tiffload(slide, page=0, access="random")))
    return lambda corner: np.frombuffer(handle().fetch(*corner, size, size), np.uint8).reshape(size, size, 3)


def large_image():
    import large_image_source_tiff

    shared = large_image_source_tiff.open(slide)

    def read(corner):
        region = {"left": corner[0], "top": corner[1], "width": size, "height": size, "units": "base_pixels"}
        return shared.getRegion(region=region, format="numpy")[0][..., :3]

    return read


def opentile():
    import opentile

    handle = per_thread(lambda: opentile.OpenTile.open(slide).get_level(0))
    return lambda corner: stitched(corner, handle().tile_size.width, lambda *place: handle().get_decoded_tile(place))


def microtome():
    import microtome

    shared = microtome.open(slide)
    side = shared.read_tile(0, 0, 0).shape[0]
    return lambda corner: stitched(corner, side, lambda column, row: shared.read_tile(0, column, row))


def pyfast():
    import fast

    fast.Reporter.setGlobalReportMethod(fast.Reporter.NONE)
    access = fast.WholeSlideImageImporter.create(slide).runAndGetOutputData().getAccess(fast.ACCESS_READ)
    return lambda corner: np.asarray(access.getPatchAsImage(0, *corner, size, size, False))[..., :3]


# Two have threads of their own and read the whole list at once: these give a function that reads it and returns the checksum.


def cucim_batch():
    from cucim import CuImage

    shared = CuImage(slide)
    shared.read_region(corners[0], (size, size), 0)

    def read_all():
        batches = shared.read_region(corners, (size, size), 0, batch_size=16, num_workers=threads)
        return sum(checksum(np.asarray(batch).reshape(-1, size, size, 3)) for batch in batches)

    return read_all


def microtome_batch():
    """The stored tiles that the list touches, each once, uncut: there is no checksum to compare."""
    import microtome

    shared = microtome.open(slide)
    side = shared.read_tile(0, 0, 0).shape[0]
    columns = -(-shared.dimensions[0] // side)
    touched = sorted({row * columns + column for x, y in corners for row in range(y // side, (y + size - 1) // side + 1)
                      for column in range(x // side, (x + size - 1) // side + 1)})

    def read_all():
        for first in range(0, len(touched), 256):
            shared.read_batch(0, touched[first : first + 256], threads=threads)
        return None

    return read_all


PACKAGES = {openslide: "openslide-python", tiffslide: "tiffslide", fastslide: "fastslide", cucim: "cucim-cu13",
            cucim_batch: "cucim-cu13", pyvips: "pyvips", large_image: "large-image-source-tiff", opentile: "opentile",
            microtome: "microtome-wsi", microtome_batch: "microtome-wsi", pyfast: "pyfast"}
BATCHES = (cucim_batch, microtome_batch)


def checksum(tiles):
    return int(tiles[..., ::16, ::16, :].sum(dtype=np.int64))


def share(read, first):
    return sum(checksum(read(corner)) for corner in corners[first::threads])


make = globals()[reader.replace("-", "_")]
if make in BATCHES:
    read_all = make()
else:
    read = make()
    shape = read(corners[0]).shape
    if shape != (size, size, 3):
        sys.exit(f"read_tiles.py: {reader} gave a tile of shape {shape}")
    pool, all_ready = concurrent.futures.ThreadPoolExecutor(threads), threading.Barrier(threads)
    list(pool.map(lambda _: (read(corners[0]), all_ready.wait()), range(threads)))
    read_all = lambda: sum(pool.map(lambda first: share(read, first), range(threads)))  # noqa: E731
begin, cpu = time.perf_counter(), time.process_time()
total = read_all()
seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
print(json.dumps({"tiles": len(corners), "s": seconds, "cpu": cpu, "checksum": total,
                  "version": importlib.metadata.version(PACKAGES[make])}), flush=True)
os._exit(0)  # some of the libraries crash while they are unloaded
