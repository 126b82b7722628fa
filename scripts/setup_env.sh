# shellcheck shell=bash
# Sourced by the run scripts: afterwards `python` is a Python >= 3.11 that imports this checkout of
# llmtuner with its libraries.
#
# Set before sourcing:   LLMTUNER_ENV=core (default) or dev (also pytest, ruff, mypy)
# Set by the user:       LLMTUNER_VENV=DIR   where the environment is made (default: .venv here)
#                        PIP_EXTRA_INDEX_URL and other PIP_* settings reach pip unchanged.

# shellcheck source=scripts/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
LLMTUNER_ENV="${LLMTUNER_ENV:-core}"
LLMTUNER_VENV="${LLMTUNER_VENV:-$REPO_ROOT/.venv}"

# Is $1 a Python >= 3.11?
is_new_enough() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

# Does $1 import everything we need, and llmtuner from this checkout rather than from another one?
is_suitable() {
  is_new_enough "$1" && "$1" - "$REPO_ROOT/src" "$LLMTUNER_ENV" >/dev/null 2>&1 <<'PYTHON'
import importlib
import importlib.metadata
import pathlib
import sys

source, kind = sys.argv[1:]
names = ["llmtuner", "torch", "transformers", "accelerate", "peft", "datasets", "ruamel.yaml"]
if kind == "dev":
    names += ["pytest", "pytest_socket", "hypothesis", "mypy", "ruff"]
modules = [importlib.import_module(name) for name in names]
command = importlib.metadata.entry_points(group="console_scripts", name="llmtuner")
sys.exit(not (command and pathlib.Path(modules[0].__file__).is_relative_to(source)))
PYTHON
}

# Print the interpreter to build the environment with; the versions we test come first.
find_python() {
  local name lacks_venv=""
  for name in "${PYTHON:-}" python3.11 python3.12 python3.13 python3 python; do
    if [[ -z $name ]] || ! is_new_enough "$name"; then continue; fi
    if "$name" -c 'import ensurepip, venv' >/dev/null 2>&1; then
      command -v "$name"
      return
    fi
    lacks_venv="$name"
  done
  if [[ -n $lacks_venv ]]; then
    fail "$lacks_venv cannot create virtual environments: its venv module is missing. / 缺少 venv 模块。" \
      "On Debian or Ubuntu: apt-get install ${lacks_venv##*/}-venv   Then run this script again." \
      "Or activate an environment in which llmtuner is installed."
  fi
  fail "No Python 3.11 or newer was found. / 没有找到 Python 3.11 或更新的版本。" \
    "Install one (https://www.python.org/downloads/) or name one: PYTHON=/path/to/python3.11 bash $0"
}

# A value that changes when the requirements, the package metadata or the checkout's place change.
requirements_stamp() {
  { cat "$REPO_ROOT/setup.py" "$1" "$REPO_ROOT/requirements.txt"; echo "$REPO_ROOT"; } | cksum
}

install_everything() {
  local python="$LLMTUNER_VENV/bin/python" list="$1" torch_pin
  torch_pin="$(grep -m1 '^torch==' "$REPO_ROOT/requirements.txt")"
  export PIP_DISABLE_PIP_VERSION_CHECK=1
  say "Installing $torch_pin (a large download on a new machine) / 安装 PyTorch"
  # First and alone: other packages only ask for "torch" and would draw in another version.
  "$python" -m pip install "$torch_pin"
  say "Installing the other libraries / 安装其他依赖: $(basename "$list")"
  "$python" -m pip install -r "$list"
  say "Installing llmtuner from this folder / 安装 llmtuner"
  "$python" -m pip install --no-deps -e "$REPO_ROOT"
}

activate_environment() {
  # The two lines of bin/activate that a script needs.
  export VIRTUAL_ENV="$LLMTUNER_VENV" PATH="$LLMTUNER_VENV/bin:$PATH"
  hash -r
}

set_up_environment() {
  local list stamp_file python
  if command -v python >/dev/null && is_suitable "$(command -v python)"; then
    note "Environment / 环境: $(command -v python) (already active)"
    return
  fi
  list="$REPO_ROOT/requirements.txt"
  [[ $LLMTUNER_ENV == dev ]] && list="$REPO_ROOT/requirements-dev.txt"
  stamp_file="$LLMTUNER_VENV/.llmtuner-$LLMTUNER_ENV.stamp"
  if [[ -f $stamp_file && "$(<"$stamp_file")" == "$(requirements_stamp "$list")" ]] \
    && is_suitable "$LLMTUNER_VENV/bin/python"; then
    activate_environment
    note "Environment / 环境: $LLMTUNER_VENV (ready)"
    return
  fi
  if ! is_new_enough "$LLMTUNER_VENV/bin/python"; then
    python="$(find_python)"
    say "Creating an environment in $LLMTUNER_VENV with $python / 创建虚拟环境"
    "$python" -m venv --clear "$LLMTUNER_VENV"
  fi
  install_everything "$list"
  is_suitable "$LLMTUNER_VENV/bin/python" \
    || fail "The environment in $LLMTUNER_VENV does not work. / 环境无法使用。" \
      "Remove that folder and run this script again; the messages of pip above may say why."
  requirements_stamp "$list" >"$stamp_file"
  # The development environment holds everything the core one does.
  requirements_stamp "$REPO_ROOT/requirements.txt" >"$LLMTUNER_VENV/.llmtuner-core.stamp"
  activate_environment
}

set_up_environment
