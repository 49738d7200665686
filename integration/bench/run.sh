#!/usr/bin/env bash
# Builds and runs the bench: what a move costs, beside a plain copy of as many
# bytes over loopback TCP in the same run.
#
#   integration/bench/run.sh [--moves N] [--json] [--check]
set -euo pipefail
cd "$(dirname "$0")/../.."
# shellcheck source=integration/setup.sh
. integration/setup.sh

need_build_tools
need_kvm
cargo build --release --locked -p migrd -p migctl -p integration >&2
exec "$(integration/target-dir.sh)/release/bench" "$@"
