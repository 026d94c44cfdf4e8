#!/bin/bash
# install.sh PG_CONFIG BINDIR [--release]: builds for that PostgreSQL's major version, installs the extension into it and
# the program `archiver` into BINDIR; by sudo where the caller may not write.
set -euo pipefail
umask 022

pg_config=$1 bindir=$2 profile=${3:-}
read -r _ version _ < <("$pg_config" --version)
major=${version%%[!0-9]*}

cd "$(dirname "$0")/.."
[[ -e $("$pg_config" --includedir-server)/postgres.h ]] || scripts/requirements.sh "postgresql-server-dev-$major"

extension=(--pg-config "$pg_config" --no-default-features --features "pg$major" ${profile:+"$profile"})
[[ -w $("$pg_config" --pkglibdir) && -w $("$pg_config" --sharedir)/extension ]] || extension+=(--sudo)
PGRX_PG_CONFIG_PATH=$pg_config PGRX_BUILD_FLAGS=--locked scripts/cargo-tool.sh pgrx install "${extension[@]}"

cargo build --locked -p archiver_cli ${profile:+"$profile"}
program=${CARGO_TARGET_DIR:-target}/$([[ $profile ]] && echo release || echo debug)/archiver
mkdir -p "$bindir" 2>/dev/null || true
sudo=()
[[ -w $bindir ]] || sudo=(sudo)
"${sudo[@]}" install -D "$program" "$bindir/archiver"
