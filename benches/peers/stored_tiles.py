#!/usr/bin/env python3
"""Writes the JPEGs of a slide that a list of tiles touches, each once, row by row, for examples/decode_jpegs.rs.

    stored_tiles.py SLIDE TILES.csv SIZE OUT

TILES.csv is that of read_tiles.py. Each JPEG is whole, with the tables of its TIFF, behind its length (four bytes, the lowest
first) and a byte that is 1 if its components are R, G and B.
"""
import csv
import struct
import sys

import tifffile

slide, size, out = sys.argv[1], int(sys.argv[3]), sys.argv[4]
with open(sys.argv[2], newline="") as file:
    corners = [(int(x), int(y)) for x, y in csv.reader(file)]
with tifffile.TiffFile(slide) as tiff, open(out, "wb") as jpegs:
    page = tiff.pages[0]
    if page.compression != 7:
        sys.exit(f"stored_tiles.py: {slide} has no JPEG tiles")
    is_rgb = page.photometric == 2
    tables = page.jpegtables[2:-2] if page.jpegtables else b""
    across = -(-page.imagewidth // page.tilewidth)
    touched = {(row, column) for x, y in corners
               for row in range(y // page.tilelength, (y + size - 1) // page.tilelength + 1)
               for column in range(x // page.tilewidth, (x + size - 1) // page.tilewidth + 1)}
    for row, column in sorted(touched):
        index = row * across + column
        tiff.filehandle.seek(page.dataoffsets[index])
        stored = tiff.filehandle.read(page.databytecounts[index])
        jpeg = stored[:2] + tables + stored[2:]
        jpegs.write(struct.pack("<IB", len(jpeg), is_rgb) + jpeg)
