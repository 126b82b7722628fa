"""Message lists to conversations: what the formats sharegpt and openai have in common."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmtuner.data.conversation import Conversation, Message, Role, ToolCall
from llmtuner.data.fields import calls_from_list, calls_from_text, optional_text, tools_text
from llmtuner.extras.errors import DataError, nearest

_THINKING_KEYS = ("reasoning_content", "reasoning", "thinking")
_WEIGHT_KEYS = ("loss_weight", "weight", "train")


@dataclass(frozen=True)
class Shape:
    """How one format spells a message.

    Attributes:
        role_key: key of the speaker.
        content_key: key of what is said.
        roles: spelling in the file -> our role; "call" is a text that holds function calls.
    """

    role_key: str
    content_key: str
    roles: Mapping[str, str]


@dataclass(frozen=True)
class _Content:
    """What one message says."""

    text: str = ""
    thinking: str | None = None
    calls: tuple[ToolCall, ...] = ()
    tools: str | None = None


def looks_like(row: Mapping[str, Any], columns: Sequence[str], shape: Shape) -> bool:
    """Tell whether one of `columns` is a list whose first message has the keys of `shape`."""
    for column in columns:
        messages = row.get(column)
        if isinstance(messages, list) and messages and isinstance(messages[0], dict):
            return {shape.role_key, shape.content_key} <= set(messages[0])
    return False


def to_conversation(row: Mapping[str, Any], columns: Sequence[str], shape: Shape) -> Conversation:
    """Read the message list in the first of `columns` that the row has.

    Raises:
        DataError: names the message, counted from 1.
    """
    found = next((row[name] for name in columns if row.get(name) is not None), None)
    if not isinstance(found, list) or not found:
        problem = f"Column {columns[0]!r} is not a list of messages."
        got = list(row) if found is None else found
        fix = "map the column of the messages with `columns`"
        raise DataError(problem, got=got, fix=fix, kind="bad_message_list")
    tools = tools_text(row.get("tools"))
    messages: list[Message] = []
    for number, raw in enumerate(found, start=1):
        try:
            message, own_tools = _message(raw, shape)
        except DataError as error:
            problem = f"Message {number}: {error.problem}"
            raise DataError(
                problem, got=error.got, allowed=error.allowed, fix=error.fix, kind=error.kind
            ) from None
        messages.append(message)
        tools = tools or own_tools
    system = optional_text(row, "system")
    if system and messages[0].role != "system":
        messages.insert(0, Message("system", system))
    return Conversation(tuple(messages), tools=tools)


def _message(raw: object, shape: Shape) -> tuple[Message, str | None]:
    if not isinstance(raw, dict):
        raise DataError("It is not an object.", got=raw, kind="bad_message_list")
    spelling = raw.get(shape.role_key)
    if not isinstance(spelling, str) or spelling not in shape.roles:
        raise _unknown_role(raw, shape)
    role = shape.roles[spelling]
    content = _content(raw, shape, is_call=role == "call")
    is_assistant = role in ("assistant", "call")
    if not is_assistant and (content.calls or content.thinking):
        problem = f"A {spelling!r} message holds a function call or reasoning."
        allowed = "these only in assistant messages"
        raise DataError(problem, got=raw, allowed=allowed, kind="wrong_role_order")
    our_role: Role = "assistant" if is_assistant else _plain_role(role)
    message = Message(
        our_role,
        content.text,
        train=_is_trained(raw, default=our_role in ("assistant", "text")),
        thinking=content.thinking,
        tool_calls=content.calls,
    )
    return message, content.tools


def _plain_role(role: str) -> Role:
    known: dict[str, Role] = {"system": "system", "user": "user", "tool": "tool", "text": "text"}
    return known[role]


def _content(raw: Mapping[str, Any], shape: Shape, *, is_call: bool) -> _Content:
    value = raw.get(shape.content_key)
    if is_call:
        return _called(value)
    calls = calls_from_list(raw.get("tool_calls"))
    if raw.get("function_call") is not None:
        calls += calls_from_list([raw["function_call"]])
    thinking = next((optional_text(raw, key) for key in _THINKING_KEYS if raw.get(key)), None)
    if value is None and not calls:
        problem = f"The {shape.content_key!r} is missing or null, and there is no function call."
        raise DataError(problem, got=raw, kind="missing_content")
    if isinstance(value, list):
        parts = _parts(value)
        return _Content(parts.text, parts.thinking or thinking, parts.calls + calls, parts.tools)
    return _Content(optional_text(raw, shape.content_key), thinking, calls)


def _called(value: object) -> _Content:
    if isinstance(value, str):
        return _Content(calls=calls_from_text(value))
    return _Content(calls=calls_from_list(value if isinstance(value, list) else [value]))


def _parts(parts: Sequence[object]) -> _Content:
    """Read content that is a list of typed parts; texts are joined without anything between."""
    texts: list[str] = []
    thoughts: list[str] = []
    tools = None
    calls: tuple[ToolCall, ...] = ()
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(part, dict) or kind not in ("text", "reasoning", "tool_call", "tools"):
            raise DataError(
                "A content part is of an unknown type.",
                got=part,
                allowed="text, reasoning, tool_call, tools",
                fix="images, audio and video are not supported; leave such rows out",
                kind="unknown_content_part",
            )
        value = part.get("value") if part.get("value") is not None else part.get(str(kind))
        if kind == "tool_call":
            calls += _called(value).calls
        elif kind == "tools":
            tools = tools_text(value)
        elif not isinstance(value, str):
            problem = f"The value of a {kind} part is not a text."
            raise DataError(problem, got=part, kind="wrong_type")
        else:
            (texts if kind == "text" else thoughts).append(value)
    return _Content("".join(texts), "".join(thoughts) or None, calls, tools)


def _is_trained(raw: Mapping[str, Any], *, default: bool) -> bool:
    """Whether the model learns to write this message; its `_WEIGHT_KEYS` say so."""
    flags = {key: raw[key] for key in _WEIGHT_KEYS if raw.get(key) is not None}
    for key, flag in flags.items():
        if not isinstance(flag, (bool, int, float)) or flag not in (0, 1):
            raise DataError(
                f"The {key!r} is neither 0 nor 1.",
                got=flag,
                allowed="0 (not trained) or 1 (trained)",
                fix="weights between are not supported; choose one",
                kind="bad_weight",
            )
    if len({bool(flag) for flag in flags.values()}) > 1:
        problem = "The flags that say what is trained disagree."
        raise DataError(problem, got=flags, fix="keep one of them", kind="bad_weight")
    return bool(next(iter(flags.values()), default))


def _unknown_role(raw: Mapping[str, Any], shape: Shape) -> DataError:
    if shape.role_key not in raw:
        problem = f"The message has no {shape.role_key!r}."
        fix = "name the keys of a message with `tags`"
        return DataError(problem, got=list(raw), fix=fix, kind="unknown_role")
    got = raw[shape.role_key]
    guess = nearest(str(got), shape.roles)
    fix = f"did you mean {guess!r}? " if guess else ""
    return DataError(
        "The role is unknown.",
        got=got,
        allowed=sorted(shape.roles),
        fix=f"{fix}Name the roles of this data set with `tags`",
        kind="unknown_role",
    )
