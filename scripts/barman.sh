#!/bin/bash
# barman.sh: prints the folder of the programs of the Barman that tests compare with, installed once into the user's cache.
set -euo pipefail

barman='barman[cloud,zstandard,lz4,snappy]==3.19.1'
boto3='boto3==1.44.5' # speaks S3 for Barman; what it sends changes from one version to the next
kept=$HOME/.cache/archiver/barman-3.19.1-boto3-1.44.5

cd "$(dirname "$0")/.."
scripts/requirements.sh file # which Barman asks of each stored file
mkdir -p "${kept%/*}"
exec {lock}>"$kept.lock"
flock "$lock" # two at once would spoil each other's
if ! [[ -e $kept/whole ]] || ! "$kept/bin/barman" --version >/dev/null 2>&1; then
    # psycopg2 comes as source only.
    scripts/requirements.sh python3-venv python3-dev libpq-dev gcc libc6-dev
    echo "barman: installing $barman with $boto3, once" >&2
    rm -rf "$kept" # not whole, or its Python is gone
    python3 -m venv "$kept" >&2
    "$kept/bin/pip" install -q --disable-pip-version-check "$barman" "$boto3" >&2
    touch "$kept/whole"
fi
echo "$kept/bin"
