"""PyTorch to one ONNX file with a free batch axis, checked against PyTorch."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn as nn

OPSET = 18
TOLERANCE = 1e-4  # largest difference of a logit; float32 sums in another order give about 1e-5


def to_onnx(net: nn.Module, shape: tuple[int, int, int], path: Path) -> None:
    """`shape` is one input's: channels, height, width."""
    net.eval()
    torch.onnx.export(
        net,
        (torch.zeros(2, *shape),),
        path,
        input_names=["input"],
        output_names=["logits"],
        opset_version=OPSET,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    without_traces(path)
    check(net, shape, path)


def without_traces(path: Path) -> None:
    """The exporter notes source files and lines at every node: they name the machine, and change from one to the next."""
    model = onnx.load(path)
    graph = model.graph
    for item in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        item.ClearField("metadata_props")
        item.ClearField("doc_string")
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def check(net: nn.Module, shape: tuple[int, int, int], path: Path) -> None:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 5):
        x = torch.rand(batch, *shape, generator=torch.Generator().manual_seed(batch)) * 2 - 1
        with torch.no_grad():
            expected = net(x).numpy()
        (found,) = session.run(None, {"input": x.numpy()})
        difference = float(np.abs(found - expected).max())
        print(f"{path.name}: batch {batch}, output {found.shape}, largest difference from PyTorch {difference:.1e}")
        if difference > TOLERANCE:
            raise SystemExit(f"{path}: differs from PyTorch by {difference:.1e}, more than {TOLERANCE:.0e}")
    print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB, {sum(p.numel() for p in net.parameters())} parameters")
