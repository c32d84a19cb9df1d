# Sourced by the other scripts, from the repository's root: makes .venv once, and sets PY to its Python.
#
# Settings: PYTHON (an interpreter >= 3.11), TORCH (what pip installs, such as torch==2.12.0), TORCH_INDEX_URL (where from,
# such as https://download.pytorch.org/whl/cu126), and those of pip (PIP_INDEX_URL, ...).

PY=.venv/bin/python
LOG=.venv/install.log
CPU_TORCH=torch==2.13.0
CPU_INDEX=https://download.pytorch.org/whl/cpu

die() {
    printf 'set-up: %s\n' "$*" >&2
    exit 1
}

is_recent() { # INTERPRETER
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        command -v "$PYTHON" >/dev/null || die "PYTHON=$PYTHON: no such program"
        is_recent "$PYTHON" || die "PYTHON=$PYTHON: needs Python >= 3.11, this is $("$PYTHON" --version 2>&1)"
        echo "$PYTHON"
        return
    fi
    for name in python3 python3.13 python3.12 python3.11 python3.14 python; do
        if is_recent "$name"; then
            echo "$name"
            return
        fi
    done
    die "needs Python >= 3.11, this is $(python3 --version 2>&1); install one, or set PYTHON=/path/to/python"
}

has_gpu() { # this machine
    nvidia-smi -L >/dev/null 2>&1
}

sees_gpu() { # the PyTorch of .venv
    "$PY" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'
}

pip_install() { # WHAT FOR, then pip's arguments
    local what=$1
    shift
    printf 'set-up: %s (log: %s)\n' "$what" "$LOG"
    if ! "$PY" -m pip install --disable-pip-version-check "$@" >>"$LOG" 2>&1; then
        tail -n 5 "$LOG" >&2
        if grep -qi 'no space left' "$LOG"; then
            die "$what: the disk is full; free some space and run this again"
        elif grep -qiE 'NewConnectionError|ConnectTimeout|ReadTimeout|name resolution|ProxyError|No matching distribution' "$LOG"; then
            die "$what: the package index does not answer or lacks it; check the network, or name a mirror with PIP_INDEX_URL"
        fi
        die "$what: pip failed; the whole story is in $LOG"
    fi
}

# True where pip's choice is a build with CUDA libraries: gigabytes that a machine without a GPU has no use for.
chooses_cuda() { # REQUIREMENT
    "$PY" -m pip install --disable-pip-version-check --dry-run --ignore-installed --no-deps --quiet --report - "$1" 2>>"$LOG" |
        "$PY" -c '
import json, sys
metadata = json.load(sys.stdin)["install"][0]["metadata"]
needs = metadata.get("requires_dist", [])
sys.exit(not any(need.startswith(("nvidia", "cuda")) for need in needs))' 2>>"$LOG"
}

install_torch() {
    if [ -n "${TORCH_INDEX_URL:-}" ]; then
        pip_install "installing PyTorch from $TORCH_INDEX_URL" "${TORCH:-torch}" --index-url "$TORCH_INDEX_URL"
    elif has_gpu; then
        pip_install "installing PyTorch for GPUs, some 3 GB" "${TORCH:-torch>=2.11}"
        sees_gpu ||
            printf 'set-up: %s cannot use the GPU here (%s); going on with the CPU. %s\n' \
                "$("$PY" -c 'import torch; print("torch", torch.__version__)')" \
                "$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | head -n 1)" \
                "Update the driver, or: rm -r .venv, then again with TORCH_INDEX_URL=https://download.pytorch.org/whl/cu126" >&2
    elif chooses_cuda "${TORCH:-$CPU_TORCH}"; then
        pip_install "installing PyTorch for CPUs" "${TORCH:-$CPU_TORCH}" --extra-index-url "$CPU_INDEX"
    else
        pip_install "installing PyTorch for CPUs" "${TORCH:-$CPU_TORCH}"
    fi
}

# What the environment depends on; it is made anew when this changes.
fingerprint() {
    {
        echo "${TORCH:-} ${TORCH_INDEX_URL:-} $(has_gpu && echo gpu)"
        find pyproject.toml setup.py scripts/_env.sh csrc -type f | LC_ALL=C sort | xargs cat
    } | cksum
}

set_up() {
    local wanted python gigabytes free
    wanted=$(fingerprint)
    if [ -x "$PY" ] && [ "$(cat .venv/.complete 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    if ! is_recent "$PY"; then
        [ ! -e .venv ] || die "needs Python >= 3.11, .venv holds $("$PY" --version 2>&1); remove it (rm -r .venv) and run this again"
        python=$(find_python) || exit 1
        gigabytes=$(has_gpu && echo 12 || echo 4)
        free=$(($(df -Pk . | awk 'NR == 2 { print $4 }') / 1048576))
        [ "$free" -ge "$gigabytes" ] || die "$free GB are free in $PWD, the environment needs $gigabytes GB"
        printf 'set-up: making .venv with %s\n' "$("$python" --version 2>&1)"
        "$python" -m venv .venv || {
            rm -rf .venv
            die "$python cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv"
        }
    fi
    rm -f .venv/.complete
    : >"$LOG"
    "$PY" -c 'import torch' 2>/dev/null || install_torch
    pip_install "installing build tools" 'setuptools>=77' wheel ninja
    pip_install "installing nanogpt and building its extension, some minutes" -v --no-build-isolation -e '.[test]'
    # What setup.py says of kernels that it could not build, which pip shows to nobody.
    grep -o 'nanogpt: pure-Python install.*' "$LOG" | head -n 1 || true
    if has_gpu; then
        grep -o 'nanogpt: no CUDA kernels.*' "$LOG" | head -n 1 || true
    fi
    printf '%s\n' "$wanted" >.venv/.complete
}
