"""Runs both models over a small slide, as it is and with pen drawn on its glass, and counts what lights up there.

    python check_slide.py --slide CMU-1-Small-Region.svs --models .. --out /tmp/check

Needs `openslide-python` and `openslide-bin`. The slide's first level must be near 0.5 µm/px.
"""

import argparse
from pathlib import Path

import numpy as np
import openslide
from PIL import Image, ImageDraw, ImageFilter
from scipy import ndimage

import evaluate

COLOURS = np.array([[232, 232, 232], [33, 102, 172], [214, 48, 74], [232, 178, 26]], np.uint8)
# Points as shares of width and height, ink, width in px: lines on the glass left and right of the tissue.
# Training saw black, blue, green and red inks, never purple.
PENS = {
    "black": ([(0.02, 0.55), (0.16, 0.48), (0.06, 0.62), (0.14, 0.66)], (20, 20, 24), 40),
    "blue": ([(0.03, 0.72), (0.10, 0.70), (0.05, 0.80), (0.15, 0.78)], (25, 45, 150), 90),
    "green": ([(0.04, 0.90), (0.14, 0.92)], (10, 110, 80), 200),
    "red": ([(0.82, 0.05), (0.97, 0.12), (0.85, 0.14)], (190, 25, 45), 60),
    "thin blue": ([(0.75, 0.02), (0.97, 0.03)], (40, 80, 190), 12),
    "purple": ([(0.93, 0.27), (0.97, 0.75)], (60, 40, 130), 130),
}


def draw_pens(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Streaky, soft-edged, see-through lines. Returns the picture, and which pen inked a pixel (1 for the first)."""
    h, w, _ = image.shape
    rng = np.random.default_rng(0)
    pen_at, out = np.zeros((h, w), np.uint8), image / 255.0
    for number, (points, ink, width) in enumerate(PENS.values(), 1):
        line = Image.new("L", (w, h))
        ImageDraw.Draw(line).line([(x * w, y * h) for x, y in points], fill=255, width=width, joint="curve")
        alpha = np.asarray(line.filter(ImageFilter.GaussianBlur(3)), np.float32) / 255
        streaks = ndimage.gaussian_filter(rng.standard_normal((h, w)), (2, 25))
        alpha = np.clip(alpha * (0.85 + 0.15 * streaks / streaks.std()), 0, 1)[..., None]
        out = out * (1 - alpha * (1 - np.array(ink) / 255))
        pen_at[alpha[..., 0] > 0.3] = number
    return (out * 255).round().astype(np.uint8), pen_at


def find_glass(image: np.ndarray) -> np.ndarray:
    """Bright, colourless, and 8 px (4 µm) away from anything that is not."""
    smooth = ndimage.uniform_filter(image.astype(np.float32), (9, 9, 1))
    return ndimage.binary_erosion((smooth.min(2) > 220) & (np.ptp(smooth, axis=2) < 12), iterations=8)


def cells_on(image: np.ndarray, unet: evaluate.Predict) -> tuple[np.ndarray, np.ndarray]:
    """Whether each pixel is in a cell, and the picture with the cells coloured."""
    classes = evaluate.class_probabilities(unet, image).argmax(0)
    cell = classes > 0
    return cell, np.where(cell[..., None], image // 3 + COLOURS[classes] // 3 * 2, image)


def tissue_on(image: np.ndarray, vit: evaluate.Predict) -> tuple[np.ndarray, np.ndarray]:
    """Whether each tile is anything but glass, and the picture with the tiles coloured."""
    rows, columns = image.shape[0] // 96, image.shape[1] // 96
    image = image[: rows * 96, : columns * 96]
    tiles = image.reshape(rows, 96, columns, 96, 3).swapaxes(1, 2).reshape(-1, 96, 96, 3)
    classes = vit(tiles).argmax(1).reshape(rows, columns)
    colours = COLOURS[[1, 2, 3, 0]][classes].repeat(96, 0).repeat(96, 1)
    tissue = classes < 3
    return tissue, np.where(tissue.repeat(96, 0).repeat(96, 1)[..., None], image // 2 + colours // 2, image)


def tile_share(mask: np.ndarray) -> np.ndarray:
    """The share of each whole 96 px tile that `mask` covers."""
    rows, columns = mask.shape[0] // 96, mask.shape[1] // 96
    return mask[: rows * 96, : columns * 96].reshape(rows, 96, columns, 96).mean((1, 3))


def lit(hit: np.ndarray, of: np.ndarray) -> str:
    return f"{hit[of].sum()} of {of.sum()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slide", required=True)
    parser.add_argument("--models", default="..")
    parser.add_argument("--out", default=".")
    args = parser.parse_args()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    slide = openslide.OpenSlide(args.slide)
    image = np.array(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))
    glass = find_glass(image)
    penned, pen_at = draw_pens(image)
    unet = evaluate.onnx_predict(f"{args.models}/cells-unet/cells-unet.onnx")
    vit = evaluate.onnx_predict(f"{args.models}/cells-vit/cells-vit.onnx")
    for name, picture in (("plain", image), ("pen", penned)):
        cell, cells_drawn = cells_on(picture, unet)
        tissue, tissue_drawn = tissue_on(picture, vit)
        Image.fromarray(cells_drawn).save(out / f"{name}-unet.png")
        Image.fromarray(tissue_drawn).save(out / f"{name}-vit.png")
        if name == "plain":
            print(f"glass: cells on {lit(cell, glass)} px, tissue on {lit(tissue, tile_share(glass) > 0.95)} tiles")
            continue
        for number, pen in enumerate(PENS, 1):
            ink = glass & (pen_at == number)
            tiles = (tile_share(ink) > 0.2) & (tile_share(glass) > 0.95)
            print(f"{pen} pen: cells on {lit(cell, ink)} px, tissue on {lit(tissue, tiles)} tiles")


if __name__ == "__main__":
    main()
