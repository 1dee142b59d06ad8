"""Makes coords_clam.h5 and coords_trident.h5, laid out as those tools write them. Needs h5py and numpy.

CLAM extends a chunked dataset patch by patch; TRIDENT writes one chunked, resizable dataset. Run it in this folder.
"""

import h5py
import numpy as np

with h5py.File("coords_clam.h5", "w") as file:
    points = np.array([(1000 + 512 * index, 2048) for index in range(5)])
    coords = file.create_dataset("coords", shape=(1, 2), maxshape=(None, 2), chunks=(1, 2), dtype=np.int32)
    coords[:] = points[:1]
    coords.resize(5, axis=0)
    coords[1:] = points[1:]
    coords.attrs["patch_size"] = 256
    coords.attrs["patch_level"] = 1
    coords.attrs["downsample"] = (4.0, 4.0)
    coords.attrs["downsampled_level_dim"] = (2000, 1000)
    coords.attrs["level_dim"] = (2000, 1000)
    coords.attrs["name"] = "slide"
    coords.attrs["save_path"] = "patches"

with h5py.File("coords_trident.h5", "w") as file:
    points = np.array([(0, 0), (448, 0), (0, 448)], dtype=np.int64)
    coords = file.create_dataset("coords", data=points, maxshape=(None, 2), chunks=True, compression="gzip")
    coords.attrs["patch_size"] = 224
    coords.attrs["patch_size_level0"] = np.int64(448)
    coords.attrs["level0_magnification"] = 40
    coords.attrs["target_magnification"] = 20.0
    coords.attrs["overlap"] = 0
    coords.attrs["name"] = "slide"
    coords.attrs["savetodir"] = "coords"
    coords.attrs["level0_width"] = 40000
    coords.attrs["level0_height"] = 30000
