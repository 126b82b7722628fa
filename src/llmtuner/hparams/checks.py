"""Checks across options."""

from collections.abc import Sequence

from llmtuner.extras.errors import ConfigError
from llmtuner.hparams.config import RunConfig


def check(config: RunConfig) -> list[tuple[Sequence[str], ConfigError]]:
    return []
