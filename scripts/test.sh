#!/usr/bin/env bash
# Sets up .venv if need be, then lint, format and all tests. Arguments go to pytest: bash scripts/test.sh tests/test_data.py -x
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/_env.sh
set_up

reports=$(mktemp -d)
trap 'rm -rf "$reports"' EXIT
failed=()

step() { # NAME, then the command
    local name=$1 code=0
    shift
    printf '\n== %s\n' "$name"
    "$@" || code=$?
    # pytest's 5: no test selected, which is right for one of the two processes when the arguments name some tests only
    if [ "$code" -ne 0 ] && { [ "$code" -ne 5 ] || [ "${name%% *}" != tests ]; }; then
        failed+=("$name")
    fi
}

# Without a GPU, Triton's kernels run in its interpreter, which must be chosen before Triton is imported: a process of its own.
# Each kernel is tested once: on the GPU where there is one.
step "lint" "$PY" -m ruff check .
step "format" "$PY" -m ruff format --check .
if sees_gpu; then
    step "tests" "$PY" -m pytest -n auto --junit-xml="$reports/1.xml" "$@"
else
    step "tests" "$PY" -m pytest -n auto --junit-xml="$reports/1.xml" -m "not triton and not gpu" "$@"
    step "tests of kernels in the interpreter" env TRITON_INTERPRET=1 \
        "$PY" -m pytest -n auto --junit-xml="$reports/2.xml" -m "triton and not gpu" "$@"
fi

printf '\n'
[ ${#failed[@]} -eq 0 ] || printf 'failed: %s\n' "${failed[@]}"
code=0
"$PY" - "$reports" <<'END' || code=1
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

suites = [s for path in Path(sys.argv[1]).glob("*.xml") for s in ElementTree.parse(path).iter("testsuite")]
tests, failures, errors, skipped = (sum(int(s.get(k, 0)) for s in suites) for k in ("tests", "failures", "errors", "skipped"))
print(f"{tests - failures - errors - skipped} passed, {failures + errors} failed, {skipped} skipped")
sys.exit(tests == 0)
END
[ "$code" -eq 0 ] && [ ${#failed[@]} -eq 0 ]
