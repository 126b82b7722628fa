"""Gradient checkpointing: activations are computed again in the backward pass to save memory."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from llmtuner.hparams.model import ModelArgs
from llmtuner.model.frozen import frozen_layers

_FULL = 0.8
"""Share of the memory that a step may take; the rest is for what a forecast does not see."""


@dataclass(frozen=True)
class MemoryForecast:
    """What a run takes at most when it keeps all activations, and what there is, in bytes."""

    peak_bytes: float
    limit_bytes: float

    @property
    def has_margin(self) -> bool:
        """Whether the run fits with a margin."""
        return self.peak_bytes <= _FULL * self.limit_bytes

    def __str__(self) -> str:
        """Return both in one phrase."""
        return (
            f"{self.peak_bytes / 1e9:.2f} GB of the {self.limit_bytes / 1e9:.2f} GB that are there"
        )


@dataclass(frozen=True)
class CheckpointingChoice:
    """Whether to recompute activations, and why."""

    enabled: bool
    reason: str


def pick_gradient_checkpointing(
    args: ModelArgs,
    *,
    asked: bool | None,
    device_type: str,
    memory: MemoryForecast | None = None,
) -> CheckpointingChoice:
    """Decide from the flags, else from the memory, else from the device.

    Args:
        args: holds `disable_gradient_checkpointing`.
        asked: the user's `gradient_checkpointing`; None: not given.
        device_type: "cpu", "cuda", …
        memory: of a training run; None: not foretold.
    """
    if args.disable_gradient_checkpointing:
        return CheckpointingChoice(False, "disable_gradient_checkpointing was given")
    if asked is not None:
        return CheckpointingChoice(asked, "gradient_checkpointing was given")
    if memory is not None:
        kept = f"keeping all activations takes {memory}"
        if memory.has_margin:
            return CheckpointingChoice(False, kept)
        return CheckpointingChoice(True, f"{kept}, and {1 - _FULL:.0%} are to stay free")
    if device_type == "cpu":
        return CheckpointingChoice(False, "main memory is plenty and a second forward pass is slow")
    return CheckpointingChoice(True, "it saves GPU memory")


def enable_gradient_checkpointing(
    model: PreTrainedModel | PeftModel, *, use_reentrant: bool
) -> None:
    """Switch recomputation on in the layers that a gradient reaches.

    Args:
        model: with adapters or without.
        use_reentrant: torch's older kind; it needs a tensor with gradient at the first of these
            layers, so what is below it, frozen as it is, is made to give one.
    """
    inner = _without_adapters(model)
    inner.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    frozen: list[Any] = frozen_layers(inner)
    for layer in frozen:  # they keep nothing, so there is nothing to save
        layer.gradient_checkpointing = False
    if use_reentrant and not frozen:
        return
    # transformers has made the embeddings do it, and gradients would go all the way down to them
    inner.disable_input_require_grads()
    if use_reentrant:
        frozen[-1].register_forward_hook(_require_gradient)


def disable_gradient_checkpointing(model: PreTrainedModel | PeftModel) -> None:
    """Switch recomputation off."""
    _without_adapters(model).activation_checkpointing_disable()


def _require_gradient(layer: object, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
    if torch.is_grad_enabled():  # some layers return more than hidden states
        (output[0] if isinstance(output, tuple) else output).requires_grad_()


def _without_adapters(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    return cast(PreTrainedModel, inner)
