#!/usr/bin/env python3
"""`slidestream simulate` beside PyTorch FP16 and torch.compile on one GPU: tiles from the host's memory, in turns.

    benches/simulate_peers.py --slidestream target/release/slidestream --out benches/results/h100-simulate-peers.json

Needs PyTorch with CUDA, timm and onnx. Each network is exported once; slidestream optimises that file for the GPU and
simulates its variants. PyTorch runs the same network in 16 bits, eagerly and compiled, fed as a good loader would:
bytes in page-locked memory, copied beside the computing, normalised on the device, results copied back; and besides
(`on_device`) with an input that already lies there, which no tiles of a slide do. Every round measures all of them one
after the other. The time of 15,000 and of 57,000 tiles follows from the rates.
"""
import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import time

import timm
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "models/train"))
from nets import UNet  # noqa: E402

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--slidestream", required=True)
parser.add_argument("--work", default="/tmp/simulate-peers")
parser.add_argument("--out", required=True)
parser.add_argument("--rounds", type=int, default=3)
parser.add_argument("--models", default="vit_base,vit_large,unet")
parser.add_argument("--variants", default="fp32,fp16")
parser.add_argument("--sessions", default="", help="of slidestream, each tried, such as 1,2; its own choice without")
parser.add_argument("--no-peers", action="store_true")
arguments = parser.parse_args()
work = pathlib.Path(arguments.work)
work.mkdir(parents=True, exist_ok=True)
torch.backends.cudnn.benchmark = True
SECONDS = 3.0


def unet():
    net = UNet(classes=1, base=64)
    # Norms as after training: statistics of real activations, not the initial 0 and 1.
    net.train()
    with torch.no_grad():
        for _ in range(3):
            net(torch.randn(2, 3, 512, 512))
    return net


# Network, side of a tile, batch sizes of slidestream, of PyTorch, task.
MODELS = {
    "vit_base": (lambda: timm.create_model("vit_base_patch16_224"), 224, "256", 256, "features"),
    "vit_large": (lambda: timm.create_model("vit_large_patch16_224"), 224, "128", 128, "features"),
    "unet": (unet, 512, "8", 16, "segmentation"),
}


def optimized(name, net, side, task):
    source, folder = work / f"{name}.onnx", work / name
    if folder.exists():
        return folder
    axes = {"input": {0: "batch"}, "output": {0: "batch"}}
    with torch.no_grad():
        torch.onnx.export(net, (torch.randn(2, 3, side, side),), str(source), input_names=["input"], output_names=["output"],
                          dynamic_axes=axes, opset_version=18, dynamo=False)
    command = [arguments.slidestream, "optimize", str(source), "--for", "cuda", "--to", "fp16", "--bytes", "--tiles", "4",
               "--out", str(folder), "--task", task, "--tile-size", str(side), "--mean", "0.5,0.5,0.5", "--std", "0.5,0.5,0.5",
               "--target-mpp", "0.5"]
    command += ["--activation", "sigmoid", "--class-names", "tumour"] if task == "segmentation" else ["--activation", "none"]
    begin = time.time()
    made = subprocess.run(command, capture_output=True, text=True)
    print(name, "optimize", f"{time.time() - begin:.0f} s", made.stdout, made.stderr, file=sys.stderr)
    return folder


def simulate(folder, variant, sizes, sessions):
    command = [arguments.slidestream, "simulate", "--model", str(folder), "--variant", variant, "--device", "cuda",
               "--batch-sizes", sizes, "--seconds", str(int(SECONDS)), "--json", "--quiet"]
    ran = subprocess.run(command + (["--sessions", sessions] if sessions else []), capture_output=True, text=True)
    if ran.returncode:
        sys.exit(ran.stderr)
    return json.loads(ran.stdout)


def from_host(net, size, side):
    """A call that runs one more batch of `size` tiles that lie in the host's memory; and one that waits for the end."""
    tiles = [torch.randint(0, 256, (size, side, side, 3), dtype=torch.uint8).pin_memory() for _ in range(4)]
    copies, computes = torch.cuda.Stream(), torch.cuda.current_stream()
    state = {"index": 0, "next": None, "outputs": []}

    def load():
        with torch.cuda.stream(copies):
            pixels = tiles[state["index"] % len(tiles)].to("cuda", non_blocking=True)
        state["index"] += 1
        return pixels

    def turn():
        pixels = state["next"] if state["next"] is not None else load()
        computes.wait_stream(copies)
        state["next"] = load()
        pixels.record_stream(computes)
        image = ((pixels.permute(0, 3, 1, 2).half() / 255) - 0.5) / 0.5
        output = net(image)
        host = torch.empty(output.shape, dtype=output.dtype, pin_memory=True)
        host.copy_(output, non_blocking=True)
        state["outputs"] = [host]

    return turn, torch.cuda.synchronize


def on_device(net, size, side):
    image = torch.randn(size, 3, side, side, device="cuda", dtype=torch.float16)
    return lambda: net(image), torch.cuda.synchronize


def rate(turn, wait, size):
    turn(), wait()
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < SECONDS:
        for _ in range(4):
            turn()
        wait()
        count += 4
    return count * size / (time.perf_counter() - begin)


out = pathlib.Path(arguments.out)
results = json.loads(out.read_text()) if out.exists() else {"models": {}}
results.update(command=" ".join(["benches/simulate_peers.py"] + sys.argv[1:]), device=torch.cuda.get_device_name(0),
               torch=torch.__version__, timm=timm.__version__)
for name in arguments.models.split(","):
    make, side, sizes, size, task = MODELS[name]
    torch.manual_seed(1)
    net = make().eval()
    folder = optimized(name, net, side, task)
    peers = {}
    if not arguments.no_peers:
        layout = torch.channels_last if name == "unet" else torch.contiguous_format
        half = net.half().cuda().to(memory_format=layout)
        compiled = torch.compile(half)
        peers = {"torch": from_host(half, size, side), "torch_compile": from_host(compiled, size, side),
                 "torch_on_device": on_device(half, size, side), "torch_compile_on_device": on_device(compiled, size, side)}
    rates, records = {}, {}
    with torch.inference_mode():
        for turn, wait in peers.values():
            for _ in range(3):
                turn()
            wait()
        for number in range(arguments.rounds):
            for variant in arguments.variants.split(","):
                for sessions in arguments.sessions.split(","):
                    key = f"slidestream {variant}" + (f", {sessions} sessions" if sessions else "")
                    record = records[key] = simulate(folder, variant, sizes, sessions)
                    point = record["points"][record["best"]]
                    rates.setdefault(key, []).append(point["tiles_per_sec"]["value"])
                    print(name, key, [(p["batch_size"], round(p["tiles_per_sec"]["value"])) for p in record["points"]],
                          "ms", round(point["ms_per_tile"]["p50"], 3), round(point["ms_per_tile"]["p99"], 3),
                          "busy", point["device_utilisation"], "watts", point["watts"], file=sys.stderr)
            for key, (turn, wait) in peers.items():
                rates.setdefault(key, []).append(rate(turn, wait, size))
    medians = {key: statistics.median(values) for key, values in rates.items()}
    results["models"][name] = {
        "side": side, "batch_of_torch": size, "tiles_per_sec": medians, "rounds": rates,
        "seconds_of_15000_tiles": {key: 15000 / value for key, value in medians.items()},
        "seconds_of_57000_tiles": {key: 57000 / value for key, value in medians.items()},
        "last_records": records,
    }
    print(json.dumps({name: medians}), flush=True)
    out.write_text(json.dumps(results, indent=1) + "\n")
