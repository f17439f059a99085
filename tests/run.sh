#!/usr/bin/env bash
# The tests, in the environment they need. Arguments go to pytest, as in: tests/run.sh tests/learner -m slow
set -euo pipefail
cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
launch/setup.sh
# shellcheck source=launch/env.sh
source launch/env.sh
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" # a test that wants the hub fails at once and says so, instead of stalling
exec pytest "$@"
