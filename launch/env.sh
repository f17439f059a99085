# shellcheck shell=bash
# The environment of every command here. The scripts source it; for a terminal: source launch/env.sh
# A variable that is already set keeps its value.

_root=$(cd -P -- "$(dirname -- "${BASH_SOURCE[0]:-$0}")/.." && pwd)

# hybrid-rl and pytest by name; DeepSpeed and vLLM also look up ninja on the PATH when they compile kernels.
case ":$PATH:" in *":$_root/.venv/bin:"*) ;; *) export PATH="$_root/.venv/bin:$PATH" ;; esac
unset _root

# The one place that decides between the two builds; launch/setup.sh installs the one named here.
if [[ -z ${HYBRID_RL_DEVICE:-} ]]; then
    if [[ $(nvidia-smi -L 2>/dev/null) == *"GPU "* ]]; then HYBRID_RL_DEVICE=gpu; else HYBRID_RL_DEVICE=cpu; fi
fi
export HYBRID_RL_DEVICE

# A tokenizer's thread pool can deadlock in a forked process; left to itself it warns there and switches off.
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
# Usage statistics are sent by those who ask for it.
export VLLM_NO_USAGE_STATS="${VLLM_NO_USAGE_STATS:-1}"
export RAY_USAGE_STATS_ENABLED="${RAY_USAGE_STATS_ENABLED:-0}"
# Who reaches a Ray cluster's ports can run programs there. A token is asked for, as Ray does by itself only on clusters of
# one machine; all nodes need the same one (docs/cluster.md).
export RAY_AUTH_MODE="${RAY_AUTH_MODE:-token}"
# For `ray start`, as hybrid_rl/cluster/ray.py sets it for a cluster of one machine: Ray's workers are the job itself.
export RAY_worker_niceness="${RAY_worker_niceness:-0}"

if [[ $HYBRID_RL_DEVICE == cpu ]]; then
    # Engines, learner ranks and reward processes share the cores; OpenMP threads that wait for one another
    # across them made a step 10 to 100 times slower.
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    # DeepSpeed would probe for an accelerator, and warn, in every process.
    export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
    # GiB for each engine. vLLM's own default is a share of the whole machine's memory: several engines overdraw it.
    export VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-1}"
    # vLLM would bind its threads to cores, and every engine on a machine to the same ones.
    export VLLM_CPU_OMP_THREADS_BIND="${VLLM_CPU_OMP_THREADS_BIND:-nobind}"
    # The engine runs in its actor's own process: weights are handed over in memory, and no child outlives the actor.
    export VLLM_ENABLE_V1_MULTIPROCESSING="${VLLM_ENABLE_V1_MULTIPROCESSING:-0}"
fi
