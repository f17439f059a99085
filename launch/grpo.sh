#!/usr/bin/env bash
# Train on one machine or on several. Run the same command on each of them, in the same directory:
#
#   launch/grpo.sh --nodes 4 --head-address 10.0.0.1 --config configs/gsm8k.yaml run.dir=/shared/run learner.world_size=16
#
# One node trains alone, on loopback. Of several, the head starts Ray, waits for the others and trains; the others join
# and stay until the head is done. What was started here is stopped at the end, however it ends; a Ray that listens at
# the head's address already is used and left running.
#
#   --config FILE              settings, for `hybrid-rl train`
#   --nodes N                  machines, the head among them           (NNODES, SLURM_NNODES; default 1)
#   --head-address HOST[:PORT] the head, as the others reach it        (MASTER_ADDR and MASTER_PORT, the first host of
#                              SLURM_JOB_NODELIST; default port 6379, which needs PORT + 1 too)
#   --node-rank K              0 is the head                           (NODE_RANK, GROUP_RANK, SLURM_NODEID; by default
#                              the machine that has the head's address is the head)
#   --timeout SECONDS          for the nodes to find one another       (default 600)
#   --resume, --auto-resume    as of `hybrid-rl train`
#   --print                    say what would be done, and do nothing
#   key=value ...              settings that replace the file's
#
# HYBRID_RL_RAY_START holds further options of `ray start`, such as --num-cpus=8. Signals are passed on to the trainer,
# which saves upon SIGTERM. Exit status: the trainer's on the head, 0 on the others; 2 if the input or the environment
# is wrong, 1 if Ray failed.
set -euo pipefail
launch=$(cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)

say() { printf 'grpo: %s\n' "$*" >&2; }
die() {
    say "$*"
    exit 2
}

nodes='' rank='' head='' config='' timeout='' print='' resume=() settings=()
while (($#)); do
    case $1 in
        --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" && continue ;;
        --config | --nodes | --node-rank | --head-address | --timeout)
            [[ -n ${2:-} ]] || die "$1 needs a value"
            case $1 in
                --config) config=$2 ;;
                --nodes) nodes=$2 ;;
                --node-rank) rank=$2 ;;
                --head-address) head=$2 ;;
                --timeout) timeout=$2 ;;
            esac
            shift
            ;;
        --resume | --auto-resume) resume+=("$1") ;;
        --print) print=yes ;;
        -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit ;;
        -*) die "there is no option $1; --help lists them" ;;
        *=*) settings+=("$1") ;;
        *) die "'$1' is neither an option nor key=value; the configuration is named by --config" ;;
    esac
    shift
done
[[ -n $config ]] || die "--config FILE is needed"
[[ -r $config ]] || die "--config $config cannot be read from $PWD"

# choose NAME FLAG VARIABLE...: leaves the flag's value in NAME, else that of the variables, which must not differ; and
# where it came from in NAME_from.
choose() {
    local -n value=$1 from=$1_from
    local name
    from=$2
    [[ -z $value ]] || return 0
    from=
    for name in "${@:3}"; do
        [[ -n ${!name:-} ]] || continue
        [[ -z $value || $value == "${!name}" ]] || die "$from=$value but $name=${!name}; say by $2 which is meant"
        value=${!name} from=$name
    done
}
nodes_from='' rank_from='' head_from=''
choose nodes --nodes NNODES SLURM_NNODES
choose rank --node-rank NODE_RANK GROUP_RANK SLURM_NODEID
choose head --head-address MASTER_ADDR
if [[ -z $head && -n ${SLURM_JOB_NODELIST:-} ]]; then
    head_from=SLURM_JOB_NODELIST
    read -r head < <(scontrol show hostnames "$SLURM_JOB_NODELIST") || die "scontrol cannot read $head_from"
fi
[[ $head_from != MASTER_ADDR || -z ${MASTER_PORT:-} ]] || head+=":$MASTER_PORT"

: "${nodes:=1}" "${timeout:=600}"
[[ $nodes =~ ^[1-9][0-9]{0,4}$ ]] || die "${nodes_from}=$nodes is no number of nodes from 1 on"
[[ $timeout =~ ^[1-9][0-9]{0,5}$ ]] || die "--timeout $timeout is no number of seconds from 1 on"
if [[ -n $rank ]]; then
    [[ $rank =~ ^(0|[1-9][0-9]{0,4})$ ]] || die "$rank_from=$rank is no rank from 0 on"
    ((rank < nodes)) || die "$rank_from=$rank is no rank of $nodes nodes (${nodes_from:-default}), which count from 0"
fi

# shellcheck source=launch/env.sh
source "$launch/env.sh"
# Of torch.distributed; in Ray's workers it would take them for its own.
unset MASTER_ADDR MASTER_PORT NNODES NODE_RANK GROUP_RANK RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE

train=(hybrid-rl train "$config" "${resume[@]}" "${settings[@]}")
show() { printf '%q ' "$@" && echo; }
if ((nodes == 1)) && [[ $head_from != --head-address ]]; then
    say "1 node (${nodes_from:-default}): Ray starts with the run, on loopback only"
    if [[ -n $print ]]; then show "${train[@]}" && exit; fi
    exec "${train[@]}"
fi

[[ -n $head ]] || die "$nodes nodes need a head; name it on each of them by --head-address HOST[:PORT]"
[[ " ${settings[*]}" != *" cluster.address="* ]] || die "cluster.address is what --head-address says; drop it"
host=${head%:*} port=6379
[[ $head != *:* ]] || port=${head##*:}
if [[ -z $host || ! $port =~ ^[1-9][0-9]{3,4}$ ]] || ((port < 1024 || port > 65534)); then
    die "$head_from=$head is not of the form HOST[:PORT], with a port from 1024 to 65534"
fi
read -r ip where < <(python "$launch/nodes.py" address "$host" "$nodes") || exit 2 # it has said why
if [[ -z $rank ]]; then
    rank_from="its address"
    if [[ $where == here ]]; then rank=0; else rank=1; fi
fi
((rank > 0)) || [[ $where == here ]] ||
    die "$rank_from=0 is the head, but $host ($ip, $head_from) is no address of this machine; correct one of them"

role="node $rank"
[[ $rank != 0 ]] || role="the head"
[[ $rank_from != "its address" || $rank == 0 ]] || role="not the head"
say "$nodes node$( ((nodes == 1)) || echo s) (${nodes_from:-default}), head $ip:$port ($head_from), this is $role ($rank_from)"
# Ray Client's server cannot be left out of a head; its default port may be another cluster's.
start=(ray start --block "--address=$ip:$port")
if ((rank == 0)); then
    start=(ray start --block --head "--node-ip-address=$ip" "--port=$port" "--ray-client-server-port=$((port + 1))"
        --include-dashboard=false --no-monitor)
fi
read -ra further <<<"${HYBRID_RL_RAY_START:-}"
start+=("${further[@]}")
train+=("cluster.address=$ip:$port")
if [[ -n $print ]]; then
    show "${start[@]}"
    if ((rank == 0)); then show "${train[@]}"; fi
    exit
fi

temp='' ray='' child='' signalled=''

start_ray() {
    temp=$(mktemp -d "/tmp/hybrid-rl.XXXXXX") # short: sockets in it have paths of at most 107 bytes
    say "starting Ray; it listens on ${1:-}ports of its choosing, on all interfaces, with RAY_AUTH_MODE=$RAY_AUTH_MODE"
    # In a session of its own, all of it and nothing else can be stopped. Actors never idle: Ray need not wait for that.
    RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0 setsid "${start[@]}" "--temp-dir=$temp" >"$temp/start.log" 2>&1 &
    ray=$!
}
stop_ray() {
    [[ -n $ray ]] || return 0
    kill -TERM "$ray" 2>/dev/null || true
    local i
    for ((i = 0; i < 60; i++)); do
        kill -0 "$ray" 2>/dev/null || break
        sleep 0.5
    done
    wait "$ray" 2>/dev/null || true
    python "$launch/nodes.py" end "$ray"
    ray=''
}
finish() {
    local status=$?
    trap '' INT TERM HUP
    stop_ray
    if [[ -n $temp ]]; then
        case $status in
            0 | 130 | 143) rm -rf -- "$temp" ;;
            *) say "Ray's logs are in $temp" ;;
        esac
    fi
}
trap finish EXIT

# attend COMMAND...: runs it, passes signals on to it, and returns its exit status.
attend() {
    local status
    set -m
    "$@" &
    child=$!
    set +m
    while true; do
        signalled=''
        wait "$child" && status=0 || status=$?
        [[ -n $signalled ]] || break
    done
    child=''
    return "$status"
}
pass_on() {
    signalled=$1
    [[ -n $child ]] || exit $((128 + $(kill -l "$1")))
    kill "-$1" "$child" 2>/dev/null || true
}
trap 'pass_on INT' INT
trap 'pass_on TERM' TERM
trap 'pass_on TERM' HUP

pause() { attend sleep "$1" || exit $?; }
listens() { timeout 3 bash -c ": </dev/tcp/$ip/$port" 2>/dev/null; }
# The host answers that nobody listens, which a network that is down does not do.
refuses() { [[ $(LC_ALL=C timeout 3 bash -c ": </dev/tcp/$ip/$port" 2>&1) == *refused* ]]; }
log_tail() { [[ ! -f $temp/start.log ]] || tail -n 5 "$temp/start.log" >&2; }

token=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}
needs_token() { [[ $RAY_AUTH_MODE == token && -z ${RAY_AUTH_TOKEN:-} && ! -s $token ]]; }
check_token() {
    ! needs_token || die "no Ray token here: copy the head's ${token/#$HOME/\~}, set RAY_AUTH_TOKEN_PATH, or, where all" \
        "who reach these machines are trusted, RAY_AUTH_MODE=disabled on every node"
}

if ((rank == 0)); then
    if listens; then
        say "Ray listens at $ip:$port already; it is used, and left running"
        check_token
    else
        if needs_token && [[ -z ${RAY_AUTH_TOKEN_PATH:-} ]]; then
            (umask 077 && ray get-auth-token --generate >/dev/null 2>&1) || die "cannot make $token"
            say "made ${token/#$HOME/\~}; every node needs it (where they share the home directory, they have it)"
        fi
        check_token
        start_ray "ports $port, $((port + 1)) and "
        until listens; do
            kill -0 "$ray" 2>/dev/null || { log_tail && say "Ray could not start" && exit 1; }
            pause 0.5
        done
    fi
    attend python "$launch/nodes.py" wait "$ip:$port" "$nodes" "$timeout" || exit $?
    attend "${train[@]}" || exit $?
    exit 0
fi

if [[ $rank_from == "its address" ]] && python "$launch/nodes.py" member "$ip:$port"; then
    say "this machine is a node of Ray at $ip:$port already; nothing to do"
    exit 0
fi
while true; do
    for ((SECONDS = 0; SECONDS < timeout; )); do
        ! listens || break
        pause 1
    done
    ((SECONDS < timeout)) || die "nobody listens at $ip:$port after $timeout s; is this command running there, and does" \
        "a firewall let it through?"
    check_token
    SECONDS=0
    start_ray
    refused=0
    while kill -0 "$ray" 2>/dev/null; do
        pause 2
        if refuses; then refused=$((refused + 1)); else refused=0; fi
        if ((refused == 2)); then
            say "the head is done"
            exit 0
        fi
    done
    if ((SECONDS < 30)) && ! refuses; then
        log_tail
        say "Ray could not join $ip:$port"
        exit 1
    fi
    stop_ray # what it left
    ! refuses || { say "the head is done" && exit 0; }
    say "lost the head at $ip:$port after $SECONDS s; joining again"
    rm -rf -- "$temp"
done
