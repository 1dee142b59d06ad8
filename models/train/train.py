"""Trains both models and exports them.

    python train.py --data brca_m2c_cells_bsd3.zip --out ..

Weights are the moving average that did best on the validation images; the test images are never read here.
"""

import argparse
import copy
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import evaluate
import export
from augment import augment
from data import Split
from nets import UNet, ViT

EMA = 0.999
# Background is most of every tile: weigh it down.
PIXEL_WEIGHTS = torch.tensor([1.0, 3.0, 2.0, 3.0])


class Segmentation:
    """The UNet: cross-entropy and soft Dice on every pixel."""

    name, size, batch, steps, lr = "cells-unet", 256, 16, 5_000, 2e-3

    def __init__(self, device: str):
        self.net = UNet().to(device, memory_format=torch.channels_last)
        self.trained = self.net

    def loss(self, tile: torch.Tensor, labels: torch.Tensor, covered: torch.Tensor) -> torch.Tensor:
        logits = self.net(tile).float()
        return pixel_loss(logits, labels) + dice_loss(logits, labels)

    def score(self, predict: evaluate.Predict, val: Split) -> float:
        """Mean Dice of the cell classes."""
        return evaluate.dice(evaluate.segment(predict, val)[0])[-1]


class Classification:
    """The ViT: the share of each class among the tile's cells.

    While training, each patch token also draws its patch's labels: 80 images are few for a transformer,
    and this tells it where the cells are. The drawing head is dropped afterwards.
    """

    name, size, batch, steps, lr = "cells-vit", 96, 256, 8_500, 1e-3

    def __init__(self, device: str):
        self.net = ViT().to(device)
        self.drawing = nn.Linear(192, 4 * 4 * 4).to(device)  # 4 classes on a 4 × 4 raster in each patch
        self.trained = nn.ModuleList([self.net, self.drawing])

    def loss(self, tile: torch.Tensor, labels: torch.Tensor, covered: torch.Tensor) -> torch.Tensor:
        target = tile_target(tile, labels, covered)
        tokens = self.net.tokens(tile)
        drawn = self.drawing(tokens[:, 1:]).float().unflatten(1, (12, 12)).unflatten(3, (4, 4, 4))
        drawn = drawn.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)  # [n, 4, 48, 48]
        logits = self.net.head(tokens[:, 0]).float()
        return F.cross_entropy(logits, target, label_smoothing=0.05) + 0.5 * pixel_loss(drawn, labels[:, ::2, ::2])

    def score(self, predict: evaluate.Predict, val: Split) -> float:
        """Balanced accuracy, on a grid twice as dense as the reported one."""
        tiles, truth, _ = evaluate.labelled_tiles(val, stride=48)
        return evaluate.recalls(predict(tiles).argmax(1), truth)[-1]


def pixel_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, labels, weight=PIXEL_WEIGHTS.to(logits), label_smoothing=0.02)


def dice_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    p = logits.softmax(1)[:, 1:]
    truth = torch.stack([labels == k for k in (1, 2, 3)], 1).float()
    both, total = (p * truth).sum((0, 2, 3)), (p + truth).sum((0, 2, 3))
    return 1 - ((2 * both + 1) / (total + 1)).mean()


def tile_target(tile: torch.Tensor, labels: torch.Tensor, covered: torch.Tensor) -> torch.Tensor:
    """Class shares `[n, 4]`: lymphocyte, tumour-epithelial, stroma, glass.

    Without a cell in it, a tile is glass if most of it is covered or white (slide, fat, lumen), else stroma:
    the training images' tissue without cells is collagen.
    """
    cells = data.cell_counts(labels)
    count = cells.sum(1, keepdim=True)
    white = (tile.amin(1) > 0.6).float().mean((1, 2))  # of a tile in -1..1: above 0.8 of full scale
    is_glass = (covered.float().mean((1, 2)) > 0.5) | (white > 0.6)
    without_cells = F.one_hot(torch.where(is_glass, 3, 2), 4).float()
    with_cells = F.pad(cells / count.clamp_min(1e-6), (0, 1))
    return torch.where(count >= 0.7, with_cells, without_cells)


def torch_predict(net: nn.Module, device: str) -> evaluate.Predict:
    @torch.no_grad()
    def predict(tiles: np.ndarray) -> np.ndarray:
        batches = torch.from_numpy(evaluate.prepare(tiles)).split(64)
        return torch.cat([net(batch.to(device)).float().cpu() for batch in batches]).numpy()

    return predict


class Budget:
    """Steps, and minutes if a limit is set: the learning rate follows whichever runs out first."""

    def __init__(self, steps: int, minutes: float | None):
        self.step, self.steps = 0, steps
        self.started, self.secs = time.time(), 60 * (minutes or math.inf)

    def spend_step(self) -> float:
        """The share of the budget that is spent, 1 at the last step."""
        self.step += 1
        return min(1, max(self.step / self.steps, (time.time() - self.started) / self.secs))

    def __str__(self) -> str:
        return f"step {self.step} of {self.steps}, {time.time() - self.started:.0f} s"


def fit(task: Segmentation | Classification, train: Split, val: Split, budget: Budget, device: str) -> nn.Module:
    average = copy.deepcopy(task.trained).eval()
    shown = average[0] if isinstance(average, nn.ModuleList) else average
    best, best_score = copy.deepcopy(shown), -1.0
    optimizer = adamw(task.trained, task.lr, device)
    losses, done, rounds = [], 0.0, 0
    while done < 1:
        done = budget.spend_step()
        for group in optimizer.param_groups:
            group["lr"] = task.lr * min(1, done / 0.05) * (0.5 + 0.5 * math.cos(math.pi * done))
        task.trained.train()
        tile, labels, covered = augment(*data.draw(train, task.batch, task.size))
        tile = ((tile - 0.5) / 0.5).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = task.loss(tile, labels, covered)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(task.trained.parameters(), 1.0)
        optimizer.step()
        update_average(average, task.trained, min(EMA, budget.step / (budget.step + 10)))
        losses.append(loss.detach())
        if int(done * 20) > rounds or done == 1:
            rounds = int(done * 20)
            score = task.score(torch_predict(shown, device), val)
            mean_loss = torch.stack(losses).mean().item()
            print(f"{task.name} {budget} loss {mean_loss:.4f} val {score:.4f}", flush=True)
            losses = []
            if score > best_score:
                best, best_score = copy.deepcopy(shown), score
    print(f"{task.name} best val {best_score:.4f}", flush=True)
    return best


def adamw(net: nn.Module, lr: float, device: str) -> torch.optim.AdamW:
    """No decay of biases and norms."""
    decayed = [p for p in net.parameters() if p.ndim > 1]
    others = [p for p in net.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, fused=device == "cuda")


@torch.no_grad()
def update_average(average: nn.Module, net: nn.Module, decay: float) -> None:
    for ours, theirs in zip(average.state_dict().values(), net.state_dict().values()):
        if ours.is_floating_point():
            ours.lerp_(theirs, 1 - decay)
        else:
            ours.copy_(theirs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="brca_m2c_cells_bsd3.zip")
    parser.add_argument("--out", default="..", help="receives cells-unet/ and cells-vit/")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--only", choices=["cells-unet", "cells-vit"])
    parser.add_argument("--steps", type=int, help="instead of each model's own number")
    parser.add_argument("--minutes", type=float, help="finish each model within this time, in fewer steps if need be")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.backends.cudnn.benchmark = True
    train, val = data.load(args.data, "train", args.device), data.load(args.data, "val")
    for task_class in (Segmentation, Classification):
        if args.only not in (None, task_class.name):
            continue
        torch.manual_seed(args.seed)
        task = task_class(args.device)
        net = fit(task, train, val, Budget(args.steps or task.steps, args.minutes), args.device)
        folder = Path(args.out) / task.name
        folder.mkdir(parents=True, exist_ok=True)
        export.to_onnx(net.cpu(), (3, task.size, task.size), folder / f"{task.name}.onnx")


if __name__ == "__main__":
    main()
