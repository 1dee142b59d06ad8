#!/usr/bin/env bash
# Holds the results of slidestream against other programs: OpenSlide's and ONNX Runtime's Python, h5py, shapely, scikit-learn, NumPy.
# The first call makes the virtual environment out of pinned packages from PyPI (474 MB on the disk). SLIDESTREAM names another
# binary than that of the dev profile; what else is given goes to pytest.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
requirements=$here/requirements.txt
venv=$here/.venv

if ! cmp -s "$requirements" "$venv/requirements.txt"; then
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "tests/conformance/run.sh: the packages need Python 3.11 or newer; python3 is older" >&2; exit 1; }
  echo "tests/conformance/run.sh: fetching the Python packages (once)" >&2
  work=$(mktemp -d "$here/.venv.XXXXXX")
  trap 'rm -rf "$work"' EXIT
  python3 -m venv "$work" ||
    { echo "tests/conformance/run.sh: python3 can't make a virtual environment (on Debian: python3-venv)" >&2; exit 1; }
  # Every package is named with its version, so none may bring others along.
  "$work/bin/python" -m pip install --quiet --disable-pip-version-check --no-input --no-deps --only-binary=:all: \
    --requirement "$requirements" ||
    { echo "tests/conformance/run.sh: the packages of $requirements can't be installed" >&2; exit 1; }
  cp "$requirements" "$work/requirements.txt"
  rm -rf "$venv"
  mv "$work" "$venv"
fi

if [ -z "${SLIDESTREAM:-}" ]; then
  (cd "$root" && cargo build --locked --quiet)
  SLIDESTREAM=${CARGO_TARGET_DIR:-$root/target}/debug/slidestream
fi
export SLIDESTREAM
cd "$root"
exec "$venv/bin/python" -m pytest -q -p no:cacheprovider --tb=short "$here" "$@" </dev/null
