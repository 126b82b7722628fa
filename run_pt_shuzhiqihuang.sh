#!/usr/bin/env bash
# 数智岐黄预训练：修改下面的变量，或用同名环境变量覆盖；附加的参数会追加到训练命令之后。
# ShuZhiQiHuang continued pre-training: edit the variables below, or set them in the environment;
# further flags are appended to the training command and win.
#
#   bash run_pt_shuzhiqihuang.sh
#   MODEL_PATH=/path/to/Qwen2.5-14B NUM_GPUS=4 bash run_pt_shuzhiqihuang.sh --max_samples 5000
set -euo pipefail
# shellcheck source=scripts/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/scripts/launch.sh"
help_if_asked "${BASH_SOURCE[0]}" "$@"

# ---- 请修改 / edit here -------------------------------------------------------------------------
MODEL_PATH="${MODEL_PATH:-}" # 基础模型；留空则用演示模型 / base model; empty: the demo model
DATA_DIR="${DATA_DIR:-$REPO_ROOT/data}"
DATASET="${DATASET:-tcm_corpus,medical_textbook,clinical_notes}"
OUTPUT_DIR="${OUTPUT_DIR:-$REPO_ROOT/outputs/shuzhiqihuang-pt-$(date +%Y%m%d-%H%M%S)}"
CACHE_DIR="${CACHE_DIR:-$REPO_ROOT/cache}"
TEMPLATE="${TEMPLATE:-qwen}"
NUM_GPUS="${NUM_GPUS:-$(count_devices)}"
MASTER_PORT="${MASTER_PORT:-29501}"
DEEPSPEED_CONFIG="${DEEPSPEED_CONFIG-$REPO_ROOT/deepspeed_config.json}"
PER_DEVICE_BATCH_SIZE="${PER_DEVICE_BATCH_SIZE:-8}"
GRADIENT_ACCUMULATION_STEPS="${GRADIENT_ACCUMULATION_STEPS:-4}"
LEARNING_RATE="${LEARNING_RATE:-1e-4}"
NUM_EPOCHS="${NUM_EPOCHS:-1}"
WARMUP_STEPS="${WARMUP_STEPS:-500}"
SAVE_STEPS="${SAVE_STEPS:-1000}"
LOGGING_STEPS="${LOGGING_STEPS:-10}"
# -------------------------------------------------------------------------------------------------

say "Preparing the environment / 准备环境"
# shellcheck source=scripts/setup_env.sh
source "$REPO_ROOT/scripts/setup_env.sh"
OUTPUT_DIR="$(flag_value output_dir "$OUTPUT_DIR" "$@")"
choose_model "$MODEL_PATH" "$@"
MODEL_PATH="$MODEL"

say "Pre-training / 预训练: $MODEL_PATH -> $OUTPUT_DIR"
run_training \
  --stage pt \
  --model_name_or_path "$MODEL_PATH" \
  --do_train \
  --template "$TEMPLATE" \
  --dataset_dir "$DATA_DIR" \
  --dataset "$DATASET" \
  --finetuning_type lora \
  --lora_target q_proj,v_proj,k_proj,o_proj,gate_proj,up_proj,down_proj \
  --lora_rank 128 \
  --lora_alpha 256 \
  --lora_dropout 0.1 \
  --output_dir "$OUTPUT_DIR" \
  --cache_dir "$CACHE_DIR" \
  --per_device_train_batch_size "$PER_DEVICE_BATCH_SIZE" \
  --gradient_accumulation_steps "$GRADIENT_ACCUMULATION_STEPS" \
  --lr_scheduler_type cosine \
  --logging_steps "$LOGGING_STEPS" \
  --preprocessing_num_workers 24 \
  --save_steps "$SAVE_STEPS" \
  --learning_rate "$LEARNING_RATE" \
  --num_train_epochs "$NUM_EPOCHS" \
  --max_samples 1000000 \
  --max_seq_length 2048 \
  --max_grad_norm 1.0 \
  --warmup_steps "$WARMUP_STEPS" \
  --weight_decay 0.01 \
  --plot_loss \
  --overwrite_output_dir \
  --bf16 \
  --save_safetensors \
  --report_to none \
  "$@"

say "Done / 完成: $OUTPUT_DIR"
note "Merge the adapter / 合并 LoRA 权重:"
note "bash $(printf '%q ' "$REPO_ROOT/merge_lora_shuzhiqihuang.sh" "$OUTPUT_DIR" "$MODEL_PATH")"
