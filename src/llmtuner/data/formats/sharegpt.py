"""Rows {"conversations": [{"from": "human", "value": …}, {"from": "gpt", "value": …}, …]}.

`system` and `tools` may be columns of their own. The value of a `function_call` is the JSON text
{"name", "arguments"} or a list of such; `observation` is the result. A `<think>…</think>` inside a
value stays where it is: the content is trained as the file has it.
"""

from collections.abc import Mapping
from typing import Any

from llmtuner.data.conversation import Conversation
from llmtuner.data.formats import _chat

COLUMNS = {"messages": "conversations", "system": "system", "tools": "tools"}
TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
_NAMES = ("conversations", "messages")
_SHAPE = _chat.Shape(
    role_key="from",
    content_key="value",
    roles={
        "system": "system",
        "human": "user",
        "user": "user",
        "gpt": "assistant",
        "assistant": "assistant",
        "function_call": "call",
        "observation": "tool",
        "tool": "tool",
    },
)


def matches(row: Mapping[str, Any]) -> bool:
    """Tell whether the row has a list of from/value messages."""
    return _chat.looks_like(row, _NAMES, _SHAPE)


def to_conversation(row: Mapping[str, Any]) -> Conversation:
    """Turn human and gpt messages into user and assistant turns."""
    return _chat.to_conversation(row, _NAMES, _SHAPE)
