#!/usr/bin/env bash
# Checks and tests: style, types, then pytest.
# 运行代码检查和测试。
#
#   bash run_tests.sh          the fast part
#   bash run_tests.sh --all    also the slow tests (real training on the demo model, minutes)
#   bash run_tests.sh -k word  further arguments go to pytest
set -euo pipefail
# shellcheck source=scripts/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/scripts/launch.sh"
help_if_asked "${BASH_SOURCE[0]}" "$@"
MARKS="not slow and not gpu and not network"
if [[ ${1:-} == --all ]]; then
  MARKS="not gpu and not network"
  shift
fi

say "Preparing the environment with the development tools / 准备开发环境"
# Read by setup_env.sh.
# shellcheck disable=SC2034
LLMTUNER_ENV=dev
# shellcheck source=scripts/setup_env.sh
source "$REPO_ROOT/scripts/setup_env.sh"
cd "$REPO_ROOT"
# The models are tiny: more threads only wait for each other.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"

say "Style: ruff / 代码风格"
python -m ruff check .
python -m ruff format --check .

say "Types: mypy on extras, hparams, data / 类型检查"
python -m mypy src/llmtuner/extras src/llmtuner/hparams src/llmtuner/data

say "Tests: pytest -m \"$MARKS\" / 测试"
python -m pytest -m "$MARKS" "$@"
