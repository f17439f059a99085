#!/usr/bin/env bash
# From a fresh clone to a trained policy: environment, warm-started model, training, and a before/after table.
# Arguments go to `hybrid-rl train`, as in: launch/quickstart.sh steps=20 seed=1
set -euo pipefail
cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
launch/setup.sh
# shellcheck source=launch/env.sh
source launch/env.sh
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" # model and data are made here; without a network a lookup would stall

if [[ $HYBRID_RL_DEVICE == gpu && $(nvidia-smi -L | wc -l) -lt 4 ]]; then
    # Two learner ranks and two engines want a GPU each; on fewer, one rank and one engine share a GPU.
    set -- learner.world_size=1 rollout.engines=1 learner.gpus=0.5 rollout.gpus=0.5 rollout.gpu_memory_utilization=0.3 "$@"
fi
hybrid-rl warm-start configs/quickstart.yaml # returns at once if the model exists
exec hybrid-rl train configs/quickstart.yaml "$@"
