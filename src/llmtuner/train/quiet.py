"""Loading without messages: what was told once need not be told again."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as hf_logging

from llmtuner.extras.logs import only_warnings


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Load a model for the second time: without its messages and progress bars."""
    has_bars = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        with only_warnings():
            yield
    finally:
        if has_bars:
            hf_logging.enable_progress_bar()
