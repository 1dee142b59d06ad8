"""What the engine should do, written once more with other means: OpenSlide's Python, Pillow, NumPy in 64 bits."""

import numpy as np
import onnxruntime
from PIL import Image


def region(slide, corner, level, size):
    """Pixels of a level over the background, `[height, width, 3]`; the corner may lie outside."""
    pixels = slide.read_region(corner, level, size)
    background = "#" + slide.properties.get("openslide.background-color", "ffffff")
    return np.asarray(Image.alpha_composite(Image.new("RGBA", pixels.size, background), pixels).convert("RGB"))


def tiles(slide, rects, side):
    """Tiles of level 0 at the corners of a tile table."""
    return [region(slide, (int(x), int(y)), 0, (side, side)) for x, y, *_ in rects]


def resampled(slide, corner, factor, side):
    """A tile of `side` pixels, each of `factor` level-0 pixels, from an exact corner: Pillow's bicubic filter.

    Pillow filters rows first, the engine columns. Between the two, values are cut off at 0 and 255, which shows where
    the filter overshoots; so Pillow is given the picture on its side.
    """
    margin = int(np.ceil(2 * factor)) + 2
    left, top = (int(np.floor(value)) - margin for value in corner)
    extent = int(np.ceil(side * factor)) + 2 * margin + 1
    on_its_side = region(slide, (left, top), 0, (extent, extent)).transpose(1, 0, 2)
    x, y = corner[0] - left, corner[1] - top
    box = (y, x, y + side * factor, x + side * factor)
    source = Image.fromarray(np.ascontiguousarray(on_its_side))
    return np.asarray(source.resize((side, side), Image.Resampling.BICUBIC, box=box)).transpose(1, 0, 2)


def normalised(tiles, mean, std):
    """Tiles `[n, height, width, 3]` as models take them, `[n, 3, height, width]`."""
    return ((np.asarray(tiles) / 255 - mean) / std).transpose(0, 3, 1, 2).astype(np.float32)


def scores(model, batch):
    """What the model at that path says of a batch."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: batch})[0]


def softmax(scores):
    """Probabilities of `scores` along axis 1."""
    powers = np.exp(scores.astype(np.float64) - scores.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def blend_window(side, overlap):
    """Weights along one axis of a tile: a raised cosine over what it shares with its neighbours."""
    from_edge = np.minimum(np.arange(side), np.arange(side)[::-1])
    ramp = min(overlap, side // 2)
    cosine = (1 - np.cos(np.pi * (from_edge + 0.5) / max(ramp, 1))) / 2
    return np.where(from_edge < ramp, cosine, 1.0)


def stitched(corners, maps, shape, window):
    """The mean of `maps` `[tile, class, side, side]` at `corners` (x, y), weighted by `window` along both axes."""
    height, width = shape
    sums, weights = np.zeros((maps.shape[1], height, width)), np.zeros((height, width))
    for (x, y), one in zip(corners, maps):
        bottom, right = min(len(window), height - y), min(len(window), width - x)
        weight = np.outer(window[:bottom], window[:right])
        sums[:, y : y + bottom, x : x + right] += weight * one[:, :bottom, :right]
        weights[y : y + bottom, x : x + right] += weight
    return sums / weights


def halved_by_mean(level):
    """Every 2 × 2 pixels' mean, halves up; a last odd row or column by itself."""
    blocks = blocks_of(level).astype(np.int64)
    return ((blocks.sum(axis=-1) + 2) // 4).astype(np.uint8)


def halved_by_mode(level):
    """Every 2 × 2 pixels' commonest value, on a tie the first in reading order."""
    blocks = blocks_of(level)
    counts = (blocks[..., :, None] == blocks[..., None, :]).sum(axis=-1)
    return np.take_along_axis(blocks, counts.argmax(axis=-1)[..., None], axis=-1)[..., 0]


def blocks_of(level):
    """`[height / 2, width / 2, 4]`; an odd edge is repeated, which changes neither mean nor mode."""
    level = np.pad(level, [(0, side % 2) for side in level.shape], mode="edge")
    return np.stack([level[y::2, x::2] for y in (0, 1) for x in (0, 1)], axis=-1)
