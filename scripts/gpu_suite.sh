#!/usr/bin/env bash
# One command turns a machine with a GPU into a set of results: bash scripts/gpu_suite.sh --out DIR [--minutes 9] [--only PARTS]
# Builds the extension, then runs, most important first: the 124M step, GPU tests, every benchmark in its quick form, the 350M
# step, start-up times. Whatever has finished within the minutes is complete in DIR: results.csv, summary.md, suite.log,
# junit.xml. A part that fails or runs out of time is reported, and the next one starts. Needs torch, triton, numpy, pytest.
set -uo pipefail

out="" minutes=9 only="build,step124,tests,ops,step350,startup"
usage() { echo "gpu_suite.sh: $1 (--out DIR [--minutes N] [--only $only])" >&2; exit 2; }
while [ $# -gt 0 ]; do
    case "$1" in --out | --minutes | --only) [ $# -ge 2 ] || usage "$1 needs a value" ;; *) usage "unknown option $1" ;; esac
    case "$1" in --out) out=$2 ;; --minutes) minutes=$2 ;; --only) only=$2 ;; esac
    shift 2
done
budget=$(awk -v m="$minutes" 'BEGIN { print int(60 * m) }')
[ "$budget" -gt 0 ] || usage "--minutes $minutes is no positive number"
[ -n "$out" ] || usage "--out DIR is missing"

mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
started=$SECONDS failures=0
left() { echo $((budget - (SECONDS - started))); }

# part NAME LIMIT_SECONDS COMMAND...: within its limit and what is left of the minutes.
part() {
    local name=$1 limit=$2 begin=$SECONDS status
    shift 2
    [ "$limit" -le "$(left)" ] || limit=$(left)
    if [ "$limit" -lt 5 ]; then
        echo "| $name | no time left | |" >>"$out/parts.tmp"
        failures=$((failures + 1))
        return
    fi
    echo "=== $name (limit $limit s): $*" | tee -a "$out/suite.log"
    timeout --kill-after=5 "$limit" "$@" 2>&1 | tee -a "$out/suite.log"
    status=${PIPESTATUS[0]}
    case $status in 0) status=ok ;; 124 | 137) status="out of time" ;; *) status="failed ($status)" ;; esac
    [ "$status" = ok ] || failures=$((failures + 1))
    echo "| $name | $status | $((SECONDS - begin)) s |" >>"$out/parts.tmp"
}
wanted() { case ",$only," in *",$1,"*) ;; *) return 1 ;; esac; }
bench() { "$python" "benchmarks/$1.py" --out "$out/results.csv" "${@:2}"; }
export -f bench
export python out

: >"$out/parts.tmp"
nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,memory.total --format=csv | tee -a "$out/suite.log"
wanted build && part "build extension" 180 "$python" setup.py build_ext --inplace
wanted step124 && part "step 124M" 240 bash -c 'bench train_step --quick --size 124M --breakdown --seconds '$((minutes * 15))
if wanted tests; then
    workers=$("$python" -c 'import importlib.util as u; print("-n auto --maxprocesses 14" if u.find_spec("xdist") else "")')
    # shellcheck disable=SC2086
    part "GPU tests" 200 "$python" -m pytest -q $workers -m "gpu or triton" --junitxml "$out/junit.xml" tests
fi
if wanted ops; then
    for op in attention cross_entropy mlp layernorm optimizer embedding ceilings; do
        part "$op" 100 bash -c "bench $op --quick"
    done
fi
wanted step350 && part "step 350M" 200 bash -c 'bench train_step --quick --size 350M --seconds 120'
wanted startup && part "start-up" 120 bash -c 'bench train_step --quick --size 124M --providers ours --startup --steps 3'

{
    echo "# GPU suite, $(date -u +%F)"
    echo
    echo "| part | outcome | took |"
    echo "|---|---|---|"
    cat "$out/parts.tmp"
    echo
    [ -f "$out/results.csv" ] && "$python" scripts/report.py "$out"
} >"$out/summary.md" 2>>"$out/suite.log"
rm "$out/parts.tmp"
cat "$out/summary.md"
exit $((failures > 0))
