"""Writes the held-out images with their labels, for `slidestream compare --data`.

    python labelled.py --data brca_m2c_cells_bsd3.zip --out labelled [--split test]

`OUT/tiles.csv` (columns image,label,group) lists the tiles that evaluate.py holds cells-vit against, `OUT/masks.csv`
(image,mask,group) the images and class maps for cells-unet. A group is a patient.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
from PIL import Image

import data
from data import CELL_CLASSES, Split
from evaluate import labelled_tiles


def write_tiles(split: Split, out: Path) -> int:
    tiles, classes, images = labelled_tiles(split)
    rows = []
    for index, (tile, label, image) in enumerate(zip(tiles, classes, images)):
        name = save(tile, out, f"tiles/{index:04}.png")
        rows.append((name, CELL_CLASSES[label], split.patients[image]))
    write_table(out / "tiles.csv", ("image", "label", "group"), rows)
    return len(rows)


def write_masks(split: Split, out: Path) -> int:
    rows = []
    for index, name in enumerate(split.names):
        image, mask = split.picture(index)
        pair = save(image, out, f"images/{name}.png"), save(mask, out, f"masks/{name}.png")
        rows.append((*pair, split.patients[index]))
    write_table(out / "masks.csv", ("image", "mask", "group"), rows)
    return len(rows)


def save(pixels: np.ndarray, out: Path, name: str) -> str:
    path = out / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return name


def write_table(path: Path, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    with open(path, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(columns)
        table.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--split", default="test")
    args = parser.parse_args()
    split = data.load(args.data, args.split)
    print(f"{write_tiles(split, args.out)} tiles and {write_masks(split, args.out)} images in {args.out}")


if __name__ == "__main__":
    main()
