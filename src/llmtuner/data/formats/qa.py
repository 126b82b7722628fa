"""Rows with a question column and an answer column, under any of their usual names.

`ask` may have a `title` before it: then the user turn is title, line feed, ask, as many medical
CSV files have it. Names are compared without regard to case.
"""

from collections.abc import Mapping
from typing import Any

from llmtuner.data.conversation import Conversation, Message
from llmtuner.data.fields import missing_column, optional_text, required_text

COLUMNS = {"prompt": "question", "query": "input", "response": "answer", "system": "system"}

_PAIRS = (
    ("question", "answer"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("ask", "answer"),
    ("问", "答"),
    ("问题", "答案"),
    ("问题", "回答"),
    ("question", "response"),
    ("prompt", "response"),
    ("prompt", "completion"),
    ("query", "response"),
    ("query", "answer"),
    ("input", "output"),
)
_BEFORE = {"ask": "title"}
_AFTER = ("input",)


def matches(row: Mapping[str, Any]) -> bool:
    """Tell whether the row has such a pair, and neither reasoning nor the columns of alpaca."""
    names = set(_names(row))
    if "think" in names or {"instruction", "output"} <= set(row):
        return False
    pair = _pair(names)
    return pair is not None and not isinstance(row[_names(row)[pair[0]]], list)


def to_conversation(row: Mapping[str, Any]) -> Conversation:
    """Turn the question into a user turn and the answer into a trained assistant turn."""
    names = _names(row)
    pair = _pair(set(names))
    if pair is None:
        if "question" in names:
            raise missing_column(row, "answer", kind="missing_answer")
        raise missing_column(row, "question")
    question, answer = pair
    around = (_BEFORE.get(question), question, *(name for name in _AFTER if name != question))
    parts = (optional_text(row, names[name]) for name in around if name in names)
    prompt = "\n".join(part for part in parts if part)
    if not prompt.strip():
        raise missing_column(row, names[question])
    system = optional_text(row, "system")
    messages = (
        *((Message("system", system),) if system else ()),
        Message("user", prompt),
        Message("assistant", required_text(row, names[answer], kind="missing_answer"), train=True),
    )
    return Conversation(messages)


def _names(row: Mapping[str, Any]) -> dict[str, str]:
    """Return {name in lower case: name in the row}."""
    return {name.strip().lower(): name for name in row}


def _pair(names: set[str]) -> tuple[str, str] | None:
    return next((pair for pair in _PAIRS if set(pair) <= names), None)
