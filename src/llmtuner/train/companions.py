"""What serving needs beside the weights: tokenizer, chat template, stop ids."""

from collections.abc import Sequence
from pathlib import Path

from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from llmtuner.data.verify import contract_digest
from llmtuner.extras.errors import ModelError
from llmtuner.hparams.model import ModelArgs


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


def check_companions(folder: Path, digest: str, *, config: ModelArgs) -> None:
    """Prove that what was saved is what the contract with serving was proved for.

    Raises:
        ModelError: tokenizer, chat template or stop ids in `folder` are others.
    """
    tokenizer = AutoTokenizer.from_pretrained(
        str(folder), trust_remote_code=config.trust_remote_code, local_files_only=True
    )
    stops = GenerationConfig.from_pretrained(str(folder)).eos_token_id
    stop_ids = stops if isinstance(stops, list) else [stops]
    if contract_digest(tokenizer, stop_ids) != digest:
        raise ModelError(
            "The saved tokenizer, chat template or stop ids are not those that were trained with.",
            where=str(folder),
            fix="do not change the folder while training; save again from the last checkpoint",
        )
