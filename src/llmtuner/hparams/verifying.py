"""Options of the comparison of an exported model with what it was made from."""

from pydantic.dataclasses import dataclass

from llmtuner.hparams.arg import CHECKED_WHEN_MADE, arg


@dataclass(frozen=True, kw_only=True, config=CHECKED_WHEN_MADE)
class VerifyingArgs:
    """How the result is compared with base and adapters."""

    verify: bool = arg(
        False, "Load the result, compare it with base and adapters, and fail on a difference."
    )
    verify_samples: int = arg(
        4, "Prompts to compare on: rows of dataset, else built-in ones.", unit="rows", low=1
    )
