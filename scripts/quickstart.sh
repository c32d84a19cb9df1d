#!/usr/bin/env bash
# From a fresh clone to text in some minutes: sets up .venv, prepares Shakespeare's plays, trains a character-level GPT that
# fits this machine, and prints what it writes. Arguments go to the trainer: bash scripts/quickstart.sh --max_iters=500
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/_env.sh
set_up

if sees_gpu; then
    preset=plays_char out=out-plays-char
else
    preset=plays_cpu out=out-plays-cpu
fi

for word; do
    case "$word" in --out_dir=*) out=${word#*=} ;; esac
done

"$PY" -m nanogpt.data.prepare plays_char
if compgen -G "$out/step-*" >/dev/null; then
    printf '%s holds a run: going on with it\n' "$out"
    set -- --init_from=resume "$@"
fi
"$PY" -m nanogpt.train "$preset" "$@"
printf '\nA sample of what it writes:\n'
"$PY" -m nanogpt.sample --out_dir="$out" --num_samples=1 --max_new_tokens=500

printf '\nMade here:\n'
printf '  %-20s %s\n' data/plays_char "the tokens" "$out" "checkpoints and metrics.jsonl"
printf 'More text:  %s -m nanogpt.sample --out_dir=%s --start="To be" --num_samples=3\n' "$PY" "$out"
printf 'Train on:   %s -m nanogpt.train --help\n' "$PY"
