#!/usr/bin/env bash
# Starts the Seamark daemons on every host of a file, over ssh: the first host is the head.
#
#   scripts/cluster-up.sh [--dry-run] [--insecure] HOSTFILE
#
# HOSTFILE has a line per host, `[user@]host [key=value...]`, and comments after #. The keys:
#   address=HOST   under which the other hosts reach this one (default: host, as written)
#   node=NAME      name of the node (default: the host's own name)
#   slots=N        workers that the node takes (default: automatic)
#   agents=N       agents on the host (default: 1)
#   config=FILE    configuration file on that host
#   seamark=FILE   the command on that host (default: seamark, found by its PATH)
# The head runs lighthouse, coordinator and agent, the others an agent. It may be run twice: what runs is left
# alone. If a host fails, those that this call brought up are taken down again.
set -euo pipefail

usage="usage: cluster-up.sh [--dry-run] [--insecure] HOSTFILE"
dry_run=false insecure=false hostfile=""
for argument in "$@"; do
    case $argument in
        --dry-run) dry_run=true ;;
        --insecure) insecure=true ;;
        -h | --help) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" && exit 0 ;;
        -*) echo "cluster-up.sh: no option $argument; $usage" >&2 && exit 64 ;;
        *) [[ -z $hostfile ]] || { echo "$usage" >&2 && exit 64; }
            hostfile=$argument ;;
    esac
done
[[ -n $hostfile ]] || { echo "$usage" >&2 && exit 64; }
[[ -r $hostfile ]] || { echo "cluster-up.sh: $hostfile can't be read" >&2 && exit 78; }

fail() {
    echo "cluster-up.sh: $hostfile, line $line_number: $1" >&2
    exit 78
}

is_loopback() { [[ $1 == localhost || $1 =~ ^127\.[0-9]+\.[0-9]+\.[0-9]+$ ]]; }

hosts=() commands=() downs=()
line_number=0 head=""
while IFS= read -r line || [[ -n $line ]]; do
    line_number=$((line_number + 1))
    read -ra words <<<"${line%%#*}" || true
    [[ ${#words[@]} -gt 0 ]] || continue
    host=${words[0]} address=${words[0]#*@} node="" slots="" agents="" config="" seamark=seamark
    [[ $host =~ ^[A-Za-z0-9_][A-Za-z0-9._@-]*$ ]] || fail "$host is not a host name"
    for pair in "${words[@]:1}"; do
        value=${pair#*=}
        [[ $pair == *=* && $value =~ ^[A-Za-z0-9_./:~+-]+$ ]] || fail "$pair: expected key=value, without blanks or quotes"
        case ${pair%%=*} in
            address) address=$value ;;
            node) node=$value ;;
            slots) [[ $value =~ ^[0-9]+$ ]] || fail "$pair: must be a number" && slots=$value ;;
            agents) [[ $value =~ ^[1-9][0-9]*$ ]] || fail "$pair: must be a number from 1" && agents=$value ;;
            config) config=$value ;;
            seamark) seamark=$value ;;
            *) fail "no key ${pair%%=*}: there are address, node, slots, agents, config, seamark" ;;
        esac
    done
    [[ " ${hosts[*]-} " != *" $host "* ]] || fail "$host is there twice"
    if ! is_loopback "$address" && ! $insecure; then
        fail "$address can be reached from other machines, and keys don't exist yet: whoever reaches the daemons can command the jobs. On a network where you trust every machine, say --insecure: everything is then sent in the clear and every sender believed"
    fi
    roles=agent
    if [[ -z $head ]]; then
        head=$address roles=lighthouse,coordinator,agent
    elif is_loopback "$head" && ! is_loopback "$address"; then
        fail "$address can't reach the head at $head: give the head an address=HOST that the others can reach"
    fi
    variables="SEAMARK_LIGHTHOUSE_ADDRESS=tcp://$head:29710 SEAMARK_LIGHTHOUSE_EVENTS=tcp://$head:29711"
    variables+=" SEAMARK_COORDINATOR_ADDRESS=tcp://$head:29712 SEAMARK_AGENT_HOST=$address"
    [[ -z $node ]] || variables+=" SEAMARK_AGENT_NODE=$node"
    [[ -z $slots ]] || variables+=" SEAMARK_AGENT_SLOTS=$slots"
    ! $insecure || variables+=" SEAMARK_SECURITY_INSECURE=true"
    hosts+=("$host")
    commands+=("env $variables $seamark up --roles $roles${agents:+ --agents $agents}${config:+ --config $config}")
    downs+=("$seamark down${config:+ --config $config}")
done <"$hostfile"
[[ ${#hosts[@]} -gt 0 ]] || { echo "cluster-up.sh: $hostfile names no host" >&2 && exit 78; }

brought_up=()

on_host() { # index, command
    echo "+ ssh ${hosts[$1]} $2"
    # No password prompts: a host without a key fails at once instead of holding up the others.
    $dry_run || ssh -n -o BatchMode=yes -o ConnectTimeout=10 "${hosts[$1]}" "$2"
}

take_down() {
    local code=$?
    trap - EXIT
    trap '' INT TERM
    rm -f "$output"
    # Broken off half-way, by a signal or by ssh itself (255): nobody knows how far that host came.
    [[ -z $half_way ]] || echo "cluster-up.sh: ${hosts[half_way]} was broken off half-way; run there: ${downs[half_way]}" >&2
    [[ ${#brought_up[@]} -eq 0 ]] || echo "taking down again what this call brought up"
    for ((at = ${#brought_up[@]} - 1; at >= 0; at--)); do
        index=${brought_up[at]}
        on_host "$index" "${downs[index]}" || echo "cluster-up.sh: ${hosts[index]} could not be taken down: run there: ${downs[index]}" >&2
    done
    exit "$code"
}

output=$(mktemp) half_way=""
trap take_down EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

for index in "${!hosts[@]}"; do
    code=0 half_way=$index
    on_host "$index" "${commands[index]}" | tee "$output" || code=$?
    if [[ $code -ne 0 ]]; then
        echo "cluster-up.sh: ${hosts[index]} failed with exit code $code" >&2
        [[ $code -eq 255 ]] || half_way=""
        exit 1
    fi
    # `seamark up` says so first when its daemons ran before this call: then they are not this call's to take down.
    grep -q '^already running' "$output" || brought_up+=("$index")
    half_way=""
done
brought_up=()
