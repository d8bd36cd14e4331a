#!/usr/bin/env bash
# Pretrain steel_1b: raw text -> indexed data -> training -> evaluation -> checkpoint -> Hugging Face model -> a sample.
#
#   bash examples/pretrain_1b.sh [any flag of `python -m megatron_steel.pretrain`]
#
# With GPUs this is the 1B recipe. Without one the same recipe runs at steel_tiny size on 2 CPU ranks in a few minutes.
# Settings (environment variables):
#   OUTPUT_DIR       where everything goes (runs/pretrain_1b): data/, checkpoints/, hf/
#   DATA_PATH        indexed data: PREFIX, or "W1 P1 W2 P2"; unset: the bundled sample corpus
#   TOKENIZER_MODEL  tokenizer folder DATA_PATH was encoded with (unset: the bundled one)
#   VALID_DATA_PATH  "name=PREFIX name=PREFIX"; unset with DATA_PATH: a split of it
#   MODEL TRAIN_ITERS SEQ_LENGTH MICRO_BATCH_SIZE GLOBAL_BATCH_SIZE LR MIN_LR WARMUP_ITERS SAVE_INTERVAL EVAL_INTERVAL
#   GPUS_PER_NODE NNODES NODE_RANK MASTER_ADDR MASTER_PORT; RANKS_PER_NODE without GPUs (2)
#   STEPS            of "data train export" (all): which part of it to do
# Started again with the same OUTPUT_DIR it goes on from the newest checkpoint.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source examples/_environment.sh

OUTPUT_DIR=${OUTPUT_DIR:-runs/pretrain_1b}
NNODES=${NNODES:-1} NODE_RANK=${NODE_RANK:-0} MASTER_ADDR=${MASTER_ADDR:-127.0.0.1} MASTER_PORT=${MASTER_PORT:-0}
SAMPLE=examples/data
STEPS=${STEPS:-data train export}
GPUS_PER_NODE=${GPUS_PER_NODE:-$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)}

if [ "$GPUS_PER_NODE" -gt 0 ]; then
  RANKS=$GPUS_PER_NODE
  MODEL=${MODEL:-steel_1b} SEQ_LENGTH=${SEQ_LENGTH:-2048} MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-8}
  GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-512} LR=${LR:-3e-4} MIN_LR=${MIN_LR:-0} WARMUP_ITERS=${WARMUP_ITERS:-2000}
  TRAIN_ITERS=${TRAIN_ITERS:-1070000} SAVE_INTERVAL=${SAVE_INTERVAL:-2000} EVAL_INTERVAL=${EVAL_INTERVAL:-2000}
  LOG_INTERVAL=${LOG_INTERVAL:-20}
  DEVICE_FLAGS=(--bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
    --manual-gc --manual-gc-interval 100)
  echo "GPUs found: $RANKS on each of $NNODES node(s). Training $MODEL."
else
  RANKS=${RANKS_PER_NODE:-2}
  MODEL=${MODEL:-steel_tiny} SEQ_LENGTH=${SEQ_LENGTH:-256} MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-4}
  GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-8} LR=${LR:-3e-3} MIN_LR=${MIN_LR:-1e-4} WARMUP_ITERS=${WARMUP_ITERS:-30}
  TRAIN_ITERS=${TRAIN_ITERS:-500} SAVE_INTERVAL=${SAVE_INTERVAL:-100} EVAL_INTERVAL=${EVAL_INTERVAL:-100}
  LOG_INTERVAL=${LOG_INTERVAL:-10}
  DEVICE_FLAGS=(--use-distributed-optimizer)
  echo "No GPU: the same recipe at $MODEL size on the bundled sample corpus with $RANKS CPU ranks."
fi

wants() { [[ " $STEPS " == *" $1 "* ]]; }

DATA_DIR=$OUTPUT_DIR/data
if [ -z "${DATA_PATH:-}" ]; then
  [ "$GPUS_PER_NODE" -gt 0 ] && echo "DATA_PATH is not set: using the bundled sample corpus, which only shows that all works."
  TOKENIZER_MODEL=$SAMPLE/tokenizer
  mkdir -p "$DATA_DIR"
  # Nodes may share the folder: the first to have the lock writes, the others wait and find it done.
  exec 9> "$DATA_DIR/.lock"
  ! command -v flock > /dev/null || flock 9
  for name in train valid_zh valid_en; do
    ! wants data || [ -f "$DATA_DIR/${name}_text_document.idx" ] && continue
    "$PYTHON" tools/preprocess_data.py --input "$SAMPLE/$name.jsonl" --output-prefix "$DATA_DIR/$name" \
      --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$TOKENIZER_MODEL" --append-eod --workers 2
  done
  exec 9>&-
  DATA_FLAGS=(--train-data-path "$DATA_DIR/train_text_document"
    --valid-data-path "zh=$DATA_DIR/valid_zh_text_document" "en=$DATA_DIR/valid_en_text_document")
  # A sample corpus is small on purpose: repeating it is fine, and a long default run stops after a few epochs of it.
  if [ "$GPUS_PER_NODE" -gt 0 ]; then
    DATA_FLAGS+=(--max-epochs-per-source 1000)
    [ "$TRAIN_ITERS" -gt 200 ] && TRAIN_ITERS=200 && WARMUP_ITERS=20
  fi
else
  TOKENIZER_MODEL=${TOKENIZER_MODEL:?set TOKENIZER_MODEL to the tokenizer folder DATA_PATH was encoded with}
  read -ra DATA_WORDS <<< "$DATA_PATH"
  DATA_FLAGS=(--data-path "${DATA_WORDS[@]}")
  if [ -n "${VALID_DATA_PATH:-}" ]; then
    read -ra VALID_WORDS <<< "$VALID_DATA_PATH"
    DATA_FLAGS=(--train-data-path "${DATA_WORDS[@]}" --valid-data-path "${VALID_WORDS[@]}")
  fi
fi

TRAINING_FLAGS=(
  --model "$MODEL" --seq-length "$SEQ_LENGTH" --train-iters "$TRAIN_ITERS"
  --micro-batch-size "$MICRO_BATCH_SIZE" --global-batch-size "$GLOBAL_BATCH_SIZE"
  --lr "$LR" --min-lr "$MIN_LR" --lr-decay-style cosine --lr-warmup-iters "$WARMUP_ITERS"
  --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.05 --clip-grad 1.0 "${DEVICE_FLAGS[@]}"
)
CHECKPOINT_FLAGS=(--save "$OUTPUT_DIR/checkpoints" --auto-resume --save-interval "$SAVE_INTERVAL" --save-total-limit 3)
LOG_FLAGS=(--log-interval "$LOG_INTERVAL" --eval-interval "$EVAL_INTERVAL" --tensorboard-dir "$OUTPUT_DIR/tensorboard")

if wants train; then
  echo "--- pretrain"
  steel_launch megatron_steel.pretrain \
    --tokenizer-model "$TOKENIZER_MODEL" "${DATA_FLAGS[@]}" \
    "${TRAINING_FLAGS[@]}" "${CHECKPOINT_FLAGS[@]}" "${LOG_FLAGS[@]}" "$@"
fi
wants export && [ "$NODE_RANK" -eq 0 ] || exit 0

if [ -z "${DATA_PATH:-}" ]; then
  echo "--- evaluate"
  "$PYTHON" tools/evaluate.py --load "$OUTPUT_DIR/checkpoints" --output "$OUTPUT_DIR/evaluation.json" \
    --valid-data-path "zh=$DATA_DIR/valid_zh_text_document" "en=$DATA_DIR/valid_en_text_document"
fi
echo "--- export to $OUTPUT_DIR/hf"
"$PYTHON" tools/convert_hf.py export --load "$OUTPUT_DIR/checkpoints" --hf "$OUTPUT_DIR/hf"
if [ "$GPUS_PER_NODE" -eq 0 ]; then
  "$PYTHON" tools/convert_hf.py verify --load "$OUTPUT_DIR/checkpoints" --hf "$OUTPUT_DIR/hf"
fi
echo "--- a sample"
"$PYTHON" tools/generate.py --load "$OUTPUT_DIR/checkpoints" --prompt "却说曹操" "It was the whale" \
  --max-new-tokens 48 --temperature 0.8 --top-p 0.9
echo "--- done: checkpoints in $OUTPUT_DIR/checkpoints, Hugging Face model in $OUTPUT_DIR/hf"
