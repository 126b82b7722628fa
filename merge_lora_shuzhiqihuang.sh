#!/usr/bin/env bash
# 合并 LoRA 权重 / merge a LoRA adapter into its base model.
#
#   bash merge_lora_shuzhiqihuang.sh LORA [BASE] [OUT]
#
#   LORA  folder of the adapter, for example outputs/shuzhiqihuang-sft-20260101-120000
#   BASE  base model (default: the one that the adapter names)
#   OUT   where the merged model goes (default: LORA/merged_model)
#   TEMPLATE=NAME in the environment changes the chat template (default: the one saved with LORA)
set -euo pipefail
# shellcheck source=scripts/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/scripts/launch.sh"
help_if_asked "${BASH_SOURCE[0]}" "$@"
if (($# < 1 || $# > 3)); then
  fail "One to three arguments are needed, got $#. / 需要一到三个参数。" \
    "Usage / 用法: bash merge_lora_shuzhiqihuang.sh LORA [BASE] [OUT]"
fi
LORA="${1%/}"
OUT="${3:-$LORA/merged_model}"
[[ -f $LORA/adapter_config.json ]] \
  || fail "No adapter in $LORA: adapter_config.json is missing. / 该目录中没有 LoRA 适配器。" \
    "Give the output_dir of a LoRA run, or one of its checkpoints."

say "Preparing the environment / 准备环境"
# shellcheck source=scripts/setup_env.sh
source "$REPO_ROOT/scripts/setup_env.sh"
BASE="${2:-$(python -c 'import json, sys
with open(sys.argv[1], encoding="utf-8") as file:
    print(json.load(file).get("base_model_name_or_path") or "")' "$LORA/adapter_config.json")}"
[[ -n $BASE ]] || fail "The adapter does not name its base model. / 适配器没有记录基础模型。" \
  "Give it as the second argument: bash merge_lora_shuzhiqihuang.sh $LORA BASE"
template_flags=()
[[ -z ${TEMPLATE:-} ]] || template_flags=(--template "$TEMPLATE")

say "Merging / 合并: $BASE + $LORA"
python "$REPO_ROOT/src/export_model.py" \
  --model_name_or_path "$BASE" \
  --adapter_name_or_path "$LORA" \
  ${template_flags[@]+"${template_flags[@]}"} \
  --finetuning_type lora \
  --export_dir "$OUT" \
  --export_size 2 \
  --export_device cpu \
  --export_legacy_format false

say "Done / 完成: $OUT"
note "Talk to it / 对话: $(command -v llmtuner) chat --model_name_or_path $(printf '%q' "$OUT")"
