"""Options of full training (there are none)."""

from typing import ClassVar

from pydantic.dataclasses import dataclass

from llmtuner.hparams.arg import CHECKED_WHEN_MADE


@dataclass(frozen=True, kw_only=True, config=CHECKED_WHEN_MADE)
class FullArgs:
    """Train every weight."""

    trains_quantized: ClassVar[bool] = False
    uses_adapters: ClassVar[bool] = False
