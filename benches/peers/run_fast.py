#!/usr/bin/env python3
"""FAST over a slide: its patch generator, its inference on batches of 8, its stitcher.

    run_fast.py SLIDE MODEL TILES.csv OUT ENGINE

MODEL is the path of the model's files without their endings; ENGINE is OpenVINO or ONNXRuntime. FAST takes no list of tiles
but a mask, which it cuts into as many parts as there are patches: a mask of one pixel per patch is the list. For map models
it leaves a pyramid of classes, and no probabilities. Its OpenVINO computes in bf16 where the CPU has it, and FAST
has no setting for that.
"""
import os
import pathlib
import sys

import fast
import numpy as np

from models import MODELS
from tiles import read_places, table_of, write_table

BATCH, MAGNIFICATION = 8, 20
slide, model, places, out, engine = sys.argv[1], sys.argv[2], read_places(sys.argv[3]), pathlib.Path(sys.argv[4]), sys.argv[5]
kind = MODELS[pathlib.Path(model).name]
side, is_map = kind.side, kind.is_map
step = places[0][2]
fast.Reporter.setGlobalReportMethod(fast.Reporter.NONE)

image = fast.WholeSlideImageImporter.create(slide).runAndGetOutputData()
listed = np.zeros((-(-image.getFullHeight() // step), -(-image.getFullWidth() // step)), np.uint8)
for x, y, _, _ in places:
    listed[y // step, x // step] = 1
patches = fast.PatchGenerator.create(side, side, magnification=MAGNIFICATION)
patches.connect(0, image).connect(1, fast.Image.createFromArray(listed))
patches.enableRuntimeMeasurements()
batches = fast.ImageToBatchGenerator.create(maxBatchSize=BATCH).connect(patches)
options = {"scaleFactor": 1.0, "meanIntensity": 127.5, "standardDeviationIntensity": 127.5, "inferenceEngine": engine,
           "maxBatchSize": BATCH}
if is_map:
    threshold = 0.0 if kind.classes == 1 else -1e9  # of logits; among several classes the largest wins
    network = fast.SegmentationNetwork.create(model + ".onnx", threshold=threshold, **options)
else:
    network = fast.NeuralNetwork.create(model + ".onnx", **options)
stitcher = fast.PatchStitcher.create(forceImagePyramidOutput=is_map).connect(network.connect(batches))
result = fast.RunUntilFinished.create().connect(stitcher).runAndGetOutputData()

if is_map:
    fast.TIFFImagePyramidExporter.create(str(out / "mask.tiff")).connect(result).run()
    made = patches.getRuntime("create patch").getSamples()
    if made != len(places):
        sys.exit(f"run_fast.py: FAST made {made} patches of {len(places)}")
    write_table(table_of(out, slide), places, [[]] * made)
else:
    logits = np.asarray(result)
    done = [(x * step, y * step, step, step) for y, x in zip(*logits.any(-1).nonzero())]
    probabilities = np.exp(logits[logits.any(-1)])
    write_table(table_of(out, slide), done, (probabilities / probabilities.sum(-1, keepdims=True)).tolist())
os._exit(0)  # the end of its Qt and OpenCL parts can hang without a display
