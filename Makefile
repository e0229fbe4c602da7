# `make help` lists the targets. `.make/cluster.sh` does the work of those that run a cluster.

SHELL = /bin/sh
.DEFAULT_GOAL = help

# The program that the cluster runs. Name one in the environment to run that one and to build nothing.
NODE_BINARY ?= $(or $(CARGO_TARGET_DIR),target)/release/raftexample
export NODE_BINARY

CLUSTER = .make/cluster.sh

# The load generator, which starts the clusters that it measures, and where its results go. The directory has to be on
# the disk that is to be measured.
BENCH_BINARY ?= $(or $(CARGO_TARGET_DIR),target)/release/raftexample-bench
BENCH_DIR ?= $(or $(CARGO_TARGET_DIR),target)/bench
export BENCH_DIR
BENCH_PEERS = .make/bench-peers.sh
FUZZ = .make/fuzz.sh
# SHORT=1 for a first reading, ROWS=put-1,put-64 for some rows, BENCH_FLAGS for all else that the program takes.
BENCH_COMPARE = $(BENCH_BINARY) compare --directory $(BENCH_DIR) $(if $(SHORT),--short) $(if $(ROWS),--rows $(ROWS))

BREAKAGE = .make/breakage.sh

SCRIPTS = $(CLUSTER) $(BENCH_PEERS) $(FUZZ) $(BREAKAGE) .ci/run .ci/schemathesis.sh

# How many clusters `make sim` simulates, and the seed of the first; without one it is drawn.
SEEDS ?= 2000
START ?=

# Some of the breakages of `make breakage`, by parts of their names; empty is all.
BREAKAGES ?=

# Of `make torture`: how long faults go on, how many members the cluster has, the seed of a run that is to be tried again,
# and `namespaces` or `loopback` for the network; empty is any.
SECONDS ?= 60
NODES ?= 3
SEED ?=
NETWORK ?=

# Of `make fuzz`: how long each of TARGETS is fuzzed, all if it is empty. FUZZ_INSTALL=yes installs what it needs.
FUZZ_SECONDS ?= 600
TARGETS ?=
FUZZ_INSTALL ?=
export FUZZ_SECONDS TARGETS FUZZ_INSTALL

.PHONY: help build cluster status logs stop clean test sim breakage torture fuzz fuzz-corpus check \
	kill-1 kill-2 kill-3 kill-4 stop-1 stop-2 stop-3 stop-4 restart-1 restart-2 restart-3 restart-4 \
	add-4 remove-4 bench bench-binary bench-etcd bench-drift bench-parts

# The text after the two number signs is the help.
help: ## list the targets
	@awk -F ':.*## ' '/^[a-zN][a-zN4-]*:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

ifeq ($(origin NODE_BINARY),file)
build: ## build the program
	cargo build --release --locked

$(NODE_BINARY):
	cargo build --release --locked
else
build:
	@:
endif

cluster: build ## build, start three nodes in the background, and wait until they are ready
	@$(CLUSTER) start

kill-N: ## end node N, one of 1 to 4, with SIGKILL, as a crash would
kill-1 kill-2 kill-3 kill-4: kill-%:
	@$(CLUSTER) kill $*

stop-N: ## end node N with SIGTERM: it answers what is in flight and hands leadership away
stop-1 stop-2 stop-3 stop-4: stop-%:
	@$(CLUSTER) stop $*

restart-N: ## start node N, after stopping it if it runs, and wait until it has caught up
restart-1 restart-2 restart-3 restart-4: restart-%: | $(NODE_BINARY)
	@$(CLUSTER) restart $*

kill-N stop-N restart-N:
	@echo "make $@: give a number for N, as in make $(@:N=2)" >&2; exit 2

add-4: | $(NODE_BINARY) ## start a fourth node, add it to the cluster, and wait until it votes and has caught up
	@$(CLUSTER) add 4

remove-4: ## remove the fourth node from the cluster, and wait until it has ended
	@$(CLUSTER) remove 4

status: ## show each node's role, term and indexes
	@$(CLUSTER) status

logs: ## show the end of each node's log
	@$(CLUSTER) logs

stop: ## end all nodes with SIGTERM
	@$(CLUSTER) stop-all

clean: ## end all nodes and delete their data and logs (cargo clean deletes what was built)
	@$(CLUSTER) clean

ifeq ($(origin BENCH_BINARY),file)
bench-binary:
	cargo build --release --locked --bin raftexample-bench
else
bench-binary:
	@:
endif

bench: build bench-binary ## start three nodes in a temporary directory, measure the standard loads, print a table
	@$(BENCH_BINARY) standard --directory $(BENCH_DIR) $(BENCH_FLAGS)

bench-etcd: build bench-binary ## print ratios to etcd, Go's raftexample and the disk; SHORT=1 takes 3 minutes, ROWS=put-1,put-64 some rows
	@peers=$$($(BENCH_PEERS)) && $(BENCH_COMPARE) $$peers $(BENCH_FLAGS)

bench-drift: build bench-binary ## load three nodes for ten minutes, and print what grows
	@$(BENCH_BINARY) drift --directory $(BENCH_DIR) $(BENCH_FLAGS)

bench-parts: ## measure the parts of a node alone: log, frames, apply, HTTP heads, read round; takes a minute
	cargo bench --locked --bench parts

test: ## run all tests
	cargo test --locked
	cargo test --locked --bench parts
	cargo test --locked --features failpoints --test failpoints

sim: ## simulate SEEDS=n clusters (2000), the first from seed START=s (any)
	@start=$(or $(START),$$(od -An -N4 -tu4 /dev/urandom | tr -d ' ')) && \
	echo "make sim SEEDS=$(SEEDS) START=$$start" && \
	SIM_SEEDS=$(SEEDS) SIM_START=$$start RUST_BACKTRACE=0 \
		cargo test --locked --test simulation -- --exact any_cluster --nocapture

breakage: ## break the program in each way that tests/breakage knows, and see that simulations notice; BREAKAGES=03 for some
	@$(BREAKAGE) $(BREAKAGES)

torture: build ## torture a cluster of NODES=3 for SECONDS=60, as SEED says; as root in network namespaces
	TORTURE_PROGRAM='$(NODE_BINARY)' TORTURE_SECONDS='$(SECONDS)' TORTURE_NODES='$(NODES)' TORTURE_SEED='$(SEED)' \
		TORTURE_NETWORK='$(NETWORK)' cargo test --locked --test torture -- --exact torture --nocapture

fuzz: ## look FUZZ_SECONDS=600 for hostile input that breaks each of TARGETS, all in fuzz/fuzz_targets
	@$(FUZZ) run

fuzz-corpus: ## keep the few inputs that `make fuzz` found and `make test` should replay
	@$(FUZZ) keep

check: ## check format, lints, docs and scripts
	cargo fmt --check
	cargo fmt --check --manifest-path fuzz/Cargo.toml
	cargo clippy --locked --all-targets -- -D warnings
	cargo clippy --locked --features failpoints --test failpoints -- -D warnings
	RUSTDOCFLAGS='-D warnings' cargo doc --locked --no-deps
	@if command -v shellcheck >/dev/null; then \
		echo shellcheck $(SCRIPTS); shellcheck $(SCRIPTS); \
	else \
		echo 'shellcheck is not installed: the scripts go unchecked'; \
	fi
