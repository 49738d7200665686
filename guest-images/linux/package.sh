# shellcheck shell=bash
# Sourced by kernel.sh and build.sh: takes packages of this distribution apart
# without installing them. Needs say and fail of integration/setup.sh.

# package_version NAME: the version that apt would install; nothing when it
# knows none.
package_version() {
    LC_ALL=C apt-cache policy "$1" 2>/dev/null |
        awk '$1 == "Candidate:" && $2 != "(none)" { print $2 }'
}

# unpack_package NAME DIR: the files of the package NAME, into the new directory
# DIR. Old package lists name files that are no longer there, so a download that
# fails is tried again with new lists.
unpack_package() {
    local name=$1 directory=$2 download
    download=$(mktemp -d) || return
    # apt downloads as a user of its own, if that user may write here.
    chmod 755 "$download"
    ! id _apt >/dev/null 2>&1 || [ "$(id -u)" != 0 ] || chown _apt "$download"
    say "downloading the package $name"
    if ! (cd "$download" && apt-get download "$name" >&2); then
        say "trying again with new package lists"
        as_root apt-get update >&2
        (cd "$download" && apt-get download "$name" >&2) || {
            rm -rf "$download"
            fail "cannot download the package $name: is the network there, and is it Debian's?"
        }
    fi
    rm -rf "$directory"
    mkdir -p "$directory"
    dpkg -x "$download"/*.deb "$directory" || fail "cannot unpack the package $name"
    rm -rf "$download"
}

# unpacked DIR PATH: where PATH is in an unpacked package; newer packages have
# it under usr.
unpacked() {
    local path
    for path in "$1/$2" "$1/usr/$2"; do
        if [ -e "$path" ]; then
            printf '%s\n' "$path"
            return
        fi
    done
    fail "the package in $1 has no $2"
}
