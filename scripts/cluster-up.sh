#!/usr/bin/env bash
# Starts the Seamark daemons on every host of a file, over ssh: the first host is the head.
#
#   scripts/cluster-up.sh [--dry-run] [--keys DIR | --insecure] HOSTFILE
#
# --keys DIR makes what is missing of the suite's keys in DIR on this machine (seamark keys --help), and gives every host
# its own over ssh: the head all of them, for they are its list of who may speak, another host those of its nodes and the
# clients'. Run it again after `seamark keys revoke NAME --keys DIR`, with the node taken out of HOSTFILE: the daemons that
# run take the list as it is now.
# --insecure does without: everything is sent in the clear, and every sender believed.
#
# HOSTFILE has a line per host, `[user@]host [key=value...]`, and comments after #. The keys:
#   address=HOST   under which the other hosts reach this one (default: host, as written)
#   node=NAME      name of the node (default: the host's own name; with --keys: host, as written)
#   slots=N        workers that the node takes (default: automatic)
#   agents=N       agents on the host (default: 1)
#   config=FILE    configuration file on that host
#   keys=DIR       directory of its keys on that host (default: .config/seamark/keys in the home directory)
#   seamark=FILE   the command on that host (default: seamark, found by its PATH)
# The head runs lighthouse, coordinator and agent, the others an agent. It may be run twice: what runs is left
# alone. If a host fails, those that this call brought up are taken down again.
set -euo pipefail

usage="usage: cluster-up.sh [--dry-run] [--keys DIR | --insecure] HOSTFILE"
dry_run=false insecure=false keys="" hostfile=""
while [[ $# -gt 0 ]]; do
    argument=$1
    shift
    case $argument in
        --dry-run) dry_run=true ;;
        --insecure) insecure=true ;;
        --keys)
            [[ -n ${1:-} ]] || { echo "cluster-up.sh: --keys which directory? $usage" >&2 && exit 64; }
            keys=$1
            shift
            ;;
        -h | --help) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" && exit 0 ;;
        -*) echo "cluster-up.sh: no option $argument; $usage" >&2 && exit 64 ;;
        *) [[ -z $hostfile ]] || { echo "$usage" >&2 && exit 64; }
            hostfile=$argument ;;
    esac
done
[[ -n $hostfile ]] || { echo "$usage" >&2 && exit 64; }
[[ -z $keys ]] || ! $insecure || { echo "cluster-up.sh: --keys or --insecure, not both; $usage" >&2 && exit 64; }
[[ -r $hostfile ]] || { echo "cluster-up.sh: $hostfile can't be read" >&2 && exit 78; }

fail() {
    echo "cluster-up.sh: $hostfile, line $line_number: $1" >&2
    exit 78
}

is_loopback() { [[ $1 == localhost || $1 =~ ^127\.[0-9]+\.[0-9]+\.[0-9]+$ ]]; }

# What a host's keys are copied by, one step for each file: a daemon that reads meanwhile never sees half of one.
install_keys() { # directory on the host
    echo "umask 077; mkdir -p $1 && new=\$(mktemp -d $1/.new.XXXXXX) &&" \
        "tar -xof - -C \"\$new\" && mv -f \"\$new\"/* $1/ && rmdir \"\$new\""
}

hosts=() commands=() downs=() nodes=() key_files=() key_directories=()
line_number=0 head=""
while IFS= read -r line || [[ -n $line ]]; do
    line_number=$((line_number + 1))
    read -ra words <<<"${line%%#*}" || true
    [[ ${#words[@]} -gt 0 ]] || continue
    host=${words[0]} address=${words[0]#*@} node="" slots="" agents="" config="" seamark=seamark
    key_directory='"$HOME/.config/seamark/keys"'
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
            keys) [[ $value == /* ]] || fail "$pair: must be an absolute path" && key_directory=$value ;;
            seamark) seamark=$value ;;
            *) fail "no key ${pair%%=*}: there are address, node, slots, agents, config, keys, seamark" ;;
        esac
    done
    [[ " ${hosts[*]-} " != *" $host "* ]] || fail "$host is there twice"
    if ! is_loopback "$address" && ! $insecure && [[ -z $keys ]]; then
        fail "$address can be reached from other machines, and without keys whoever reaches the daemons can command the jobs: say --keys DIR, and they are made and given to the hosts. On a network where you trust every machine, say --insecure: everything is then sent in the clear and every sender believed"
    fi
    files=client.key
    if [[ -n $keys ]]; then
        node=${node:-${host#*@}}
        [[ $node =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ ]] || fail "$node: with keys a node's name has letters, digits, dots, dashes and underscores only: give it another with node=NAME"
        for ((number = 0; number < ${agents:-1}; number++)); do
            name=$node
            [[ $number -eq 0 ]] || name+=-$number
            nodes+=("$name")
            files+=" $name.key"
        done
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
    [[ -z $keys ]] || variables+=" SEAMARK_SECURITY_KEYS=$key_directory"
    [[ ${#hosts[@]} -gt 0 ]] || files=all
    key_files+=("$files") key_directories+=("$key_directory")
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

here() { # command...
    echo "+ $*"
    $dry_run || "$@"
}

give_keys() { # index
    local files=${key_files[$1]} command
    command=$(install_keys "${key_directories[$1]}")
    if [[ $files == all ]] && ! $dry_run; then
        files=$(cd "$keys" && echo *.key && find . -name '*.revoked')
    fi
    echo "+ tar -cf - -C $keys ${files//$'\n'/ } | ssh ${hosts[$1]} $command"
    # shellcheck disable=SC2086  # several names, none with a blank
    $dry_run || tar -cf - -C "$keys" $files | ssh -o BatchMode=yes -o ConnectTimeout=10 "${hosts[$1]}" "$command"
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

if [[ -n $keys ]]; then
    command -v seamark >/dev/null || { echo "cluster-up.sh: --keys needs the seamark command on this machine, too" >&2 && exit 78; }
    here env SEAMARK_AGENT_NODE="${nodes[0]}" seamark keys init --keys "$keys"
    for name in "${nodes[@]:1}"; do
        here seamark keys add --keys "$keys" "$name"
    done
fi

for index in "${!hosts[@]}"; do
    if [[ -n $keys ]] && ! give_keys "$index"; then
        echo "cluster-up.sh: ${hosts[index]} did not take its keys" >&2
        exit 1
    fi
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
