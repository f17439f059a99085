#!/usr/bin/env bash
# From a fresh clone to a trained policy: environment, warm-started model, training, and a before/after table.
# Arguments go to `hybrid-rl train`, as in: launch/quickstart.sh steps=20 seed=1
set -euo pipefail
cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
launch/setup.sh
# shellcheck source=launch/env.sh
source launch/env.sh
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" # model and data are made here; without a network a lookup would stall

hybrid-rl warm-start configs/quickstart.yaml # returns at once if the model exists
exec hybrid-rl train configs/quickstart.yaml "$@"
