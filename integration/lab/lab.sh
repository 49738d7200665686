#!/usr/bin/env bash
# Stock Debian hosts on this one machine, joined by a private network, each with
# the migrd built here. docs/lab.md explains it.
#
#   integration/lab/lab.sh build           what a lab needs: programs, kernel, guest
#   integration/lab/lab.sh demo            shows what migr does, with a table at the end
#   integration/lab/lab.sh up              a lab that stays until "down"
#   integration/lab/lab.sh run SCRIPT …    a lab for the time that a script takes
#   integration/lab/lab.sh exec|cut|heal|freeze|thaw|kill|start|status|diagnose|down
#
# "--help" after any of them says more.
set -euo pipefail
here=$PWD
cd "$(dirname "$0")/../.."
# shellcheck source=integration/setup.sh
. integration/setup.sh

program() {
    printf '%s\n' "$(integration/target-dir.sh)/debug/lab"
}

case "${1---help}" in
    build | demo | up | run)
        [ "$(uname -m)" = x86_64 ] || fail "the lab needs an x86-64 machine"
        [ "$(id -u)" = 0 ] || fail "hosts are lent this machine's root file system: run this as root"
        need_build_tools
        need_lab
        say "building"
        # Only what runs here, and one migrd: that of the demo can also be halted in the
        # middle of a move, when its host is to lose its power.
        features=()
        [ "$1" != demo ] || features=(--features migrd/failpoints)
        cargo build --locked -p migrd -p migctl -p integration \
            --bin migrd --bin migctl --bin lab "${features[@]}" >&2
        if [ "$1" = demo ]; then
            built=$(integration/target-dir.sh)/debug
            cp --remove-destination "$built/migrd" "$built/migrd-failpoints"
        fi
        guest-images/linux/build.sh >&2
        [ "$1" != build ] || exit 0
        ;;
    *)
        need_rust
        [ -x "$(program)" ] || fail "nothing is built yet: run integration/lab/lab.sh build"
        ;;
esac
lab=$(program)
cd "$here"
exec "$lab" "$@"
