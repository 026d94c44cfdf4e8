#!/bin/bash
# prefix.sh PG_CONFIG: prints the bindir of a private copy of that PostgreSQL, so that tests and demo never write into
# the system's and need no root. One copy per build directory and major version, refreshed at
# each call; servers that run from it are not disturbed. Headers are linked, not copied.
set -euo pipefail
umask 022

pg_config=$1
read -r _ version _ < <("$pg_config" --version)
cd "$(dirname "$0")/.."
build=$(realpath -m "${CARGO_TARGET_DIR:-target}")
prefix=${TMPDIR:-/tmp}/archiver-$UID-$(sha256sum <<<"$build" | cut -c1-8)-pg${version%%[!0-9]*}

# A folder made by someone else could hold someone else's programs.
mkdir "$prefix" 2>/dev/null || [[ -O $prefix && -d $prefix && ! -L $prefix ]] || {
    echo "prefix: $prefix is not a folder of ours; remove it or set TMPDIR" >&2
    exit 1
}

# PostgreSQL looks for its files relative to its programs: the same layout below another root is whole.
for what in bindir pkglibdir sharedir; do
    dir=$("$pg_config" --$what)
    mkdir -p "$prefix$dir"
    cp -au --remove-destination "$dir/." "$prefix$dir/"
done
# Libraries that its programs find relative to themselves.
while read -r library; do
    mkdir -p "$prefix${library%/*}"
    cp -au --remove-destination "$library" "$prefix$library"
done < <(ldd "$("$pg_config" --bindir)/psql" | awk '$3 ~ "^/" { print $3 }' | xargs realpath -s | grep -vE '^/(usr/)?lib')
headers=$("$pg_config" --includedir)
mkdir -p "$prefix${headers%/*}"
ln -sfnT "$headers" "$prefix$headers"

bindir=$prefix$("$pg_config" --bindir)
((EUID)) || runuser -u postgres -- test -x "$bindir/postgres" || {
    echo "prefix: the OS user postgres cannot reach $bindir; set TMPDIR to a folder that everyone may enter" >&2
    exit 1
}
echo "$bindir"
