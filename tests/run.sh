#!/usr/bin/env bash
# Everything that needs no GPU: style, types, spelling, then the tests by level (unit, parity, distributed, invariant,
# faults, examples; gpu tests skip without a GPU). On a fresh machine it makes .venv first.
#
#   bash tests/run.sh [pytest arguments]        e.g. bash tests/run.sh tests/unit -k order
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
STEEL_EXTRAS=dev
source examples/_environment.sh
unset STEEL_EXTRAS
# Tests bring their own text; a network that hangs must not hang them.
export HF_HUB_OFFLINE=1 WANDB_MODE=offline TOKENIZERS_PARALLELISM=false

failed=()
check() {
  echo "--- $*"
  "$PYTHON" -m "$@" || failed+=("$1")
}

echo "Testing with $("$PYTHON" --version) at $PYTHON"
check ruff check --quiet .
check ruff format --check --quiet .
check mypy
check codespell_lib
[ ${#failed[@]} -eq 0 ] || echo "FAILED: ${failed[*]} (see above); the tests run anyway, and this script fails at the end"

echo "--- pytest $*"
status=0
"$PYTHON" -m pytest "$@" || status=$?
[ ${#failed[@]} -eq 0 ] || exit 1
exit "$status"
