"""Gradient checkpointing: activations are computed again in the backward pass to save memory."""

from dataclasses import dataclass
from typing import cast

from peft import PeftModel
from transformers import PreTrainedModel

from llmtuner.hparams.model import ModelArgs


@dataclass(frozen=True)
class CheckpointingChoice:
    """Whether to recompute activations, and why."""

    enabled: bool
    reason: str


def pick_gradient_checkpointing(
    args: ModelArgs, *, asked: bool | None, device_type: str
) -> CheckpointingChoice:
    """Decide from the flags and the device.

    Args:
        args: holds `disable_gradient_checkpointing`.
        asked: the user's `gradient_checkpointing`; None: not given.
        device_type: "cpu", "cuda", …
    """
    if args.disable_gradient_checkpointing:
        return CheckpointingChoice(False, "disable_gradient_checkpointing was given")
    if asked is not None:
        return CheckpointingChoice(asked, "gradient_checkpointing was given")
    if device_type == "cpu":
        return CheckpointingChoice(False, "main memory is plenty and a second forward pass is slow")
    return CheckpointingChoice(True, "it saves GPU memory")


def enable_gradient_checkpointing(
    model: PreTrainedModel | PeftModel, *, use_reentrant: bool
) -> None:
    """Switch recomputation on.

    Args:
        model: with adapters or without.
        use_reentrant: torch's older kind; it needs a tensor with gradient at the first layer,
            which frozen embeddings do not give, so their output is made to have one.
    """
    inner = _without_adapters(model)
    inner.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        inner.enable_input_require_grads()


def disable_gradient_checkpointing(model: PreTrainedModel | PeftModel) -> None:
    """Switch recomputation off."""
    _without_adapters(model).activation_checkpointing_disable()


def _without_adapters(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    return cast(PreTrainedModel, inner)
