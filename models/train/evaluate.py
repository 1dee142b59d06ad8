"""Held-out figures of the exported models, with 95 % intervals from a bootstrap over patients.

    python evaluate.py --data brca_m2c_cells_bsd3.zip --models .. [--split test] [--json metrics.json]

UNet: 256 px tiles overlapping by 64 px, probabilities averaged; Dice over all pixels of the split together,
and the class at each labelled cell's centre. ViT: 96 px tiles on a grid from the image's corner, those with
at least 3 cells of which at least 60 % are of one class. Each model stands beside trivial baselines.
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import data
from data import CELL_CLASSES, Split

Predict = Callable[[np.ndarray], np.ndarray]  # RGB uint8 [n, size, size, 3] to logits [n, classes, ...]
DRAWS = 2000


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def prepare(tiles: np.ndarray) -> np.ndarray:
    return (tiles.transpose(0, 3, 1, 2).astype(np.float32) / 255 - 0.5) / 0.5


# --- Segmentation ---------------------------------------------------------------------------------


def class_probabilities(predict: Predict, image: np.ndarray, tile: int = 256, overlap: int = 64) -> np.ndarray:
    """Mean probability of every class over the tiles that cover a pixel: `[classes, h, w]`."""
    h, w, _ = image.shape
    corners = [(y, x) for y in _starts(h, tile, tile - overlap) for x in _starts(w, tile, tile - overlap)]
    logits = predict(np.stack([image[y : y + tile, x : x + tile] for y, x in corners]))
    total, count = np.zeros((logits.shape[1], h, w), np.float32), np.zeros((h, w), np.float32)
    for (y, x), p in zip(corners, softmax(logits)):
        total[:, y : y + tile, x : x + tile] += p
        count[y : y + tile, x : x + tile] += 1
    return total / count


def _starts(length: int, tile: int, stride: int) -> list[int]:
    return [*range(0, length - tile, stride), length - tile]


def overlaps(predicted: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Per cell class: pixels in both, predicted, labelled. `[3, 3]`."""
    return np.array([[((predicted == k) & (mask == k)).sum(), (predicted == k).sum(), (mask == k).sum()] for k in (1, 2, 3)])


def dice(counts: np.ndarray) -> np.ndarray:
    """From `overlaps` of several images `[images, 3, 3]`: per class and their mean."""
    both, predicted, labelled = counts.sum(0).T
    per_class = 2 * both / np.maximum(predicted + labelled, 1)
    return np.append(per_class, per_class.mean())


def segment(predict: Predict, split: Split) -> tuple[np.ndarray, list[np.ndarray]]:
    """Per image: `overlaps`, and the class probabilities at its cells' centres `[cells, 4]`."""
    counts, at_cells = [], []
    for i in range(len(split.names)):
        image, mask = split.picture(i)
        p = class_probabilities(predict, image)
        counts.append(overlaps(p.argmax(0), mask))
        y, x, _ = split.cells[i].T
        at_cells.append(p[:, y, x].T)
    return np.stack(counts), at_cells


# --- Classification -------------------------------------------------------------------------------


def labelled_tiles(split: Split, stride: int = 96, size: int = 96) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tiles, their dominant class (0 to 2) and the index of the image of each."""
    tiles, classes, images = [], [], []
    for i in range(len(split.names)):
        image, _ = split.picture(i)
        cy, cx, cell_class = split.cells[i].T
        for y in range(0, image.shape[0] - size + 1, stride):
            for x in range(0, image.shape[1] - size + 1, stride):
                inside = (cy >= y) & (cy < y + size) & (cx >= x) & (cx < x + size)
                if inside.sum() < 3:
                    continue
                top, n = Counter(cell_class[inside].tolist()).most_common(1)[0]
                if n >= 0.6 * inside.sum():
                    tiles.append(image[y : y + size, x : x + size])
                    classes.append(top - 1)
                    images.append(i)
    return np.stack(tiles), np.array(classes), np.array(images)


def recalls(predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Per cell class and their mean, which is the balanced accuracy."""
    per_class = np.array([(predicted[truth == k] == k).mean() if (truth == k).any() else np.nan for k in range(3)])
    return np.append(per_class, np.nanmean(per_class))


def aucs(scores: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """One class against the others; and their mean."""
    per_class = [roc_auc_score(truth == k, scores[:, k]) if 0 < (truth == k).sum() < len(truth) else np.nan for k in range(3)]
    return np.append(per_class, np.nanmean(per_class))


def colour_features(tiles: np.ndarray) -> np.ndarray:
    flat = tiles.reshape(len(tiles), -1, 3) / 255.0
    return np.concatenate([flat.mean(1), flat.std(1)], 1)


# --- Bootstrap ------------------------------------------------------------------------------------


def interval(split: Split, statistic: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """`statistic` takes indices of images; patients are drawn with replacement. `[figures, 3]`: value, low, high."""
    patients = np.array(split.patients)
    groups = [np.flatnonzero(patients == p) for p in sorted(set(patients))]
    rng = np.random.default_rng(0)
    draws = [statistic(np.concatenate([groups[g] for g in rng.integers(len(groups), size=len(groups))])) for _ in range(DRAWS)]
    low, high = np.nanpercentile(np.stack(draws), [2.5, 97.5], axis=0)
    return np.stack([statistic(np.arange(len(patients))), low, high], 1)


def named(figures: np.ndarray, last: str) -> dict[str, list[float]]:
    return {name: [round(float(v), 3) for v in row] for name, row in zip((*CELL_CLASSES, last), figures)}


def rows_of(images: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Indices of the rows (tiles or cells) of the drawn images, again for an image drawn twice."""
    rows = [np.flatnonzero(images == i) for i in range(images.max() + 1)]
    empty = np.zeros(0, int)
    return lambda drawn: np.concatenate([rows[i] if i < len(rows) else empty for i in drawn])


# --- Reports --------------------------------------------------------------------------------------


def haematoxylin(image: np.ndarray) -> np.ndarray:
    """Optical density of red light, which haematoxylin takes and eosin hardly does."""
    return -np.log(np.maximum(image[..., 0], 1) / 255.0)


def unet_report(predict: Predict, train: Split, split: Split) -> dict:
    counts, at_cells = segment(predict, split)
    truth = np.concatenate([c[:, 2] - 1 for c in split.cells])
    scores = np.concatenate(at_cells)[:, 1:]
    select = rows_of(np.concatenate([np.full(len(c), i) for i, c in enumerate(split.cells)]))

    # Baseline: every pixel dark with haematoxylin is tumour-epithelial; the threshold is fitted on the training images.
    def dark(s: Split, threshold: float) -> np.ndarray:
        return np.stack([overlaps((haematoxylin(image) > threshold) * 2, mask) for image, mask in map(s.picture, range(len(s.names)))])

    threshold = max(np.arange(0.2, 1.5, 0.1), key=lambda t: dice(dark(train, t))[1])
    baseline = dark(split, threshold)
    return {
        "test_images": len(split.names),
        "test_patients": len(set(split.patients)),
        "test_cells": len(truth),
        "dice": named(interval(split, lambda i: dice(counts[i])), "mean"),
        "recall_at_cells": named(
            interval(split, lambda i: recalls(scores[select(i)].argmax(1), truth[select(i)])), "balanced_accuracy"
        ),
        "auc_at_cells": named(interval(split, lambda i: aucs(scores[select(i)], truth[select(i)])), "mean"),
        "baseline": {
            "method": f"pixels with red optical density above {threshold:.1f} are tumour-epithelial",
            "dice": named(interval(split, lambda i: dice(baseline[i])), "mean"),
        },
    }


def vit_report(predict: Predict, train: Split, split: Split) -> dict:
    tiles, truth, images = labelled_tiles(split)
    p = softmax(predict(tiles))
    select = rows_of(images)
    predicted = p.argmax(1)  # the fourth class, glass, is wrong on every one of these tiles

    train_tiles, train_truth, _ = labelled_tiles(train)
    colour = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=2000))
    colour.fit(colour_features(train_tiles), train_truth)
    colour_p = colour.predict_proba(colour_features(tiles))

    def report(p: np.ndarray, predicted: np.ndarray) -> dict:
        return {
            "recall": named(interval(split, lambda i: recalls(predicted[select(i)], truth[select(i)])), "balanced_accuracy"),
            "auc": named(interval(split, lambda i: aucs(p[select(i)], truth[select(i)])), "mean"),
        }

    return {
        "test_images": len(split.names),
        "test_patients": len(set(split.patients)),
        "test_tiles": {name: int((truth == k).sum()) for k, name in enumerate(CELL_CLASSES)},
        "called_glass": int((predicted == 3).sum()),
        **report(p[:, :3], predicted),
        "baseline": {
            "majority_balanced_accuracy": 0.333,
            "method": "logistic regression on the mean and spread of each colour channel",
            **report(colour_p, colour_p.argmax(1)),
        },
    }


def onnx_predict(path: str) -> Predict:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda tiles: np.concatenate(
        [session.run(None, {"input": prepare(tiles[i : i + 8])})[0] for i in range(0, len(tiles), 8)]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--models", default="..", help="folder that holds cells-unet/ and cells-vit/")
    parser.add_argument("--split", default="test")
    parser.add_argument("--json")
    args = parser.parse_args()
    train, split = data.load(args.data, "train"), data.load(args.data, args.split)
    report = {
        "cells-unet": unet_report(onnx_predict(f"{args.models}/cells-unet/cells-unet.onnx"), train, split),
        "cells-vit": vit_report(onnx_predict(f"{args.models}/cells-vit/cells-vit.onnx"), train, split),
    }
    text = json.dumps(report, indent=1)
    print(text)
    if args.json:
        with open(args.json, "w") as out:
            out.write(text + "\n")


if __name__ == "__main__":
    main()
