"""Which parameters learn, and in which type."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from llmtuner.extras.logs import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True)
class TrainableParameters:
    """How many numbers learn, out of how many."""

    trainable: int
    total: int

    @property
    def percent(self) -> float:
        """The share that learns."""
        return 100 * self.trainable / max(self.total, 1)

    def __str__(self) -> str:
        """Return one line for the log."""
        return f"{self.trainable:,} of {self.total:,} parameters learn ({self.percent:.3f} %)"


def trainable_report(model: nn.Module) -> TrainableParameters:
    """Count the parameters, also of quantised and of partitioned (ZeRO-3) models."""
    trainable = total = 0
    for parameter in model.parameters():
        count = _count(parameter)
        total += count
        trainable += count if parameter.requires_grad else 0
    return TrainableParameters(trainable, total)


def set_trained_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Hold every parameter that learns in `dtype`."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)


def cast_parameters(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Round every parameter to `dtype`, but for those that the architecture keeps in float32.

    Unlike `model.to(dtype)` this leaves buffers alone: rotary frequencies need float32.
    """
    kept = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not kept & set(name.split(".")):
            parameter.data = parameter.data.to(dtype)


def log_parameters(model: nn.Module) -> None:
    """List every parameter with its type and whether it learns."""
    for name, parameter in model.named_parameters():
        learns = "learns" if parameter.requires_grad else "frozen"
        logger.info("%s: %s %s %s", name, parameter.dtype, tuple(parameter.shape), learns)


def _count(parameter: nn.Parameter) -> int:
    # DeepSpeed's ZeRO-3 leaves an empty tensor here and keeps the size beside it; bitsandbytes
    # packs two 4-bit weights into a byte and keeps the shape in its quantisation state.
    full_size = vars(parameter).get("ds_numel")
    if full_size is not None:
        return int(full_size)
    state = vars(parameter).get("quant_state")
    return int(state.shape.numel()) if state is not None else parameter.numel()
