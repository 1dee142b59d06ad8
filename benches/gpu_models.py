#!/usr/bin/env python3
"""Variants that `slidestream optimize --for cuda` makes, against stock exports and torch.compile, on one GPU.

    benches/gpu_models.py --slidestream target/release/slidestream --out benches/results/gpu-models.json

Needs PyTorch with CUDA, timm, onnx and onnxruntime-gpu. Each model is exported once in 32 bits, from which slidestream
makes its FP16 variant, and once by PyTorch in 16 bits (`stock`). All run with inputs and outputs on the device, the
same random input, synchronised, in turns; the median of the rounds counts. `torch` and `torch_compile` are the same
network in PyTorch FP16, channels last for the UNet.
"""
import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

import numpy as np
import onnxruntime as ort
import timm
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "models/train"))
from nets import UNet  # noqa: E402

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--slidestream", required=True)
parser.add_argument("--work", default="/tmp/gpu-models")
parser.add_argument("--out", required=True)
parser.add_argument("--rounds", type=int, default=15)
parser.add_argument("--models", default="vit_base,vit_large,unet")
arguments = parser.parse_args()
work = pathlib.Path(arguments.work)
work.mkdir(parents=True, exist_ok=True)
torch.manual_seed(1)
torch.backends.cudnn.benchmark = True


def unet():
    net = UNet(classes=1, base=64)
    # Norms as after training: statistics of real activations, not the initial 0 and 1.
    net.train()
    with torch.no_grad():
        for _ in range(3):
            net(torch.randn(2, 3, 512, 512))
    return net


MODELS = {
    "vit_base": (lambda: timm.create_model("vit_base_patch16_224"), 224, 256, "features"),
    "vit_large": (lambda: timm.create_model("vit_large_patch16_224"), 224, 128, "features"),
    "unet": (unet, 512, 16, "segmentation"),
}


def export(net, path, side, half):
    example = torch.randn(2, 3, side, side)
    if half:
        net, example = net.half().cuda(), example.half().cuda()
    axes = {"input": {0: "batch"}, "output": {0: "batch"}}
    torch.onnx.export(net, (example,), path, input_names=["input"], output_names=["output"], dynamic_axes=axes,
                      opset_version=18, dynamo=False)


def session(path, options):
    cuda = {"cudnn_conv_algo_search": "HEURISTIC", **options}
    return ort.InferenceSession(path, providers=[("CUDAExecutionProvider", cuda)])


def runner(path, options, batch):
    """A call that runs the model once, everything on the device; and its output."""
    model = session(str(path), options)
    kind = np.float16 if "float16" in model.get_inputs()[0].type else np.float32
    value = ort.OrtValue.ortvalue_from_numpy(batch.cpu().numpy().astype(kind), "cuda", 0)
    binding = model.io_binding()
    binding.bind_ortvalue_input("input", value)
    binding.bind_output(model.get_outputs()[0].name, "cuda", 0)
    return lambda: (model.run_with_iobinding(binding), binding.synchronize_outputs()), \
        lambda: binding.copy_outputs_to_cpu()[0].astype(np.float32)


results = {"command": " ".join(sys.argv), "device": torch.cuda.get_device_name(0), "torch": torch.__version__,
           "onnxruntime": ort.__version__, "timm": timm.__version__, "models": {}}
for name in arguments.models.split(","):
    make, side, size, task = MODELS[name]
    net = make().eval()
    source = work / f"{name}.onnx"
    with torch.no_grad():
        export(net, str(source), side, half=False)
    folder = work / f"{name}-optimized"
    flags = ["--task", task, "--tile-size", str(side), "--mean", "0.5,0.5,0.5", "--std", "0.5,0.5,0.5", "--target-mpp", "0.5"]
    flags += ["--activation", "none"] + (["--class-names", "tumour"] if task == "segmentation" else [])
    command = [arguments.slidestream, "optimize", str(source), "--for", "cuda", "--to", "fp16", "--half-io", "--tiles", "4", "--out", str(folder)] + flags
    begin = time.time()
    made = subprocess.run(command, capture_output=True, text=True)
    print(name, "optimize", f"{time.time() - begin:.0f} s", made.stdout, made.stderr, file=sys.stderr)
    record = json.load(open(folder / "optimize.json"))
    variant = next(v for v in record["variants"] if v["file"])

    batch = torch.randn(size, 3, side, side, device="cuda")
    stock = work / f"{name}-stock-fp16.onnx"
    with torch.no_grad():
        reference = net.cuda()(batch[:8]).float().cpu().numpy()
        half = net.half()
        export(half, str(stock), side, half=True)
        layout = torch.channels_last if name == "unet" else torch.contiguous_format
        half = half.to(memory_format=layout)
        image = batch.half().to(memory_format=layout)
        compiled = torch.compile(half, mode="max-autotune-no-cudagraphs")

        def eager_turn():
            half(image)
            torch.cuda.synchronize()

        def compiled_turn():
            compiled(image)
            torch.cuda.synchronize()

        ours, ours_output = runner(folder / variant["file"], variant["options"], batch)
        theirs, _ = runner(stock, {}, batch)
        contestants = {"slidestream": ours, "stock": theirs, "torch": eager_turn, "torch_compile": compiled_turn}
        for turn in contestants.values():
            for _ in range(3):
                turn()
        seconds = {key: [] for key in contestants}
        for _ in range(arguments.rounds):
            for key, turn in contestants.items():
                begin = time.perf_counter()
                for _ in range(5):
                    turn()
                seconds[key].append((time.perf_counter() - begin) / 5)
    output = ours_output()[:8]
    a, b = output.reshape(8, -1).astype(np.float64), reference.reshape(8, -1).astype(np.float64)
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    rates = {key: size / statistics.median(values) for key, values in seconds.items()}
    results["models"][name] = {
        "batch": size, "side": side, "tiles_per_sec": rates, "seconds_per_batch": seconds,
        "against_stock": rates["slidestream"] / rates["stock"],
        "against_torch_compile": rates["slidestream"] / rates["torch_compile"],
        "cosine_to_fp32": {"least": float(cosines.min()), "mean": float(cosines.mean())},
        "options": variant["options"],
        "passes": {entry["pass"]: entry["applied"] for entry in variant["passes"]},
    }
    print(json.dumps({name: {k: v for k, v in results["models"][name].items() if k != "seconds_per_batch"}}))
    pathlib.Path(arguments.out).parent.mkdir(parents=True, exist_ok=True)
    pathlib.Path(arguments.out).write_text(json.dumps(results, indent=1) + "\n")
    del half, compiled, ours, theirs
    torch.cuda.empty_cache()
