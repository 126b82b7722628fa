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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset
from filelock import FileLock

from llmtuner.extras.errors import StorageError
from llmtuner.extras.files import read_json, sha256_of, sync_tree, write_json
from llmtuner.extras.logs import get_logger

_SCHEMA = pa.schema(
    {
        "input_ids": pa.large_list(pa.int32()),
        "labels": pa.large_list(pa.int32()),
        "source": pa.string(),
        "row": pa.int64(),
        "digest": pa.int64(),
    }
)
_ROWS_PER_BATCH = 1000

logger = get_logger(__name__)


@dataclass(frozen=True)
class TokenRow:
    """One training sample.

    Attributes:
        input_ids: tokens of the sample.
        labels: the same where a token is trained, IGNORE_INDEX elsewhere; not shifted.
        source: `file:line` of the data row.
        row: number of the data row in its set; several samples can come from one row.
        digest: hash of the data row, by which equal rows are found; 0 without an audit.
    """

    input_ids: list[int]
    labels: list[int]
    source: str
    row: int
    digest: int = 0


@dataclass(frozen=True)
class Tokens:
    """A tokenised data set and the counts that were taken while it was made."""

    dataset: Dataset
    counts: dict[str, Any]


def load_or_build(
    folder: Path,
    *,
    build: Callable[[dict[str, Any]], Iterable[TokenRow]],
    rebuild: bool,
) -> Tokens:
    """Return the rows of one store, building them when they are missing, damaged or unwanted.

    Args:
        folder: the place of this content key.
        build: yields the rows and fills the given dictionary with counts (JSON values).
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


def _digests(folder: Path) -> dict[str, str]:
    return {name: sha256_of(folder / name) for name in ("rows.arrow", "counts.json")}


def _build(folder: Path, build: Callable[[dict[str, Any]], Iterable[TokenRow]]) -> None:
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


def _write_rows(path: Path, rows: Iterable[TokenRow]) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, _SCHEMA) as writer:
        for chunk in _chunks(rows, _ROWS_PER_BATCH):
            columns = {
                "input_ids": [row.input_ids for row in chunk],
                "labels": [row.labels for row in chunk],
                "source": [row.source for row in chunk],
                "row": [row.row for row in chunk],
                "digest": [row.digest for row in chunk],
            }
            writer.write_batch(pa.record_batch(columns, schema=_SCHEMA))


def _chunks(rows: Iterable[TokenRow], size: int) -> Iterator[list[TokenRow]]:
    chunk: list[TokenRow] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def content_key(parts: dict[str, Any]) -> str:
    """Return the hash of everything that decides the tokens, as a folder name."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:32]
