#!/usr/bin/env bash
# Runs test programs in host 1 of a lab: started by `lab.sh run`, from test.sh.
#
#   kvm-tests.sh PATHS NAME…     PATHS, one a line, are all test programs there are
#
# Prints what cargo test would, and ends well also when tests fail. Nothing is printed
# of a program that is not there; one that does not come to its end has a failed test.
#
# Should the emulation lose the host (docs/lab.md), it is powered on again and the tests
# that have not passed yet are done once more, up to three times in all. A failure in a
# host that lives is a failure.
set -euo pipefail
paths=$1
shift
repository=$PWD
attempts=3
outcome=$(mktemp)
trap 'rm -f "$outcome"' EXIT

# What is slower by the emulation, if that is what hosts run by.
words="export MIGR_TEST_PATIENCE=10 MIGR_TEST_MAX_DOWNTIME=5s"
[ -z "${MIGR_CRIU-}" ] || words+=" MIGR_CRIU='$MIGR_CRIU'"

lives() {
    "$LAB" exec 1 -- true 2>/dev/null
}

# The path of the test program NAME.
path_of() {
    local path
    while read -r path; do
        [ "$(basename "${path%-*}")" != "$1" ] || printf '%s\n' "$path"
    done <<<"$paths"
}

# run NAME PATH
run() {
    local passed=() skip attempt=1
    printf '     Running tests/%s.rs (%s)\n' "$1" "$2"
    while :; do
        skip=
        [ ${#passed[@]} = 0 ] || skip="--exact$(printf " --skip '%s'" "${passed[@]}")"
        # As many at once as nextest lets.
        "$LAB" exec 1 -- sh -c "cd '$repository' && $words && '$2' --test-threads 2 $skip" |
            tee >(cat >&2) >"$outcome" || true
        if grep -q '^test result: ' "$outcome" || lives || [ $attempt = $attempts ]; then
            break
        fi
        printf 'the emulation lost the host: what has not passed is done once more\n' >&2
        attempt=$((attempt + 1))
        grep '^test .* \.\.\. ok$' "$outcome" || true
        mapfile -t -O ${#passed[@]} passed < <(sed -n 's/^test \(.*\) \.\.\. ok$/\1/p' "$outcome")
        "$LAB" start 1 || true
    done
    cat "$outcome"
    # Its tests that are not there are not known.
    grep -q '^test result: ' "$outcome" || printf 'test the_rest_of_them ... FAILED\n'
}

for name; do
    path=$(path_of "$name")
    if [ -n "$path" ]; then
        run "$name" "$path"
    else
        printf 'there is no test program %s\n' "$name" >&2
    fi
done
