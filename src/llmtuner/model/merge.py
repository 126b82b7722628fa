"""Adapters folded into the base weights."""

from collections.abc import Sequence
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel

from llmtuner.extras.errors import ModelError
from llmtuner.extras.logs import get_logger

logger = get_logger(__name__)


def merge_adapters(model: PreTrainedModel, folders: Sequence[Path]) -> PreTrainedModel:
    """Add the adapters to the weights, one after another.

    Args:
        model: in float32, so that nothing is rounded between two adapters.
        folders: the adapters, in the order they were trained.

    Raises:
        ModelError: an adapter holds values that are not finite.
    """
    for folder in folders:
        try:
            peft_model = PeftModel.from_pretrained(model, folder, is_trainable=False)
            model = peft_model.merge_and_unload(safe_merge=True)
        except (ValueError, RuntimeError) as error:
            raise ModelError(
                f"The adapter cannot be merged: {str(error).splitlines()[0]}", where=str(folder)
            ) from error
        model.tie_weights()
        logger.info("Merged the adapter %s.", folder)
    return model
