#!/bin/sh
# Looks for inputs that break what reads hostile input: `fuzz.sh run`, for FUZZ_SECONDS and each of TARGETS.
# `fuzz.sh keep` puts the few inputs that reach all of the code that was reached into fuzz/corpus, for `cargo test`.
set -eu

command=${1:-run}
seconds=${FUZZ_SECONDS:-600}
targets=${TARGETS:-$(cd fuzz/fuzz_targets && ls | sed 's/\.rs$//')}
# All that is built and found, but what breaks something: that lies in fuzz/artifacts.
build=${CARGO_TARGET_DIR:-target}/fuzz
found=${FUZZ_DIR:-$build/corpus}

fail() {
	echo "$1" >&2
	exit 1
}

case $seconds in
'' | *[!0-9]*) fail "FUZZ_SECONDS=$seconds: give a whole number of seconds" ;;
esac
for target in $targets; do
	[ -f "fuzz/fuzz_targets/$target.rs" ] || fail "TARGETS=$targets: there is no fuzz/fuzz_targets/$target.rs"
done

if ! cargo fuzz --version >/dev/null 2>&1; then
	[ "${FUZZ_INSTALL:-}" = yes ] ||
		fail "cargo-fuzz is not installed: run 'cargo install cargo-fuzz', or make fuzz FUZZ_INSTALL=yes"
	cargo install --locked cargo-fuzz
fi
command -v c++ >/dev/null || command -v "${CXX:-g++}" >/dev/null ||
	fail "the fuzzer's own library needs a C++ compiler, such as g++"

# The flags that fuzzing needs are those of a nightly toolchain; this makes the one that is there take them. There is no
# unsafe code to look for with a sanitizer, and without one all goes faster.
export RUSTC_BOOTSTRAP=1
fuzz() {
	target=$1
	shift
	cargo fuzz run --target-dir "$build" --sanitizer "${FUZZ_SANITIZER:-none}" "$target" "$@"
}

for target in $targets; do
	mkdir -p "$found/$target"
	case $command in
	run)
		echo "fuzzing $target for $seconds seconds"
		fuzz "$target" "$found/$target" "fuzz/corpus/$target" -- -max_total_time="$seconds" -max_len=2048 -timeout=20 \
			-rss_limit_mb=2048 -print_final_stats=1
		;;
	keep)
		kept=fuzz/corpus/$target.kept
		rm -rf "$kept"
		mkdir "$kept"
		# What has a name was put there by hand, for what it broke once, and stays. Others are named by a hash.
		cp "fuzz/corpus/$target"/*-* "$kept" 2>/dev/null || :
		fuzz "$target" "$kept" "fuzz/corpus/$target" "$found/$target" -- -set_cover_merge=1 -use_counters=0
		rm -rf "fuzz/corpus/${target:?}"
		mv "$kept" "fuzz/corpus/$target"
		;;
	*)
		fail "fuzz.sh: '$command' is neither run nor keep"
		;;
	esac
done
