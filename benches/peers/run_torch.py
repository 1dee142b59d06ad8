#!/usr/bin/env python3
"""PyTorch over a slide on a GPU, as one who knows it well writes it, in 16 bits.

    run_torch.py SLIDE MODEL TILES.csv OUT READER WORKERS eager|compile

A DataLoader of WORKERS processes reads the tiles, with openslide or cucim, into page-locked batches of bytes, from before
the model is loaded on; they are copied beside the computing and normalised on the device, and results are fetched at the
end. The last batch is filled up, so that nothing is compiled for its size. MODEL is the path of the weights without their
ending. OUT gets the table, and seconds.json: from the start of the program to the first batch of results, and from there to
the last.
"""
import json
import pathlib
import sys
import time

start = time.perf_counter()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402

from networks import build_vit  # noqa: E402
from tiles import read_places, table_of, write_table  # noqa: E402

BATCH, AHEAD = 256, 3
slide, model, out, reader, workers, mode = sys.argv[1], sys.argv[2], pathlib.Path(sys.argv[4]), *sys.argv[5:8]
places = read_places(sys.argv[3])
if reader == "openslide":
    import openslide
else:
    from cucim import CuImage


class Tiles(Dataset):
    """Tiles as tensors of bytes, `[row, column, channel]`."""

    def __init__(self):
        self.slide = None

    def __len__(self):
        return -(-len(places) // BATCH) * BATCH

    def __getitem__(self, index):
        x, y, width, height = places[min(index, len(places) - 1)]
        if reader == "openslide":
            self.slide = self.slide or openslide.OpenSlide(slide)
            return torch.from_numpy(np.asarray(self.slide.read_region((x, y), 0, (width, height)))[..., :3].copy())
        self.slide = self.slide or CuImage(slide)
        return torch.from_numpy(np.asarray(self.slide.read_region((x, y), (width, height), 0)))


loader = DataLoader(Tiles(), BATCH, num_workers=int(workers), pin_memory=True, prefetch_factor=AHEAD)
batches = iter(loader)
with torch.device("meta"):
    net = build_vit()
net.load_state_dict(torch.load(model + ".pth", weights_only=True), assign=True)
net = net.eval().half().cuda()
if mode == "compile":
    net = torch.compile(net)
results, copied = [], torch.cuda.Stream()
with torch.inference_mode():
    for batch in batches:
        with torch.cuda.stream(copied):
            pixels = batch.to("cuda", non_blocking=True)
        torch.cuda.current_stream().wait_stream(copied)
        pixels.record_stream(torch.cuda.current_stream())
        logits = net(pixels.permute(0, 3, 1, 2).half().div_(127.5).sub_(1))
        results.append(torch.softmax(logits.float(), 1))
        if len(results) == 1:
            torch.cuda.synchronize()
            first = time.perf_counter()
probabilities = torch.cat(results).cpu()[: len(places)].tolist()
end = time.perf_counter()
write_table(table_of(out, slide), places, probabilities)
(out / "seconds.json").write_text(json.dumps({"to_first_batch": first - start, "steady": end - first, "batch": BATCH}))
