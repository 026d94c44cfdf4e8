#!/bin/bash
# cargo-tool.sh pgrx|deny ARGUMENT...: runs `cargo pgrx ARGUMENT...` (or deny) of exactly the version below, built once
# into the user's cache. What ~/.cargo/bin holds neither matters nor changes.
set -euo pipefail

tool=cargo-$1
case $1 in
    pgrx) version=0.18.1 ;; # as pgrx in Cargo.toml: cargo-pgrx refuses any other
    deny) version=0.20.2 ;;
    *) echo "cargo-tool: unknown tool \"$1\"" >&2 && exit 2 ;;
esac

root=$HOME/.cache/archiver/$tool-$version
if ! [[ -x $root/bin/$tool ]]; then
    echo "cargo-tool: building $tool $version, once; this takes some minutes" >&2
    env -u CARGO_TARGET_DIR PATH="$root/bin:$PATH" cargo install "$tool" --version "$version" --locked --root "$root"
fi
exec "$root/bin/$tool" "$@"
