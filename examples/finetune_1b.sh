#!/usr/bin/env bash
# Finetune on conversations: chat data -> training -> checkpoint -> Hugging Face model with its chat template -> a chat.
#
#   bash examples/finetune_1b.sh [any flag of `python -m megatron_steel.finetune`]
#
# It goes on from what examples/pretrain_1b.sh saved, or from any Hugging Face folder. Without a GPU the same recipe runs
# on 2 CPU ranks: from the tiny model of pretrain_1b.sh it takes about a minute.
# Settings (environment variables):
#   OUTPUT_DIR       where everything goes (runs/finetune_1b): checkpoints/, hf/
#   PRETRAINED       a directory of checkpoints or a Hugging Face folder (runs/pretrain_1b/checkpoints)
#   TRAIN_DATA       conversations: files, folders or patterns, or "W1 DATA1 W2 DATA2"; unset: the bundled sample chats
#   VALID_DATA       "name=DATA name=DATA"; unset with TRAIN_DATA: none
#   CHAT_TEMPLATE    a built-in template, a .jinja file, or "tokenizer" for the one that comes with the weights (chatml)
#   NUM_EPOCHS SEQ_LENGTH MICRO_BATCH_SIZE GLOBAL_BATCH_SIZE LR MIN_LR WARMUP_ITERS SAVE_INTERVAL EVAL_INTERVAL
#   GPUS_PER_NODE NNODES NODE_RANK MASTER_ADDR MASTER_PORT; RANKS_PER_NODE without GPUs (2)
#   STEPS            of "data train export" (all): which part of it to do
# Started again with the same OUTPUT_DIR it goes on from the newest checkpoint.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source examples/_environment.sh

OUTPUT_DIR=${OUTPUT_DIR:-runs/finetune_1b}
NNODES=${NNODES:-1} NODE_RANK=${NODE_RANK:-0} MASTER_ADDR=${MASTER_ADDR:-127.0.0.1} MASTER_PORT=${MASTER_PORT:-0}
PRETRAINED=${PRETRAINED:-runs/pretrain_1b/checkpoints}
STEPS=${STEPS:-data train export}
GPUS_PER_NODE=${GPUS_PER_NODE:-$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)}

wants() { [[ " $STEPS " == *" $1 "* ]]; }

[ -e "$PRETRAINED" ] ||
  steel_fail "$PRETRAINED is not there; run examples/pretrain_1b.sh first, or set PRETRAINED to a checkpoint directory or a Hugging Face folder"

if [ "$GPUS_PER_NODE" -gt 0 ]; then
  RANKS=$GPUS_PER_NODE
  DEVICE_FLAGS=(--bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
    --manual-gc --manual-gc-interval 100)
  echo "GPUs found: $RANKS on each of $NNODES node(s). Finetuning $PRETRAINED."
else
  RANKS=${RANKS_PER_NODE:-2}
  DEVICE_FLAGS=(--use-distributed-optimizer)
  echo "No GPU: finetuning $PRETRAINED with $RANKS CPU ranks."
fi

if [ -z "${TRAIN_DATA:-}" ]; then
  echo "TRAIN_DATA is not set: using the bundled sample chats, which a tiny model learns by heart."
  DATA_FLAGS=(--train-data examples/data/chat_train.jsonl --valid-data chats=examples/data/chat_valid.jsonl)
  # A few kilobytes: many passes in small steps.
  SEQ_LENGTH=${SEQ_LENGTH:-256} MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-1} GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-$((RANKS * NNODES))}
  WARMUP_ITERS=${WARMUP_ITERS:-5}
  if [ "$GPUS_PER_NODE" -gt 0 ]; then
    NUM_EPOCHS=${NUM_EPOCHS:-10} LR=${LR:-2e-5} MIN_LR=${MIN_LR:-2e-6}
  else
    NUM_EPOCHS=${NUM_EPOCHS:-60} LR=${LR:-3e-3} MIN_LR=${MIN_LR:-1e-4}
  fi
else
  read -ra DATA_WORDS <<< "$TRAIN_DATA"
  DATA_FLAGS=(--train-data "${DATA_WORDS[@]}")
  if [ -n "${VALID_DATA:-}" ]; then
    read -ra VALID_WORDS <<< "$VALID_DATA"
    DATA_FLAGS+=(--valid-data "${VALID_WORDS[@]}")
  fi
  SEQ_LENGTH=${SEQ_LENGTH:-2048} MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-2} GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-64}
  NUM_EPOCHS=${NUM_EPOCHS:-3} LR=${LR:-2e-5} MIN_LR=${MIN_LR:-2e-6} WARMUP_ITERS=${WARMUP_ITERS:-50}
fi

CHAT_FLAGS=(
  --pretrained-checkpoint "$PRETRAINED" "${DATA_FLAGS[@]}" --chat-template "${CHAT_TEMPLATE:-chatml}" --packing
)
TRAINING_FLAGS=(
  --num-epochs "$NUM_EPOCHS" --seq-length "$SEQ_LENGTH"
  --micro-batch-size "$MICRO_BATCH_SIZE" --global-batch-size "$GLOBAL_BATCH_SIZE"
  --lr "$LR" --min-lr "$MIN_LR" --lr-decay-style cosine --lr-warmup-iters "$WARMUP_ITERS"
  --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.0 --clip-grad 1.0 "${DEVICE_FLAGS[@]}"
)
SAVE_FLAGS=(--save "$OUTPUT_DIR/checkpoints" --auto-resume --save-interval "${SAVE_INTERVAL:-500}" --save-total-limit 3)
LOG_FLAGS=(--log-interval 10 --eval-interval "${EVAL_INTERVAL:-100}" --eval-iters 10 --tensorboard-dir "$OUTPUT_DIR/tensorboard")

if wants data && [ "$NODE_RANK" -eq 0 ]; then
  echo "--- two conversations as the model will read them, what is trained in them marked"
  "$PYTHON" -m megatron_steel.finetune "${CHAT_FLAGS[@]}" "${TRAINING_FLAGS[@]}" --inspect 2 "$@"
fi
if wants train; then
  echo "--- finetune"
  steel_launch megatron_steel.finetune \
    "${CHAT_FLAGS[@]}" "${TRAINING_FLAGS[@]}" "${SAVE_FLAGS[@]}" "${LOG_FLAGS[@]}" "$@"
fi
wants export && [ "$NODE_RANK" -eq 0 ] || exit 0

echo "--- export to $OUTPUT_DIR/hf"
"$PYTHON" tools/convert_hf.py export --load "$OUTPUT_DIR/checkpoints" --hf "$OUTPUT_DIR/hf"
if [ "$GPUS_PER_NODE" -eq 0 ]; then
  "$PYTHON" tools/convert_hf.py verify --load "$OUTPUT_DIR/checkpoints" --hf "$OUTPUT_DIR/hf"
fi
echo "--- a chat"
"$PYTHON" tools/generate.py --load "$OUTPUT_DIR/checkpoints" --chat-template "${CHAT_TEMPLATE:-chatml}" --temperature 0 \
  --prompt "Who are you?" "你是谁？" --max-new-tokens 48
echo "--- done: checkpoints in $OUTPUT_DIR/checkpoints, Hugging Face model in $OUTPUT_DIR/hf"
