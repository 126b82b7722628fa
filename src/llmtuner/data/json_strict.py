"""JSON that every parser reads alike: what others change silently is refused with its place."""

import json
import math
import re
from collections.abc import Iterator
from typing import Any

from llmtuner.extras.error_kinds import ErrorKind

MAX_DEPTH = 100

_SPACE = re.compile(r"[ \t\n\r]*")
_SUSPECT = re.compile(r"\\u(?:0000|[dD][89a-fA-F])")
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|.)", re.DOTALL)


class JsonError(ValueError):
    """A text is not strict JSON.

    Attributes:
        reason: what is wrong, without a full stop.
        offset: index of the character where it is wrong.
        kind: class of the error.
    """

    def __init__(self, reason: str, offset: int, *, kind: ErrorKind = "malformed_json") -> None:
        super().__init__(reason)
        self.reason = reason
        self.offset = offset
        self.kind = kind


class _RefusedValue(Exception):
    """Raised inside the decoder's hooks, which do not know the offset."""

    def __init__(self, reason: str, kind: ErrorKind = "malformed_json") -> None:
        super().__init__(reason)
        self.kind = kind


def parse_json(text: str) -> Any:
    """Return the one JSON value of `text`.

    Beyond the grammar, these are refused: duplicate keys, NaN and infinities, numbers that overflow
    a float, lone surrogates, NUL characters, and nesting deeper than `MAX_DEPTH`.

    Raises:
        JsonError: with the reason and the offset.
    """
    start = _skip_space(text, 0)
    value, end = _decode(text, start)
    end = _skip_space(text, end)
    if end < len(text):
        raise JsonError("there is more text after the JSON value", end)
    return value


def iter_array(text: str) -> Iterator[tuple[Any, int]]:
    """Yield each element of the one JSON array in `text`, with the offset where it starts.

    Raises:
        JsonError: with the reason and the offset, after the elements before it were yielded.
    """
    position = _skip_space(text, _skip_space(text, 0) + 1)
    closed = text.startswith("]", position)
    while not closed:
        value, end = _decode(text, position)
        yield value, position
        position = _skip_space(text, end)
        closed = text.startswith("]", position)
        if not closed:
            if not text.startswith(",", position):
                raise JsonError("expected ',' or ']' after an element of the array", position)
            position = _skip_space(text, position + 1)
    position = _skip_space(text, position + 1)
    if position < len(text):
        raise JsonError("there is more text after the JSON array", position)


def raw_objects(text: str) -> list[dict[str, str]]:
    """Return the members of the object, or list of objects, in `text` as raw slices of it.

    `text` must have passed `parse_json`. Slices keep spacing, number spelling and escapes.
    """
    position = _skip_space(text, 0)
    if text[position] == "{":
        return [_raw_members(text, position)]
    return [_raw_members(text, start) for _, start in iter_array(text)]


def line_and_column(text: str, offset: int) -> tuple[int, int]:
    """Return the line and column of a character, both counted from 1."""
    return text.count("\n", 0, offset) + 1, offset - text.rfind("\n", 0, offset)


def _raw_members(text: str, start: int) -> dict[str, str]:
    members = {}
    position = _skip_space(text, start + 1)
    while text[position] != "}":
        key, end = _decode(text, position)
        begin = _skip_space(text, _skip_space(text, end) + 1)
        _, end = _decode(text, begin)
        members[key] = text[begin:end]
        position = _skip_space(text, end)
        if text[position] == ",":
            position = _skip_space(text, position + 1)
    return members


def _skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _decode(text: str, start: int) -> tuple[Any, int]:
    try:
        value, end = _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        raise JsonError(error.msg[0].lower() + error.msg[1:], error.pos) from None
    except _RefusedValue as error:
        raise JsonError(str(error), start, kind=error.kind) from None
    except RecursionError:
        raise JsonError(f"the nesting is deeper than {MAX_DEPTH} levels", start) from None
    except ValueError:
        raise JsonError("a number has too many digits", start) from None
    if _SUSPECT.search(text, start, end):
        _check_escapes(text, start, end)
    if text.count("[", start, end) + text.count("{", start, end) > MAX_DEPTH:
        _check_depth(value, start)
    return value, end


def _check_escapes(text: str, start: int, end: int) -> None:
    half = "a \\u escape is half of a surrogate pair"
    low_due_at = -1  # where the second half of a pair must start
    for match in _ESCAPE.finditer(text, start, end):
        code = int(match[1], 16) if match[1] else -1
        is_low = 0xDC00 <= code <= 0xDFFF
        if low_due_at != -1 and not (is_low and match.start() == low_due_at):
            raise JsonError(half, low_due_at - 6, kind="lone_surrogate")
        if is_low and low_due_at == -1:
            raise JsonError(half, match.start(), kind="lone_surrogate")
        if code == 0:
            problem = "a string contains the NUL character"
            raise JsonError(problem, match.start(), kind="nul_character")
        low_due_at = match.end() if 0xD800 <= code <= 0xDBFF else -1
    if low_due_at != -1:
        raise JsonError(half, low_due_at - 6, kind="lone_surrogate")


def _check_depth(value: Any, start: int) -> None:
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(MAX_DEPTH):
        level = [child for parent in level for child in _containers(parent)]
        if not level:
            return
    raise JsonError(f"the nesting is deeper than {MAX_DEPTH} levels", start)


def _containers(parent: dict[str, Any] | list[Any]) -> list[Any]:
    items = parent.values() if isinstance(parent, dict) else parent
    return [item for item in items if isinstance(item, (dict, list))]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [key for key, _ in pairs]
        twice = next(key for key in result if names.count(key) > 1)
        raise _RefusedValue(f"the key {twice!r} occurs twice in one object", "duplicate_key")
    return result


def _constant(name: str) -> float:
    raise _RefusedValue(f"{name} is not JSON")


def _float(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise _RefusedValue(f"the number {digits[:40]} is too large")
    return number


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_float=_float)
