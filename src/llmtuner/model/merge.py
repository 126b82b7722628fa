"""Adapters put on the base: folded into its weights, or beside them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from llmtuner.extras.errors import ModelError
from llmtuner.extras.logs import get_logger
from llmtuner.model.patches import peft_without_bitsandbytes

logger = get_logger(__name__)


def merge_adapters(model: PreTrainedModel, folders: Sequence[Path]) -> PreTrainedModel:
    """Add the adapters to the weights, one after another.

    Args:
        model: in float32, so that nothing is rounded between two adapters.
        folders: the adapters, in the order they were trained.

    Raises:
        ModelError: an adapter holds values that are not finite, or does not fit.
    """
    for folder in folders:
        try:
            model = attach_adapter(model, folder).merge_and_unload(safe_merge=True)
        except ValueError as error:
            raise ModelError(
                f"The adapter cannot be merged: {str(error).splitlines()[0]}", where=str(folder)
            ) from error
        _tie_again(model)
        logger.info("Merged the adapter %s.", folder)
    return model


def _tie_again(model: PreTrainedModel) -> None:
    """Let embedding and head be one again, unless the adapter changed one of them only."""
    if not model.config.get_text_config().tie_word_embeddings:
        return
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    if torch.equal(embedding.weight, head.weight):
        model.tie_weights()
    else:
        logger.info("The adapter changes embedding and head apart: they are not tied any more.")
        model.config.get_text_config().tie_word_embeddings = False


def attach_adapter(
    model: PreTrainedModel, folder: Path, *, is_trainable: bool = False
) -> PeftModel:
    """Put an adapter beside the weights.

    Raises:
        ModelError: it does not fit.
    """
    try:
        with peft_without_bitsandbytes():
            return PeftModel.from_pretrained(model, folder, is_trainable=is_trainable)
    except (ValueError, RuntimeError) as error:
        raise ModelError(
            f"The adapter does not fit the model: {str(error).splitlines()[0]}",
            where=str(folder),
            fix="give the base model that the adapter was trained on",
        ) from error
