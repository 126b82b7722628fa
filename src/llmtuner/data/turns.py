"""The rules that every conversation obeys, whatever format it came from."""

import re

from llmtuner.data.conversation import Conversation, Message
from llmtuner.extras.error_kinds import ErrorKind
from llmtuner.extras.errors import DataError

_SURROGATE = re.compile("[\ud800-\udfff]")
# Rendering marks the control tokens in what people say with these two, and drops others of them.
_RESERVED = re.compile("[\U000f0000\U000f0001]")
_RESERVED_ESCAPE = re.compile(r"\\u[dD][bB]80\\u[dD][cC]0[01]")
_SKIP = "repair the row, or pass --on_bad_row skip"
_NEXT = {
    "start": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "call": ("tool",),
    "assistant": ("user",),
    "tool": ("tool", "assistant"),
}


def check_conversation(conversation: Conversation) -> None:
    """Refuse a conversation that cannot be served the way it is trained.

    A text stands alone. Else: an optional system turn first, then user and assistant in strict
    alternation; an assistant turn with calls is followed by one tool turn or more (results of
    parallel calls), then by the assistant. The last turn is the assistant's, an answer or a call.
    User turns and answers are not empty, and no text holds NUL or half of a surrogate pair,
    nor, in a chat, U+F0000 or U+F0001. Nothing is cut, merged or re-ordered to make a row fit.

    Raises:
        DataError: names the turn, counted from 1.
    """
    messages = conversation.messages
    if not messages:
        raise DataError("The conversation has no turns.", fix=_SKIP, kind="no_turns")
    for number, message in enumerate(messages, start=1):
        _check_message(number, message)
    _check_json("The column of tool definitions", conversation.tools or "")
    if any(message.role == "text" for message in messages):
        if len(messages) > 1:
            problem = "A pre-training text stands alone, it has no other turns."
            got = [message.role for message in messages]
            raise DataError(problem, got=got, fix=_SKIP, kind="wrong_role_order")
        return
    state = "start"
    for number, message in enumerate(messages, start=1):
        if message.role not in _NEXT[state]:
            raise _wrong_turn(number, message, state)
        state = "call" if message.tool_calls else message.role
    if state not in ("assistant", "call"):
        raise DataError(
            f"The conversation ends with {_said(messages[-1])}, which nobody answers.",
            got=[message.role for message in messages[-3:]],
            allowed="an answer of the assistant as the last turn",
            fix=f"add the answer or remove the turn; or {_SKIP.split(', or ')[1]}",
            kind="unanswered_turn",
        )


def _check_message(number: int, message: Message) -> None:
    what, is_chat = f"Turn {number}", message.role != "text"
    for text in (message.content, message.thinking or ""):
        _check_text(what, text, reserved=_RESERVED if is_chat else None)
    for call in message.tool_calls:
        _check_text(what, call.name, reserved=_RESERVED)
        _check_json(what, call.arguments)
    may_be_empty = message.role in ("system", "tool") or bool(message.tool_calls)
    if not may_be_empty and (not message.content or message.content.isspace()):
        problem = f"Turn {number} ({message.role}) is empty."
        kind: ErrorKind = "empty_answer" if message.role == "assistant" else "empty_turn"
        raise DataError(problem, got=message.content, fix=_SKIP, kind=kind)
    if message.train and message.role not in ("assistant", "text"):
        raise DataError(
            f"Turn {number} ({message.role}) asks to be trained.",
            allowed="training on assistant turns",
            fix="remove its weight, or use --train_on_prompt",
            kind="untrainable_turn",
        )


def _check_json(what: str, text: str) -> None:
    _check_text(what, text, reserved=_RESERVED)
    _check_reserved(what, text, _RESERVED_ESCAPE)


def _check_text(what: str, text: str, *, reserved: re.Pattern[str] | None) -> None:
    if "\0" in text:
        raise DataError(f"{what} contains a NUL character.", fix=_SKIP, kind="nul_character")
    if not text.isascii() and (found := _SURROGATE.search(text)):
        problem = f"{what} contains half of a surrogate pair at character {found.start() + 1}."
        raise DataError(problem, got=found[0], fix=_SKIP, kind="lone_surrogate")
    if reserved is not None and not text.isascii():
        _check_reserved(what, text, reserved)


def _check_reserved(what: str, text: str, reserved: re.Pattern[str]) -> None:
    if found := reserved.search(text):
        problem = f"{what} contains U+F0000 or U+F0001 at character {found.start() + 1}."
        allowed = "any other character; these two mark control tokens while a chat is rendered"
        raise DataError(problem, allowed=allowed, fix=_SKIP, kind="reserved_character")


def _wrong_turn(number: int, message: Message, state: str) -> DataError:
    kind: ErrorKind = "wrong_role_order"
    if message.role == "system":
        kind = "late_system_turn"
        problem = f"Turn {number} is a system turn; only the first turn can be one."
    elif message.role == "tool":
        kind = "tool_result_without_call"
        problem = f"Turn {number} is a tool result, but no function call stands before it."
    elif state in ("start", "system"):
        problem = f"The conversation starts with {_said(message)}."
    else:
        problem = f"Turn {number} ({message.role}) follows {_STATES[state]}."
    allowed = "a turn of " + " or ".join(_NEXT[state])
    return DataError(problem, got=message.content, allowed=allowed, fix=_SKIP, kind=kind)


_STATES = {
    "user": "a user turn",
    "call": "a function call",
    "assistant": "an assistant turn",
    "tool": "a tool result",
}


def _said(message: Message) -> str:
    return (
        "a function call"
        if message.tool_calls
        else f"a {message.role} turn".replace("a assistant", "an assistant")
    )
