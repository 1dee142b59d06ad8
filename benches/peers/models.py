"""The four models that every system runs: side of a tile in pixels, and whether a tile gets a class or a map."""
from typing import NamedTuple


class Model(NamedTuple):
    title: str
    side: int
    is_map: bool = False


MODELS = {
    "tinycnn": Model("tiny CNN", 224),
    "resnet18": Model("ResNet-18", 224),
    "unet16": Model("UNet base 16", 256, is_map=True),
    "vit_small": Model("ViT-S/16", 224),
}
MPP = 0.5
CLASSES = ["c0", "c1", "c2", "c3", "c4", "c5", "c6", "c7"]
