#!/usr/bin/env python3
"""TIAToolbox over a slide, as its documentation shows for a model of one's own.

    run_tiatoolbox.py SLIDE MODEL TILES.csv OUT

`PatchPredictor` for classifiers, `SemanticSegmentor` for maps, batches of 32 and a loader process per core. MODEL is the
path of the model's files without their endings. TIAToolbox takes no list of tiles but a mask, of which it takes every tile
that touches it: the mask has the middle of every tile of the list. It reads at the list's resolution.
"""
import os
import pathlib
import sys

import numpy as np
import torch
from tiatoolbox.models import PatchPredictor, SemanticSegmentor
from tiatoolbox.models.engine.io_config import IOPatchPredictorConfig, IOSegmentorConfig
from tiatoolbox.models.models_abc import ModelABC
from tiatoolbox.wsicore.wsireader import WSIReader

from models import MODELS
from networks import build
from tiles import read_places, table_of, write_table

BATCH = 32
MASK_SCALE = 16


class Wrapped(ModelABC):
    """The network with its normalisation and activation, which keeps the mean probabilities of every tile."""

    def __init__(self, name, weights):
        super().__init__()
        self.net, _ = build(name)
        self.net.load_state_dict(torch.load(weights, weights_only=True))
        self.kind = MODELS[name]
        self.means = []

    def forward(self, image):
        logits = self.net(image)
        if self.kind.classes == 1:
            logits = torch.cat([torch.zeros_like(logits), logits], 1)  # the softmax of both is the sigmoid
        probabilities = torch.softmax(logits, 1)
        return probabilities.permute(0, 2, 3, 1) if self.kind.is_map else probabilities

    @staticmethod
    def preproc(image):
        return image

    @staticmethod
    def postproc(probabilities):
        return probabilities.argmax(-1)

    @staticmethod
    def infer_batch(model, images, *, device):
        images = images.to(device).permute(0, 3, 1, 2).float().div_(127.5).sub_(1).contiguous()
        with torch.inference_mode():
            probabilities = model.eval()(images).numpy()
        # Of a map as a double: in single precision the sum over a tile is off by more than the network.
        classes = probabilities[..., -model.kind.classes:]
        model.means.append(classes.mean((1, 2), dtype=np.float64) if model.kind.is_map else classes)
        return probabilities


def mask_of(slide, places):
    width, height = WSIReader.open(slide).info.slide_dimensions
    mask = np.zeros((-(-height // MASK_SCALE), -(-width // MASK_SCALE)), np.uint8)
    for x, y, w, h in places:
        rows = slice((y + h // 4) // MASK_SCALE, (y + 3 * h // 4) // MASK_SCALE)
        mask[rows, (x + w // 4) // MASK_SCALE : (x + 3 * w // 4) // MASK_SCALE] = 1
    return mask


slide, model, places, out = pathlib.Path(sys.argv[1]), sys.argv[2], read_places(sys.argv[3]), pathlib.Path(sys.argv[4])
name = pathlib.Path(model).name
side = MODELS[name].side
scale = places[0][2] / side
shape, resolution = (side, side), {"units": "baseline", "resolution": 1 / scale}
network = Wrapped(name, model + ".pth")
options = {"batch_size": BATCH, "num_workers": len(os.sched_getaffinity(0)), "device": "cpu", "verbose": False}
if MODELS[name].is_map:
    engine = SemanticSegmentor(network, **options)
    config = IOSegmentorConfig(input_resolutions=[resolution], output_resolutions=[resolution], save_resolution=resolution,
                               patch_input_shape=shape, patch_output_shape=shape, stride_shape=shape)
else:
    engine = PatchPredictor(network, **options)
    config = IOPatchPredictorConfig(input_resolutions=[resolution], patch_input_shape=shape, stride_shape=shape)
engine.run([slide], masks=[mask_of(slide, places)], ioconfig=config, patch_mode=False, save_dir=out / "tiatoolbox",
           overwrite=True, output_type="zarr")
done = [(round(x * scale), round(y * scale), round((right - x) * scale), round((bottom - y) * scale))
        for x, y, right, bottom in engine.dataloader.dataset.inputs.tolist()]
write_table(table_of(out, slide), done, np.concatenate(network.means).tolist())
