# shellcheck shell=bash
# Sourced by demo.sh and test.sh: makes sure that this machine has what they
# need, and says what it installs. Everything it says goes to stderr.

say() {
    printf '%s\n' "$*" >&2
}

fail() {
    say "error: $*"
    exit 1
}

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        fail "root is needed for: $*"
    fi
}

# install_packages PACKAGE…
install_packages() {
    command -v apt-get >/dev/null || fail "missing here: $*; install it and start again"
    say "installing with apt-get: $*"
    as_root apt-get update >&2 || say "apt-get update failed; trying with the lists that are here"
    as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get install --yes --no-install-recommends "$@" >&2 || fail "could not install: $*"
}

# Whether the Rust that is here is new enough for the workspace.
rust_suffices() {
    command -v cargo >/dev/null && command -v rustc >/dev/null || return 1
    local wanted have
    wanted=$(sed -n 's/^rust-version = "\(.*\)"$/\1/p' Cargo.toml)
    have=$(rustc --version | cut -d' ' -f2)
    [ "$(printf '%s\n%s\n' "$wanted" "$have" | sort -V | head -n1)" = "$wanted" ]
}

need_rust() {
    if [ -f "${CARGO_HOME:-$HOME/.cargo}/env" ]; then
        # shellcheck source=/dev/null
        . "${CARGO_HOME:-$HOME/.cargo}/env"
    fi
    rust_suffices && return
    local wanted
    wanted=$(sed -n 's/^rust-version = "\(.*\)"$/\1/p' Cargo.toml)
    if ! command -v rustup >/dev/null; then
        # Debian 12 has no rustup, and its own cargo is too old for the workspace.
        apt-cache show rustup >/dev/null 2>&1 || fail "Rust $wanted or newer is needed, and \
this distribution's is older: install rustup as the Rust project's website says, then start again"
        install_packages rustup
    fi
    say "installing a current Rust with rustup"
    rustup toolchain install stable --profile minimal --component rustfmt,clippy >&2
    rustup default stable >&2
    rust_suffices || fail "Rust $wanted or newer is needed; rustup gave $(rustc --version)"
}

need_build_tools() {
    local missing=()
    command -v cc >/dev/null || missing+=(gcc libc6-dev)
    command -v unshare >/dev/null || missing+=(util-linux)
    command -v mount >/dev/null || missing+=(mount)
    [ ${#missing[@]} = 0 ] || install_packages "${missing[@]}"
    need_rust
}

# What guest-images/linux is built with, beside Rust and a C linker.
need_guest_image() {
    local missing=()
    command -v cpio >/dev/null || missing+=(cpio)
    command -v mke2fs >/dev/null || missing+=(e2fsprogs)
    command -v modprobe >/dev/null || missing+=(kmod)
    command -v flock >/dev/null || missing+=(util-linux)
    command -v xz >/dev/null || missing+=(xz-utils)
    command -v zstd >/dev/null || missing+=(zstd)
    [ ${#missing[@]} = 0 ] || install_packages "${missing[@]}"
}

# What hosts with networks of their own are made of on this machine, and a client and a
# server written in Python.
need_two_nets() {
    local missing=()
    command -v ip >/dev/null || missing+=(iproute2)
    command -v nsenter >/dev/null || missing+=(util-linux)
    [ -x /usr/bin/python3 ] || missing+=(python3)
    [ ${#missing[@]} = 0 ] || install_packages "${missing[@]}"
}

need_kvm() {
    [ "$(uname -m)" = x86_64 ] || fail "this needs an x86-64 machine"
    [ -e /dev/kvm ] || fail "/dev/kvm is missing: load kvm_intel or kvm_amd (modprobe), and on a \
virtual machine switch nested virtualization on"
    if [ ! -r /dev/kvm ] || [ ! -w /dev/kvm ]; then
        fail "/dev/kvm may not be used by $(id -un): run this as root or join the group kvm"
    fi
}

# What the containers of tests and demonstrations are made by, and of.
need_runc() {
    local missing=()
    command -v runc >/dev/null || missing+=(runc)
    if ! [ -x /bin/busybox ] || ldd /bin/busybox >/dev/null 2>&1; then
        missing+=(busybox-static)
    fi
    [ ${#missing[@]} = 0 ] || install_packages "${missing[@]}"
}

# What the hosts of the lab are run with, beside what the guest is built with.
need_lab() {
    local missing=()
    command -v qemu-system-x86_64 >/dev/null || missing+=(qemu-system-x86)
    # Its interpreter is the first program of a host.
    if ! [ -x /bin/busybox ] || ldd /bin/busybox >/dev/null 2>&1; then
        missing+=(busybox-static)
    fi
    command -v setpriv >/dev/null || missing+=(util-linux)
    command -v ip >/dev/null || missing+=(iproute2)
    [ ${#missing[@]} = 0 ] || install_packages "${missing[@]}"
    need_guest_image
}
