#!/usr/bin/env bash
# Install with the test extra into .venv and run everything that CI runs. Idempotent.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/install.sh test,parity
export HF_HUB_OFFLINE=1 WANDB_MODE="${WANDB_MODE:-offline}" TOKENIZERS_PARALLELISM=false
# One thread a process: the models are tiny, and two test processes fill two cores.
export OMP_NUM_THREADS=1
bin=.venv/bin
$bin/ruff format --check src benchmarks scripts tests
$bin/ruff check src benchmarks scripts tests
$bin/mypy
$bin/lint-imports
$bin/codespell src benchmarks scripts tests configs docs README.md CHANGELOG.md CONTRIBUTING.md SECURITY.md
bash scripts/docs.sh --quiet
$bin/python -m pytest -n "${TEST_PROCESSES:-2}" -q "$@"
