"""The conversations of the golden texts, and how one of them is encoded."""

from typing import Any

from llmtuner.data.conversation import Conversation, Message, ToolCall
from llmtuner.data.render import Encoded, encode_conversations, encode_texts

TOOLS = (
    '[{"name": "get_weather", "description": "Weather of a city.", "parameters": {"type": '
    '"object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}]'
)

MANY_TOOLS = (
    '[{"type": "function", "function": {"name": "get_weather", "description": "Weather of a city.",'
    ' "parameters": {"type": "object", "properties": {"city": {"type": "string", "description":'
    ' "Its name."}, "days": {"type": "integer", "default": 1}, "hours": {"type": "array", "items":'
    ' {"type": "number"}}, "unit": {"type": "string", "enum": ["C", "F"]}, "fast": {"type":'
    ' "boolean"}, "place": {"type": "object", "properties": {"x": {"type": "number"}, "y": {"type":'
    ' "number"}}, "required": ["x"]}, "more": {"type": "object"}, "at": {"type":'
    ' ["string", "null"]}, "raw": {}, "any": {"type": "array"}}, "required": ["city"]}}},'
    ' {"type": "function", "function": {"name": "now", "description": "现在几点？", "parameters":'
    ' {"type": "object", "properties": {}}}}]'
)


def encode_conversation(conversation: Conversation, **settings: Any) -> Encoded:
    return encode_conversations([conversation], **settings)[0]


def encode_text(document: Conversation, **settings: Any) -> Encoded:
    return encode_texts([document], **settings)[0]


def chat(*turns: str, system: str | None = None, tools: str | None = None) -> Conversation:
    """A conversation of user and assistant in turn, every answer trained."""
    messages = [Message("system", system)] if system is not None else []
    for number, text in enumerate(turns):
        is_answer = number % 2 == 1
        messages.append(Message("assistant" if is_answer else "user", text, train=is_answer))
    return Conversation(tuple(messages), tools=tools, source="chat.json#0")


def tool_chat() -> Conversation:
    """A question that is answered with a tool."""
    call = ToolCall("get_weather", '{"city": "Paris"}')
    messages = (
        Message("user", "How is the weather in Paris?"),
        Message("assistant", "", train=True, tool_calls=(call,)),
        Message("tool", '{"sky": "clear"}'),
        Message("assistant", "It is clear.", train=True),
    )
    return Conversation(messages, tools=TOOLS, source="chat.json#0")


def long_tool_chat(num_calls: int) -> Conversation:
    """A system prompt, words in front of one or two calls, two results, and another question."""
    calls = (
        ToolCall("get_weather", '{"city": "Paris", "days": 2}'),
        ToolCall("get_weather", '{"city": "罗马", "hours": [6, {"to": null}]}'),
    )[:num_calls]
    messages = (
        Message("system", "Answer briefly."),
        Message("user", "How is the weather?"),
        Message("assistant", "I look it up.", train=True, tool_calls=calls),
        Message("tool", "result 0"),
        Message("tool", "result 1"),
        Message("assistant", "It is clear.", train=True),
        Message("user", "Thanks."),
        Message("assistant", "Welcome.", train=True),
    )
    return Conversation(messages, tools=MANY_TOOLS, source="chat.json#0")


def thought_chat() -> Conversation:
    """Two answers with the reasoning that led to them, and one without."""
    messages = (
        Message("user", "Q1"),
        Message("assistant", "A1", train=True, thinking="Let me see."),
        Message("user", "Q2"),
        Message("assistant", "A2", train=True, thinking="想一想。"),
        Message("user", "Q3"),
        Message("assistant", "A3", train=True),
    )
    return Conversation(messages, source="chat.json#0")


CHATS = {
    "one turn": chat("What is the capital of France?", "Paris."),
    "three turns": chat("Q1", "A1", "Q2", "A2", "Q3", "A3"),
    "system": chat("What is 高血压?", "A disease.", system="Answer briefly."),
}
