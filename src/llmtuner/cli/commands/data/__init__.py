"""Look at training data: audit it, show a row token by token, prove what is trained."""

from collections.abc import Sequence

from llmtuner.extras.errors import ConfigError
from llmtuner.extras.registry import Registry

DATA_COMMANDS = Registry("data command", __name__, exports="run")


def run(argv: Sequence[str]) -> int:
    """Run `llmtuner data NAME …`."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if argv[0].startswith("-"):
        allowed = DATA_COMMANDS.names()
        raise ConfigError("The data command is missing.", got=argv[0], allowed=allowed)
    return int(DATA_COMMANDS.get(argv[0])(argv[1:]))


def _overview() -> str:
    rows = [f"  {name:<8} {line}" for name, line in DATA_COMMANDS.summaries().items()]
    usage = "Usage: llmtuner data COMMAND [config.yaml] [--flag value] [key=value]"
    hint = "`llmtuner data COMMAND --help` lists the options of a command, with examples."
    return "\n".join([usage, "", "Commands:", *rows, "", hint])
