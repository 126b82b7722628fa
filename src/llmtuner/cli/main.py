"""`llmtuner COMMAND …`: find the command, run it, turn errors into one line and an exit code."""

import os
import sys
from collections.abc import Sequence

from llmtuner import __version__
from llmtuner.cli.commands import COMMANDS
from llmtuner.extras.env import share_out_cores, tune_allocator
from llmtuner.extras.errors import ConfigError, LlmtunerError
from llmtuner.extras.logs import set_up_logs
from llmtuner.extras.stopping import Terminated, terminated_like_interrupted

_INTERRUPTED, _TERMINATED = 130, 143
_COMPUTING = ("train", "eval", "selfcheck")


def program(*command: str) -> int:
    """Run as the program that the user started, with `command` before its words.

    Commands that compute start themselves once more, with what must be set before a start.
    """
    words = [*command, *sys.argv[1:]]
    computes = words[:1] and words[0] in _COMPUTING and not {"-h", "--help"} & set(words)
    if computes and any([tune_allocator(), share_out_cores()]):
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    return main(words)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0 done · 2 configuration · 3 data · 4 model, adapter or checkpoint · 5 not finite · 6 storage ·
    7 distributed · 8 layouts differ · 9 a score too low · 130 interrupted · 143 ended by
    SIGTERM.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        set_up_logs(debug=debug)
        with terminated_like_interrupted():
            return _run(words)
    except LlmtunerError as error:
        if debug:
            raise
        print(f"Error: {error}", file=sys.stderr)
        return error.exit_code
    except Terminated:
        print("Ended by SIGTERM.", file=sys.stderr)
        return _TERMINATED
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return _INTERRUPTED


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if words[0] in ("-V", "--version", "version"):
        print(f"llmtuner {__version__}")
        return 0
    name = words[0].replace("-", "_")
    if words[0].startswith("-"):
        raise ConfigError("The command is missing.", got=words[0], allowed=_names())
    return int(COMMANDS.get(name)(words[1:]))


def _names() -> list[str]:
    return [name.replace("_", "-") for name in COMMANDS.names()]


def _overview() -> str:
    summaries = COMMANDS.summaries()  # imports no command, which takes longer than all the rest
    rows = [f"  {name.replace('_', '-'):<12} {line}" for name, line in summaries.items()]
    return "\n".join(
        [
            "Usage: llmtuner COMMAND [config.yaml] [--flag value] [key=value]",
            "",
            "Fine-tune language models, prove what was trained, export and use the result.",
            "",
            "Commands:",
            *rows,
            "",
            "`llmtuner COMMAND --help` lists the options of a command, with examples.",
            "`--debug` shows the traceback of an error.",
        ]
    )


if __name__ == "__main__":
    sys.exit(program())
