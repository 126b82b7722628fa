"""What every dataset row becomes: a conversation, or one text for pre-training."""

from dataclasses import dataclass
from typing import Literal

IGNORE_INDEX = -100
"""Label of a token that is read but not learned."""

Role = Literal["system", "user", "assistant", "tool", "text"]


@dataclass(frozen=True)
class ToolCall:
    """A function call by the assistant; `arguments` is JSON text of an object, byte for byte."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Message:
    """One turn.

    Attributes:
        role: who speaks; "text" is a pre-training document, which stands alone.
        content: the text, byte-identical to the file.
        train: whether the model learns to write this turn (assistant and text only).
        thinking: the reasoning before the answer, without `<think>` tags; None where there is none.
        tool_calls: calls the assistant makes in this turn.
    """

    role: Role
    content: str
    train: bool = False
    thinking: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True)
class Conversation:
    """The turns of one row.

    Attributes:
        messages: at least one; a system turn can only be the first.
        tools: JSON text of the list of tool definitions, byte for byte; None without tools.
        source: `file:line` or `file#row` of the row.
    """

    messages: tuple[Message, ...]
    tools: str | None = None
    source: str = ""
