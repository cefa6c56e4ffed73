#!/usr/bin/env bash
# Stops the Seamark daemons on every host of a file, over ssh: the agents first, the head (the first host) last.
#
#   scripts/cluster-down.sh [--dry-run] HOSTFILE
#
# HOSTFILE is cluster-up.sh's. It may be run twice. A host that fails doesn't keep the others up; the exit code is 1.
set -euo pipefail

usage="usage: cluster-down.sh [--dry-run] HOSTFILE"
dry_run=false hostfile=""
for argument in "$@"; do
    case $argument in
        --dry-run) dry_run=true ;;
        -h | --help) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" && exit 0 ;;
        -*) echo "cluster-down.sh: no option $argument; $usage" >&2 && exit 64 ;;
        *) [[ -z $hostfile ]] || { echo "$usage" >&2 && exit 64; }
            hostfile=$argument ;;
    esac
done
[[ -n $hostfile ]] || { echo "$usage" >&2 && exit 64; }
[[ -r $hostfile ]] || { echo "cluster-down.sh: $hostfile can't be read" >&2 && exit 78; }

hosts=() commands=()
while IFS= read -r line || [[ -n $line ]]; do
    read -ra words <<<"${line%%#*}" || true
    [[ ${#words[@]} -gt 0 ]] || continue
    config="" seamark=seamark
    for word in "${words[@]}"; do
        [[ $word =~ ^[A-Za-z0-9_][A-Za-z0-9_./:@~+=-]*$ ]] ||
            { echo "cluster-down.sh: $hostfile: $word is neither a host nor key=value" >&2 && exit 78; }
        case $word in
            config=*) config=${word#*=} ;;
            seamark=*) seamark=${word#*=} ;;
        esac
    done
    hosts+=("${words[0]}")
    commands+=("$seamark down${config:+ --config $config}")
done <"$hostfile"
[[ ${#hosts[@]} -gt 0 ]] || { echo "cluster-down.sh: $hostfile names no host" >&2 && exit 78; }

result=0
for ((index = ${#hosts[@]} - 1; index >= 0; index--)); do
    echo "+ ssh ${hosts[index]} ${commands[index]}"
    $dry_run || ssh -n -o BatchMode=yes -o ConnectTimeout=10 "${hosts[index]}" "${commands[index]}" || {
        echo "cluster-down.sh: ${hosts[index]} failed: run there: ${commands[index]}" >&2
        result=1
    }
done
exit "$result"
