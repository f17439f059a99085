#!/usr/bin/env bash
# Train as a job of a Ray cluster that is there: launch/submit.sh --help
set -euo pipefail
launch=$(cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/env.sh
source "$launch/env.sh"
exec python "$launch/submit.py" "$@"
