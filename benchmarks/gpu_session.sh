#!/usr/bin/env bash
# Everything that needs a GPU, in stages of less than ten minutes, on a machine that may have no network.
#
#   WHEELS=wheels OUT=results bash benchmarks/gpu_session.sh STAGE ...
#
#   install   the wheels of $WHEELS (benchmarks/gpu_wheels.txt says which), without asking an index
#   join      one wheel that came in pieces: $WHEELS/NAME.whl.part-* become $WHEELS/NAME.whl
#   tests     pytest -m gpu tests/gpu
#   kernels   benchmarks/gpu_kernels.py
#   train     benchmarks/gpu_train.py: the torch backend, plain megatron-core, what each fused part is worth
#   engine    the same of Transformer Engine, bf16 and FP8 (its wheels must be in $WHEELS before `install`)
#   large     the same of an 8B model
#
# Later stages run when one fails; the exit code is 1 then. Logs, JSON and Markdown come to $OUT (default: results).
# STEEL_PYTHON is the interpreter, python3 without it.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() { sed -n '2,/^set /p' "${BASH_SOURCE[0]}" | sed '$d; s/^# \{0,1\}//'; }
[ $# -gt 0 ] || { usage >&2; exit 2; }
python=${STEEL_PYTHON:-python3}
out=${OUT:-results}
wheels=${WHEELS:-wheels}
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

# Put the wheels together that came in pieces.
join_pieces() {
  local first whole
  for first in "$wheels"/*.whl.part-*; do
    [ -e "$first" ] || { echo "no pieces in $wheels"; return 1; }
    whole=${first%.part-*}
    [ -e "$whole" ] || cat "$whole".part-* > "$whole.incomplete"
    [ -e "$whole" ] || mv "$whole.incomplete" "$whole"
  done
}

run_stage() {
  case $1 in
    install) "$python" -m pip install --quiet --no-index --no-deps --break-system-packages "$wheels"/*.whl ;;
    join) join_pieces ;;
    tests) "$python" -m pytest -m gpu tests/gpu -q -p no:cacheprovider ;;
    kernels) "$python" benchmarks/gpu_kernels.py --json "$out/gpu_kernels.json" ;;
    train) "$python" benchmarks/gpu_train.py --stages torch plain ablation local --minutes 8 --record "$out/gpu_train" ;;
    engine) "$python" benchmarks/gpu_train.py --stages engine fp8 --minutes 8 --record "$out/gpu_engine" ;;
    large) "$python" benchmarks/gpu_train.py --stages large --minutes 8 --record "$out/gpu_large" ;;
    *) usage >&2; exit 2 ;;
  esac
}

for stage in "$@"; do
  case $stage in install | join | tests | kernels | train | engine | large) ;; *) usage >&2; exit 2 ;; esac
done
failed=()
for stage in "$@"; do
  echo "--- $stage"
  begun=$SECONDS
  run_stage "$stage" > >(tee "$out/$stage.log") 2>&1 || failed+=("$stage")
  wait $! 2> /dev/null
  echo "--- $stage: $((SECONDS - begun)) s"
done
[ ${#failed[@]} -eq 0 ] || { echo "FAILED: ${failed[*]}"; exit 1; }
