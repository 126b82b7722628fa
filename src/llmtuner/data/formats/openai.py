"""Rows {"messages": [{"role": "user", "content": …}, {"role": "assistant", "content": …}, …]}.

The list may also be called `conversations`, or be the whole row. Content is a text, null beside
`tool_calls`, or a list of parts (text, reasoning, tool_call, tools). `reasoning_content` becomes
the thinking of the turn; a `<think>…</think>` inside the content stays where it is. `loss_weight`,
`weight` (0 or 1) or `train` say for each message whether it is trained; assistant messages are by
default. A message of the role `pretrain` is a whole document.
"""

from collections.abc import Mapping
from typing import Any

from llmtuner.data.conversation import Conversation
from llmtuner.data.formats import _chat

COLUMNS = {"messages": "messages", "system": "system", "tools": "tools"}
TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": "function_call",
    "system_tag": "system",
}
_NAMES = ("messages", "conversations")
_SHAPE = _chat.Shape(
    role_key="role",
    content_key="content",
    roles={
        "system": "system",
        "developer": "system",
        "user": "user",
        "assistant": "assistant",
        "function_call": "call",
        "tool": "tool",
        "function": "tool",
        "observation": "tool",
        "pretrain": "text",
        "text": "text",
    },
)


def matches(row: Mapping[str, Any]) -> bool:
    """Tell whether the row has a list of role/content messages."""
    return _chat.looks_like(row, _NAMES, _SHAPE)


def to_conversation(row: Mapping[str, Any]) -> Conversation:
    """Turn role/content messages into turns."""
    return _chat.to_conversation(row, _NAMES, _SHAPE)
