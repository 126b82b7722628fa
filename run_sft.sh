#!/usr/bin/env bash
# Supervised fine-tuning from nothing to a tuned model: sets up Python, fetches a demo model,
# trains, merges, and shows answers before and after.
# 一条命令完成监督微调：准备环境、获取演示模型、训练、合并、对比回答。
#
#   bash run_sft.sh
#   MODEL=/path/to/model DATASET=my_data bash run_sft.sh --lora_rank 16
#
# Every value below can be set as an environment variable; flags are appended to the training
# command and win. Relative paths start at the folder you are in.
#   MODEL             folder or hub name (default: the demo model SmolLM2-135M-Instruct)
#   DATASET           names of dataset_info.json or files, comma separated
#   DATASET_DIR       folder of dataset_info.json (default: data of this checkout)
#   TEMPLATE          name of a chat template (default: the model's own)
#   OUTPUT_DIR        where the result goes (default: saves/sft-DATE-TIME of this checkout)
#   EPOCHS LEARNING_RATE BATCH_SIZE GRAD_ACCUM CUTOFF_LEN LORA_RANK VAL_SIZE
#   NUM_GPUS          devices (default: all GPUs, or 1)
#   DEEPSPEED_CONFIG  DeepSpeed file; set it to nothing to train without DeepSpeed
#   PROMPTS           questions for the comparison, one a line
set -euo pipefail
# shellcheck source=scripts/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/scripts/launch.sh"
help_if_asked "${BASH_SOURCE[0]}" "$@"
say "Preparing the environment / 准备环境"
# shellcheck source=scripts/setup_env.sh
source "$REPO_ROOT/scripts/setup_env.sh"

OUTPUT_DIR="$(flag_value output_dir "${OUTPUT_DIR:-$REPO_ROOT/saves/sft-$(date +%Y%m%d-%H%M%S)}" "$@")"
TEMPLATE="$(flag_value template "${TEMPLATE:-}" "$@")"
METHOD="$(flag_value finetuning_type lora "$@")"
NUM_GPUS="${NUM_GPUS:-$(count_devices)}"
MASTER_PORT="${MASTER_PORT:-29500}"
DEEPSPEED_CONFIG="${DEEPSPEED_CONFIG-$REPO_ROOT/deepspeed_config.json}"
PROMPTS="${PROMPTS:-Who are you?
What is your name?
你是谁？
How can I sleep better?}"

choose_model "${MODEL:-}" "$@"
template_flags=()
[[ -z $TEMPLATE ]] || template_flags=(--template "$TEMPLATE")

say "Training / 训练: $MODEL"
run_training \
  --stage sft \
  --do_train \
  --model_name_or_path "$MODEL" \
  --dataset_dir "${DATASET_DIR:-$REPO_ROOT/data}" \
  --dataset "${DATASET:-identity,tcm_alpaca,medical_qa}" \
  ${template_flags[@]+"${template_flags[@]}"} \
  --finetuning_type lora \
  --lora_rank "${LORA_RANK:-16}" \
  --lora_target all \
  --cutoff_len "${CUTOFF_LEN:-1024}" \
  --val_size "${VAL_SIZE:-0.05}" \
  --per_device_train_batch_size "${BATCH_SIZE:-8}" \
  --gradient_accumulation_steps "${GRAD_ACCUM:-1}" \
  --num_train_epochs "${EPOCHS:-4}" \
  --learning_rate "${LEARNING_RATE:-5e-4}" \
  --lr_scheduler_type cosine \
  --warmup_steps "${WARMUP_STEPS:-5}" \
  --eval_strategy epoch \
  --save_strategy epoch \
  --save_total_limit 1 \
  --logging_steps 5 \
  --plot_loss \
  --output_dir "$OUTPUT_DIR" \
  "$@"

merge_result "$METHOD" "$OUTPUT_DIR" ${template_flags[@]+"${template_flags[@]}"}

say "Answers before and after / 训练前后的回答"
mapfile -t prompts <<<"$PROMPTS"
llmtuner compare --model_name_or_path "$MODEL" --tuned_model "$TUNED" --prompts "${prompts[@]}"

say "Done / 完成"
note "adapter or model, logs, run.json / 训练结果: $OUTPUT_DIR"
note "loss curve / 损失曲线:                  $OUTPUT_DIR/training_loss.png"
note "model for use / 可直接使用的模型:       $TUNED"
note "talk to it / 对话:  $(command -v llmtuner) chat --model_name_or_path $(printf '%q' "$TUNED")"
