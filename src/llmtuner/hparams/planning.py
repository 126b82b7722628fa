"""Options of `llmtuner plan`."""

from pydantic.dataclasses import dataclass

from llmtuner.hparams.arg import CHECKED_WHEN_MADE, arg


@dataclass(frozen=True, kw_only=True, config=CHECKED_WHEN_MADE)
class PlanningArgs:
    """How the plan is made."""

    probe: bool = arg(
        False, "Run two real steps in a process of their own, and correct the plan by them."
    )
