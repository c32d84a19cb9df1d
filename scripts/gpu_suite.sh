#!/usr/bin/env bash
# Measures what this project claims of a GPU: bash scripts/gpu_suite.sh --out DIR [--minutes 9] [--only PARTS] [--data DIR]
#
# Whatever has finished within the minutes is complete in DIR: results.csv, summary.md, suite.log, junit.xml, curves/. A part that
# fails or runs out of time is reported, and the next one starts. Needs torch, triton, numpy, pytest, and no network. All of it
# takes three calls of 9 minutes, in order of value; the build takes seconds where it was done before:
#
#   --only build,step124,tests               the 124M step by component beside its peers (~200 s), all GPU tests (the rest)
#   --only build,ops,sanitize,startup        every op beside its peers (~200 s), compute-sanitizer (150 s), time to the first step
#   --only build,truth,step350,step1558      loss curves on two backends (~150 s), 350M (~90 s), 1558M (the rest)
#
# Parts: build    the CUDA extension, for this GPU's architecture (~60 s)
#        step124  GPT-2 124M, B=64, T=1024: six providers in turns, breakdown of each
#        tests    pytest -m "gpu or triton"
#        ops      attention, cross_entropy, mlp, layernorm, optimizer, embedding, ceilings
#        sanitize scripts/sanitize_gpu.py: memcheck and racecheck over small cases of every kernel
#        startup  process start to the end of the first step, empty caches and filled ones
#        truth    benchmarks/loss_curves.py, on tokens that must be there: --data or NANOGPT_DATA, else data/plays, which
#                 `python -m nanogpt.data.prepare plays` makes
#        step350, step1558   ours and the strongest baseline, at B=32 and B=16
#        batch1558           the baseline at B=24, which its memory allows; ours needs --recompute there
# liger-kernel, quack-kernels and cut-cross-entropy take part in ops where they are installed or on PYTHONPATH. Results of several
# calls make one page when each results.csv lies under a name of its own in one folder of benchmarks/results.
set -uo pipefail

parts="build,step124,tests,ops,sanitize,startup,truth,step350,step1558,batch1558"
out="" minutes=9 only="build,step124,tests" data=${NANOGPT_DATA:-data/plays}
usage() { echo "gpu_suite.sh: $1 (--out DIR [--minutes N] [--only $parts] [--data DIR])" >&2; exit 2; }
wanted() { case ",$only," in *",$1,"*) ;; *) return 1 ;; esac; }

while [ $# -gt 0 ]; do
    case "$1" in --out | --minutes | --only | --data) [ $# -ge 2 ] || usage "$1 needs a value" ;; *) usage "unknown option $1" ;; esac
    case "$1" in --out) out=$2 ;; --minutes) minutes=$2 ;; --only) only=$2 ;; --data) data=$2 ;; esac
    shift 2
done
budget=$(awk -v m="$minutes" 'BEGIN { print int(60 * m) }')
[ "$budget" -gt 0 ] || usage "--minutes $minutes is no positive number"
[ -n "$out" ] || usage "--out DIR is missing"
for part in ${only//,/ }; do
    case ",$parts," in *",$part,"*) ;; *) usage "--only $part: no such part" ;; esac
done

mkdir -p "$out"
out=$(cd "$out" && pwd)
[ ! -d "$data" ] || data=$(cd "$data" && pwd)
cd "$(dirname "$0")/.."
if wanted truth && [ ! -f "$data/dataset.json" ]; then
    usage "truth: no tokens in $data; make them with python -m nanogpt.data.prepare plays, or name them with --data DIR"
fi
python=${PYTHON:-$(command -v python || echo python3)}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1)
if [ -n "$arch" ]; then
    export TORCH_CUDA_ARCH_LIST=$arch
elif ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "gpu_suite.sh: needs a GPU: nvidia-smi lists none, and $python has no PyTorch that sees one" >&2
    exit 2
fi
started=$SECONDS failures=0
left() { echo $((budget - (SECONDS - started))); }

# part NAME LIMIT_SECONDS COMMAND...: within its limit and what is left of the minutes. It is stopped as by Ctrl-C, at which pytest
# still writes its report.
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
    timeout --signal=INT --kill-after=15 "$limit" "$@" 2>&1 | tee -a "$out/suite.log"
    status=${PIPESTATUS[0]}
    case $status in 0) status=ok ;; 124 | 137) status="out of time" ;; *) status="failed ($status)" ;; esac
    [ "$status" = ok ] || failures=$((failures + 1))
    echo "| $name | $status | $((SECONDS - begin)) s |" >>"$out/parts.tmp"
}
bench() { part "$1" "$2" "$python" "benchmarks/$3.py" --out "$out/results.csv" "${@:4}"; }

: >"$out/parts.tmp"
nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,memory.total --format=csv | tee -a "$out/suite.log"
wanted build && part "build" 150 env BUILD_CUDA=1 "$python" setup.py build_ext --inplace
wanted step124 && bench "step 124M" 250 train_step --quick --size 124M --breakdown --seconds $((budget / 4))
if wanted tests; then
    workers=$("$python" -c 'import importlib.util as u; print("-n auto --maxprocesses 14" if u.find_spec("xdist") else "")')
    # shellcheck disable=SC2086
    part "tests" 600 "$python" -m pytest -q -rfE $workers --continue-on-collection-errors -m "gpu or triton" --junitxml "$out/junit.xml" tests
fi
if wanted ops; then
    bench attention 60 attention --quick --providers ours,flash,cudnn,flash-attn
    for op in cross_entropy mlp layernorm optimizer embedding ceilings; do
        bench "$op" 90 "$op" --quick
    done
fi
wanted sanitize && part "sanitize" 170 "$python" scripts/sanitize_gpu.py
wanted startup && bench "start-up" 170 train_step --startup --size 124M --providers ours,compile-cudnn-low
wanted truth && bench "training truth" 180 loss_curves --size 124M --kernels triton --data "$data" --seconds 140 --plot
wanted step350 && bench "step 350M" 150 train_step --quick --size 350M --providers ours,compile-cudnn-low
wanted step1558 && bench "step 1558M" 350 train_step --quick --size 1558M --providers ours,compile-cudnn-low
wanted batch1558 && bench "step 1558M, B=24" 350 train_step --quick --size 1558M --batch 24 --providers compile-cudnn-low

{
    echo "# GPU suite, $(date -u +%F)"
    echo
    echo "| part | outcome | took |"
    echo "|---|---|---|"
    cat "$out/parts.tmp"
    echo
    [ ! -f "$out/results.csv" ] || "$python" scripts/report.py "$out"
} >"$out/summary.md" 2>>"$out/suite.log"
rm "$out/parts.tmp"
cat "$out/summary.md"
exit $((failures > 0))
