#!/usr/bin/env bash
# Builds and runs the bench: what a move costs; of a VM beside a plain copy of as many
# bytes over loopback TCP, of a process beside CRIU alone, in the same run. Processes
# need root.
#
#   integration/bench/run.sh [--moves N] [--only vms|processes] [--json] [--check]
set -euo pipefail
cd "$(dirname "$0")/../.."
# shellcheck source=integration/setup.sh
. integration/setup.sh

need_build_tools
[[ "$*" == *only*processes* ]] || need_kvm
if [[ "$*" != *only*vms* ]]; then
    [ "$(id -u)" = 0 ] || fail "processes move as root only: run this as root, or with --only vms"
    need_two_nets
    MIGR_CRIU=$(integration/install-criu.sh)
    export MIGR_CRIU
fi
cargo build --release --locked -p migrd -p migctl -p integration >&2
exec "$(integration/target-dir.sh)/release/bench" "$@"
