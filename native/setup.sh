#!/usr/bin/env bash
# Puts the two native libraries, ONNX Runtime and OpenSlide, into native/lib out of pinned PyPI wheels.
# Needs python3 with pip, nothing as root. Done once: a second call finds the stamp and says nothing.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
arch=$(uname -m)
[ "$(uname -s)" = Linux ] || { echo "native/setup.sh: the pinned wheels are for Linux; on $(uname -s) install ONNX Runtime and OpenSlide and set ORT_DYLIB_PATH and OPENSLIDE_LIBRARY" >&2; exit 1; }
requirements=$here/wheels-$arch.txt
[ -f "$requirements" ] || { echo "native/setup.sh: no pinned wheels for $arch; set ORT_DYLIB_PATH and OPENSLIDE_LIBRARY to libraries of your own" >&2; exit 1; }
stamp=$here/lib/.wheels.txt
cmp -s "$requirements" "$stamp" && exit 0

echo "native/setup.sh: fetching ONNX Runtime and OpenSlide (26 MB, once)" >&2
work=$(mktemp -d "$here/.setup.XXXXXX")
trap 'rm -rf "$work"' EXIT
# The platform tag is named, so that an old pip or an unusual Python still gets the pinned file; pip checks its hash.
python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --require-hashes \
  --python-version 3.12 --implementation cp --abi cp312 --abi none --platform "manylinux_2_28_$arch" \
  --dest "$work" --requirement "$requirements"
python3 - "$work" <<'PYTHON'
import glob, os, sys, zipfile
work = sys.argv[1]
os.mkdir(work + "/lib")
for wheel in glob.glob(work + "/*.whl"):
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            name = os.path.basename(member)
            if name.startswith("lib") and ".so" in name:
                with open(f"{work}/lib/{name}", "wb") as out:
                    out.write(archive.read(member))
            elif os.path.basename(member).upper().startswith(("LICENSE", "COPYING", "THIRDPARTY")):
                package = os.path.basename(wheel).split("-")[0]
                with open(f"{work}/lib/{package}.{name}", "wb") as out:
                    out.write(archive.read(member))
PYTHON
cp "$requirements" "$work/lib/.wheels.txt"
rm -rf "$here/lib"
mv "$work/lib" "$here/lib"
