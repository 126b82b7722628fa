"""Reading one column of a row: texts are texts, and nothing else is turned into one."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llmtuner.data.conversation import ToolCall
from llmtuner.data.json_strict import JsonError, parse_json, raw_objects
from llmtuner.extras.error_kinds import ErrorKind
from llmtuner.extras.errors import DataError, nearest

_ARGUMENTS = "`arguments` of the function call"


def optional_text(row: Mapping[str, Any], name: str) -> str:
    """Return the text of a column; "" where the column is missing or null.

    Raises:
        DataError: the value is not a text.
    """
    value = row.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(
            f"Column {name!r} is not a text.",
            got=value,
            allowed="a text; numbers and booleans are not turned into one",
            fix="put the value in quotes",
            kind="wrong_type",
        )
    return value


def required_text(row: Mapping[str, Any], name: str, *, kind: ErrorKind = "missing_column") -> str:
    """Return the text of a column that must hold more than white space.

    Args:
        row: with the names of the format.
        name: of the column.
        kind: of the error when there is no such text.

    Raises:
        DataError: it is missing, empty or not a text.
    """
    text = optional_text(row, name)
    if not text.strip():
        raise missing_column(row, name, kind=kind)
    return text


def missing_column(
    row: Mapping[str, Any], name: str, *, kind: ErrorKind = "missing_column"
) -> DataError:
    """Return the error for a column that is missing or empty."""
    guess = nearest(name, [key for key in row if key != name])
    hint = f"did you mean {guess!r}? Map it with `columns`" if guess else "map it with `columns`"
    fix = "fill it" if name in row else hint
    problem = f"Column {name!r} is missing or empty."
    return DataError(problem, got=list(row), fix=fix, kind=kind)


def first_name(row: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """Return the first of `names` that is a column with a value, or None."""
    return next((name for name in names if row.get(name) is not None), None)


def tools_text(value: object) -> str | None:
    """Return the JSON text of a list of tool definitions; None where there are none.

    A text stays byte for byte; a list from the file is written as JSON with `json.dumps`.

    Raises:
        DataError: it is no JSON list of objects.
    """
    if value is None or value == "":
        return None
    what = "Column 'tools'"
    text = value if isinstance(value, str) else _dumped(value, what, "bad_tools")
    tools = _parsed(text, what, "bad_tools")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        problem = "Column 'tools' is not a list of tool definitions."
        allowed = '[{"name": …, "parameters": …}, …]'
        raise DataError(problem, got=value, allowed=allowed, kind="bad_tools")
    return text if tools else None


def calls_from_text(text: str) -> tuple[ToolCall, ...]:
    """Return the calls in a text `{"name": …, "arguments": {…}}`, or a list of such objects.

    `arguments` is cut out of the text as it stands, so its spelling is kept.

    Raises:
        DataError: the text is not of that shape.
    """
    value = _parsed(text, "The function call", "bad_tool_call")
    calls = value if isinstance(value, list) else [value]
    if not calls or not all(isinstance(call, dict) for call in calls):
        raise _bad_call(text)
    raws = raw_objects(text)
    return tuple(_call(call, raw.get("arguments")) for call, raw in zip(calls, raws, strict=True))


def calls_from_list(value: object) -> tuple[ToolCall, ...]:
    """Return the calls of an OpenAI `tool_calls` list; () where it is null.

    `arguments` that are a text stay byte for byte; an object is written with `json.dumps`.

    Raises:
        DataError: the list is not of that shape.
    """
    if value is None:
        return ()
    if not isinstance(value, list):
        raise _bad_call(value)
    calls = []
    for item in value:
        call = item.get("function", item) if isinstance(item, dict) else item
        if not isinstance(call, dict):
            raise _bad_call(value)
        calls.append(_call(call, None))
    return tuple(calls)


def _call(call: Mapping[str, Any], raw_arguments: str | None) -> ToolCall:
    name, arguments = call.get("name"), call.get("arguments")
    if not isinstance(name, str) or not name:
        raise _bad_call(dict(call))
    if isinstance(arguments, str):
        if not isinstance(_parsed(arguments, _ARGUMENTS, "bad_tool_call"), dict):
            raise _bad_call(dict(call))
        return ToolCall(name, arguments)
    if arguments is None:  # a function without parameters
        return ToolCall(name, "{}")
    if not isinstance(arguments, dict):
        raise _bad_call(dict(call))
    if raw_arguments is None:
        raw_arguments = _dumped(arguments, _ARGUMENTS, "bad_tool_call")
    return ToolCall(name, raw_arguments)


def _dumped(value: object, what: str, kind: ErrorKind) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except TypeError:
        problem = f"{what} cannot be written as JSON."
        raise DataError(problem, got=value, kind=kind) from None


def _parsed(text: str, what: str, kind: ErrorKind) -> Any:
    try:
        return parse_json(text)
    except JsonError as error:
        problem = f"{what} is not JSON: {error.reason} (character {error.offset + 1})."
        raise DataError(problem, got=text, kind=kind) from None


def _bad_call(value: object) -> DataError:
    return DataError(
        "A function call is malformed.",
        got=value,
        allowed='{"name": "…", "arguments": {…}}, or a list of such objects',
        kind="bad_tool_call",
    )
