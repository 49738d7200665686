#!/usr/bin/env bash
# Builds the Linux guest from Debian's stock kernel and busybox.
#
#   guest-images/linux/build.sh [DIR]
#
# leaves in DIR (guest-linux in cargo's target directory, if it is not given)
#   vmlinuz      the kernel, as it is in Debian's package
#   vmlinux      the same, decompressed, which boots faster where code is emulated
#   initrd       the initramfs: modules, busybox, init, witness
#   disk.img     a raw disk with an empty ext4 file system, to be copied for each guest
#   witness      the test program, static, for hosts
# What is as its inputs say already is not built again. MIGR_GUEST_DISK is the
# disk's size (256M). Nothing is mounted, and nothing but the tools that are
# missing is installed.
set -euo pipefail
cd "$(dirname "$0")/../.."
# shellcheck source=integration/setup.sh
. integration/setup.sh
# shellcheck source=guest-images/linux/package.sh
. guest-images/linux/package.sh
source_dir=guest-images/linux

# fetch_busybox DIR: busybox, static, as DIR/busybox.
fetch_busybox() {
    local version busybox
    version=$(package_version busybox-static)
    if [ -f "$1/.package" ] && { [ -z "$version" ] || [ "$(cat "$1/.package")" = "$version" ]; }; then
        return
    fi
    mkdir -p "$1"
    rm -f "$1/.package"
    unpack_package busybox-static "$1/unpacked"
    busybox=$(unpacked "$1/unpacked" bin/busybox)
    mv "$busybox" "$1/busybox"
    rm -rf "$1/unpacked"
    package_version busybox-static >"$1/.package"
}

# build_witness: prints where the static program is.
build_witness() {
    local triple=x86_64-unknown-linux-gnu
    # For this target alone, so that build scripts and the rest of the workspace stay as they are.
    CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS="-Ctarget-feature=+crt-static -Cstrip=symbols" \
        cargo build --locked --package witness --bin witness --target "$triple" >&2 ||
        fail "the witness does not build; the reasons are above"
    printf '%s\n' "$(integration/target-dir.sh)/$triple/debug/witness"
}

# group GROUP +|-: the modules of a group, or those that it does without.
group() {
    awk -v wanted="[$1]" -v sign="$2" '
        /^\[/ { inside = ($0 == wanted) }
        inside && /^[-a-z]/ && (/^-/ ? "-" : "+") == sign { sub(/^-/, ""); print }' \
        "$source_dir/modules"
}

# copy_modules KERNEL ROOT: the guest's modules, and for each group the order to
# load them in.
copy_modules() {
    local kernel=$1 root=$2 release modules group without path name
    release=$(cat "$kernel/release")
    modules=$root/lib/modules/$release
    mkdir -p "$modules"
    for group in all pci; do
        without=" $(group "$group" - | tr '\n' ' ')"
        group "$group" + | while read -r name; do
            modprobe -d "$kernel" -S "$release" --show-depends "$name" </dev/null ||
                fail "the kernel has no module $name"
        done | awk '$1 == "insmod" { print $2 }' | while read -r path; do
            name=$(basename "$path")
            name=${name%.ko*}
            [[ $without != *" $name "* ]] || continue
            copy_module "$path" "$modules"
            printf '%s\n' "$name"
        done | awk '!seen[$0]++' >"$root/lib/modules/$group"
    done
    depmod -b "$root" "$release" 2>/dev/null
    # All that busybox's modprobe reads.
    find "$modules" -name 'modules.*' ! -name modules.dep -delete
}

# copy_module FILE DIR: decompressed, as busybox loads it.
copy_module() {
    local to=$2/${1##*/}
    case $1 in
        *.xz) xz -dc "$1" >"${to%.xz}" ;;
        *.zst) zstd -qdc "$1" >"${to%.zst}" ;;
        *) cp "$1" "$to" ;;
    esac
}

# pack ROOT FILE: the tree as an initramfs. It is not compressed: to unpack it
# costs a guest more than to load it. Same tree, same bytes.
pack() {
    find "$1" -exec touch --no-dereference --date=@0 {} +
    (cd "$1" && find . -mindepth 1 -print0 | LC_ALL=C sort -z |
        cpio --null --create --format=newc --owner=+0:+0 --reproducible --quiet) >"$2"
}

build_initrd() {
    local kernel=$1 busybox=$2 witness=$3 out=$4 root applet
    root=$(mktemp -d)
    mkdir -p "$root"/{bin,dev,etc,proc,sys,run,tmp,data,root,var/log}
    cp -R "$source_dir/root/." "$root/"
    cp "$busybox" "$root/bin/busybox"
    cp "$witness" "$root/bin/witness"
    for applet in $("$busybox" --list); do
        [ -e "$root/bin/$applet" ] || ln -s busybox "$root/bin/$applet"
    done
    ln -s bin "$root/sbin"
    copy_modules "$kernel" "$root"
    chmod -R u=rwX,go=rX "$root"
    pack "$root" "$out"
    rm -rf "$root"
}

# The identifiers are fixed, so that the same recipe makes the same disk.
build_disk() {
    local size=$1 out=$2 uuid=6d696772-0000-4000-8000-000000000001
    rm -f "$out"
    truncate --size="$size" "$out"
    E2FSPROGS_FAKE_TIME=1 mke2fs -q -F -t ext4 -L migr-data -U "$uuid" -m 0 \
        -E "hash_seed=$uuid,lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0" "$out"
}

# fresh OUT INPUT…: whether OUT was made from exactly these. Otherwise it is to
# be made, and `made OUT` said.
declare -A digest
fresh() {
    local out=$1
    shift
    digest[$out]=$(printf '%s\n' "$@" | sha256sum)
    [ -f "$out" ] && [ "$(cat "$out.inputs" 2>/dev/null)" = "${digest[$out]}" ] && return
    rm -f "$out.inputs"
    return 1
}
made() {
    mv "$1.new" "$1"
    printf '%s\n' "${digest[$1]}" >"$1.inputs"
    say "built $1"
}
content() {
    find "$@" -type f -exec sha256sum {} + | LC_ALL=C sort
}

[ $# -le 1 ] || fail "usage: guest-images/linux/build.sh [DIR]"
[ "$(uname -m)" = x86_64 ] || fail "the guest is built on x86-64 machines only"
need_build_tools
need_guest_image
cache=$(integration/target-dir.sh)/debian
out=${1:-$(integration/target-dir.sh)/guest-linux}
[ $# = 0 ] || out=$(cd "$OLDPWD" && mkdir -p "$out" && cd "$out" && pwd)
mkdir -p "$out" "$cache/kernel" "$cache/busybox"
exec 8>"$cache/.lock"
flock 8

"$source_dir/kernel.sh" "$cache/kernel"
fetch_busybox "$cache/busybox"
witness=$(build_witness)

for file in "$cache/kernel/vmlinuz" "$cache/kernel/vmlinux" "$witness"; do
    copy=$out/$(basename "$file")
    fresh "$copy" "$(content "$file")" || {
        cp "$file" "$copy.new"
        made "$copy"
    }
done
fresh "$out/initrd" "$(cat "$cache/kernel/.package")" "$(content "$cache/busybox/busybox" \
    "$witness" "$source_dir/root" "$source_dir/modules" "$source_dir/build.sh")" || {
    build_initrd "$cache/kernel" "$cache/busybox/busybox" "$witness" "$out/initrd.new"
    made "$out/initrd"
}
fresh "$out/disk.img" "${MIGR_GUEST_DISK:=256M}" "$(content "$source_dir/build.sh")" || {
    build_disk "$MIGR_GUEST_DISK" "$out/disk.img.new"
    made "$out/disk.img"
}
say "the Linux guest is in $out"
