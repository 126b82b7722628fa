"""Rows {"patient": …, "doctor": …}: one user turn and one trained assistant turn."""

from collections.abc import Mapping
from typing import Any

from llmtuner.data.conversation import Conversation, Message
from llmtuner.data.fields import required_text


def matches(row: Mapping[str, Any]) -> bool:
    """Tell whether a row without a named format is one of ours."""
    return {"patient", "doctor"} <= set(row)


def to_conversation(row: Mapping[str, Any]) -> Conversation:
    """Turn what the patient says into a prompt and what the doctor says into the answer."""
    question = Message("user", required_text(row, "patient"))
    reply = Message("assistant", required_text(row, "doctor"), train=True)
    return Conversation((question, reply))
