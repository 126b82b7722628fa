"""Bytes to rows: one strict reader for every kind of data file, which tells kinds apart by content.

JSON (an array of rows, or one object), JSON Lines, CSV, plain text with one sample a line, Parquet
and Arrow. Strings come back byte-identical; nothing is converted by a guess about its type.
"""

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtuner.data.encodings import decoded_lines, pick_codec, read_text
from llmtuner.data.json_strict import JsonError, iter_array, line_and_column, parse_json
from llmtuner.data.records import BadRows, Row
from llmtuner.data.tables import (
    looks_like_csv,
    read_arrow_file,
    read_arrow_stream,
    read_csv,
    read_parquet,
)
from llmtuner.extras.errors import DataError
from llmtuner.extras.logs import get_logger

_logger = get_logger(__name__)

DATA_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt", ".parquet", ".arrow")

_HEAD_LINES = 20
_HEAD_CHARACTERS = 1 << 16
_JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
_CSV_SUFFIXES = (".csv", ".tsv")
_BINARY_READERS: tuple[tuple[bytes, Callable[[Path], Iterator[Row]]], ...] = (
    (b"PAR1", read_parquet),
    (b"ARROW1", read_arrow_file),
    (b"\xff\xff\xff\xff", read_arrow_stream),
)
_REFUSED_MAGIC = (
    (b"\x1f\x8b", "a gzip archive", "gunzip it"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", "unzstd it"),
    (b"BZh", "a bzip2 archive", "bunzip2 it"),
    (b"\xfd7zXZ", "an xz archive", "unxz it"),
    (b"PK\x03\x04", "a zip archive or an Office document", "unpack it, or save the sheet as CSV"),
    (b"SQLite format 3", "an SQLite database", "export the table as CSV"),
    (b"version https://git-lfs", "a Git LFS pointer without its data", "run git lfs pull"),
)


@dataclass(frozen=True)
class FileStamp:
    """What tells, without reading it, that a file has changed."""

    size_bytes: int
    changed_at_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> "FileStamp":
        """Take the stamp of a regular file.

        Raises:
            DataError: the file is gone.
        """
        status = check_regular(path)
        return cls(status.st_size, status.st_mtime_ns, status.st_ino)


def read_rows(
    path: Path,
    *,
    encoding: str | None = None,
    bad_rows: BadRows | None = None,
    stamp: FileStamp | None = None,
) -> Iterator[Row]:
    """Yield the rows of one data file.

    JSON Lines, CSV and text are read line by line and say `file:line`; JSON arrays, Parquet and
    Arrow say `file#row`, with rows counted from 0.

    Args:
        path: a regular file.
        encoding: of the text; None recognises UTF-8 (with or without mark) and GB18030.
        bad_rows: gets the lines that cannot be read; None raises at the first one. A JSON array
            or CSV file that cannot be parsed is always an error: no row behind the fault is sure.
        stamp: the file must have it before and after reading; None takes it now.

    Raises:
        DataError: with `file:line:column` where there is one.
    """
    before = FileStamp.of(path)
    stamp = stamp or before
    _check_stamp(path, before, stamp)
    with path.open("rb") as file:
        magic = file.read(32)
    if not magic:
        raise DataError(
            "The file is empty.", where=str(path), fix="give a file with rows", kind="empty_file"
        )
    for start, kind, fix in _REFUSED_MAGIC:
        if magic.startswith(start):
            raise DataError(
                f"The file is {kind}.", where=str(path), fix=fix, kind="unreadable_file"
            )
    for start, reader in _BINARY_READERS:
        if magic.startswith(start):
            return _unchanged(reader(path), path, stamp)
    rows = _read_text_rows(path, pick_codec(path, encoding), bad_rows or BadRows())
    return _unchanged(rows, path, stamp)


def _unchanged(rows: Iterator[Row], path: Path, stamp: FileStamp) -> Iterator[Row]:
    """Yield `rows`, then refuse them all if the file was written to meanwhile."""
    try:
        yield from rows
    except DataError:
        _check_stamp(path, FileStamp.of(path), stamp)  # a half-written line is not the user's fault
        raise
    _check_stamp(path, FileStamp.of(path), stamp)


def _check_stamp(path: Path, now: FileStamp, stamp: FileStamp) -> None:
    if now != stamp:
        raise DataError(
            "The file has changed since the run began.",
            where=str(path),
            got=f"{now.size_bytes} bytes, before {stamp.size_bytes}"
            if now.size_bytes != stamp.size_bytes
            else "the same size, written again",
            fix="start the run again, and leave its data alone while it reads",
            kind="file_changed",
        )


def check_regular(path: Path) -> os.stat_result:
    """Refuse what is no regular file: a pipe, a device, a socket, a folder, nothing at all.

    Returns:
        its status.
    """
    try:
        status = path.stat()
    except OSError as error:
        problem = f"The data file cannot be opened: {error.strerror}."
        raise DataError(
            problem, where=str(path), fix="check the path", kind="unreadable_file"
        ) from None
    if not stat.S_ISREG(status.st_mode):
        raise DataError(
            "The path is not a regular file.",
            where=str(path),
            allowed="regular files; no pipes, devices or sockets",
            fix="write the data to a file first",
            kind="unreadable_file",
        )
    if not os.access(path, os.R_OK):
        fix = "check its permissions"
        raise DataError(
            "The file is not readable.", where=str(path), fix=fix, kind="unreadable_file"
        )
    return status


def list_data_files(path: Path) -> list[Path]:
    """Return `path`, or the data files of the folder `path` in sorted order.

    Files of a folder with another suffix than `DATA_SUFFIXES` are left out, and the log names them.

    Raises:
        DataError: there is no such path, or the folder holds no data file.
    """
    if not os.path.isdir(path):  # which says no to names that no file can have
        check_regular(path)
        return [path]
    try:
        present = sorted(path.iterdir(), key=lambda p: p.name)
    except OSError as error:
        problem = f"The folder cannot be read: {error.strerror}."
        fix = "check its permissions"
        raise DataError(problem, where=str(path), fix=fix, kind="unreadable_file") from None
    visible = [p for p in present if not p.name.startswith((".", "_"))]
    found = [p for p in visible if p.suffix.lower() in DATA_SUFFIXES and not p.is_dir()]
    if any(p.suffix == ".arrow" for p in found):  # what `Dataset.save_to_disk` wrote
        found = [p for p in found if p.name not in ("dataset_info.json", "state.json")]
    if not found:
        raise DataError(
            "The folder holds no data file.",
            where=str(path),
            got=[p.name for p in visible],
            allowed=DATA_SUFFIXES,
            kind="empty_file",
        )
    left_out = sorted({p.name for p in visible} - {p.name for p in found})
    if left_out:
        _logger.warning("%s: not read, by their suffix: %s", path, ", ".join(left_out))
    for file in found:
        check_regular(file)
    return found


def _read_text_rows(path: Path, codec: str, bad_rows: BadRows) -> Iterator[Row]:
    unreadable = BadRows("skip")
    head = _head_lines(path, codec, unreadable)
    if not head and unreadable.count:
        head = [""]  # the suffix decides, and the reader says what is wrong
    if not head:
        raise DataError("The file has only blank lines.", where=str(path), kind="empty_file")
    return _text_kind(head, path.suffix.lower())(path, codec, bad_rows)


def _head_lines(path: Path, codec: str, unreadable: BadRows) -> list[str]:
    """The first lines that are not blank; lines that cannot be read do not count."""
    head: list[str] = []
    num_characters = 0
    for _, line in decoded_lines(path, codec, unreadable):
        if line and not line.isspace():
            head.append(line)
            num_characters += len(line)
        if len(head) == _HEAD_LINES or (len(head) > 1 and num_characters > _HEAD_CHARACTERS):
            break
    return head


def _text_kind(head: Sequence[str], suffix: str) -> Callable[[Path, str, BadRows], Iterator[Row]]:
    """Choose the reader by the first lines; the suffix only decides between equal readings."""
    first = head[0]
    start = first.lstrip(" \t\r\n")[:1]
    opens = start in ("{", "[")
    if opens and _is_whole_json(first, suffix):
        return _read_json_array if start == "[" and len(head) == 1 else _read_json_lines
    may_be_text = suffix in (*_CSV_SUFFIXES, ".txt") and first.strip() not in ("{", "[", "[{")
    if opens and not may_be_text:
        return _json_kind(head, start)
    if suffix in _JSON_SUFFIXES:
        return _read_json_lines
    if suffix in _CSV_SUFFIXES or looks_like_csv(first):
        return read_csv
    return _read_text_lines


def _json_kind(head: Sequence[str], start: str) -> Callable[[Path, str, BadRows], Iterator[Row]]:
    """JSON that does not end on its first line: laid out over lines, or a broken first line."""
    others = head[1:]
    goes_on = head[0].strip() in ("{", "[", "[{") or head[0].rstrip().endswith(",")
    opens_again = bool(others) and others[0].startswith(start) and not goes_on
    num_rows = sum(_is_whole_json(line, "") for line in others)
    if opens_again or num_rows > len(others) / 2:
        return _read_json_lines
    return _read_json_array if start == "[" else _read_json_object


def _is_whole_json(line: str, suffix: str) -> bool:
    try:
        value = parse_json(line)
    except JsonError:
        return False
    is_row = isinstance(value, dict) or any(isinstance(item, dict) for item in value)
    return is_row or suffix in _JSON_SUFFIXES  # "[1]" opens many a line of plain text


def _read_json_lines(path: Path, codec: str, bad_rows: BadRows) -> Iterator[Row]:
    for number, line in decoded_lines(path, codec, bad_rows):
        if not line or (line.isspace() and not line.strip(" \t\r\n")):
            continue
        where = f"{path}:{number}"
        try:
            value = parse_json(line)
        except JsonError as error:
            column = min(error.offset, len(line.rstrip())) + 1
            problem = f"The line is not JSON: {error.reason}."
            fix = "write one JSON value a line, or pass --on_bad_row skip"
            bad_rows.add(DataError(problem, where=f"{where}:{column}", fix=fix, kind=error.kind))
            continue
        yield from _checked(value, where, bad_rows)


def _read_json_array(path: Path, codec: str, bad_rows: BadRows) -> Iterator[Row]:
    text = read_text(path, codec)
    elements = _located(path, text)
    for number, value in enumerate(elements):
        if number == 0 and _is_message(value):
            # [{"role": …}, …] is one conversation, as such a line is in JSON Lines.
            yield Row([value, *elements], f"{path}#0")
        else:
            yield from _checked(value, f"{path}#{number}", bad_rows)


def _located(path: Path, text: str) -> Iterator[Any]:
    try:
        yield from (value for value, _ in iter_array(text))
    except JsonError as error:
        raise _not_json(path, text, error) from None


def _read_json_object(path: Path, codec: str, bad_rows: BadRows) -> Iterator[Row]:
    text = read_text(path, codec)
    try:
        value = parse_json(text)
    except JsonError as error:
        raise _not_json(path, text, error) from None
    yield from _checked(value, f"{path}#0", bad_rows)


def _not_json(path: Path, text: str, error: JsonError) -> DataError:
    line, column = line_and_column(text, error.offset)
    problem = f"The file is not JSON: {error.reason}."
    where = f"{path}:{line}:{column}"
    return DataError(problem, where=where, fix="repair the file", kind=error.kind)


def _checked(value: Any, where: str, bad_rows: BadRows) -> Iterator[Row]:
    if isinstance(value, (dict, list, str)):
        yield Row(value, where)
    else:
        allowed = "an object, a list of messages, or a text"
        problem = "The row is no row."
        bad_rows.add(DataError(problem, where=where, got=value, allowed=allowed, kind="wrong_type"))


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and (
        {"role", "content"} <= set(value) or {"from", "value"} <= set(value)
    )


def _read_text_lines(path: Path, codec: str, bad_rows: BadRows) -> Iterator[Row]:
    for number, line in decoded_lines(path, codec, bad_rows):
        if line and not line.isspace():
            yield Row(line.removesuffix("\n").removesuffix("\r"), f"{path}:{number}")
