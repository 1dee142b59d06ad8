"""The networks as PyTorch modules. All take RGB scaled to [-1, 1] and return logits."""
import pathlib
import sys

import timm
import torch
import torchvision
from torch import nn

from models import GPU_MODEL, MODELS

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "models/train"))
from nets import UNet, ViT  # noqa: E402


def convolution(inputs, outputs, side, stride, padding):
    return nn.Sequential(nn.Conv2d(inputs, outputs, side, stride, padding, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class TinyCNN(nn.Module):
    """A classifier of 23 MFLOP: so small that the time of a run is that of everything else."""

    def __init__(self, classes):
        super().__init__()
        self.features = nn.Sequential(
            convolution(3, 16, 4, 4, 0), convolution(16, 32, 3, 2, 1), convolution(32, 64, 3, 2, 1),
            convolution(64, 64, 3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(64, classes)

    def forward(self, image):
        return self.head(self.features(image))


def build(name):
    """The network, untrained, and the layer that makes its logits."""
    classes = MODELS[name].classes
    if name == "tinycnn":
        net = TinyCNN(classes)
    elif name == "resnet18":
        net = torchvision.models.resnet18(num_classes=classes)
        return net, net.fc
    elif name == "vit_small":
        net = timm.create_model("vit_small_patch16_224", num_classes=classes)
    elif name == "cells_vit":
        net = ViT(classes=classes)
    else:
        net = UNet(classes=classes, base=16)
    return net, net.head


def build_vit():
    """The network of the comparison on a GPU."""
    return timm.create_model("vit_base_patch16_224", num_classes=GPU_MODEL.classes)


def pictures(count, side):
    """Noise around a colour that differs from picture to picture, scaled to [-1, 1]."""
    colours = torch.rand(count, 3, 1, 1) * 2 - 1
    return (colours + torch.randn(count, 3, side, side) / 4).clamp(-1, 1)


@torch.no_grad()
def spread_logits(net, head, side):
    """Gives the logits of pictures of different colours a deviation of 1, by the layer that makes them."""
    logits = net(pictures(32, side)).transpose(0, 1).flatten(1)
    shape = (-1,) + (1,) * (head.weight.dim() - 1)
    head.weight.div_(logits.std(1).reshape(shape))
    head.bias.sub_(logits.mean(1)).div_(logits.std(1))
