#!/usr/bin/env bash
# Fetches Debian's stock kernel and takes it apart, without installing it.
#
#   guest-images/linux/kernel.sh DIR
#
# leaves in DIR
#   vmlinuz          the kernel, a bzImage, as it is in the package
#   vmlinux          the same, decompressed: an ELF image that PVH boots
#   config           what it was built with
#   release          its release, such as 6.1.0-40-amd64
#   lib/modules/     its modules, indexed: modprobe -d DIR -S RELEASE … finds them
#
# Guests and the hosts of the lab boot the same one. A DIR that has the version
# that apt would install is left as it is, and so is any without a network.
set -euo pipefail
cd "$(dirname "$0")/../.."
# shellcheck source=integration/setup.sh
. integration/setup.sh
# shellcheck source=guest-images/linux/package.sh
. guest-images/linux/package.sh

# The package that the metapackage of the stock kernel stands for.
stock_kernel() {
    LC_ALL=C apt-cache depends linux-image-amd64 2>/dev/null |
        awk '$1 == "Depends:" && $2 ~ /^linux-image-[0-9]/ { print $2; exit }'
}

# number FILE OFFSET BYTES: a little-endian number in a file.
number() {
    od -An -t "u$3" -j "$(($2))" -N "$3" "$1" | tr -d ' '
}

# decompress_kernel BZIMAGE ELF. Where the payload lies is in the header of the
# Linux/x86 boot protocol: setup_sects, payload_offset, payload_length. Its last
# four bytes are its size.
decompress_kernel() {
    local sectors offset length
    sectors=$(number "$1" 0x1f1 1)
    offset=$(number "$1" 0x248 4)
    length=$(number "$1" 0x24c 4)
    dd if="$1" of="$2.payload" bs=1M iflag=skip_bytes,count_bytes status=none \
        skip=$(((sectors + 1) * 512 + offset)) count=$((length - 4))
    case $(od -An -t x1 -N 4 "$2.payload" | tr -d ' ') in
        fd377a58) xz -dc <"$2.payload" >"$2" ;;
        28b52ffd) zstd -dc <"$2.payload" >"$2" ;;
        *) fail "the kernel in $1 is compressed in a way that is not known here" ;;
    esac
    rm "$2.payload"
}

fetch_kernel() {
    local directory=$1 package version release modules
    package=$(stock_kernel)
    if [ -z "$package" ]; then
        if [ -f "$directory/.package" ]; then
            say "apt knows no kernel now: using $(cat "$directory/.package")"
            return
        fi
        as_root apt-get update >&2 || true
        package=$(stock_kernel)
    fi
    [ -n "$package" ] || fail "apt knows no linux-image-amd64: this needs Debian's package lists"
    version="$package $(package_version "$package")"
    [ "$(cat "$directory/.package" 2>/dev/null)" != "$version" ] || return 0

    # Whole or not at all: .package is written last.
    rm -f "$directory/.package"
    unpack_package "$package" "$directory/unpacked"
    # The lists may have become newer.
    version="$package $(package_version "$package")"
    release=$(basename "$directory"/unpacked/boot/vmlinuz-*)
    release=${release#vmlinuz-}
    rm -rf "${directory:?}/lib"
    mkdir -p "$directory/lib/modules"
    mv "$directory/unpacked/boot/vmlinuz-$release" "$directory/vmlinuz"
    decompress_kernel "$directory/vmlinuz" "$directory/vmlinux"
    mv "$directory/unpacked/boot/config-$release" "$directory/config"
    modules=$(unpacked "$directory/unpacked" "lib/modules/$release")
    mv "$modules" "$directory/lib/modules/"
    rm -rf "$directory/unpacked"
    depmod -b "$directory" "$release"
    printf '%s\n' "$release" >"$directory/release"
    printf '%s\n' "$version" >"$directory/.package"
    say "the kernel $release is in $directory"
}

[ $# = 1 ] || fail "usage: guest-images/linux/kernel.sh DIR"
need_guest_image
directory=$(cd "$OLDPWD" && mkdir -p "$1" && cd "$1" && pwd)
# One at a time: guests and hosts may be built at once.
exec 9>"$directory/.lock"
flock 9
fetch_kernel "$directory"
