"""What serving needs beside the weights: tokenizer, chat template, stop ids."""

from collections.abc import Sequence
from pathlib import Path

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


def write_companions(
    folder: Path,
    *,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    stop_ids: Sequence[int],
) -> None:
    """Write the tokenizer with its chat template, and a generation config that stops.

    Args:
        folder: holds the weights.
        tokenizer: carries the template that was trained, without generation marks.
        model: gives the other generation settings of the base model.
        stop_ids: ids that end a turn; empty keeps the base model's.
    """
    tokenizer.save_pretrained(str(folder))
    settings = model.generation_config or GenerationConfig.from_model_config(model.config)
    values = settings.to_diff_dict() | {"pad_token_id": tokenizer.pad_token_id}
    if stop_ids:
        values["eos_token_id"] = list(stop_ids) if len(stop_ids) > 1 else stop_ids[0]
    GenerationConfig(**values).save_pretrained(str(folder))
