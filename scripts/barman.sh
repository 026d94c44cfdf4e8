#!/bin/bash
# barman.sh: prints the folder of the programs of the Barman that tests compare with, installed once into the user's cache.
set -euo pipefail

barman='barman[cloud,zstandard,lz4,snappy]==3.19.1'
kept=$HOME/.cache/archiver/barman-3.19.1

cd "$(dirname "$0")/.."
if ! "$kept/bin/barman" --version >/dev/null 2>&1; then
    scripts/requirements.sh python3-venv
    echo "barman: installing $barman, once" >&2
    rm -rf "$kept" # not whole, or its Python is gone
    trap 'rm -rf "$kept"' EXIT
    python3 -m venv "$kept" >&2
    "$kept/bin/pip" install -q --disable-pip-version-check "$barman" >&2
    trap - EXIT
fi
echo "$kept/bin"
