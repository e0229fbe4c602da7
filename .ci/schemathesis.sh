#!/usr/bin/env bash
# Sends what the OpenAPI document of a running node allows, and what it forbids, to that node, and holds the answers
# against the document. The seed is printed and can be given again: SCHEMATHESIS_SEED=7 .ci/schemathesis.sh
#
# Needs python3 with venv, and a package index for the first run.
set -euo pipefail
cd "$(dirname "$0")/.."

VERSION=4.32.5
: "${NODE_BINARY:=target/debug/raftexample}"
: "${SCHEMATHESIS_SEED:=1}"
# Examples per operation. So many are half a minute.
: "${SCHEMATHESIS_EXAMPLES:=300}"
# How long the node may take to be ready.
START_SECONDS=30

venv=target/schemathesis-$VERSION
if [ ! -f "$venv/complete" ]; then
    rm -rf "$venv"
    python3 -m venv "$venv"
    "$venv/bin/pip" --quiet --disable-pip-version-check install "schemathesis==$VERSION"
    touch "$venv/complete"
fi

directory=$(mktemp -d)
node=
# Ends the node and shows its log if anything went wrong.
finish() {
    status=$?
    if [ -n "$node" ]; then
        kill "$node" 2>/dev/null || true
        wait "$node" || status=1
    fi
    if [ "$status" -ne 0 ]; then
        echo "the node's log:" >&2
        tail -n 50 "$directory/log" >&2 || true
    fi
    rm -rf "$directory"
    exit "$status"
}
trap finish EXIT

read -r port peer_port < <(python3 -c '
import socket
sockets = [socket.socket(), socket.socket()]
for s in sockets: s.bind(("127.0.0.1", 0))
print(*(s.getsockname()[1] for s in sockets))')
"$NODE_BINARY" --port "$port" --cluster "http://127.0.0.1:$peer_port" --data-dir "$directory/data" \
    >"$directory/log" 2>&1 &
node=$!

url=http://127.0.0.1:$port
deadline=$((SECONDS + START_SECONDS))
until curl --silent --fail --noproxy '*' "$url/_/readyz" >/dev/null; do
    if ! kill -0 "$node" 2>/dev/null || [ "$SECONDS" -ge "$deadline" ]; then
        echo "the node did not become ready" >&2
        exit 1
    fi
    sleep 0.1
done

# The membership is left alone: invented URLs lead nowhere, or to somebody else's machine.
echo "seed $SCHEMATHESIS_SEED"
checkout=$PWD
(
    # It leaves files where it runs.
    cd "$directory"
    export SCHEMATHESIS_HOOKS=$checkout/.ci/schemathesis_hooks.py NO_PROXY=127.0.0.1 PYTHONDONTWRITEBYTECODE=1
    "$checkout/$venv/bin/schemathesis" --config-file "$checkout/.ci/schemathesis.toml" run "$url/_/openapi.json" \
        --seed "$SCHEMATHESIS_SEED" --max-examples "$SCHEMATHESIS_EXAMPLES" --phases examples,coverage,fuzzing \
        --exclude-tag members --continue-on-failure --warnings off --no-color
)

# It has survived, and answers.
curl --silent --show-error --fail --noproxy '*' "$url/_/readyz" >/dev/null
