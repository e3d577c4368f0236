#!/usr/bin/env bash
# The tests and benches of all ops on this machine's GPU, written to docs/results-<gpu>.md.
# --dry-run goes the same way without a GPU, emulated and short: no number in it means anything.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-.venv/bin/python}" bench/gpu.py "$@"
