#!/usr/bin/env python3
"""Makes the models that every system runs: the same numbers in the form that each wants.

    make_models.py FOLDER

Runs in the environment `tiatoolbox`. For each model FOLDER gets NAME.onnx, NAME.pt (TorchScript), NAME.pth (weights) and
NAME.json (WSInfer's description); models.json tells parameters, FLOP of a tile, and how far ONNX, TorchScript and the
committed file are from PyTorch. Where weights are random, norms get statistics of real activations, and the logits of pictures
of different colours are spread to a deviation of 1, so that a wrong pixel, or red for blue, shows in the probabilities.
"""
import json
import pathlib
import sys

import onnxruntime
import torch
from torch.utils.flop_counter import FlopCounterMode

from models import MODELS, MPP
from networks import build, pictures, spread_logits
from onnx_weights import load_onnx

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
TOLERANCE = 1e-4  # of a logit, as when the committed models were exported


@torch.no_grad()
def weighted(name, side):
    torch.manual_seed(1)
    net, head = build(name)
    if MODELS[name].committed:
        load_onnx(net, REPOSITORY / MODELS[name].committed)
        return net.eval()
    net.train()
    for _ in range(10):
        net(pictures(8, side))
    net.eval()
    spread_logits(net, head, side)
    return net


def description(name, side):
    """What WSInfer wants to know of a model."""
    scale = {"name": "Normalize", "arguments": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}}
    steps = [{"name": "Resize", "arguments": {"size": side}}, {"name": "ToTensor"}, scale]
    names = MODELS[name].class_names
    return {"spec_version": "1.0", "architecture": name, "name": name, "num_classes": len(names), "class_names": names,
            "patch_size_pixels": side, "spacing_um_px": MPP, "transform": steps}


@torch.no_grad()
def export(name, side, folder):
    net, images = weighted(name, side), pictures(3, side)
    path = str(folder / name)
    torch.save(net.state_dict(), path + ".pth")
    traced = torch.jit.trace(net, images)
    traced.save(path + ".pt")
    axes = {"input": {0: "batch"}, "output": {0: "batch"}}
    # Not 17, whose LayerNormalization crashes the OpenVINO that FAST 4.18.0 brings.
    torch.onnx.export(net, (images,), path + ".onnx", input_names=["input"], output_names=["output"], dynamic_axes=axes,
                      opset_version=16, dynamo=False)
    (folder / f"{name}.json").write_text(json.dumps(description(name, side), indent=1) + "\n")

    expected = net(images)

    def difference(onnx_file):
        """Of ONNX Runtime's logits from PyTorch's, the largest."""
        session = onnxruntime.InferenceSession(onnx_file, providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {"input": images.numpy()})
        return float((torch.from_numpy(found) - expected).abs().max())

    made = {"onnx_from_pytorch": difference(path + ".onnx")}
    if MODELS[name].committed:
        made["committed_from_pytorch"] = difference(REPOSITORY / MODELS[name].committed)
        if made["committed_from_pytorch"] > TOLERANCE:
            raise SystemExit(f"{MODELS[name].committed} differs from PyTorch by {made['committed_from_pytorch']:.1e}")
    with FlopCounterMode(display=False) as counter:
        net(images[:1])
    return {"parameters": sum(weights.numel() for weights in net.parameters()), "flop_per_tile": counter.get_total_flops(),
            **made, "torchscript_from_pytorch": float((traced(images) - expected).abs().max())}


folder = pathlib.Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
made = {name: export(name, model.side, folder) for name, model in MODELS.items()}
(folder / "models.json").write_text(json.dumps(made, indent=1) + "\n")
