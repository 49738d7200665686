#!/usr/bin/env bash
# Moves a running virtual machine between two daemons on this machine, there
# and back, and shows what the guest saw of it. Then a process tree and a container
# that serve TCP, between two network namespaces, while a client keeps counting; that
# needs root.
#
#   integration/demo.sh [--json]
#
# With --json exactly one JSON object goes to stdout and everything else to
# stderr. Ends with 0 when all moves completed and were verified.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=integration/setup.sh
. integration/setup.sh

case "${1-}" in
    "" | --json) ;;
    *)
        say "usage: integration/demo.sh [--json]"
        exit 2
        ;;
esac

need_build_tools
need_kvm
if [ "$(id -u)" = 0 ]; then
    need_two_nets
    need_runc
    MIGR_CRIU=$(integration/install-criu.sh)
    export MIGR_CRIU
else
    set -- "$@" --without-process "moving process trees and containers needs root"
fi
say "building"
cargo build --release --locked -p migrd -p migctl -p integration >&2
# It takes care of Ctrl-C itself: daemons, VMs and files go.
exec "$(integration/target-dir.sh)/release/demo" "$@"
