#!/usr/bin/env bash
# Continued pre-training on plain text, merged into a model that can be fine-tuned next.
# 在纯文本上继续预训练，并合并成可以继续微调的模型。
#
#   bash run_pt.sh
#   MODEL=/path/to/model DATASET=my_corpus bash run_pt.sh --lora_rank 32
#
# Every value below can be set as an environment variable; flags are appended to the training
# command and win. Relative paths start at the folder you are in.
#   MODEL             folder or hub name (default: the demo model SmolLM2-135M-Instruct)
#   DATASET           names of dataset_info.json or files, comma separated
#   DATASET_DIR       folder of dataset_info.json (default: data of this checkout)
#   OUTPUT_DIR        where the result goes (default: saves/pt-DATE-TIME of this checkout)
#   EPOCHS LEARNING_RATE BATCH_SIZE GRAD_ACCUM CUTOFF_LEN LORA_RANK VAL_SIZE
#   NUM_GPUS          devices (default: all GPUs, or 1)
#   DEEPSPEED_CONFIG  DeepSpeed file; set it to nothing to train without DeepSpeed
set -euo pipefail
# shellcheck source=scripts/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/scripts/launch.sh"
help_if_asked "${BASH_SOURCE[0]}" "$@"
say "Preparing the environment / 准备环境"
# shellcheck source=scripts/setup_env.sh
source "$REPO_ROOT/scripts/setup_env.sh"

OUTPUT_DIR="$(flag_value output_dir "${OUTPUT_DIR:-$REPO_ROOT/saves/pt-$(date +%Y%m%d-%H%M%S)}" "$@")"
METHOD="$(flag_value finetuning_type lora "$@")"
NUM_GPUS="${NUM_GPUS:-$(count_devices)}"
MASTER_PORT="${MASTER_PORT:-29501}"
DEEPSPEED_CONFIG="${DEEPSPEED_CONFIG-$REPO_ROOT/deepspeed_config.json}"

choose_model "${MODEL:-}" "$@"

say "Training / 训练: $MODEL"
run_training \
  --stage pt \
  --do_train \
  --model_name_or_path "$MODEL" \
  --dataset_dir "${DATASET_DIR:-$REPO_ROOT/data}" \
  --dataset "${DATASET:-medical_corpus,tcm_corpus}" \
  --finetuning_type lora \
  --lora_rank "${LORA_RANK:-16}" \
  --lora_target all \
  --cutoff_len "${CUTOFF_LEN:-512}" \
  --packing \
  --val_size "${VAL_SIZE:-0.1}" \
  --per_device_train_batch_size "${BATCH_SIZE:-2}" \
  --gradient_accumulation_steps "${GRAD_ACCUM:-1}" \
  --num_train_epochs "${EPOCHS:-3}" \
  --learning_rate "${LEARNING_RATE:-2e-4}" \
  --lr_scheduler_type cosine \
  --warmup_steps "${WARMUP_STEPS:-2}" \
  --eval_strategy epoch \
  --save_strategy epoch \
  --save_total_limit 1 \
  --logging_steps 2 \
  --plot_loss \
  --output_dir "$OUTPUT_DIR" \
  "$@"

merge_result "$METHOD" "$OUTPUT_DIR"

say "Done / 完成"
note "adapter or model, logs, run.json / 训练结果: $OUTPUT_DIR"
note "loss curve / 损失曲线:                  $OUTPUT_DIR/training_loss.png"
note "model to go on with / 可继续微调的模型: $TUNED"
note "fine-tune it next / 继续微调:  MODEL=$(printf '%q' "$TUNED") bash $(printf '%q' "$REPO_ROOT/run_sft.sh")"
