"""A data set's rows to conversations: read, map, convert, check; each row keeps its place."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
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

_NUM_REASONS = 3
_NUM_SPARED = 2  # one per cent of a small set is less than a row

_logger = get_logger(__name__)


def load_conversations(
    spec: DatasetSpec, *, data_args: DataArgs, bad_rows: BadRows, seed: int = 42
) -> Iterator[Conversation]:
    """Yield the conversations of one data set, in file order.

    `spec.num_samples` draws that many rows by a seeded permutation (and again with replacement
    when there are fewer), in file order; `data_args.max_samples` then takes the first ones. Rows
    behind the last one taken are not read. At the end it is known, and checked, whether more were
    skipped than `spec.max_bad_rows` allows.

    Args:
        spec: from `load_dataset_specs`.
        data_args: `encoding`, `custom_formats`, `streaming` and `max_samples` are read.
        bad_rows: raises, or counts, by `on_bad_row`; one object may serve several data sets.
        seed: of the permutation.

    Raises:
        DataError: a bad row where those are errors, a file that cannot be read, or no usable row.
    """
    own = BadRows("skip", on_bad=bad_rows.add)  # counts this set alone; `bad_rows` decides
    taken = _read_all(spec, data_args, own)
    if spec.num_samples is not None:
        taken = iter(_draw(list(taken), spec.num_samples, seed))
    num_taken = 0
    for conversation in islice(taken, data_args.max_samples):
        num_taken += 1
        yield conversation
    if own.count and data_args.on_bad_row == "skip":
        _logger.warning("%s: %d rows skipped; %s", spec.name, own.count, own.examples[-1])
    if not num_taken:
        nothing = "max_samples is 0" if data_args.max_samples == 0 else "there is none"
        reasons = "; ".join(own.examples[:_NUM_REASONS]) or nothing
        raise DataError(
            f"0 usable rows of {own.count}: {reasons}",
            where=spec.name,
            fix="correct the rows, columns or max_samples",
            kind="no_usable_rows",
        )
    if spec.max_bad_rows is not None:
        _check_share(spec, own, limit=spec.max_bad_rows)


def _check_share(spec: DatasetSpec, bad_rows: BadRows, *, limit: float) -> None:
    """Refuse a data set of which too much was skipped: it, or its entry, is not what one thinks."""
    num_rows = bad_rows.count + bad_rows.num_good
    spared = min(_NUM_SPARED, num_rows // 2) if limit else 0
    if bad_rows.count <= max(limit * num_rows, spared):
        return
    kinds = ", ".join(f"{kind}: {count}" for kind, count in bad_rows.kinds.most_common())
    raise DataError(
        f"{bad_rows.count} of {num_rows} rows are bad ({kinds}): "
        + "; ".join(bad_rows.examples[:_NUM_REASONS]),
        where=spec.name,
        allowed=f"a share of {limit:g}",
        fix="repair the rows, or raise --max_bad_rows",
        kind="too_many_bad_rows",
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
            bad_rows.num_good += 1
            yield replace(conversation, source=row.where)
    if unseen and num_rows:
        key, name = next(iter(unseen.items()))
        problem = f"Column {name!r}, which columns.{key} names, is in no row."
        fix = "correct `columns` in dataset_info.json"
        raise DataError(problem, where=spec.name, fix=fix, kind="missing_column")


def _sources(spec: DatasetSpec, data_args: DataArgs, bad_rows: BadRows) -> Iterator[Iterator[Row]]:
    if spec.hub is not None:
        yield read_hub_rows(spec.hub, streaming=data_args.streaming)
    stamps = spec.stamps or (None,) * len(spec.files)
    for path, stamp in zip(spec.files, stamps, strict=True):
        yield read_rows(path, encoding=data_args.encoding, bad_rows=bad_rows, stamp=stamp)


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
            fix = nearest_column(name, row)
            raise DataError(problem, got=list(row), fix=fix, kind=error.kind) from None
        raise
    except Exception as error:
        problem = f"The format {entry.name!r} failed: {type(error).__name__}: {error}."
        raise DataError(problem, got=dict(own), kind="failing_format") from error
    if not isinstance(conversation, Conversation):
        problem = f"The format {entry.name!r} did not return a Conversation."
        raise DataError(problem, got=conversation, kind="failing_format")
    check_conversation(conversation)
    return conversation


def _draw(conversations: Sequence[Conversation], num_samples: int, seed: int) -> list[Conversation]:
    generator = random.Random(seed)
    order = generator.sample(range(len(conversations)), k=len(conversations))[:num_samples]
    if order and len(order) < num_samples:
        order += generator.choices(range(len(conversations)), k=num_samples - len(order))
    return [conversations[index] for index in sorted(order)]
