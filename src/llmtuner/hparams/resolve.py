"""Derived values: each one is set in a new object and logged with its reason."""

from llmtuner.hparams.config import RunConfig


def resolve(config: RunConfig) -> RunConfig:
    return config
