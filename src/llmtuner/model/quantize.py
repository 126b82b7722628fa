"""Weights in 4 or 8 bits, by bitsandbytes (the base of QLoRA)."""

from importlib.util import find_spec

import torch
from transformers import BitsAndBytesConfig

from llmtuner.extras.errors import MissingExtraError
from llmtuner.hparams.model import ModelArgs


def quantization_config(
    args: ModelArgs, *, compute_dtype: torch.dtype
) -> BitsAndBytesConfig | None:
    """Return how to quantise while loading, or None for plain weights.

    Args:
        args: the model's options.
        compute_dtype: type of the matrix products with unpacked 4-bit weights.

    Raises:
        MissingExtraError: bitsandbytes is not installed.
    """
    if args.quantization_bit is None:
        return None
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
