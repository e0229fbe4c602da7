#!/bin/sh
# Shows that the simulation notices what it is there for: breaks the program, in one place after the other, as the patches
# in tests/breakage say, and simulates clusters of each broken program until one fails. It fails itself if that takes too
# long, if a patch does not apply any more, or if the program that nobody broke fails.
#
# breakage.sh [NAME...]: only those whose file's name contains one of these, as `03` or `snapshot`. All happens in a copy of
# the tree. The first line of a patch says what it breaks, and in brackets which promise that was.
set -eu

: "${BREAKAGE_SECONDS:=600}" # for each
: "${BREAKAGE_SOUND:=1000}" # clusters of the program as it is
: "${BREAKAGE_DIR:=${CARGO_TARGET_DIR:-target}/breakage}"

SCENARIO=any_cluster
# In seeds: small enough that the time is kept, and that a failure early in it is not waited for.
PIECE=250
PATCHES=$PWD/tests/breakage
# Of each broken tree only what differs from the one before is compiled.
export CARGO_INCREMENTAL=1 RUST_BACKTRACE=0

say() { printf 'breakage: %s\n' "$*" >&2; }

# copy: the tree as it is, into the directory where it is broken. Files that are the same keep their times, or all would be
# compiled anew.
copy() {
    for part in Cargo.toml Cargo.lock src tests benches; do
        find "$part" -type f | while read -r file; do
            cmp -s "$file" "$TREE/$file" || { mkdir -p "$TREE/$(dirname "$file")" && cp "$file" "$TREE/$file"; }
        done
        [ ! -d "$TREE/$part" ] || (cd "$TREE" && find "$part" -type f) | while read -r file; do
            [ -e "$file" ] || rm "$TREE/$file"
        done
    done
}

# apply PATCH: false if it does not apply. Git must not look for the repository around it: it would leave out what is not
# in that.
apply() { (cd "$TREE" && GIT_CEILING_DIRECTORIES=${TREE%/*} git apply "$1"); }

# build: compiles what is in the tree.
build() { (cd "$TREE" && cargo test --quiet --locked --test simulation --no-run) >"$LOG" 2>&1; }

# simulate COUNT SECONDS: from the seed in $start on, and counts it up. False if a cluster fails, or the time is up.
simulate() {
    (
        cd "$TREE"
        export SIM_START="$start" SIM_SEEDS="$1"
        timeout "$2" cargo test --quiet --locked --test simulation -- --exact "$SCENARIO" --nocapture
    ) >"$LOG" 2>&1 || return 1
    start=$((start + $1))
}

# failure: what the failed simulation says, in one line: seed and reason.
failure() { sed -n "s/^$SCENARIO fails with seed \([0-9]*\): \([^;]*\).*/\1 \2/p" "$LOG" | head -n 1 | cut -c 1-150; }

# row NAME SEEDS SECONDS WHAT
row() { printf '%-26s %-11s %7s %7s  %s\n' "$1" "$SCENARIO" "$2" "$3" "$4" >>"$TABLE"; }

# break_with PATCH: false if nothing was found.
break_with() {
    name=${1##*/} name=${name%.patch}
    say "$name: $(head -n 1 "$1")"
    copy
    if ! apply "$1"; then
        row "$name" - - 'DOES NOT APPLY ANY MORE'
        return 1
    fi
    if ! build; then
        tail -n 30 "$LOG" >&2
        row "$name" - - 'DOES NOT COMPILE'
        return 1
    fi
    began=$(date +%s) first=$start found=
    while left=$((began + BREAKAGE_SECONDS - $(date +%s))) && [ "$left" -gt 0 ]; do
        simulate "$PIECE" "$left" || { found=$(failure) && break; }
    done
    seconds=$(($(date +%s) - began))
    if [ -z "$found" ]; then
        row "$name" ">$((start - first))" "$seconds" 'NOT FOUND'
        say "$name: not found"
        return 1
    fi
    say "found after $seconds s: $found"
    seed=${found%% *}
    row "$name" $((seed - first + 1)) "$seconds" "${found#* }"
    start=$((seed + 1))
}

# sound: whether the program as it is passes.
sound() {
    say "the program as it is: $BREAKAGE_SOUND clusters from seed $start"
    copy
    build || { tail -n 30 "$LOG" >&2; return 1; }
    began=$(date +%s)
    simulate "$BREAKAGE_SOUND" 3600 || { tail -n 30 "$LOG" >&2; return 1; }
    row '(as it is)' "$BREAKAGE_SOUND" $(($(date +%s) - began)) 'nothing, as it should be'
}

# is_wanted PATCH NAME...
is_wanted() {
    patch=${1##*/}
    shift
    [ $# -gt 0 ] || return 0
    for wanted; do
        case $patch in *"$wanted"*) return 0 ;; esac
    done
    return 1
}

command -v git >/dev/null || { say 'git is needed, to apply patches'; exit 2; }
mkdir -p "$BREAKAGE_DIR/tree"
TREE=$(realpath "$BREAKAGE_DIR/tree")
# Its own, and the same for all: cargo would take a broken program for that of the tree around it, which looks the same.
CARGO_TARGET_DIR=$(realpath "$BREAKAGE_DIR")/target
export CARGO_TARGET_DIR
LOG=$(realpath "$BREAKAGE_DIR")/last.log
TABLE=$(realpath "$BREAKAGE_DIR")/table
: >"$TABLE"
row BREAKAGE SEEDS SECONDS REPORTED
start=${BREAKAGE_START:-$(od -An -N4 -tu4 /dev/urandom | tr -d ' ')}
say "the seeds begin with BREAKAGE_START=$start"
status=0 tried=0
sound || { say 'the program fails without being broken'; exit 1; }
for file in "$PATCHES"/*.patch; do
    is_wanted "$file" "$@" || continue
    tried=$((tried + 1))
    break_with "$file" || status=1
done
[ "$tried" -gt 0 ] || { say "no breakage is called like $*"; exit 2; }
cat "$TABLE"
exit "$status"
