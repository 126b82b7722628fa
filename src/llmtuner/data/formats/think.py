"""Rows {"question", "think", "answer"}: one user turn and one answer with its reasoning apart.

Other columns of the row are ignored. How the reasoning is written down is the template's business.
"""

from collections.abc import Mapping
from typing import Any

from llmtuner.data.conversation import Conversation, Message
from llmtuner.data.fields import optional_text, required_text

COLUMNS = {"prompt": "question", "think": "think", "response": "answer", "system": "system"}


def matches(row: Mapping[str, Any]) -> bool:
    """Tell whether the row has all three columns."""
    return {"question", "think", "answer"} <= set(row)


def to_conversation(row: Mapping[str, Any]) -> Conversation:
    """Turn the question into a user turn, reasoning and answer into a trained assistant turn."""
    system = optional_text(row, "system")
    answer = required_text(row, "answer", kind="missing_answer")
    messages = (
        *((Message("system", system),) if system else ()),
        Message("user", required_text(row, "question")),
        Message("assistant", answer, train=True, thinking=optional_text(row, "think") or None),
    )
    return Conversation(messages)
