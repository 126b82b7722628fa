"""Options of freeze training."""

from typing import ClassVar

from pydantic.dataclasses import dataclass

from llmtuner.hparams.arg import CHECKED_WHEN_MADE, arg


@dataclass(frozen=True, kw_only=True, config=CHECKED_WHEN_MADE)
class FreezeArgs:
    """Train a few layers and leave the rest as it is."""

    trains_quantized: ClassVar[bool] = False
    uses_adapters: ClassVar[bool] = False

    freeze_trainable_layers: int = arg(
        2, "Layers that learn: the last n, or the first n if negative.", unit="layers"
    )
    freeze_trainable_modules: tuple[str, ...] = arg(
        ("all",), "Modules of these layers that learn, or all of them."
    )
    freeze_extra_modules: tuple[str, ...] | None = arg(
        None, "Modules outside the layers that learn as well."
    )
