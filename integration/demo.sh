#!/usr/bin/env bash
# Moves a running virtual machine between two daemons on this machine, there
# and back, and shows what the guest saw of it.
#
#   integration/demo.sh [--json]
#
# With --json exactly one JSON object goes to stdout and everything else to
# stderr. Ends with 0 when both moves completed and were verified.
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
say "building"
cargo build --release --locked -p migrd -p migctl -p integration >&2
# It takes care of Ctrl-C itself: daemons, VMs and files go.
exec "$(integration/target-dir.sh)/release/demo" "$@"
