"""Log lines for people: one logger tree, rank 0 speaks, warnings stand out."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from llmtuner.extras.env import process_env

_CHATTY = ("bitsandbytes", "DeepSpeed", "deepspeed", "filelock", "matplotlib")


def get_logger(name: str) -> logging.Logger:
    """Return the logger of a module (`get_logger(__name__)`)."""
    return logging.getLogger(name)


def set_up_logs(*, debug: bool = False) -> None:
    """Send the package's log lines to stderr; ranks above 0 only speak when something is wrong."""
    logger = logging.getLogger("llmtuner")
    logger.handlers.clear()
    logger.addHandler(_handler())
    logger.propagate = False
    level = logging.DEBUG if debug else logging.INFO
    logger.setLevel(level if process_env().rank == 0 else logging.WARNING)
    if not debug:
        _quiet_libraries()


@contextmanager
def only_warnings() -> Iterator[None]:
    """Leave out what is only good to know, meanwhile: it was told before."""
    logger = logging.getLogger("llmtuner")
    before = logger.level
    logger.setLevel(max(before, logging.WARNING))
    try:
        yield
    finally:
        logger.setLevel(before)


def _handler() -> logging.Handler:
    """Colour and wrapping for people at a terminal; one plain line each for files and pipes."""
    if sys.stderr.isatty():
        from rich.console import Console  # only now: --help in a pipe must not wait for it
        from rich.logging import RichHandler

        console = Console(stderr=True)
        return RichHandler(console=console, show_path=False, markup=False, log_time_format="[%X]")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("[%(asctime)s] %(levelname)s %(message)s", "%H:%M:%S"))
    return handler


def _errors_only(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def _quiet_libraries() -> None:
    """Hide what other libraries tell their own developers; their errors stay."""
    for name in _CHATTY:
        # The level goes for the loggers below, the filter for those that set their own on import.
        logging.getLogger(name).setLevel(logging.ERROR)
        logging.getLogger(name).addFilter(_errors_only)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
