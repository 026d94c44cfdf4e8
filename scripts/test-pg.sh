#!/bin/bash
# test-pg.sh BINDIR: runs the tests of pg_test/ inside backends of the PostgreSQL in BINDIR, into which a build with
# those tests is installed; the cluster made for it is removed. As root the server runs as the OS user postgres.
# This server, unlike every other here, also listens on localhost: pgrx-tests connects in no other way.
set -euo pipefail

export PGRX_PG_CONFIG_PATH=$1/pg_config USER=${USER:-$(id -un)}
read -r _ version _ < <("$PGRX_PG_CONFIG_PATH" --version)
cd "$(dirname "$0")/.."

data=$(mktemp -d "${TMPDIR:-/tmp}/archiver-pg.XXXXXX")
trap 'rm -rf "$data"' EXIT
runas=()
if ((EUID == 0)); then
    chown postgres "$data"
    runas=(--runas postgres)
fi
rm -f "$("$PGRX_PG_CONFIG_PATH" --pkglibdir)/archiver.so" # written anew, never over one that a server has loaded
scripts/cargo-tool.sh pgrx test "pg${version%%[!0-9]*}" "${runas[@]}" --pgdata "$data"
