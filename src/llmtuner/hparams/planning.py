"""Options of `llmtuner plan`."""

from pydantic.dataclasses import dataclass

from llmtuner.hparams.arg import arg


@dataclass(frozen=True, kw_only=True)
class PlanningArgs:
    """How the plan is made."""

    probe: bool = arg(
        False, "Run two real steps in a process of their own, and correct the plan by them."
    )
