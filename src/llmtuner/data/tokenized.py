"""`tokenized_path`: tokenised data that a user keeps, and that `datasets.load_from_disk` opens."""

import shutil
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_from_disk
from filelock import FileLock

from llmtuner.data.dataset_info import load_dataset_specs
from llmtuner.data.token_store import content_key
from llmtuner.data.tokenise import Encoder
from llmtuner.extras.env import process_env
from llmtuner.extras.errors import DataError
from llmtuner.extras.files import read_json, sha256_of, write_json
from llmtuner.extras.logs import get_logger
from llmtuner.hparams.data import DataArgs

_SETTINGS = "llmtuner.json"

logger = get_logger(__name__)


def settings_of(args: DataArgs, encode: Encoder, seed: int) -> dict[str, Any]:
    """Return what must not change between making tokenised data and using it."""
    names = (
        "dataset", "eval_dataset", "max_samples", "val_size", "mix_strategy", "interleave_probs",
        "eval_on_each_dataset", "encoding", "on_bad_row", "custom_formats",
    )  # fmt: skip
    settings = {name: _as_list(vars(args)[name]) for name in names} | {"seed": seed}
    specs = load_dataset_specs(args, [*(args.dataset or ()), *(args.eval_dataset or ())])
    settings["files"] = [sha256_of(path) for spec in specs for path in spec.files]
    return {"key": content_key({**settings, "encoder": encode.fingerprint()}), **settings}


def save_tokenized(
    target: Path, parts: dict[str, Dataset], *, settings: dict[str, Any], report: dict[str, Any]
) -> None:
    """Write the sets with what they were made from; a lone training set is no `DatasetDict`.

    The first process of a job writes, the others find the folder whole when they get the lock.
    """
    columns = {name: part.remove_columns(["row", "digest"]) for name, part in parts.items()}
    only = columns["train"] if set(columns) == {"train"} else DatasetDict(columns)
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(target) + ".lock"):
        if target.exists():
            return
        staging = target.with_name(f".{target.name}.staging")
        shutil.rmtree(staging, ignore_errors=True)
        only.save_to_disk(str(staging))
        record = {"settings": settings, "report": report, "job": process_env().job_id}
        write_json(staging / _SETTINGS, record)
        staging.rename(target)
    logger.info("Tokenised data saved to %s; start again with the same settings to use it.", target)


def is_of_this_job(target: Path) -> bool:
    """Tell whether another process of this job has just written the folder."""
    job_id = process_env().job_id
    try:
        return job_id != "" and read_json(target / _SETTINGS).get("job") == job_id
    except (OSError, ValueError, AttributeError):
        return False


def load_tokenized(
    target: Path, settings: dict[str, Any]
) -> tuple[dict[str, Dataset], dict[str, Any]]:
    """Return the sets and their report.

    Raises:
        DataError: the folder cannot be read, or was made with other settings.
    """
    try:
        stored = read_json(target / _SETTINGS)
        made_with, report = stored["settings"], stored["report"]
        made_key = made_with["key"]
        loaded = load_from_disk(str(target))
    except (OSError, ValueError, TypeError, KeyError) as error:
        problem = f"The tokenised data cannot be read: {error!r}."
        fix = "delete the folder, or choose another --tokenized_path"
        raise DataError(problem, where=str(target), fix=fix) from error
    if made_key != settings["key"]:
        changed = [
            name
            for name, value in settings.items()
            if name != "key" and made_with.get(name) != value
        ]
        raise DataError(
            "The tokenised data was made with other settings.",
            where=str(target),
            got=changed or "another template, tokenizer, cutoff_len or mask setting",
            fix="delete the folder, or choose another --tokenized_path",
        )
    logger.info("Tokenised data loaded from %s.", target)
    parts = dict(loaded) if isinstance(loaded, DatasetDict) else {"train": loaded}
    return parts, report


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
