#!/usr/bin/env bash
# Makes sure that the programs are here that tests/programs.rs moves, which nobody here
# wrote, and prints the directory of those that were fetched.
#
#   integration/install-programs.sh
#
# A program that the machine has is taken as it is. Debian's packages of the others are
# fetched and unpacked below cargo's target directory, not installed: installing a
# server starts it, on every start of the machine too, with a port and a user of its own.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=integration/setup.sh
. integration/setup.sh

root=$(integration/target-dir.sh)/programs

# Where each program is, below / or the directory: package, pattern.
programs() {
    cat <<'END'
python3 usr/bin/python3
redis-server usr/bin/redis-server
nginx usr/sbin/nginx
nodejs usr/bin/node
postgresql usr/lib/postgresql/*/bin/postgres
postgresql usr/lib/postgresql/*/bin/psql
END
}

# missing: packages whose program is nowhere.
missing() {
    local package pattern
    programs | while read -r package pattern; do
        compgen -G "/$pattern" >/dev/null || compgen -G "$root/$pattern" >/dev/null ||
            printf '%s\n' "$package"
    done | sort -u
}

# fetch PACKAGE…: unpacks them, and what they need and the machine has not, in $root.
fetch() {
    local work deb
    command -v apt-get >/dev/null || fail "missing here: $*; install it and start again"
    work=$(mktemp -d)
    # shellcheck disable=SC2064
    trap "rm -rf '$work'" EXIT
    mkdir -p "$work/partial"
    say "fetching with apt-get, without installing: $*"
    as_root apt-get update >&2 || say "apt-get update failed; trying with the lists that are here"
    as_root apt-get install --yes --no-install-recommends --download-only \
        -o "Dir::Cache::Archives=$work" "$@" >&2 || fail "could not fetch: $*"
    mkdir -p "$root"
    for deb in "$work"/*.deb; do
        dpkg -x "$deb" "$root" || fail "could not unpack $(basename "$deb")"
    done
}

command -v setpriv >/dev/null || install_packages util-linux
# The workloads of other tests are written in it, and expect it where Debian has it.
[ -x /usr/bin/python3 ] || install_packages python3
mapfile -t packages < <(missing)
[ ${#packages[@]} = 0 ] || fetch "${packages[@]}"
mapfile -t packages < <(missing)
[ ${#packages[@]} = 0 ] || fail "the packages ${packages[*]} have other files than expected"
printf '%s\n' "$root"
