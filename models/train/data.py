"""The labelled cells, read straight from their zip, and training windows cut from them.

120 H&E images of breast at 0.5 µm/px. `SPLIT/images/NAME.jpg` is the picture, `SPLIT/cellmask/NAME.png`
draws every labelled cell as a disc of its class (0 = background), `cells.csv` lists the centres.
A patient is the first 12 characters of a name (the TCGA barcode).
"""

import csv
import io
import math
import zipfile
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

CELL_CLASSES = ("lymphocyte", "tumour-epithelial", "stroma")  # labels 1, 2, 3
PADDED = 512  # images are 328 to 505 px; stored mirrored to one size
DISC_AREA_PX = 129  # pixels of one cell's disc in `cellmask`


@dataclass
class Split:
    names: list[str]
    images: torch.Tensor  # uint8 [n, 3, PADDED, PADDED], RGB
    masks: torch.Tensor  # uint8 [n, PADDED, PADDED], 0 = background, 1 to 3 = CELL_CLASSES
    sizes: torch.Tensor  # int64 [n, 2], height and width before padding
    cells: list[np.ndarray]  # per image int [k, 3]: y, x, class 1 to 3

    @property
    def patients(self) -> list[str]:
        return [name[:12] for name in self.names]

    def picture(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Image `i` without padding: RGB uint8 [h, w, 3] and its mask [h, w]."""
        h, w = self.sizes[i].tolist()
        image = self.images[i, :, :h, :w].permute(1, 2, 0).cpu().numpy()
        return image, self.masks[i, :h, :w].cpu().numpy()


def load(zip_path: str, split: str, device: str = "cpu") -> Split:
    with zipfile.ZipFile(zip_path) as archive:
        members = archive.namelist()
        root = next(m for m in members if m.endswith("cells.csv"))[: -len("cells.csv")]
        cells = defaultdict(list)
        for row in csv.DictReader(io.StringIO(archive.read(root + "cells.csv").decode())):
            cells[row["image"]].append((int(row["y"]), int(row["x"]), int(row["class"])))
        folder = f"{root}{split}/images/"
        names = sorted(m[len(folder) : -len(".jpg")] for m in members if m.startswith(folder) and m.endswith(".jpg"))
        images, masks, sizes = [], [], []
        for name in names:
            image = np.array(Image.open(archive.open(f"{folder}{name}.jpg")).convert("RGB"))
            mask = np.array(Image.open(archive.open(f"{root}{split}/cellmask/{name}.png")))
            pad = [(0, PADDED - image.shape[0]), (0, PADDED - image.shape[1])]
            images.append(np.pad(image, [*pad, (0, 0)], mode="symmetric").transpose(2, 0, 1))
            masks.append(np.pad(mask, pad, mode="symmetric"))
            sizes.append(mask.shape)
    return Split(
        names=names,
        images=torch.from_numpy(np.stack(images)).to(device),
        masks=torch.from_numpy(np.stack(masks)).to(device),
        sizes=torch.tensor(sizes, device=device),
        cells=[np.array(cells[name]).reshape(-1, 3) for name in names],
    )


def draw(split: Split, n: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`n` random windows of `size` px, turned, mirrored and scaled, the three cell classes in balance.

    Four times as many windows are proposed; those with rare classes are likelier to be kept.
    Returns RGB in 0..1 `[n, 3, size, size]` and labels `[n, size, size]`.
    """
    step = size // 24  # a coarse raster is enough to count a proposal's cells
    image_index, turn, centre = _propose(split, 4 * n, size)
    labels = _labels(split, image_index, _positions(turn, centre, size, step))
    share = step**2 * cell_counts(labels)
    share = share / share.sum(1, keepdim=True).clamp_min(1.0)
    weight = (share / share.mean(0).clamp_min(1e-3)).sum(1) + 0.3
    kept = torch.multinomial(weight, n)
    xy = _positions(turn[kept], centre[kept], size)
    return _bilinear(split.images, image_index[kept], xy), _labels(split, image_index[kept], xy)


def cell_counts(labels: torch.Tensor) -> torch.Tensor:
    """Cells of each class in `labels` `[n, h, w]`, from the area of their discs: float `[n, 3]`."""
    return torch.stack([(labels == k).sum((1, 2)) for k in (1, 2, 3)], 1) / DISC_AREA_PX


def _propose(split: Split, n: int, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images, turns (with mirror and scale) `[n, 2, 2]` and centres `[n, 2]` of random windows."""
    device = split.images.device
    image_index = torch.randint(len(split.names), (n,), device=device)
    scale = torch.exp((torch.rand(n, device=device) - 0.5) * 0.5)  # 0.78 to 1.28
    angle = torch.randint(4, (n,), device=device) * (math.pi / 2) + (torch.rand(n, device=device) - 0.5) * 0.5
    mirror = torch.randint(2, (n,), device=device) * 2 - 1
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    turn = torch.stack([torch.stack([cos * mirror, -sin], 1), torch.stack([sin * mirror, cos], 1)], 1)
    extent = split.sizes[image_index].flip(1).float()  # width, height
    margin = (size / 2 * scale).unsqueeze(1)
    centre = margin + torch.rand(n, 2, device=device) * (extent - 2 * margin).clamp_min(0)
    return image_index, turn, centre


def _positions(turn: torch.Tensor, centre: torch.Tensor, size: int, step: int = 1) -> torch.Tensor:
    """Where in its image each `step`-th pixel of a window lies: x, y `[n, size/step, size/step, 2]`.

    Corners of a turned window may leave the image: they are folded back in.
    """
    line = torch.arange(0, size, step, device=turn.device) + (step - size) / 2
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), 2)
    xy = torch.einsum("nij,hwj->nhwi", turn, grid) + centre.view(-1, 1, 1, 2) - 0.5
    last = PADDED - 1
    return (last - (last - xy.abs()).abs()).clamp(0, last)


def _labels(split: Split, image_index: torch.Tensor, xy: torch.Tensor) -> torch.Tensor:
    x, y = xy.round().long().unbind(-1)
    return split.masks[image_index.view(-1, 1, 1), y, x].long()


def _bilinear(images: torch.Tensor, image_index: torch.Tensor, xy: torch.Tensor) -> torch.Tensor:
    low = xy.floor().clamp(0, PADDED - 2)
    fx, fy = (xy - low).unbind(-1)
    x, y = low.long().unbind(-1)
    at = image_index.view(-1, 1, 1)
    planes = images.permute(0, 2, 3, 1)  # a view with the channel last
    top = torch.lerp(planes[at, y, x].float(), planes[at, y, x + 1].float(), fx.unsqueeze(-1))
    bottom = torch.lerp(planes[at, y + 1, x].float(), planes[at, y + 1, x + 1].float(), fx.unsqueeze(-1))
    return torch.lerp(top, bottom, fy.unsqueeze(-1)).permute(0, 3, 1, 2) / 255
