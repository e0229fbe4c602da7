#!/bin/sh
# Finds, or builds, the programs that `make bench-etcd` compares with, and prints the flags that name them. What cannot be
# had is said on standard error, and is no failure: the rows about it are left out.
#
# Nothing is installed unless BENCH_INSTALL=yes, and then by apt-get, as root. Without that, etcd's package is downloaded
# and unpacked beside the results, where it starts no service and changes nothing else.
set -eu

: "${BENCH_DIR:=target/bench}"
: "${BENCH_INSTALL:=no}"

ETCD_PACKAGE=etcd-server
GO_PACKAGES='golang-go golang-etcd-server-dev'
# Where Debian's packages of Go sources lie, and the example in them.
GO_PATH=/usr/share/gocode
GO_EXAMPLE=go.etcd.io/etcd/contrib/raftexample

say() { printf 'bench: %s\n' "$*" >&2; }

# install PACKAGE...: as root, and only if that was asked for.
install() {
    [ "$BENCH_INSTALL" = yes ] || return 1
    if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
        say "BENCH_INSTALL=yes needs root and apt-get; not installing $*"
        return 1
    fi
    say "installing $*"
    apt-get install --yes --quiet --no-install-recommends "$@" >&2
}

# unpack PACKAGE: into the directory of its name, without installing it.
unpack() {
    command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || return 1
    directory=$BENCH_DIR/peers/$1
    rm -rf "$directory"
    mkdir -p "$directory"
    say "downloading the package $1 into $directory"
    (cd "$directory" && apt-get download --quiet "$1" >&2 && dpkg-deb --extract ./*.deb .) || return 1
}

# is_etcd_3_4 PROGRAM: version 3.5 and later have no v2 of their own any more.
is_etcd_3_4() { "$1" --version 2>/dev/null | grep -q '^etcd Version: 3\.4\.'; }

# find_etcd: the program's path.
find_etcd() {
    unpacked=$BENCH_DIR/peers/$ETCD_PACKAGE/usr/bin/etcd
    for attempt in find install unpack; do
        case $attempt in
            find) ;;
            install) install "$ETCD_PACKAGE" || continue ;;
            unpack) unpack "$ETCD_PACKAGE" || continue ;;
        esac
        for program in "$(command -v etcd || true)" "$unpacked"; do
            if [ -x "$program" ] && is_etcd_3_4 "$program"; then
                printf '%s\n' "$program"
                return 0
            fi
        done
    done
    say "there is no etcd 3.4, and Debian's package $ETCD_PACKAGE could not be had; rows about it are left out"
    return 1
}

# find_go_raftexample: the path of the program, built once.
find_go_raftexample() {
    program=$BENCH_DIR/peers/go-raftexample
    if [ ! -x "$program" ]; then
        if ! command -v go >/dev/null || [ ! -d "$GO_PATH/src/$GO_EXAMPLE" ]; then
            # Several words on purpose.
            # shellcheck disable=SC2086
            install $GO_PACKAGES || {
                say "there is no Go, or no source of its raftexample: apt-get install $GO_PACKAGES; rows about it are left out"
                return 1
            }
        fi
        mkdir -p "$BENCH_DIR/peers"
        say "building $GO_EXAMPLE"
        GO111MODULE=off GOFLAGS='' GOPATH=$GO_PATH go build -o "$program" "$GO_EXAMPLE" >&2 || {
            say 'building it has failed; rows about it are left out'
            return 1
        }
    fi
    printf '%s\n' "$program"
}

if path=$(find_etcd); then printf '%s %s\n' --etcd "$path"; fi
if path=$(find_go_raftexample); then printf '%s %s\n' --go-raftexample "$path"; fi
