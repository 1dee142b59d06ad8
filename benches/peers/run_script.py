#!/usr/bin/env python3
"""What many write themselves: openslide, a pool of threads that read, ONNX Runtime.

    run_script.py SLIDE MODEL TILES.csv OUT THREADS

A reader per core works ahead of the model, which gets batches of 16; THREADS are those of ONNX Runtime.
Classifiers leave the table, map models a mask of the slide besides.
"""
import collections
import concurrent.futures
import itertools
import os
import pathlib
import sys
import threading

import cv2
import numpy as np
import onnxruntime
import openslide

from models import MODELS
from tiles import read_places, table_of, write_table

BATCH, AHEAD = 16, 64
slide, model, places, out, threads = sys.argv[1], sys.argv[2], read_places(sys.argv[3]), sys.argv[4], int(sys.argv[5])
kind = MODELS[pathlib.Path(model).name]
side = kind.side
scale = places[0][2] / side
mine = threading.local()


def read(place):
    if not hasattr(mine, "slide"):
        mine.slide = openslide.OpenSlide(slide)
    level = mine.slide.get_best_level_for_downsample(scale * 1.01)
    size = round(place[2] / mine.slide.level_downsamples[level])
    pixels = np.asarray(mine.slide.read_region(place[:2], level, (size, size)))[..., :3]
    return pixels if size == side else cv2.resize(pixels, (side, side), interpolation=cv2.INTER_AREA)


def read_ahead(pool):
    rest, reading = iter(places), collections.deque()
    for place in itertools.islice(rest, AHEAD):
        reading.append(pool.submit(read, place))
    while reading:
        tile = reading.popleft().result()
        reading.extend(pool.submit(read, place) for place in itertools.islice(rest, 1))
        yield tile


options = onnxruntime.SessionOptions()
options.intra_op_num_threads = threads
session = onnxruntime.InferenceSession(model + ".onnx", options, providers=["CPUExecutionProvider"])
width, height = openslide.OpenSlide(slide).dimensions
mask = np.zeros((round(height / scale), round(width / scale)) if kind.is_map else (0, 0), np.uint8)
rows = []
with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
    tiles = read_ahead(pool)
    while batch := list(itertools.islice(tiles, BATCH)):
        images = np.stack(batch).transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
        (logits,) = session.run(None, {"input": images})
        if kind.classes == 1:
            probabilities = 1 / (1 + np.exp(-logits))
        else:
            probabilities = np.exp(logits - logits.max(1, keepdims=True))
            probabilities /= probabilities.sum(1, keepdims=True)
        if kind.is_map:
            classes = (logits[:, 0] > 0) * 255 if kind.classes == 1 else logits.argmax(1)
            for (x, y, _, _), tile in zip(places[len(rows) :], classes):
                mask[round(y / scale) :, round(x / scale) :][:side, :side] = tile
            probabilities = probabilities.mean((2, 3))
        rows.extend(probabilities.tolist())
write_table(table_of(out, slide), places, rows)
if kind.is_map:
    cv2.imwrite(os.path.join(out, "mask.png"), mask)
