"""The models that every system runs, on the CPU and on a GPU."""
from typing import NamedTuple


class Model(NamedTuple):
    """`side` of a tile in pixels, `classes` of its logits, and whether a tile gets a class or a map.

    A model with `committed` has the weights of that file of the repository, which were trained; the others' are random.
    """
    title: str
    side: int
    classes: int
    is_map: bool = False
    committed: str = ""

    @property
    def class_names(self):
        return [f"c{index}" for index in range(self.classes)]


MODELS = {
    "tinycnn": Model("tiny CNN", 224, 8),
    "resnet18": Model("ResNet-18", 224, 8),
    "unet16": Model("UNet base 16", 256, 1, is_map=True),
    "vit_small": Model("ViT-S/16", 224, 8),
    "cells_vit": Model("cells-vit", 96, 4, committed="models/cells-vit/cells-vit.onnx"),
    "cells_unet": Model("cells-unet", 256, 4, is_map=True, committed="models/cells-unet/cells-unet.onnx"),
}
GPU_MODEL = Model("ViT-B/16", 224, 8)
MPP = 0.5
