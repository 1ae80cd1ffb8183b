#!/usr/bin/env bash
# Make or reuse .venv and install gradmerge into it, from pinned constraints.
# Usage: bash scripts/install.sh [EXTRA]      PYTHON=python3.12 chooses another interpreter
set -euo pipefail
cd "$(dirname "$0")/.."
extra="${1:-}"
target="${extra:+.[$extra]}"; target="${target:-.}"
stamp=".venv/.gradmerge-${extra:-plain}"
state="$(cat pyproject.toml scripts/constraints.txt | cksum)"
[ "$(cat "$stamp" 2>/dev/null || true)" = "$state" ] && exit 0
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
pip=".venv/bin/python -m pip --disable-pip-version-check --quiet"
# torch first and pinned: a looser request may pull gigabytes of CUDA packages. Where a build of
# torch is there already (a CUDA one, say), it is kept, and its Triton.
.venv/bin/python -c "import torch" 2>/dev/null || $pip install -c scripts/constraints.txt torch
torch="$(.venv/bin/python -c 'import torch; print(torch.__version__.split("+")[0])')"
triton="$(.venv/bin/python -c 'import triton; print(triton.__version__)' 2>/dev/null || true)"
sed "s/^torch==.*/torch==$torch/${triton:+; s/^triton==.*/triton==$triton/}" scripts/constraints.txt > .venv/constraints.txt
# Some pins have no build for Python 3.10; there, the ranges of pyproject.toml decide.
.venv/bin/python -c "import sys; sys.exit(sys.version_info < (3, 11))" \
  || grep '^torch==' scripts/constraints.txt > .venv/constraints.txt
$pip install -c .venv/constraints.txt -e "$target"
echo "$state" > "$stamp"
