"""Options of `llmtuner selfcheck`."""

from pydantic.dataclasses import dataclass

from llmtuner.hparams.arg import CHECKED_WHEN_MADE, arg


@dataclass(frozen=True, kw_only=True, config=CHECKED_WHEN_MADE)
class SelfcheckArgs:
    """How much is compared, and where the result is written."""

    selfcheck_steps: int = arg(2, "Optimizer steps of each layout.", low=1)
    selfcheck_batch: int = arg(
        8, "Samples of each optimizer step; an even number.", unit="samples", low=2
    )
    selfcheck_report: str | None = arg(None, "File for the result as JSON. Unset: none.")
