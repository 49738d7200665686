#!/usr/bin/env bash
# Runs test programs in host 1 of a lab: started by `lab.sh run`, from test.sh.
#
#   kvm-tests.sh PATHS NAME…     PATHS, one a line, are all test programs there are
#
# Prints what cargo test would, and ends well also when tests fail.
set -euo pipefail
paths=$1
shift
repository=$PWD
criu=
[ -z "${MIGR_CRIU-}" ] || criu="MIGR_CRIU='$MIGR_CRIU'"
while read -r path; do
    name=$(basename "$path")
    name=${name%-*}
    [[ " $* " == *" $name "* ]] || continue
    printf '     Running tests/%s.rs (%s)\n' "$name" "$path"
    # As many at once as nextest lets.
    "$LAB" exec 1 -- sh -c "cd '$repository' && $criu '$path' --test-threads 2" || true
done <<<"$paths"
