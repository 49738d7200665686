#!/usr/bin/env bash
# Runs every check and every test of the project, and says how many of each
# kind ran.
#
#   integration/test.sh            everything
#   integration/test.sh --no-lab   all but the lab's scenarios, which take a quarter of an hour
#   integration/test.sh --build    only build what the tests run
#   integration/test.sh --build --release    … for the demo, soak and bench
#
# The tests of real virtual machines need /dev/kvm, and root for the mount
# namespaces in which some daemons are started. Without /dev/kvm, or with
# MIGR_TEST_KVM=lab, they run in a host of the lab. With MIGR_TEST_PROGRAMS=lab the
# programs that process trees are tried with move there once more: where this shell
# lacks CAP_SYS_RESOURCE, those of other users are only seen to be refused here.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=integration/setup.sh
. integration/setup.sh

build() {
    local target profile=debug plain=profile.dev.package.migrd.opt-level=0
    [ $# = 0 ] || { profile=release && plain=${plain/dev/release}; }
    target=$(integration/target-dir.sh)
    # The daemon with its failpoints first: what is built last keeps the name. It is
    # halted more than it runs, so it is built fast.
    cargo build --locked --workspace --bins --features migrd/failpoints --config "$plain" \
        "$@" || return
    cp --remove-destination "$target/$profile/migrd" "$target/$profile/migrd-failpoints" || return
    cargo build --locked --workspace --bins "$@"
}

# check WHAT COMMAND…: runs it and goes on, whatever comes of it.
checks_passed=0
checks_failed=()
check() {
    local what=$1
    shift
    say "== $what"
    if "$@"; then
        checks_passed=$((checks_passed + 1))
    else
        checks_failed+=("$what")
        say "FAILED: $what"
    fi
}

# Whether the lab's scenarios are to run.
with_lab=true

# Whether the tests of real virtual machines run in the lab.
kvm_in_lab() {
    [ "${MIGR_TEST_KVM-}" = lab ] || [ ! -e /dev/kvm ]
}

# Runs every test; one line "ok|failed BINARY TEST" for each goes to $1.
run_tests() {
    local programs=() others=() filter='all()' name
    if kvm_in_lab; then
        mapfile -t programs < <(kvm_programs)
    fi
    others=("${programs[@]}")
    $with_lab || others+=(lab)
    for name in "${others[@]}"; do filter+=" - binary(=$name)"; done
    if cargo nextest --version >/dev/null 2>&1; then
        say "== tests, with cargo-nextest"
        cargo nextest run --locked --workspace --no-fail-fast --color never -E "$filter" \
            --status-level all --final-status-level fail 2>&1 | tee "$1.log" || true
        # "PASS [   0.004s] (  1/300) migrd::vmm_child a_test"; a failed test
        # appears again after the summary.
        awk '/^ *Summary \[/ { exit }
             $1 == "PASS" || $1 == "FAIL" || $1 == "TIMEOUT" || $1 ~ /^(SIG|ABORT|LEAK)/ {
                 status = ($1 == "PASS" || $1 == "LEAK") ? "ok" : "failed"
                 sub(/^[^]]*\] */, ""); sub(/^\([^)]*\) */, ""); print status, $1, $2
             }' "$1.log" >"$1"
    else
        say "== tests, with cargo test (cargo-nextest is not installed)"
        local options=(--workspace --lib --bins --examples)
        for name in $(test_programs); do
            [[ " ${others[*]} " == *" $name "* ]] || options+=(--test "$name")
        done
        # One lab at a time: its hosts take the whole machine.
        RUST_TEST_THREADS=1 cargo test --locked "${options[@]}" --no-fail-fast --color never \
            2>&1 | tee "$1.log" || true
        plain_results "$1.log" >"$1"
    fi
    if kvm_in_lab; then
        say "== tests of real virtual machines, in a host of the lab"
        results_of_lab "$1" lab "${programs[@]}"
    fi
    if [ "${MIGR_TEST_PROGRAMS-}" = lab ]; then
        say "== programs once more, in a host of the lab"
        results_of_lab "$1" programs programs
    fi
}

# "ok|failed BINARY TEST" for each test in what cargo test printed to $1.
plain_results() {
    awk '/^ *Running / { binary = $NF; gsub(/.*\/|-[0-9a-f]+\)$/, "", binary) }
         /^ *Doc-tests / { binary = "doc" }
         /^test .* \.\.\. / { print ($NF == "ok" ? "ok" : "failed"), binary, $2 }' "$1"
}

# results_of_lab FILE WORD PROGRAM…: runs test programs in a lab host; what they print
# goes to FILE.WORD.log, and a line for each test to FILE.
results_of_lab() {
    local results=$1 log=$1.$2.log program
    shift 2
    run_in_lab "$@" >"$log" || say "the lab has failed"
    plain_results "$log" >>"$results"
    # A lab that did not come up has printed nothing.
    for program; do
        grep -q "^[a-z]* $program " <(plain_results "$log") ||
            echo "failed $program in_the_lab" >>"$results"
    done
}

# Runs the test programs of these names, as they are built, in one lab host, and
# prints what cargo test would.
run_in_lab() {
    local paths
    paths=$(cargo test --locked --workspace --no-run --message-format json 2>/dev/null |
        sed -n 's/.*"kind":\["test"\].*"executable":"\([^"]*\)".*/\1/p')
    # One CPU: the emulation loses hosts with two every few minutes of such tests.
    "$(integration/target-dir.sh)/debug/lab" run --hosts 1 --cpus 1 --memory 8192 --no-migrd \
        integration/lab/kvm-tests.sh "$paths" "$@"
}

# What failed tests said of their failure, without all that was shown for it.
reasons() {
    awk '/^ *(Error: |thread .* panicked at )/ { left = 12; print "" }
         /^ *(Stack backtrace:|note: run with)|^ *$/ { if (left < 12) left = 0 }
         left > 0 { print; left-- }' "$@" 2>/dev/null | head -n 200 || true
}

# Names of the tests that are properties: functions in a proptest! block.
property_tests() {
    find . -name '*.rs' -not -path './target/*' -exec awk '
        FNR == 1 { inside = 0 }
        /^ *proptest! *\{/ { inside = 1; indent = match($0, /[^ ]/) }
        inside && match($0, /fn [a-z0-9_]+\(/) { print substr($0, RSTART + 3, RLENGTH - 4) }
        inside && /^ *\}/ && match($0, /[^ ]/) == indent { inside = 0 }' {} +
}

# Names of all test programs.
test_programs() {
    local file
    for file in */tests/*.rs */tests/*/main.rs; do
        [ "${file##*/}" != main.rs ] || file=${file%/main.rs}
        basename "$file" .rs
    done
}

# Names of the test programs that have process trees written and made by CRIU:
# they say so.
criu_programs() {
    local file
    grep -lw CRIU integration/tests/*.rs migrd/tests/*.rs migrd/tests/*/main.rs |
        while read -r file; do
            [ "${file##*/}" != main.rs ] || file=${file%/main.rs}
            basename "$file" .rs
        done
}

# Names of the test programs that run virtual machines on this machine's KVM.
kvm_programs() {
    local file
    for file in integration/tests/*.rs $(grep -lw KVM migrd/tests/*.rs); do
        basename "$file" .rs
    done | grep -vxF lab | grep -vxF "$(criu_programs)"
}

# "KIND ok|failed" for each test in $1.
kinds() {
    awk -v properties="$(property_tests | tr '\n' ' ')" -v kvm="$(kvm_programs | tr '\n' ' ')" \
        -v criu="$(criu_programs | tr '\n' ' ')" '
        BEGIN {
            split(properties, names, " "); for (i in names) property[names[i]] = 1
            split(kvm, names, " "); for (i in names) real[names[i]] = 1
            split(criu, names, " "); for (i in names) frozen[names[i]] = 1
        }
        {
            program = $2; sub(/.*::/, "", program)
            name = $3; sub(/.*::/, "", name)
            if (program == "lab") kind = "lab"
            else if (program in frozen) kind = "real-CRIU"
            else if (program in real) kind = "real-KVM"
            else if (name in property) kind = "property"
            else if ($3 ~ /^migration::tests::/) kind = "state-machine"
            else kind = "unit"
            print kind, $1
        }' "$1"
}

# A CRIU that works here, for all daemons of the tests.
find_criu() {
    MIGR_CRIU=$(integration/install-criu.sh) && export MIGR_CRIU
}

# How many lines of $1 are exactly $2.
count() {
    grep -cxF "$2" "$1" || true
}

if [ "${1-}" = --build ]; then
    shift
    need_build_tools
    build "$@"
    exit
fi

case "${1-}" in
    '') ;;
    --no-lab) with_lab=false ;;
    *) fail "usage: integration/test.sh [--no-lab | --build [--release]]" ;;
esac
need_build_tools
kvm_in_lab || need_kvm
[ "$(id -u)" = 0 ] || fail "some tests start daemons in mount namespaces: run this as root"
need_lab
results=$(mktemp -d)
trap 'rm -rf "$results"' EXIT

check "format" cargo fmt --all --check
check "format of the guest" rustfmt --edition 2024 --check guest-images/pulse/guest/main.rs
check "lints" cargo clippy --locked --workspace --all-targets -- -D warnings
check "lints with failpoints" \
    cargo clippy --locked -p migrd --features failpoints -- -D warnings
if command -v shellcheck >/dev/null; then
    check "shell scripts" shellcheck -x \
        integration/*.sh integration/*/*.sh guest-images/linux/*.sh .ci/run
    check "scripts of busybox" shellcheck -s dash integration/src/lab/init.sh \
        guest-images/linux/root/init guest-images/linux/root/etc/shutdown
fi
check "runc" need_runc
check "build" build
check "CRIU" find_criu
check "programs to move" integration/install-programs.sh
if $with_lab; then check "guest of the lab" guest-images/linux/build.sh; fi

passed=$checks_passed
failed=${#checks_failed[@]}
: >"$results/tests"
case " ${checks_failed[*]} " in
    *" build "*) say "no test was run, since the build failed" ;;
    *) run_tests "$results/tests" ;;
esac
kinds "$results/tests" >"$results/kinds"

say ""
place="this machine's KVM"
if kvm_in_lab; then place="KVM in a host of the lab"; fi
criu=$("${MIGR_CRIU:-criu}" --version 2>/dev/null | sed -n 's/^Version: /CRIU /p' || true)
say "Ran on: $(uname -sr), $place, ${criu:-no CRIU} ($(nproc) CPUs)"
kinds=(unit property state-machine real-KVM real-CRIU)
if $with_lab; then kinds+=(lab); fi
for kind in "${kinds[@]}"; do
    good=$(count "$results/kinds" "$kind ok")
    bad=$(count "$results/kinds" "$kind failed")
    say "$(printf '%-14s %4d passed, %d failed' "$kind" "$good" "$bad")"
    passed=$((passed + good))
    failed=$((failed + bad))
    if [ $((good + bad)) = 0 ]; then
        say "FAILED: no $kind test has run"
        failed=$((failed + 1))
    fi
done
say "$(printf '%-14s %4d passed, %d failed %s' checks \
    "$checks_passed" "${#checks_failed[@]}" "${checks_failed[*]}")"
grep '^failed' "$results/tests" >&2 || true
reasons "$results/tests.log" "$results/tests.lab.log" "$results/tests.programs.log" >&2
say ""
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
