"""Weights in 4 or 8 bits, by bitsandbytes (the base of QLoRA)."""

from abc import ABC, abstractmethod
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from llmtuner.extras.errors import ConfigError, MissingExtraError
from llmtuner.hparams.model import ModelArgs

# The CPU form of a 4-bit weight holds its rows in groups of this size.
_CPU_ROWS = 32


def quantization_config(
    args: ModelArgs, *, compute_dtype: torch.dtype
) -> BitsAndBytesConfig | None:
    """Return how to quantise while loading, or None for plain weights.

    Args:
        args: the model's options.
        compute_dtype: type of the matrix products with unpacked 4-bit weights.

    Raises:
        MissingExtraError: bitsandbytes is not installed.
        ConfigError: ZeRO-3 is on.
    """
    if args.quantization_bit is None:
        return None
    if is_deepspeed_zero3_enabled():
        raise ConfigError(
            "Quantised weights cannot be spread over the processes by ZeRO-3.",
            where="quantization_bit",
            got=args.quantization_bit,
            fix="use ZeRO-2, or drop --quantization_bit",
        )
    if find_spec("bitsandbytes") is None:
        raise MissingExtraError("bitsandbytes", extra="quant", needed_for="--quantization_bit")
    if args.quantization_bit == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=args.quantization_type,
        bnb_4bit_use_double_quant=args.double_quantization,
        bnb_4bit_compute_dtype=compute_dtype,
    )


class StandIn(nn.Module, ABC):
    """A layer in the place of a quantised one where only shapes matter: in a forecast of memory."""

    bits: int

    @abstractmethod
    def unpack(self) -> Tensor:
        """Return a tensor like the unpacked weight, [out, in]."""


def is_quantized(layer: nn.Module) -> bool:
    """Tell whether a layer's weight is in 4 bits, of which `dequantized` makes numbers again."""
    if isinstance(layer, StandIn):
        return layer.bits == 4
    return type(layer.weight).__name__ == "Params4bit"


def dequantized(layer: nn.Module) -> Tensor:
    """Return a layer's weight as numbers; one that is not quantised as it is."""
    if isinstance(layer, StandIn):
        return layer.unpack()
    packed: Any = layer.weight
    if not is_quantized(layer):
        return packed.detach()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(packed.data, packed.quant_state)


def keep_layout(model: nn.Module, *, for_training: bool) -> None:
    """Stop bitsandbytes from packing 4-bit weights anew at the first evaluation on a CPU.

    On processors with AVX512-BF16, `Linear4bit.forward` in evaluation mode replaces the weights by
    a form that has rounded scales and no gradient, and keeps it: training after an evaluation
    would silently get wrong gradients. It also fails on layers of odd sizes. Generation is twice
    as fast in that form, so models that never learn keep it.
    Affected: bitsandbytes 0.50. To be removed when the layer goes back to a form with gradients.

    Args:
        model: a model with or without quantised layers.
        for_training: whether gradients will flow through the weights.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            layer: Any = module
            blocksize = layer.weight.quant_state.blocksize
            fits = layer.out_features % _CPU_ROWS == 0 and layer.in_features % blocksize == 0
            if for_training or not fits:
                layer.support_avx512bf16_for_cpu = False
