"""The weights of a committed ONNX file, put back into the PyTorch module that it was exported from."""
import onnx
import torch
from onnx import numpy_helper
from torch import nn


def load_onnx(net, path):
    """Gives `net` the weights of the ONNX file that `models/train/export.py` made of it.

    The exporter keeps the names of weights but for two kinds: a matrix of a linear layer is stored transposed under
    another name, and found by the bias that is added to its product; a batch norm lies in the convolution before it, whose
    bias has its shift, and does nothing of its own here but to add that.
    """
    graph = onnx.load(path).graph
    stored = {item.name: torch.from_numpy(numpy_helper.to_array(item).copy()) for item in graph.initializer}
    product = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    for node in graph.node:
        if node.op_type == "Add" and node.input[1] in stored and node.input[0] in product:
            stored[node.input[1].removesuffix("bias") + "weight"] = stored[product[node.input[0]]].T
    for name, layer in net.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            folder, index = name.rsplit(".", 1)
            stored[f"{name}.weight"] = torch.full_like(layer.weight, (1 + layer.eps) ** 0.5)
            if (bias := f"{folder}.{int(index) - 1}.weight_bias") in stored:
                stored[f"{name}.bias"] = stored[bias]
    missing = [name for name, _ in net.named_parameters() if name not in stored]
    if missing:
        raise SystemExit(f"{path} has no {', '.join(missing)}")
    net.load_state_dict({name: stored.get(name, value) for name, value in net.state_dict().items()})
