"""Tokenised rows on disk, found again by the content they were made from.

The key is a hash of everything that decides the tokens. The first process that needs a key builds
it while the others wait for its file lock, before any process group exists; so ranks never hang in
a collective because one of them is still tokenising. A store that does not verify is built again.
"""

import hashlib
import json
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from filelock import FileLock

from llmtuner.data.conversation import IGNORE_INDEX
from llmtuner.data.render import Encoded
from llmtuner.extras.errors import StorageError
from llmtuner.extras.files import read_json, sha256_of_parts, sync_tree, write_json
from llmtuner.extras.logs import get_logger

_SCHEMA = pa.schema(
    {
        "input_ids": pa.large_list(pa.int32()),
        "labels": pa.large_list(pa.int32()),  # the ids that are trained, else IGNORE_INDEX
        "source": pa.string(),  # `file:line` of the data row
        "row": pa.int64(),  # number of the data row in its set; it can give several samples
        "digest": pa.int64(),  # hash of the data row
    }
)

logger = get_logger(__name__)


@dataclass(frozen=True)
class Tokens:
    """A tokenised data set and the counts that were taken while it was made."""

    dataset: Dataset
    counts: dict[str, Any]


def load_or_build(
    folder: Path,
    *,
    build: Callable[[dict[str, Any]], Iterable[pa.RecordBatch]],
    rebuild: bool,
) -> Tokens:
    """Return the rows of one store, building them when they are missing, damaged or unwanted.

    Args:
        folder: the place of this content key.
        build: yields the samples, from `token_batch`, and fills the given dictionary with counts
            (JSON values).
        rebuild: ignore what is stored.
    """
    _make_room(folder.parent)
    with FileLock(str(folder) + ".lock"):
        if rebuild or not _is_whole(folder):
            _build(folder, build)
        else:
            logger.info("Tokenised rows found in %s.", folder)
        dataset = Dataset.from_file(str(folder / "rows.arrow"))
        return Tokens(dataset, read_json(folder / "counts.json"))


def _make_room(parent: Path) -> None:
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise StorageError(
            f"The folder for tokenised rows cannot be written: {error.strerror}.",
            where=str(parent),
            fix="name another one with the environment variable LLMTUNER_CACHE",
        ) from error


def _is_whole(folder: Path) -> bool:
    try:
        expected = read_json(folder / "digest.json")
        actual = _digests(folder)
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as error:
        logger.warning("The tokenised rows in %s are damaged (%s); building again.", folder, error)
        return False
    if expected != actual:
        logger.warning("The tokenised rows in %s are damaged; they are built again.", folder)
    return bool(expected == actual)


def _digests(folder: Path) -> dict[str, list[str]]:
    return {name: sha256_of_parts(folder / name) for name in ("rows.arrow", "counts.json")}


def _build(folder: Path, build: Callable[[dict[str, Any]], Iterable[pa.RecordBatch]]) -> None:
    staging = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    staging.mkdir(parents=True)
    try:
        counts: dict[str, Any] = {}
        _write_rows(staging / "rows.arrow", build(counts))
        write_json(staging / "counts.json", counts)
        write_json(staging / "digest.json", _digests(staging))
        sync_tree(staging)
        shutil.rmtree(folder, ignore_errors=True)
        staging.rename(folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _write_rows(path: Path, batches: Iterable[pa.RecordBatch]) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, _SCHEMA) as writer:
        for batch in batches:
            writer.write_batch(batch)


def token_batch(rows: Sequence[Encoded], digests: Sequence[int] = ()) -> pa.RecordBatch:
    """Return the samples of data rows as they are stored; the rows are numbered from 0.

    Args:
        rows: from an encoder.
        digests: hash of each row, by which equal rows are found; 0 where there is no audit.
    """
    samples = [sample for row in rows for sample in row.samples]
    numbers = [number for number, row in enumerate(rows) for _ in row.samples]
    borders = [0, *accumulate(len(sample.input_ids) for sample in samples)]
    tokens = chain.from_iterable(sample.input_ids for sample in samples)
    ids = np.fromiter(tokens, np.int32, borders[-1])
    labels = np.full_like(ids, IGNORE_INDEX)
    for sample, border in zip(samples, borders, strict=False):
        for first, end in sample.trained:
            labels[border + first : border + end] = ids[border + first : border + end]
    offsets = pa.array(borders, pa.int64())
    columns = [
        pa.LargeListArray.from_arrays(offsets, pa.array(ids)),
        pa.LargeListArray.from_arrays(offsets, pa.array(labels)),
        [sample.source for sample in samples],
        numbers,
        [digests[number] for number in numbers] if digests else [0] * len(samples),
    ]
    return pa.record_batch(columns, schema=_SCHEMA)


def behind(batch: pa.RecordBatch, num_rows: int) -> pa.RecordBatch:
    """Return the batch with the numbers that its rows have behind so many others."""
    place = _SCHEMA.get_field_index("row")
    return batch.set_column(place, _SCHEMA.field(place), pc.add(batch.column(place), num_rows))


def content_key(parts: dict[str, Any]) -> str:
    """Return the hash of everything that decides the tokens, as a folder name."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:32]
