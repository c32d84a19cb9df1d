#!/usr/bin/env bash
# Kills, corrupts and resumes real training processes for some minutes, and fuzzes the readers: bash scripts/soak.sh --minutes=15
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/_env.sh
set_up
exec "$PY" scripts/soak.py "$@"
