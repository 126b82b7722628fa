"""Options of full training (there are none)."""

from typing import ClassVar

from pydantic.dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class FullArgs:
    """Train every weight."""

    trains_quantized: ClassVar[bool] = False
    uses_adapters: ClassVar[bool] = False
