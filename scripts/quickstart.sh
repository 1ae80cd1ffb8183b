#!/usr/bin/env bash
# Install, build real experts, learn a merge and print a table. Idempotent.
# Usage: bash scripts/quickstart.sh [text4|text8|lm|vision|vision4|vision8|chat|lm-chat] [--seeds 0 1 2] [--output FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/install.sh
exec .venv/bin/python scripts/quickstart.py "$@"
