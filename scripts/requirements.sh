#!/bin/bash
# requirements.sh PACKAGE...: afterwards these Debian packages are installed.
# Touches nothing when they already are; else says what it installs and does so as root or by password-less sudo.
# With neither, it prints the one line to run and exits 1. No database cluster is made and no server is started.
set -euo pipefail

command -v dpkg-query >/dev/null || {
    echo "requirements: this is not Debian; going on, in the hope that its own kind of these is here: $*" >&2
    exit 0
}

missing=()
for package; do
    [[ $(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null) == installed ]] || missing+=("$package")
done
((${#missing[@]})) || exit 0

if ((EUID == 0)); then
    as_root=(env)
elif sudo -n true 2>/dev/null; then
    as_root=(sudo -n)
else
    echo "requirements: some packages are missing; as root, run:" >&2
    echo "apt-get update && apt-get install --no-install-recommends ${missing[*]}" >&2
    exit 1
fi
echo "requirements: installing ${missing[*]}" >&2

# The first postgresql-N on a machine makes and starts a cluster "main" unless told otherwise, as here for this once.
conf=/etc/postgresql-common/createcluster.d/archiver-requirements.conf
trap '"${as_root[@]}" rm -f "$conf"' EXIT
"${as_root[@]}" mkdir -p "${conf%/*}"
"${as_root[@]}" tee "$conf" >/dev/null <<<"create_main_cluster = false"

apt_get() { "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300 "$@" </dev/null >&2; }
apt_get update
apt_get install --yes --no-install-recommends "${missing[@]}"
