#!/usr/bin/env python3
"""WSInfer over a slide: `wsinfer run` with batches of 16, a loader process per core and `--speedup`.

    run_wsinfer.py SLIDE MODEL TILES.csv OUT

MODEL is the path of the model's files without their endings. WSInfer goes on from the patches that it finds: the list is
written as its own file of patches, by its own function, with an empty picture of the mask beside it. When it is loaded it
fetches the list of its model zoo, also for a model of one's own; that list is replaced by an empty one, so that it runs
without a network. Nothing else of it is changed.
"""
import os
import pathlib
import sys

import numpy as np
import wsinfer_zoo.client

from models import MPP
from tiles import read_places

wsinfer_zoo.client.load_registry = lambda *arguments, **options: wsinfer_zoo.client.ModelRegistry(models={})
from wsinfer.cli.cli import cli  # noqa: E402
from wsinfer.patchlib import save_hdf5  # noqa: E402

slide, model, out = pathlib.Path(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[4])
places = np.array(read_places(sys.argv[3]))
for folder in ("slides", "patches", "masks"):
    (out / folder).mkdir()
(out / "slides" / slide.name).symlink_to(slide)
save_hdf5(out / "patches" / f"{slide.stem}.h5", places[:, :2], int(places[0, 2]), MPP)
(out / "masks" / f"{slide.stem}.jpg").touch()
cli(["--backend", "openslide", "run", "--wsi-dir", str(out / "slides"), "--results-dir", str(out), "--config", model + ".json",
     "--model-path", model + ".pt", "--batch-size", "16", "--num-workers", str(len(os.sched_getaffinity(0))), "--speedup"])
