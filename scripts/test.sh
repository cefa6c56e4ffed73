#!/usr/bin/env bash
# Runs every check: style, types, tests. Further arguments go to pytest.
#
#   scripts/test.sh                                all of it; two tests at a time where that harms neither
#   scripts/test.sh -m suite                       one part: integration, inprocess, suite, replicas
#   scripts/test.sh --repeat 10 -m integration     one part ten times, with a summary
set -euo pipefail
cd "$(dirname "$0")/.."

repeat=1
if [[ ${1:-} == --repeat ]]; then
    repeat=${2:?--repeat needs a number}
    shift 2
fi
scripts/install.sh dev
PATH=$PWD/.venv/bin:$PATH

ruff check .
ruff format --check .
mypy

# Of all tests, or of those that one marker names, two run at a time where that harms neither; in the order of their
# folders, so that the long ones come first and neither half waits for the other.
tests() {
    local and=
    if (($# == 2)) && [[ $1 == -m ]]; then
        and=" and ($2)"
    elif (($# > 0)); then
        pytest "$@"
        return
    fi
    local code=0
    selected -m "alone$and" || code=$?
    selected -m "not alone$and" --numprocesses 2 --dist loadfile --no-loadscope-reorder || code=$?
    return $code
}

# pytest ends with 5 where a marker selects nothing.
selected() {
    pytest "$@" || (($? == 5))
}

failed=0
for ((round = 1; round <= repeat; round++)); do
    began=$SECONDS
    if ! tests "$@"; then
        failed=$((failed + 1))
    fi
    if ((repeat > 1)); then
        echo "round $round of $repeat: $((SECONDS - began)) s, $failed failed so far"
    fi
done
exit $((failed > 0))
