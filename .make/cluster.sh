#!/bin/sh
# Runs a cluster of three nodes on this machine, and a fourth that joins it: the work behind `make cluster` and its
# relatives.
# Everything it writes (data, logs, pid files) lies in one directory.
set -eu

FOUNDERS='1 2 3'
JOINER=4
: "${NODE_BINARY:=target/release/raftexample}"
: "${CLUSTER_DIR:=.cluster}"
# One port for each node, in order. Tests choose others, to run beside a cluster that somebody works with.
: "${KEY_VALUE_PORTS:=12380 22380 32380 42380}"
: "${PEER_PORTS:=12379 22379 32379 42379}"

# How long, in seconds, a node may take to answer after its start, to catch up, and to end. An election takes one or
# two; the rest is for a busy machine and a long log.
START_DEADLINE=30
CATCH_UP_DEADLINE=120
STOP_DEADLINE=15

say() { printf '%s\n' "$*"; }
fail() { printf 'cluster: %s\n' "$*" >&2; exit 1; }
now() { date +%s; }

# nth N WORD...: the Nth of the words.
nth() { shift "$1"; say "$1"; }
# The port lists are words on purpose.
# shellcheck disable=SC2086
key_value_port() { nth "$1" $KEY_VALUE_PORTS; }
# shellcheck disable=SC2086
peer_port() { nth "$1" $PEER_PORTS; }
url() { say "http://127.0.0.1:$(key_value_port "$1")"; }
peer_url() { say "http://127.0.0.1:$(peer_port "$1")"; }
data_dir() { say "$CLUSTER_DIR/node-$1"; }
log_file() { say "$CLUSTER_DIR/node-$1.log"; }
pid_file() { say "$CLUSTER_DIR/node-$1.pid"; }

# nodes: those that there are. The joiner is one from `add` until `remove`.
nodes() { if [ -d "$(data_dir "$JOINER")" ]; then say "$FOUNDERS $JOINER"; else say "$FOUNDERS"; fi; }

# member_list NODE...: their peer URLs, as --cluster takes them.
member_list() {
    list=
    for n in "$@"; do list="$list${list:+,}$(peer_url "$n")"; done
    say "$list"
}

# arguments_of PID: the command line of a process; nothing if it is gone.
arguments_of() {
    if [ -r "/proc/$1/cmdline" ]; then
        tr '\0' ' ' <"/proc/$1/cmdline" 2>/dev/null || true
    else
        ps -o args= -p "$1" 2>/dev/null || true
    fi
}

# pid_of N: node N's process id; nothing if it does not run. A number in a file proves nothing, since the system uses
# numbers again: the process has to run on the data directory of this very node too.
pid_of() {
    [ -f "$(pid_file "$1")" ] || return 0
    pid=$(cat "$(pid_file "$1")")
    case $(arguments_of "$pid")' ' in
        *" --data-dir $(data_dir "$1") "*) say "$pid" ;;
    esac
}

# --disable: without the user's own settings of curl.
fetch() { curl --disable --silent --fail --noproxy '*' --max-time 2 "$@"; }

# status_of N: the JSON of its status in one line; nothing if it does not answer.
status_of() { fetch "$(url "$1")/_/status" 2>/dev/null | tr -d '\n' || true; }
# field NAME JSON: the first number or string with that name.
field() { say "$2" | grep -o "\"$1\" *: *[^,}]*" | head -n 1 | sed 's/^[^:]*: *//; s/"//g'; }

ready() { fetch --output /dev/null "$(url "$1")/_/readyz" 2>/dev/null; }

# port_taken N: whether anything listens on node N's key-value port. 7 is curl's status for a refused connection.
port_taken() {
    code=0
    curl --disable --silent --noproxy '*' --max-time 2 --output /dev/null "$(url "$1")/_/livez" || code=$?
    [ "$code" -ne 7 ]
}

check_port() {
    if port_taken "$1"; then
        fail "another program listens on port $(key_value_port "$1"), which is node $1's; end it first"
    fi
}

launch() {
    check_port "$1"
    mkdir -p "$CLUSTER_DIR"
    # The founders are words on purpose.
    # shellcheck disable=SC2086
    case $1 in
        "$JOINER") peers=$(member_list $FOUNDERS "$JOINER"); join=--join ;;
        *) peers=$(member_list $FOUNDERS); join= ;;
    esac
    # A later start appends to the log, so that the reason of an earlier end stays there.
    nohup "$NODE_BINARY" --id "$1" ${join:+"$join"} --cluster "$peers" --port "$(key_value_port "$1")" \
        --data-dir "$(data_dir "$1")" </dev/null >>"$(log_file "$1")" 2>&1 &
    say $! >"$(pid_file "$1")"
    # Until the new process has become the program it has this script's command line, and would pass for gone.
    tries=0
    while [ -z "$(pid_of "$1")" ] && [ "$tries" -lt 20 ]; do
        sleep 0.05
        tries=$((tries + 1))
    done
}

# give_up N WHAT: shows what node N logged, and ends.
give_up() {
    printf '\ncluster: node %s %s. The end of its log, %s:\n' "$1" "$2" "$(log_file "$1")" >&2
    tail -n 20 "$(log_file "$1")" | sed 's/^/    /' >&2
    exit 1
}

# wait_until DEADLINE N WHAT COMMAND...: runs the command until it succeeds; gives node N up if its process ends.
wait_until() {
    end=$(($(now) + $1)); node=$2; what=$3
    shift 3
    until "$@"; do
        [ -n "$(pid_of "$node")" ] || give_up "$node" 'has ended'
        [ "$(now)" -lt "$end" ] || give_up "$node" "$what"
        sleep 0.2
    done
}

start() {
    for n in $FOUNDERS; do
        if [ -n "$(pid_of "$n")" ]; then
            say "node $n runs already, pid $(pid_of "$n")"
        else
            launch "$n"
            say "node $n started, pid $(cat "$(pid_file "$n")"), log $(log_file "$n")"
        fi
    done
    for n in $FOUNDERS; do
        wait_until "$START_DEADLINE" "$n" "was not ready within $START_DEADLINE s" ready "$n"
    done
    first=$(url 1)
    second=$(url 2)
    cat <<END
all three are ready; try:
  curl -i -X PUT --data 'hello' $first/greeting
  curl -i $second/greeting
  make kill-2, and then write and read again
  make restart-2
  make status, make logs, make stop
END
}

# change METHOD N [OPTION...]: asks a node other than N, which may be leaving, to change the membership of N.
change() {
    method=$1; member=$2
    shift 2
    for n in $FOUNDERS; do
        if [ "$n" != "$member" ] && ready "$n"; then
            answer=$(curl --disable --silent --show-error --noproxy '*' --max-time 30 --write-out '\n%{http_code}' \
                --request "$method" "$@" "$(url "$n")/_/members/$member") || fail "node $n did not answer: $answer"
            case $answer in
                *204) return 0 ;;
                *) fail "node $n refuses: $(say "$answer" | sed -n 's/.*"detail" *: *"\([^"]*\)".*/\1/p')" ;;
            esac
        fi
    done
    fail 'no node of the cluster is ready; see make status'
}

# votes N: whether node N says of itself that it does.
votes() {
    case $(field role "$(status_of "$1")") in leader | follower | candidate | pre-candidate) ;; *) return 1 ;; esac
}

add() {
    if [ -n "$(pid_of "$1")" ]; then
        say "node $1 runs already, pid $(pid_of "$1")"
        change PUT "$1" --data "$(peer_url "$1")"
    else
        # Refused, it is not even started.
        check_port "$1"
        change PUT "$1" --data "$(peer_url "$1")"
        launch "$1"
        say "node $1 started, pid $(cat "$(pid_file "$1")"), log $(log_file "$1")"
    fi
    wait_until "$CATCH_UP_DEADLINE" "$1" "was not made a voter within $CATCH_UP_DEADLINE s" votes "$1"
    target=$(commit_index_of_others "$1")
    wait_until "$CATCH_UP_DEADLINE" "$1" "has not caught up to index $target within $CATCH_UP_DEADLINE s" \
        caught_up "$1" "$target"
    say "node $1 is a voter, and has caught up: applied index $applied, the others were at $target"
}

remove() {
    change DELETE "$1"
    wait_for_end "$1" 'its removal'
    rm -rf "$(data_dir "$1")"
}

# signal N NAME: sends it to node N, and waits until the process has ended.
signal() {
    pid=$(pid_of "$1")
    if [ -z "$pid" ]; then
        say "node $1 does not run"
        return 0
    fi
    kill -s "$2" "$pid" 2>/dev/null || true
    wait_for_end "$1" "SIG$2"
}

# wait_for_end N REASON: waits until node N, which has that reason to end, has done so.
wait_for_end() {
    end=$(($(now) + STOP_DEADLINE))
    until [ -z "$(pid_of "$1")" ]; do
        [ "$(now)" -lt "$end" ] || fail "node $1 still runs $STOP_DEADLINE s after $2; see $(log_file "$1")"
        sleep 0.1
    done
    rm -f "$(pid_file "$1")"
    say "node $1 ended by $2"
}

# commit_index_of_others N: the highest commit index that a node other than N knows; 0 if none answers.
commit_index_of_others() {
    highest=0
    for n in $(nodes); do
        [ "$n" = "$1" ] && continue
        index=$(field commit_index "$(status_of "$n")")
        if [ "${index:-0}" -gt "$highest" ]; then highest=$index; fi
    done
    say "$highest"
}

caught_up() {
    applied=$(field applied_index "$(status_of "$1")")
    [ -n "$applied" ] && [ "$applied" -ge "$2" ]
}

restart() {
    case " $(nodes) " in *" $1 "*) ;; *) fail "node $1 is no member of the cluster; make add-$1" ;; esac
    if [ -n "$(pid_of "$1")" ]; then signal "$1" TERM; fi
    target=$(commit_index_of_others "$1")
    launch "$1"
    wait_until "$CATCH_UP_DEADLINE" "$1" "has not caught up to index $target within $CATCH_UP_DEADLINE s" \
        caught_up "$1" "$target"
    say "node $1 started, pid $(pid_of "$1"), and has caught up: applied index $applied, the others were at $target"
}

status() {
    format='%-5s%-9s%-15s%-8s%-6s%-8s%-9s%-6s%s\n'
    # shellcheck disable=SC2059
    printf "$format" node pid role leader term commit applied keys url
    for n in $(nodes); do
        pid=$(pid_of "$n")
        json=$(status_of "$n")
        if [ -n "$json" ]; then role=$(field role "$json"); elif [ -n "$pid" ]; then role='no answer'; else role=down; fi
        # shellcheck disable=SC2059
        printf "$format" "$n" "${pid:--}" "$role" "$(or_dash leader)" "$(or_dash term)" "$(or_dash commit_index)" \
            "$(or_dash applied_index)" "$(or_dash keys)" "$(url "$n")"
    done
}

or_dash() {
    value=$(field "$1" "$json")
    say "${value:--}"
}

logs() {
    for n in $(nodes); do
        [ -f "$(log_file "$n")" ] || continue
        say "==> $(log_file "$n") <=="
        tail -n 20 "$(log_file "$n")"
    done
    say "to follow them: tail -f $CLUSTER_DIR/*.log"
}

# All are told at once: one after the other, the last would look for a majority that has gone.
stop_all() {
    running=
    for n in $(nodes); do
        pid=$(pid_of "$n")
        [ -n "$pid" ] || continue
        kill -s TERM "$pid" 2>/dev/null || true
        running="$running $n"
    done
    [ -n "$running" ] || say 'no node runs'
    for n in $running; do wait_for_end "$n" SIGTERM; done
}

clean() {
    stop_all
    for n in $FOUNDERS $JOINER; do
        rm -rf "$(data_dir "$n")"
        rm -f "$(log_file "$n")" "$(pid_file "$n")"
    done
    rmdir "$CLUSTER_DIR" 2>/dev/null || true
    say "deleted data and logs in $CLUSTER_DIR"
}

command -v curl >/dev/null || fail 'curl is needed to ask the nodes whether they are ready; install it'
# Data directories name their node on its command line, for this cluster and no other on the machine.
case $CLUSTER_DIR in /*) ;; *) CLUSTER_DIR=$(pwd)/$CLUSTER_DIR ;; esac

case ${1:-} in
    start | status | logs | clean) "$1" ;;
    stop-all) stop_all ;;
    kill) signal "$2" KILL ;;
    stop) signal "$2" TERM ;;
    restart | add | remove) "$1" "$2" ;;
    *) fail 'usage: cluster.sh start | {kill | stop | restart | add | remove} N | status | logs | stop-all | clean' ;;
esac
