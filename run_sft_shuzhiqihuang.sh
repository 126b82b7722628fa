#!/usr/bin/env bash
# 数智岐黄 SFT 微调：修改下面的变量，或用同名环境变量覆盖；附加的参数会追加到训练命令之后。
# ShuZhiQiHuang supervised fine-tuning: edit the variables below, or set them in the environment;
# further flags are appended to the training command and win.
#
#   bash run_sft_shuzhiqihuang.sh
#   MODEL_PATH=/path/to/Qwen2.5-14B NUM_GPUS=4 bash run_sft_shuzhiqihuang.sh --max_samples 1000
set -euo pipefail
# shellcheck source=scripts/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/scripts/launch.sh"
help_if_asked "${BASH_SOURCE[0]}" "$@"

# ---- 请修改 / edit here -------------------------------------------------------------------------
MODEL_PATH="${MODEL_PATH:-}" # 基础模型；留空则用演示模型 / base model; empty: the demo model
DATA_DIR="${DATA_DIR:-$REPO_ROOT/data}"
DATASET="${DATASET:-tcm_qa,medical_instruction}"
OUTPUT_DIR="${OUTPUT_DIR:-$REPO_ROOT/outputs/shuzhiqihuang-sft-$(date +%Y%m%d-%H%M%S)}"
CACHE_DIR="${CACHE_DIR:-$REPO_ROOT/cache}"
TEMPLATE="${TEMPLATE:-qwen}"
NUM_GPUS="${NUM_GPUS:-$(count_devices)}"
MASTER_PORT="${MASTER_PORT:-29500}"
DEEPSPEED_CONFIG="${DEEPSPEED_CONFIG-$REPO_ROOT/deepspeed_config.json}"
PER_DEVICE_BATCH_SIZE="${PER_DEVICE_BATCH_SIZE:-4}"
GRADIENT_ACCUMULATION_STEPS="${GRADIENT_ACCUMULATION_STEPS:-8}"
LEARNING_RATE="${LEARNING_RATE:-5e-5}"
NUM_EPOCHS="${NUM_EPOCHS:-3}"
WARMUP_STEPS="${WARMUP_STEPS:-100}"
SAVE_STEPS="${SAVE_STEPS:-500}"
EVAL_STEPS="${EVAL_STEPS:-500}"
LOGGING_STEPS="${LOGGING_STEPS:-10}"
# -------------------------------------------------------------------------------------------------

say "Preparing the environment / 准备环境"
# shellcheck source=scripts/setup_env.sh
source "$REPO_ROOT/scripts/setup_env.sh"
OUTPUT_DIR="$(flag_value output_dir "$OUTPUT_DIR" "$@")"
choose_model "$MODEL_PATH" "$@"
MODEL_PATH="$MODEL"

say "SFT / 监督微调: $MODEL_PATH -> $OUTPUT_DIR"
run_training \
  --stage sft \
  --model_name_or_path "$MODEL_PATH" \
  --do_train \
  --template "$TEMPLATE" \
  --dataset_dir "$DATA_DIR" \
  --dataset "$DATASET" \
  --finetuning_type lora \
  --lora_target q_proj,v_proj,k_proj,o_proj,gate_proj,up_proj,down_proj \
  --lora_rank 64 \
  --lora_alpha 128 \
  --lora_dropout 0.05 \
  --output_dir "$OUTPUT_DIR" \
  --cache_dir "$CACHE_DIR" \
  --per_device_train_batch_size "$PER_DEVICE_BATCH_SIZE" \
  --gradient_accumulation_steps "$GRADIENT_ACCUMULATION_STEPS" \
  --lr_scheduler_type cosine \
  --logging_steps "$LOGGING_STEPS" \
  --preprocessing_num_workers 16 \
  --save_steps "$SAVE_STEPS" \
  --learning_rate "$LEARNING_RATE" \
  --num_train_epochs "$NUM_EPOCHS" \
  --max_samples 100000 \
  --per_device_eval_batch_size 4 \
  --evaluation_strategy steps \
  --eval_steps "$EVAL_STEPS" \
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
