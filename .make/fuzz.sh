#!/bin/sh
# Looks for inputs that break what reads hostile input: `fuzz.sh run`, for FUZZ_SECONDS and each of TARGETS.
# `fuzz.sh keep` puts the few inputs that reach all of the code that was reached into fuzz/corpus, for `cargo test`: one file
# for each target, one line for each input, its name and then its bytes in base64.
set -eu

command=${1:-run}
seconds=${FUZZ_SECONDS:-600}
targets=${TARGETS:-$(for target in fuzz/fuzz_targets/*.rs; do basename "$target" .rs; done)}
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

# unpack TARGET: its kept inputs, a file each, into $kept.
unpack() {
	rm -rf "$kept"
	mkdir -p "$kept"
	while read -r name input; do
		printf '%s' "$input" | base64 -d >"$kept/$name"
	done <"fuzz/corpus/$1.inputs"
}

# pack DIRECTORY TARGET: the other way round.
pack() {
	for file in "$1"/*; do
		printf '%s %s\n' "$(basename "$file" | cut -c 1-40)" "$(base64 <"$file" | tr -d '\n')"
	done >"fuzz/corpus/$2.inputs"
}

for target in $targets; do
	mkdir -p "$found/$target"
	kept=$build/kept/$target
	unpack "$target"
	case $command in
	run)
		echo "fuzzing $target for $seconds seconds"
		fuzz "$target" "$found/$target" "$kept" -- -max_total_time="$seconds" -max_len=2048 -timeout=20 \
			-rss_limit_mb=2048 -print_final_stats=1
		;;
	keep)
		few=$build/few/$target
		rm -rf "$few"
		mkdir -p "$few"
		# What has a name was put there by hand, for what it broke once, and stays. Others are named by a hash.
		cp "$kept"/*-* "$few" 2>/dev/null || :
		fuzz "$target" "$few" "$kept" "$found/$target" -- -set_cover_merge=1 -use_counters=0
		pack "$few" "$target"
		;;
	*)
		fail "fuzz.sh: '$command' is neither run nor keep"
		;;
	esac
done
