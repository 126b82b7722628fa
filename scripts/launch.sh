# shellcheck shell=bash
# Sourced by the run scripts and setup_env.sh: messages, flags, and training on the devices there are.

REPO_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"

say() { printf '\n==> %s\n' "$*"; }
note() { printf '    %s\n' "$*"; }
fail() {
  printf '\nERROR: %s\n' "$1" >&2
  shift
  local line
  for line in "$@"; do printf '       %s\n' "$line" >&2; done
  exit 1
}

# Number of GPUs that CUDA_VISIBLE_DEVICES leaves; 1 (the CPU) where there is none.
count_devices() {
  local found=0 ids
  if [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
    IFS=, read -r -a ids <<<"$CUDA_VISIBLE_DEVICES"
    found="${#ids[@]}"
  elif command -v nvidia-smi >/dev/null; then
    found="$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)"
  fi
  echo "$((found > 0 ? found : 1))"
}

# Value of flag $1 among the arguments after $2 (the default); the last one wins, as in llmtuner.
flag_value() {
  local name="$1" value="$2" spelled
  shift 2
  while (($# > 0)); do
    spelled="${1%%=*}"
    spelled="${spelled//-/_}"
    case "$spelled" in
      "__$name" | "$name")
        if [[ $1 == *=* ]]; then
          value="${1#*=}"
        elif (($# > 1)) && [[ $1 == --* ]]; then
          value="$2"
          shift
        fi
        ;;
    esac
    shift
  done
  echo "$value"
}

# Why DeepSpeed cannot be used here; nothing where it can.
deepspeed_obstacle() {
  if ! command -v deepspeed >/dev/null || ! python -c 'import deepspeed' >/dev/null 2>&1; then
    echo "the library deepspeed is not installed"
  fi
}

# Print TCP port $1, or a free one where $1 is taken.
usable_port() {
  python - "$1" <<'PYTHON'
import socket
import sys

for port in (int(sys.argv[1]), 0):
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("127.0.0.1", port))
        except OSError:
            continue
        print(server.getsockname()[1])
        break
PYTHON
}

# Train with the arguments given, under DeepSpeed where it works. Reads NUM_GPUS, MASTER_PORT and
# DEEPSPEED_CONFIG (empty: without DeepSpeed).
run_training() {
  local obstacle command devices
  if [[ -z $DEEPSPEED_CONFIG ]]; then
    obstacle="DEEPSPEED_CONFIG is empty"
  else
    obstacle="$(deepspeed_obstacle)"
  fi
  if [[ -z $obstacle ]]; then
    devices=(--num_gpus "$NUM_GPUS")
    # With --num_gpus the launcher ignores which GPUs were chosen and takes the first ones.
    if [[ -n ${CUDA_VISIBLE_DEVICES:-} && $NUM_GPUS == "$(count_devices)" ]]; then devices=(); fi
    command=(deepspeed ${devices[@]+"${devices[@]}"} --master_port "$(usable_port "$MASTER_PORT")"
      "$REPO_ROOT/src/train_bash.py" --deepspeed "$DEEPSPEED_CONFIG" "$@")
    note "DeepSpeed on $NUM_GPUS device(s). Its first start here compiles a small C++ part: up to a minute."
    note "DeepSpeed 首次启动需要编译，请稍候。"
  elif ((NUM_GPUS > 1)); then
    note "Training without DeepSpeed: $obstacle. / 不使用 DeepSpeed。"
    command=(torchrun --nproc_per_node "$NUM_GPUS" --master_port "$(usable_port "$MASTER_PORT")"
      "$REPO_ROOT/src/train_bash.py" "$@")
  else
    note "Training without DeepSpeed: $obstacle. / 不使用 DeepSpeed。"
    command=(python "$REPO_ROOT/src/train_bash.py" "$@")
  fi
  printf '    $'
  printf ' %q' "${command[@]}"
  printf '\n'
  "${command[@]}"
}

# Read by the run scripts.
# shellcheck disable=SC2034
DEMO_MODEL="$REPO_ROOT/models/smollm2-135m-instruct"

# Show the comment at the top of script $1 and leave, where -h or --help is the next argument.
help_if_asked() {
  case "${2:-}" in
    -h | --help)
      sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "$1"
      exit 0
      ;;
  esac
}

# Leave the model to train in MODEL: the flag, or $1, or the demo model, which is fetched once.
choose_model() {
  MODEL="$(flag_value model_name_or_path "$@")"
  if [[ -z $MODEL ]]; then
    say "Getting the demo model SmolLM2-135M-Instruct / 获取演示模型"
    llmtuner demo-model --output_dir "$DEMO_MODEL"
    MODEL="$DEMO_MODEL"
  fi
}

# Leave the model for use in TUNED: training of method $1 wrote $2, with MODEL as its base.
# Full and freeze training write a whole model; only an adapter has to be merged.
# Further arguments go to the export.
merge_result() {
  local method="$1" output_dir="$2"
  shift 2
  TUNED="$output_dir"
  [[ $method == lora ]] || return 0
  TUNED="$output_dir/merged"
  say "Merging the adapter into the model / 合并 LoRA 权重"
  python "$REPO_ROOT/src/export_model.py" \
    --model_name_or_path "$MODEL" \
    --adapter_name_or_path "$output_dir" \
    --finetuning_type lora \
    --export_dir "$TUNED" \
    "$@"
}
