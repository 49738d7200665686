#!/usr/bin/env bash
# Finds a CRIU that works on this machine's kernel, and prints its path.
#
#   integration/install-criu.sh
#
# Taken is the first of these that "criu check" is content with: $MIGR_CRIU, the
# criu in PATH, and one that is built here from Debian's newest source
# package and stays in cargo's target directory. What is
# installed for that is said.
#
# The tests read images with crit, CRIU's own tool. Unless there is one beside that
# CRIU or in PATH, it is put beside the CRIU of the target directory, where the
# tests look for it.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=integration/setup.sh
. integration/setup.sh

# works CRIU: whether it can checkpoint on this kernel.
works() {
    [ -x "$1" ] && "$1" check >/dev/null 2>&1
}

# Where the machine gets its Debian packages from, as its apt is set up.
debian_mirror() {
    # shellcheck disable=SC2016 # apt-get expands them
    apt-get indextargets --format '$(ORIGIN) $(SUITE) $(REPO_URI)' 'Created-By: Packages' |
        awk '$1 == "Debian" && $2 !~ /security/ { print $3; exit }'
}

# fetch_source DIR: Debian's newest source of CRIU, verified by apt, in DIR.
fetch_source() {
    local apt=$1/apt mirror
    mirror=$(debian_mirror)
    [ -n "$mirror" ] || fail "apt knows no Debian mirror: install CRIU 4.0 or newer and start again"
    mkdir -p "$apt/lists/partial" "$apt/cache/archives/partial"
    printf 'deb-src [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] %s sid main\n' \
        "$mirror" >"$apt/sources.list"
    local options=(
        -o "Dir::Etc::SourceList=$apt/sources.list" -o "Dir::Etc::SourceParts=/dev/null"
        -o "Dir::State::Lists=$apt/lists" -o "Dir::Cache=$apt/cache" -o "APT::Sandbox::User=root"
    )
    apt-get "${options[@]}" update >&2 || fail "apt can't read Debian's sources from its mirror"
    # What Debian adds to it is not needed, and may be missing at a mirror.
    (cd "$1" && apt-get "${options[@]}" source --download-only criu >&2) || true
    compgen -G "$1/criu_*.orig.tar.*" >/dev/null || fail "apt has not fetched the source of CRIU"
}

# Sets $work to a directory with CRIU's source in $work/source, once.
work=
unpack_source() {
    local tarball
    [ -z "$work" ] || return 0
    install_missing
    work=$(mktemp -d)
    # shellcheck disable=SC2064
    trap "rm -rf '$work'" EXIT
    fetch_source "$work"
    tarball=$(compgen -G "$work/criu_*.orig.tar.*" | grep -v '\.asc$' | head -n1)
    say "building from $(basename "$tarball")"
    mkdir "$work/source"
    tar -xf "$tarball" -C "$work/source" --strip-components=1
}

# make_source TARGET…
make_source() {
    make -C "$work/source" -j"$(nproc)" NO_GNUTLS=1 "$@" >"$work/log" 2>&1 || {
        tail -n 40 "$work/log" >&2
        fail "CRIU does not build; the end of its output is above"
    }
}

build_criu() {
    unpack_source
    make_source criu
    mkdir -p "$(dirname "$1")"
    install -m 755 "$work/source/criu/criu" "$1"
}

# need_crit CRIU: sees to it that there is a crit that the tests find.
need_crit() {
    local to crit
    to=$(integration/target-dir.sh)/criu
    for crit in "$(dirname "$1")/crit" "$(command -v crit || true)" "$to/crit"; do
        [ -x "$crit" ] && "$crit" --version >/dev/null 2>&1 && return
    done
    unpack_source
    make_source lib crit
    mkdir -p "$to/python"
    cp -r "$work/source/lib/pycriu" "$work/source/crit/crit" "$to/python/"
    # Debian's protobuf is for Debian's Python.
    cat >"$to/crit" <<'END'
#!/bin/sh
exec env PYTHONPATH="$(dirname "$0")/python" /usr/bin/python3 -m crit "$@"
END
    chmod 755 "$to/crit"
    "$to/crit" --version >/dev/null || fail "crit does not work; its message is above"
}

# Installs what CRIU is built with, unless it is all here.
install_missing() {
    local package missing=()
    for package in gcc make pkg-config dpkg-dev libprotobuf-dev libprotobuf-c-dev \
        protobuf-c-compiler protobuf-compiler libnl-3-dev libnet1-dev libnftables-dev libbsd-dev \
        libcap-dev uuid-dev python3 python3-protobuf; do
        dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q ' installed$' ||
            missing+=("$package")
    done
    [ ${#missing[@]} = 0 ] || install_packages "${missing[@]}"
}

[ "$(id -u)" = 0 ] || fail "CRIU works for root only: run this as root"
if [ -n "${MIGR_CRIU-}" ]; then
    works "$MIGR_CRIU" || fail "$MIGR_CRIU (from MIGR_CRIU) does not work here: see \
\"$MIGR_CRIU check\""
    need_crit "$MIGR_CRIU"
    printf '%s\n' "$MIGR_CRIU"
    exit
fi
for criu in "$(command -v criu || true)" "$(integration/target-dir.sh)/criu/criu"; do
    if works "$criu"; then
        need_crit "$criu"
        printf '%s\n' "$criu"
        exit
    fi
done
criu=$(integration/target-dir.sh)/criu/criu
build_criu "$criu"
works "$criu" || {
    "$criu" check >&2 || true
    fail "the newest CRIU does not work on this kernel ($(uname -r)); the reasons are above"
}
need_crit "$criu"
printf '%s\n' "$criu"
