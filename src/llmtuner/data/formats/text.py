"""Rows {"text"} or {"content"}, and plain lines: documents for pre-training, trained as a whole."""

from collections.abc import Mapping
from typing import Any

from llmtuner.data.conversation import Conversation, Message
from llmtuner.data.fields import first_name, missing_column, required_text

COLUMNS = {"prompt": "text", "text": "text"}

_NAMES = ("text", "content")
_OTHER_FORMATS = frozenset(
    ("messages", "conversations", "instruction", "question", "ask", "prompt", "query")
).union(("answer", "output", "response", "问", "答"))


def matches(row: Mapping[str, Any]) -> bool:
    """Tell whether the row has a text and no column of a question, an answer or messages."""
    name = first_name(row, _NAMES)
    is_text = name is not None and isinstance(row[name], str)
    return is_text and not _OTHER_FORMATS & {column.strip().lower() for column in row}


def to_conversation(row: Mapping[str, Any]) -> Conversation:
    """Turn the text into one trained document."""
    name = first_name(row, _NAMES)
    if name is None:
        raise missing_column(row, "text")
    return Conversation((Message("text", required_text(row, name), train=True),))
