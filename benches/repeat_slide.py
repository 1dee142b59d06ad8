#!/usr/bin/env python3
"""Makes a larger slide out of a tiled SVS by repeating it N times each way; the data of its tiles is copied, not decoded.

    benches/repeat_slide.py SLIDE OUT N

Needs tifffile and imagecodecs. Every level of SLIDE must be a whole number of tiles wide and high, as those of a mosaic can be made to be; what
is not tiled (thumbnail, label, macro) is left out.
"""
import re
import sys

import tifffile

source, out, times = sys.argv[1], sys.argv[2], int(sys.argv[3])


def repeated(tiff, page):
    """The data of the larger level's tiles, row by row."""
    across, down = page.imagewidth // page.tilewidth, page.imagelength // page.tilelength
    tiles = []
    for offset, count in zip(page.dataoffsets, page.databytecounts):
        tiff.filehandle.seek(offset)
        tiles.append(tiff.filehandle.read(count))
    for row in range(down * times):
        for column in range(across * times):
            yield tiles[row % down * across + column % across]


with tifffile.TiffFile(source) as tiff, tifffile.TiffWriter(out, bigtiff=True, byteorder="<") as made:
    for page in tiff.pages:
        if not page.is_tiled:
            continue
        if page.imagewidth % page.tilewidth or page.imagelength % page.tilelength:
            sys.exit(f"repeat_slide.py: the level of {page.imagewidth} x {page.imagelength} px of {source} is no whole number of tiles")
        height, width = page.imagelength * times, page.imagewidth * times
        description = re.sub(r"\d+x\d+", lambda size: "x".join(str(int(side) * times) for side in size[0].split("x")), page.description)
        description = description.replace(f"({page.tilewidth * times}x{page.tilelength * times})", f"({page.tilewidth}x{page.tilelength})")
        tables = [(347, 7, len(page.jpegtables), page.jpegtables, True)] if page.jpegtables else []
        subsampling = {"subsampling": page.subsampling} if page.photometric == 6 else {}
        made.write(repeated(tiff, page), shape=(height, width, 3), tile=(page.tilelength, page.tilewidth), dtype="uint8",
                   compression=page.compression, photometric=page.photometric, description=description, extratags=tables,
                   metadata=None, software=False, resolution=None, contiguous=False, **subsampling)
