#!/usr/bin/env bash
# Shows what Seamark does, in a minute: brings the daemons up under supervisord, with two agents of two ranks each, and
# trains a small GPT on them, twice. The second run loses a rank, and the coordinator, to kill -9 in mid-training. Both
# end with the same parameters, bit by bit.
#
# Leaves nothing behind but the virtual environment .venv, also when it is interrupted.
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/install.sh
began=$SECONDS
PATH=$PWD/.venv/bin:$PATH
steps=50
kill_at=25
place=$(mktemp -d "${TMPDIR:-/tmp}/seamark-quickstart.XXXXXX")
mkdir -m 0700 "$place/run"
export XDG_RUNTIME_DIR=$place/run XDG_STATE_HOME=$place/state
# Addresses of its own, so that it meets no suite that runs already.
export SEAMARK_LIGHTHOUSE_ADDRESS=ipc://$place/run/l SEAMARK_LIGHTHOUSE_EVENTS=ipc://$place/run/e
export SEAMARK_COORDINATOR_ADDRESS=ipc://$place/run/c SEAMARK_AGENT_SLOTS=2 SEAMARK_AGENT_NODE=node
run_pid=

clean_up() {
    trap - EXIT INT TERM
    if [[ -n $run_pid ]] && kill -TERM "$run_pid" 2>/dev/null; then
        wait "$run_pid" || true
    fi
    seamark down >/dev/null 2>&1 || true
    rm -rf "$place"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

say() { printf '\n== %s\n' "$*"; }

# start NAME: runs the example as job NAME in the background.
start() {
    seamark run --name "$1" --nnodes 2 --nproc-per-node 2 --checkpoint-dir "$place/$1" --log-dir "$place/logs-$1" \
        examples/train_bytes.py --steps "$steps" >"$place/$1.out" 2>&1 &
    run_pid=$!
}

# finish NAME: waits for it; prints what it printed, and fails if it failed.
finish() {
    local code=0
    wait "$run_pid" || code=$?
    run_pid=
    cat "$place/$1.out"
    if ((code != 0)); then
        echo "quickstart: job $1 ended with exit code $code" >&2
        exit 1
    fi
}

digest() { sed -n 's/^final parameters sha256 //p' "$place/logs-$1/rank_0.log" | tail -n 1; }

say "0. the suite: seamark up --agents 2"
seamark up --agents 2

say "1. an undisturbed run: four ranks, DDP over Gloo, $steps steps"
start undisturbed
finish undisturbed

say "2. the same run, and kill -9 of the coordinator and of rank 2 after step $kill_at"
start killed
until grep -qs "^step $kill_at " "$place/logs-killed/rank_0.log"; do
    if ! kill -0 "$run_pid" 2>/dev/null; then
        finish killed
        echo "quickstart: the job ended before step $kill_at" >&2
        exit 1
    fi
    sleep 0.05
done
victim=$(sed -n 's/.*rank 2 pid \([0-9]*\).*/\1/p' "$place/killed.out" | head -n 1)
coordinator=$(seamark status --json | python -c 'import json, sys; print(json.load(sys.stdin)["coordinator"]["pid"])')
echo "kill -9 $coordinator   (coordinator)"
kill -9 "$coordinator"
echo "kill -9 $victim   (rank 2)"
kill -9 "$victim"
finish killed
grep -h "^resumed from step [1-9]" "$place"/logs-killed/rank_0.log

say "3. what happened: seamark why killed"
seamark why killed

say "4. the parameters at the end, SHA-256"
echo "undisturbed  $(digest undisturbed)"
echo "killed       $(digest killed)"
if [[ -z $(digest killed) || $(digest undisturbed) != "$(digest killed)" ]]; then
    echo "quickstart: the parameters differ" >&2
    exit 1
fi
echo "equal: the kills cost a moment and no work ($((SECONDS - began)) s after installation)"
