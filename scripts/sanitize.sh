#!/usr/bin/env bash
# Runs the tests of the CPU extension under the address and undefined-behaviour sanitizers: bash scripts/sanitize.sh [pytest arguments]
# Builds in a copy of the sources. Needs .venv (scripts/test.sh makes it) or PYTHON, and a compiler with its sanitizer runtimes.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath --no-symlinks "${PYTHON:-.venv/bin/python}")
compiler=${CXX:-c++}

copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r csrc kernels nanogpt tests setup.py pyproject.toml "$copy"
rm -f "$copy"/kernels/*.so
cd "$copy"

flags="-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g -O1"
PATH="$(dirname "$python"):$PATH" CXXFLAGS=$flags LDFLAGS="-fsanitize=address,undefined" BUILD_CUDA=0 \
    "$python" setup.py build_ext --inplace

# Python itself is not instrumented, so the runtimes come first. It keeps memory at exit: leaks are not looked for.
preload=$("$compiler" -print-file-name=libasan.so):$("$compiler" -print-file-name=libubsan.so)
# The subprocess tests build their own copies, without sanitizers.
LD_PRELOAD=$preload ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
    "$python" -m pytest -q -p no:cacheprovider tests/test_row_kernels.py tests/test_optimizer.py tests/test_split_mm.py "$@"
