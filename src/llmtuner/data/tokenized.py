"""`tokenized_path`: tokenised data that a user keeps, and that `datasets.load_from_disk` opens."""

from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_from_disk

from llmtuner.data.token_store import content_key
from llmtuner.data.tokenise import Encoder
from llmtuner.extras.errors import DataError
from llmtuner.extras.files import read_json, write_json
from llmtuner.extras.logs import get_logger
from llmtuner.hparams.data import DataArgs

_SETTINGS = "llmtuner.json"

logger = get_logger(__name__)


def settings_of(args: DataArgs, encode: Encoder, seed: int) -> dict[str, Any]:
    """Return what must not change between making tokenised data and using it."""
    names = ("dataset", "eval_dataset", "max_samples", "val_size", "mix_strategy")
    chosen = {name: vars(args)[name] for name in names}
    settings = {**chosen, "interleave_probs": args.interleave_probs, "seed": seed}
    return {"key": content_key({**settings, "encoder": encode.fingerprint()}), **settings}


def save_tokenized(
    target: Path, parts: dict[str, Dataset], *, settings: dict[str, Any], report: dict[str, Any]
) -> None:
    """Write the sets with what they were made from; a lone training set is no `DatasetDict`."""
    columns = {name: part.remove_columns("row") for name, part in parts.items()}
    only = columns["train"] if set(columns) == {"train"} else DatasetDict(columns)
    only.save_to_disk(str(target))
    write_json(target / _SETTINGS, {"settings": settings, "report": report})
    logger.info("Tokenised data saved to %s; start again with the same settings to use it.", target)


def load_tokenized(
    target: Path, settings: dict[str, Any]
) -> tuple[dict[str, Dataset], dict[str, Any]]:
    """Return the sets and their report.

    Raises:
        DataError: the folder cannot be read, or was made with other settings.
    """
    try:
        stored = read_json(target / _SETTINGS)
        loaded = load_from_disk(str(target))
    except (OSError, ValueError) as error:
        problem = f"The tokenised data cannot be read: {error}."
        fix = "delete the folder, or choose another --tokenized_path"
        raise DataError(problem, where=str(target), fix=fix) from error
    if stored["settings"]["key"] != settings["key"]:
        changed = [
            name
            for name, value in settings.items()
            if name != "key"
            and str(stored["settings"].get(name)) not in (str(value), str(_as_list(value)))
        ]
        raise DataError(
            "The tokenised data was made with other settings.",
            where=str(target),
            got=changed or "another template, tokenizer, cutoff_len or mask setting",
            fix="delete the folder, or choose another --tokenized_path",
        )
    logger.info("Tokenised data loaded from %s.", target)
    parts = dict(loaded) if isinstance(loaded, DatasetDict) else {"train": loaded}
    return parts, stored["report"]


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
