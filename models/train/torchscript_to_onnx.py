"""A WSInfer model (`torchscript_model.pt` and `config.json`) to ONNX.

    python torchscript_to_onnx.py torchscript_model.pt config.json OUT_FOLDER

OUT_FOLDER receives `model.onnx`, with a free batch axis and checked against the TorchScript, and `config.json` as it was.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch

import export


def input_size(config: dict) -> int:
    """The side the net sees: that of the config's Resize step, else of the patch itself."""
    for step in config["transform"]:
        if step["name"] == "Resize":
            size = step["arguments"]["size"]
            return size if isinstance(size, int) else size[0]
    return config["patch_size_pixels"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("config", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    config = json.loads(args.config.read_text())
    size = input_size(config)
    net = torch.jit.load(args.model, map_location="cpu").eval()
    with torch.no_grad():
        classes = net(torch.zeros(1, 3, size, size)).shape[-1]
    if classes != config["num_classes"]:
        raise SystemExit(f"{args.model}: {classes} outputs, but {args.config} says num_classes = {config['num_classes']}")
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "model.onnx"
    # The newer exporter does not take TorchScript.
    torch.onnx.export(
        net,
        (torch.zeros(2, 3, size, size),),
        path,
        input_names=["input"],
        output_names=["logits"],
        opset_version=17,
        dynamic_axes={"input": {0: "batch"}, "logits": {0: "batch"}},
        dynamo=False,
    )
    export.without_traces(path)
    export.check(net, (3, size, size), path)
    if args.config.resolve() != (args.out / "config.json").resolve():
        shutil.copyfile(args.config, args.out / "config.json")


if __name__ == "__main__":
    main()
