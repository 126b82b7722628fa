"""What every command does with its words: help, or a checked config and its notices."""

from collections.abc import Sequence

from llmtuner.extras.logs import get_logger
from llmtuner.hparams.config import RunConfig
from llmtuner.hparams.help import help_text

logger = get_logger(__name__)


def parse_or_help(command: str, argv: Sequence[str]) -> RunConfig | None:
    """Return the config; print the help and return None when it was asked for.

    Raises:
        ConfigErrors: every problem of the command line and the config file.
    """
    if any(word in ("-h", "--help") for word in argv):
        print(help_text(command))
        return None
    from llmtuner.hparams.parser import parse  # only now: --help reads nothing

    config = parse(command, argv)
    for notice in config.notices:
        logger.info("%s", notice)
    return config
