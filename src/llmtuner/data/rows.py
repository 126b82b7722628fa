"""A data set's rows to conversations: read, map, convert, check; each row keeps its place."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from llmtuner.data.columns import (
    Format,
    load_formats,
    missing_columns,
    nearest_column,
    open_formats,
    own_row,
    pick_format,
    reads_documents,
)
from llmtuner.data.conversation import Conversation
from llmtuner.data.dataset_info import DatasetSpec
from llmtuner.data.hub import read_hub_rows
from llmtuner.data.records import BadRows as BadRows
from llmtuner.data.records import Row
from llmtuner.data.sources import read_rows
from llmtuner.data.turns import check_conversation
from llmtuner.extras.errors import DataError
from llmtuner.extras.logs import get_logger
from llmtuner.hparams.data import DataArgs

_logger = get_logger(__name__)


def load_conversations(
    spec: DatasetSpec, *, data_args: DataArgs, bad_rows: BadRows, seed: int = 42
) -> Iterator[Conversation]:
    """Yield the conversations of one data set, in file order.

    `spec.num_samples` draws that many rows by a seeded permutation (and again with replacement
    when there are fewer), in file order; `data_args.max_samples` then takes the first ones. Rows
    behind the last one taken are not read.

    Args:
        spec: from `load_dataset_specs`.
        data_args: `encoding`, `custom_formats`, `streaming` and `max_samples` are read.
        bad_rows: raises, or counts, by `on_bad_row`; one object may serve several data sets.
        seed: of the permutation.

    Raises:
        DataError: a bad row where those are errors, a file that cannot be read, or no usable row.
    """
    num_skipped_before = bad_rows.count
    taken = _read_all(spec, data_args, bad_rows)
    if spec.num_samples is not None:
        taken = iter(_draw(list(taken), spec.num_samples, seed))
    num_taken = 0
    for conversation in islice(taken, data_args.max_samples):
        num_taken += 1
        yield conversation
    num_skipped = bad_rows.count - num_skipped_before
    if num_skipped:
        _logger.warning("%s: %d rows skipped; %s", spec.name, num_skipped, bad_rows.examples[-1])
    if not num_taken:
        reasons = "; ".join(bad_rows.examples[:3]) or "there is none"
        raise DataError(
            f"0 usable rows of {num_skipped}: {reasons}",
            where=spec.name,
            fix="correct the rows, columns or max_samples",
        )


def _read_all(spec: DatasetSpec, data_args: DataArgs, bad_rows: BadRows) -> Iterator[Conversation]:
    formats = load_formats(open_formats(data_args.custom_formats))
    unseen = dict(spec.columns or {})
    num_rows = 0
    for rows in _sources(spec, data_args, bad_rows):
        entry: Format | None = None
        for row in rows:
            num_rows += 1
            try:
                value = _as_mapping(row.value, spec.columns)
                unseen = missing_columns(value, unseen)
                entry = entry or _choose(formats, value, spec)
                conversation = _convert(value, entry, spec)
            except DataError as error:
                bad_rows.add(error.at(row.where))
                continue
            yield replace(conversation, source=row.where)
    if unseen and num_rows:
        key, name = next(iter(unseen.items()))
        problem = f"Column {name!r}, which columns.{key} names, is in no row."
        raise DataError(problem, where=spec.name, fix="correct `columns` in dataset_info.json")


def _sources(spec: DatasetSpec, data_args: DataArgs, bad_rows: BadRows) -> Iterator[Iterator[Row]]:
    if spec.hub is not None:
        yield read_hub_rows(spec.hub, streaming=data_args.streaming)
    for path in spec.files:
        yield read_rows(Path(path), encoding=data_args.encoding, bad_rows=bad_rows)


def _as_mapping(value: object, columns: Mapping[str, str] | None) -> Mapping[str, Any]:
    """Name what has no column names: a plain text, a bare list of messages."""
    if isinstance(value, str):
        return {"text": value}
    if isinstance(value, list):
        return {(columns or {}).get("messages", "messages"): value}
    assert isinstance(value, Mapping), type(value)
    return value


def _choose(formats: Sequence[Format], row: Mapping[str, Any], spec: DatasetSpec) -> Format:
    if spec.formatting is None:
        return pick_format(formats, row, columns=spec.columns, tags=spec.tags)
    named = next(entry for entry in formats if entry.name == spec.formatting)
    if reads_documents(named, spec.columns):
        return pick_format(formats, row, columns=spec.columns, tags=None)
    return named


def _convert(row: Mapping[str, Any], entry: Format, spec: DatasetSpec) -> Conversation:
    own = own_row(row, entry, columns=spec.columns, tags=spec.tags)
    try:
        conversation = entry.to_conversation(own)
    except DataError as error:
        if missing := missing_columns(row, spec.columns):
            key, name = next(iter(missing.items()))
            problem = f"{error.problem} columns.{key} names {name!r}, which the row does not have."
            raise DataError(problem, got=list(row), fix=nearest_column(name, row)) from None
        raise
    except Exception as error:
        problem = f"The format {entry.name!r} failed: {type(error).__name__}: {error}."
        raise DataError(problem, got=dict(own)) from error
    if not isinstance(conversation, Conversation):
        problem = f"The format {entry.name!r} did not return a Conversation."
        raise DataError(problem, got=conversation)
    check_conversation(conversation)
    return conversation


def _draw(conversations: Sequence[Conversation], num_samples: int, seed: int) -> list[Conversation]:
    generator = random.Random(seed)
    order = generator.sample(range(len(conversations)), k=len(conversations))[:num_samples]
    if order and len(order) < num_samples:
        order += generator.choices(range(len(conversations)), k=num_samples - len(order))
    return [conversations[index] for index in sorted(order)]
