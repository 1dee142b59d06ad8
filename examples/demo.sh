#!/usr/bin/env bash
# Runs the committed cell model over a real slide and says what to look at. `make demo` builds first.
set -euo pipefail
cd "$(dirname "$0")/.."
out=demo-out

# The slide, CMU-1-Small-Region.svs (CC0), lies in the package of the crate openslide-rs, which cargo has downloaded.
slide=$(cargo metadata --format-version 1 --locked | python3 -c '
import json, os, sys
package = next(p for p in json.load(sys.stdin)["packages"] if p["name"] == "openslide-rs")
print(os.path.join(os.path.dirname(package["manifest_path"]), "tests", "assets", "default.svs"))')

mkdir -p "$out"
printf 'slide,id\n%s,CMU-1-Small-Region\n' "$slide" >"$out/slides.csv"
target/release/slidestream run "$out/slides.csv" --model models/cells-unet --out "$out"

cat <<TEXT

Look first at
  $out/overlays/CMU-1-Small-Region.png         the cells that the model found, over the slide
  $out/masks/CMU-1-Small-Region.png            what was taken for tissue
then at
  $out/regions/CMU-1-Small-Region.geojson      the same as polygons, for QuPath
  $out/heatmaps/CMU-1-Small-Region.*.tif       probabilities, for QuPath, ASAP or OpenSlide
  $out/model-outputs-csv/CMU-1-Small-Region.csv  one row per tile
  $out/slides/CMU-1-Small-Region.json          exactly what was done
TEXT
