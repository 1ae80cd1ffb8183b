#!/usr/bin/env bash
# Install with the docs extra into .venv and build the documentation into site/; warnings are errors. Idempotent.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/install.sh docs
# Material for MkDocs prints an advertisement for its successor otherwise.
NO_MKDOCS_2_WARNING=1 exec .venv/bin/mkdocs build --strict "$@"
