"""Bytes to text: UTF-8 is expected, GB18030 is recognised, anything else is refused by name."""

import codecs
from collections.abc import Iterator
from pathlib import Path

from llmtuner.data.records import BadRows
from llmtuner.extras.errors import ConfigError, DataError
from llmtuner.extras.logs import get_logger

_logger = get_logger(__name__)

_HEAD_BYTES = 1 << 20
_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_CHINESE_SHARE = 0.8
_SURE_CHARACTERS = 4  # fewer can be anything, such as UTF-8 that is damaged


def pick_codec(path: Path, encoding: str | None) -> str:
    """Return the codec to read a text file with.

    Args:
        path: a regular file that holds text.
        encoding: what the user says it is; None looks at the first megabyte. A file that is not
            UTF-8 is read as GB18030 when most of its non-ASCII lines are broken as UTF-8 and are
            common Chinese as GB18030, four characters or more; the log says so.

    Raises:
        ConfigError: there is no such codec.
        DataError: the file is in another encoding; the message names the guess and the flag.
    """
    if encoding is not None:
        return _known_codec(encoding)
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    guess, is_sure = _guess(head)
    if guess == "gb18030" and is_sure:
        _logger.info("%s: read as GB18030", path)
    elif guess != "utf-8":
        raise DataError(
            f"The file is not UTF-8; it looks like {guess}.",
            where=str(path),
            fix=f"pass --encoding {guess}, or convert the file to UTF-8",
            kind="wrong_encoding",
        )
    return guess


def decoded_lines(path: Path, codec: str, bad_rows: BadRows) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, text with its line end) of every line that can be read.

    Lines end at a line feed only: U+2028 and its like are text. A line whose bytes do not decode,
    or that holds a NUL character, is a bad row. A byte order mark at the start is left out.
    """
    at_bytes = _splits_at_bytes(codec)
    lines = _byte_lines(path, codec, bad_rows) if at_bytes else _text_lines(path, codec)
    for number, line in lines:
        if "\0" in line:
            column = line.index("\0") + 1
            problem = "The line contains a NUL character."
            where = f"{path}:{number}:{column}"
            bad_rows.add(DataError(problem, where=where, kind="nul_character"))
            continue
        yield number, line.removeprefix("\ufeff") if number == 1 else line


def read_text(path: Path, codec: str) -> str:
    """Return the whole text of a file, without a byte order mark.

    Raises:
        DataError: some bytes do not decode; the message has their line and column.
    """
    data = path.read_bytes()
    try:
        text = data.decode(codec)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        start = data.rfind(b"\n", 0, error.start) + 1
        end = data.find(b"\n", error.start)
        raise _undecodable(path, line, data[start : end if end > 0 else None], codec) from None
    return text.removeprefix("\ufeff")


def _byte_lines(path: Path, codec: str, bad_rows: BadRows) -> Iterator[tuple[int, str]]:
    number = 0
    with path.open("rb") as file:
        for data in file:  # no enumerate, which would keep the bytes of a huge line
            number += 1
            try:
                line = data.decode(codec)
            except UnicodeDecodeError:
                bad_rows.add(_undecodable(path, number, data, codec))
                continue
            del data
            yield number, line


def _text_lines(path: Path, codec: str) -> Iterator[tuple[int, str]]:
    """Lines of an encoding whose line feed is not the byte 0x0A, such as UTF-16."""
    try:
        with path.open(encoding=codec, newline="\n") as file:
            yield from enumerate(file, start=1)
    except UnicodeError as error:
        problem = f"The bytes are not valid {codec}: {error}."
        fix = "give the right --encoding"
        raise DataError(problem, where=str(path), fix=fix, kind="wrong_encoding") from None


def _undecodable(path: Path, number: int, data: bytes, codec: str) -> DataError:
    try:
        data.decode(codec)
    except UnicodeDecodeError as error:
        column = len(data[: error.start].decode(codec, errors="replace")) + 1
        got: object = data[error.start : error.start + 8]
    else:  # the line reads alone, the fault is in how it meets the next one
        column, got = 1, data[:8]
    guess, _ = _guess(data.strip())
    hint = f"pass --encoding {guess} if the whole file is {guess}; " if guess != codec else ""
    return DataError(
        f"The bytes are not valid {codec}.",
        where=f"{path}:{number}:{column}",
        got=got,
        fix=f"{hint}repair the line, or pass --on_bad_row skip",
        kind="wrong_encoding",
    )


def _known_codec(encoding: str) -> str:
    try:
        "a".encode(encoding)
    except LookupError:
        raise ConfigError(
            "Unknown text encoding.",
            where="--encoding",
            got=encoding,
            allowed="a Python codec name such as utf-8, gb18030, big5, utf-16 or latin-1",
        ) from None
    return codecs.lookup(encoding).name


def _splits_at_bytes(codec: str) -> bool:
    return "\n".encode(codec) == b"\n"


def _guess(head: bytes) -> tuple[str, bool]:
    """Return the most likely codec, and whether there is enough text to be sure of it."""
    for bom, codec in _BOMS:
        if head.startswith(bom):
            return codec, True
    sample = head[:4096]
    if sample.count(0) > len(sample) // 5:
        is_little = sample[1::2].count(0) > sample[::2].count(0)
        return ("utf-16-le" if is_little else "utf-16-be"), True
    lines = [line for line in _whole_lines(head) if line.strip()]
    beyond_ascii = [line for line in lines if not line.isascii()]
    broken = [line for line in beyond_ascii if not _decodes(line, "utf-8")]
    if len(broken) <= 0.5 * len(beyond_ascii):
        return "utf-8", True  # a broken line among good ones is a bad row, not another encoding
    data = b"".join(broken)
    common_share, num_characters = _common_chinese(data.decode("gb18030", errors="ignore"))
    is_sure = num_characters >= _SURE_CHARACTERS
    if common_share >= _CHINESE_SHARE and is_sure:
        return "gb18030", True
    if len(lines) > 1 and len(broken) <= 0.5 * len(lines):
        return "utf-8", is_sure  # hardly an encoding, rather some broken lines
    if common_share >= _CHINESE_SHARE:
        return "gb18030", False
    return ("big5" if _decodes(data, "big5") else "latin-1"), is_sure


def _whole_lines(head: bytes) -> list[bytes]:
    """The lines of `head` without the last one, which the reading limit may have cut in two."""
    lines = head.split(b"\n")
    if len(head) < _HEAD_BYTES:
        return lines
    if len(lines) > 1:
        return lines[:-1]
    # One enormous line: cut where UTF-8 and GB18030 agree that a character has ended.
    tail = range(len(head) - 1, len(head) - 4096, -1)
    end = next((at for at in tail if head[at] < 0x30), len(head))
    return [head[:end]]


def _decodes(data: bytes, codec: str) -> bool:
    try:
        data.decode(codec)
    except UnicodeDecodeError:
        return False
    return True


def _common_chinese(text: str) -> tuple[float, int]:
    """The share of common Chinese characters and punctuation among the non-ASCII ones; all these.

    GB2312 sorts the 3,755 most used characters into rows 0xB0-0xD7 and the punctuation into
    rows 0xA1-0xA3; text in another encoding, misread as GB18030, falls mostly elsewhere.
    """
    others = [character.encode("gb18030") for character in text if not character.isascii()]
    common = sum(
        len(code) == 2 and code[1] >= 0xA1 and (0xB0 <= code[0] <= 0xD7 or 0xA1 <= code[0] <= 0xA3)
        for code in others
    )
    return (common / len(others) if others else 0.0), len(others)
