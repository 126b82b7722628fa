"""Rows of files with named columns: CSV, Parquet and Arrow."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llmtuner.data.encodings import decoded_lines
from llmtuner.data.records import BadRows, Row
from llmtuner.extras.errors import DataError

_BATCH_ROWS = 1024
# Longer cells are cut by no one: the limit of Python's csv module is 131,072 characters.
_LONGEST_CELL = 2**31 - 1
_DELIMITERS = (",", "\t", ";")
_KNOWN_HEADERS = frozenset(
    ("question", "answer", "instruction", "input", "output", "ask", "title", "prompt", "response")
).union(("query", "text", "content", "system", "think", "问", "答", "问题", "答案", "回答"))


def looks_like_csv(line: str) -> bool:
    """Tell whether a first line is a header: two column names or more, all of them well known."""
    names = [name.strip().strip('"').lower() for name in line.strip().split(_delimiter(line))]
    return len(names) > 1 and set(names) <= _KNOWN_HEADERS


def read_csv(
    path: Path, codec: str, bad_rows: BadRows, *, columns: Sequence[str] = ()
) -> Iterator[Row]:
    """Yield one `{column: text}` per record; every cell stays a text, an empty one an empty text.

    The first record is the header. Columns without a name (an exported index) are left out. A
    record with more or fewer cells than the header is a bad row; broken quoting is an error.

    Args:
        path: a file that is not blank.
        codec: from `pick_codec`.
        bad_rows: gets the bad rows.
        columns: names of the columns of a file without a header, with commas between its cells; a
            first record that holds just these names is a header all the same.

    Raises:
        DataError: with `file:line`.
    """
    header = list(columns)
    for number, (line, cells) in enumerate(_records(path, codec, has_header=not columns)):
        where = f"{path}:{line}"
        if number == 0 and _is_header(cells, columns):
            header = _checked_header(cells, where)
        elif len(cells) != len(header):
            problem = f"The record has {len(cells)} cells, the header {len(header)}."
            fix = "quote cells that contain the delimiter or a line break"
            bad_rows.add(DataError(problem, where=where, got=cells, fix=fix, kind="malformed_csv"))
        else:
            named = {name: cell for name, cell in zip(header, cells, strict=True) if name}
            yield Row(named, where)


def _records(path: Path, codec: str, *, has_header: bool) -> Iterator[tuple[int, list[str]]]:
    """Yield the line and the cells of every record that is not blank."""
    csv.field_size_limit(_LONGEST_CELL)
    # A line lost in the middle of a quoted cell would change the cell, so no line may be skipped.
    first = next(text for _, text in decoded_lines(path, codec, BadRows()) if text.strip())
    texts = (text for _, text in decoded_lines(path, codec, BadRows()))
    delimiter = _delimiter(first) if has_header else ","
    records = csv.reader(texts, delimiter=delimiter, strict=True)
    while True:
        line = records.line_num + 1
        try:
            cells = next(records)
        except StopIteration:
            return
        except csv.Error as error:
            problem = f"The file is not CSV: {error}."
            fix = 'close the quoted cell, and write a quote inside one as ""'
            raise DataError(
                problem, where=f"{path}:{line}", fix=fix, kind="malformed_csv"
            ) from None
        if any(cell.strip() for cell in cells):
            yield line, cells


def read_parquet(path: Path) -> Iterator[Row]:
    """Yield the rows of a Parquet file, batch by batch."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            yield from _rows(path, file.iter_batches(batch_size=_BATCH_ROWS))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise _unreadable(path, "Parquet", error) from None


def read_arrow_file(path: Path) -> Iterator[Row]:
    """Yield the rows of an Arrow IPC file (Feather version 2)."""
    import pyarrow as pa

    try:
        # No memory map: a file that shrinks under one kills the process.
        with pa.OSFile(str(path)) as source:
            reader = pa.ipc.open_file(source)
            yield from _rows(path, map(reader.get_batch, range(reader.num_record_batches)))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise _unreadable(path, "Arrow", error) from None


def read_arrow_stream(path: Path) -> Iterator[Row]:
    """Yield the rows of an Arrow IPC stream, as the `datasets` library keeps its tables."""
    import pyarrow as pa

    try:
        with pa.OSFile(str(path)) as source:
            yield from _rows(path, pa.ipc.open_stream(source))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise _unreadable(path, "Arrow", error) from None


def _rows(path: Path, batches: Any) -> Iterator[Row]:
    number = 0
    for batch in batches:
        names = batch.schema.names
        if len(set(names)) < len(names):  # one of them would win silently
            raise _twice(names, str(path))
        batch.validate(full=True)  # damaged offsets would be read as addresses
        for start in range(0, batch.num_rows, _BATCH_ROWS):
            for value in batch.slice(start, _BATCH_ROWS).to_pylist():
                yield Row(value, f"{path}#{number}")
                number += 1


def _unreadable(path: Path, kind: str, error: Exception) -> DataError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return DataError(
        f"The {kind} file cannot be read: {reason}.",
        where=str(path),
        fix="write it again, it may have been cut short",
        kind="malformed_table",
    )


def _delimiter(header: str) -> str:
    return max(_DELIMITERS, key=header.count)


def _is_header(cells: Sequence[str], columns: Sequence[str]) -> bool:
    names = {cell.strip().lower() for cell in cells}
    return not columns or names == {column.lower() for column in columns}


def _checked_header(cells: list[str], where: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    named = [name for name in names if name]
    if len(set(named)) < len(named):
        raise _twice(named, where)
    return names


def _twice(names: Sequence[str], where: str) -> DataError:
    twice = sorted({name for name in names if names.count(name) > 1})
    problem, fix = "The header names a column twice.", "rename one of them"
    return DataError(problem, where=where, got=twice, fix=fix, kind="duplicate_key")
