"""Rows to conversations, format by format."""

import json
from typing import Any

import pytest

from llmtuner.data.columns import load_formats, open_formats, pick_format
from llmtuner.data.conversation import Conversation, Message, ToolCall
from llmtuner.data.formats import FORMATS
from llmtuner.data.turns import check_conversation
from llmtuner.extras.errors import DataError


def convert(name: str, row: dict[str, Any]) -> Conversation:
    conversation = FORMATS.get(name)(row)
    check_conversation(conversation)
    return conversation


def user(text: str) -> Message:
    return Message("user", text)


def answer(text: str, **more: Any) -> Message:
    return Message("assistant", text, **{"train": True, **more})


def turns(*pairs: str) -> list[dict[str, str]]:
    return [{"role": pair.split(":", 1)[0], "content": pair.split(":", 1)[1]} for pair in pairs]


def test_every_format_loads() -> None:
    assert FORMATS.names() == ["alpaca", "openai", "qa", "sharegpt", "text", "think"]
    for name in FORMATS.names():
        assert callable(FORMATS.get(name))


def test_alpaca() -> None:
    row = {"instruction": "i", "input": "x", "output": "o", "system": "s"}
    row["history"] = [["q1", "a1"], ["q2", "a2"]]
    assert convert("alpaca", row).messages == (
        Message("system", "s"),
        user("q1"),
        answer("a1"),
        user("q2"),
        answer("a2"),
        user("i\nx"),
        answer("o"),
    )
    row = {"instruction": "i", "input": "", "output": " o\n", "history": None, "system": None}
    assert convert("alpaca", row).messages == (user("i"), answer(" o\n"))
    assert convert("alpaca", {"instruction": "", "input": "x", "output": "o"}).messages[0] == user(
        "x"
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "i", "output": ""}, "'output' is missing or empty"),
        ({"instruction": "i", "outputs": "o"}, "did you mean 'outputs'"),
        ({"instruction": " ", "input": "", "output": "o"}, "'instruction' is missing or empty"),
        ({"instruction": 7, "output": "o"}, "'instruction' is not a text.*Got: 7"),
        ({"instruction": "i", "output": True}, "'output' is not a text.*Got: True"),
        ({"instruction": "i", "output": ["good", "bad"]}, "preference"),
        ({"instruction": "i", "output": "o", "history": [["q"]]}, "history"),
        ({"instruction": "i", "output": "o", "history": "q"}, "history"),
    ],
)
def test_alpaca_refuses(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        convert("alpaca", row)


def test_sharegpt_with_calls() -> None:
    call = '{"name": "f", "arguments": {"x":1e5,  "y": "\\u00e9"}}'
    tools = '[{"name": "f",   "parameters": {}}]'
    row = {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": call},
            {"from": "observation", "value": "1"},
            {"from": "observation", "value": ""},
            {"from": "gpt", "value": "<think>t</think>a"},
        ],
        "system": "s",
        "tools": tools,
    }
    conversation = convert("sharegpt", row)
    assert conversation.messages == (
        Message("system", "s"),
        user("q"),
        answer("", tool_calls=(ToolCall("f", '{"x":1e5,  "y": "\\u00e9"}'),)),
        Message("tool", "1"),
        Message("tool", ""),
        answer("<think>t</think>a"),
    )
    assert conversation.tools == tools
    row["conversations"][1]["value"] = '[{"name":"f","arguments":{}} , {"name":"g"}]'
    calls = convert("sharegpt", row).messages[2].tool_calls
    assert calls == (ToolCall("f", "{}"), ToolCall("g", "{}"))


@pytest.mark.parametrize("tools", [None, "", "[]", [], "[ ]"])
def test_no_tools(tools: object) -> None:
    row = {"messages": turns("user:q", "assistant:a"), "tools": tools}
    assert convert("openai", row).tools is None


@pytest.mark.parametrize("tools", ["{}", "oops", "[1]", {"name": "f"}, 3])
def test_bad_tools(tools: object) -> None:
    with pytest.raises(DataError, match="tools"):
        convert("openai", {"messages": turns("user:q", "assistant:a"), "tools": tools})


def test_a_system_message_wins_over_the_column() -> None:
    row = {"messages": turns("system:m", "user:q", "assistant:a"), "system": "column"}
    assert convert("openai", row).messages[0] == Message("system", "m")


def test_openai_calls() -> None:
    function = {"name": "f", "arguments": '{ "x": 1 }'}
    row = {
        "messages": [
            {"role": "developer", "content": "s"},
            {"role": "user", "content": "q"},
            {
                "role": "assistant",
                "content": None,
                "reasoning_content": "t",
                "tool_calls": [
                    {"id": "1", "type": "function", "function": function},
                    {"name": "g", "arguments": {"城市": "北京", "n": 1.0}},
                ],
            },
            {"role": "tool", "content": "1", "tool_call_id": "1"},
            {"role": "function", "name": "g", "content": "2"},
            {"role": "assistant", "content": "a", "tool_calls": None, "reasoning_content": ""},
        ],
        "tools": [{"name": "f", "description": "查"}],
    }
    conversation = convert("openai", row)
    calls = (ToolCall("f", '{ "x": 1 }'), ToolCall("g", '{"城市": "北京", "n": 1.0}'))
    assert conversation.messages == (
        Message("system", "s"),
        user("q"),
        answer("", thinking="t", tool_calls=calls),
        Message("tool", "1"),
        Message("tool", "2"),
        answer("a"),
    )
    assert conversation.tools == '[{"name": "f", "description": "查"}]'
    old = [*turns("user:q"), {"role": "assistant", "content": None, "function_call": function}]
    assert convert("openai", {"messages": old}).messages[1].tool_calls == calls[:1]


def test_openai_parts() -> None:
    call = json.dumps({"name": "f", "arguments": {"x": 1}})
    content = [{"type": "reasoning", "value": "t"}, {"type": "tool_call", "value": call}]
    row = {
        "conversations": [
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "value": "b"}],
            },
            {"role": "assistant", "content": content},
        ]
    }
    assert convert("openai", row).messages == (
        user("ab"),
        answer("", thinking="t", tool_calls=(ToolCall("f", '{"x": 1}'),)),
    )


def test_weights_say_what_is_trained() -> None:
    messages = turns("user:q", "assistant:a", "user:q", "assistant:b", "user:q", "assistant:c")
    messages[0]["loss_weight"] = 0.0  # type: ignore[assignment]
    messages[1]["weight"] = 0  # type: ignore[assignment]
    messages[3]["loss_weight"] = 1.0  # type: ignore[assignment]
    messages[5]["train"] = False  # type: ignore[assignment]
    trained = [message.train for message in convert("openai", {"messages": messages}).messages]
    assert trained == [False, False, False, True, False, False]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"weight": 0.5}, "neither 0 nor 1"),
        ({"train": "yes"}, "neither 0 nor 1"),
        ({"weight": 1, "train": False}, "disagree"),
        ({"content": 42}, "Message 2: Column 'content' is not a text"),
        ({"content": None}, "Message 2: .*missing or null"),
        ({"content": {"a": 1}}, "is not a text"),
        ({"content": [{"type": "image_url"}]}, "unknown type"),
        ({"content": ["a"]}, "unknown type"),
        ({"role": "asistant"}, "did you mean 'assistant'"),
        ({"role": None}, "role is unknown"),
        ({"tool_calls": "f"}, "malformed"),
        ({"tool_calls": [{"name": "f", "arguments": "{oops"}]}, "not JSON"),
        ({"tool_calls": [{"name": "f", "arguments": "[1]"}]}, "malformed"),
        ({"tool_calls": [{"arguments": "{}"}]}, "malformed"),
    ],
)
def test_openai_refuses(extra: dict[str, Any], message: str) -> None:
    messages: list[dict[str, Any]] = list(turns("user:q", "assistant:a"))
    messages[1] |= extra
    with pytest.raises(DataError, match=message):
        convert("openai", {"messages": messages})


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ("user", "ends with a user turn"),
        ("user assistant user", "ends with a user turn"),
        ("assistant", "starts with an assistant turn"),
        ("system assistant", "starts with an assistant turn"),
        ("user user assistant", r"Turn 2 \(user\) follows a user turn"),
        ("user assistant assistant", r"Turn 3 \(assistant\) follows an assistant turn"),
        ("user system assistant", "Turn 2 is a system turn"),
        ("user assistant tool assistant", "Turn 3 is a tool result"),
        ("user call user assistant", r"Turn 3 \(user\) follows a function call"),
        ("user call tool", "ends with a tool turn"),
        ("user call tool user assistant", r"Turn 4 \(user\) follows a tool result"),
        ("text user", "stands alone"),
        ("", "no turns"),
    ],
)
def test_order_is_strict(roles: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_conversation(said(roles))


@pytest.mark.parametrize(
    "roles",
    [
        "user assistant",
        "system user assistant user assistant",
        "user call tool tool assistant",
        "user call tool call tool assistant user assistant",
        "user call",
        "text",
    ],
)
def test_good_order(roles: str) -> None:
    check_conversation(said(roles))


def said(roles: str) -> Conversation:
    call = answer("", tool_calls=(ToolCall("f", "{}"),))
    makers: dict[str, Any] = {role: Message(role, "x") for role in roles.split() if role != "call"}  # type: ignore[arg-type]
    return Conversation(tuple({**makers, "call": call}[role] for role in roles.split()))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ((user(""), answer("a")), r"Turn 1 \(user\) is empty"),
        ((user("q"), answer(" \n")), r"Turn 2 \(assistant\) is empty"),
        ((user("q\0"), answer("a")), "NUL"),
        ((user("q"), answer("a", thinking="\0")), "NUL"),
        (
            (user("q\ud800"), answer("a")),
            r"Turn 1 contains half of a surrogate pair at character 2",
        ),
        (
            (user("q"), answer("中\U000f0001")),
            r"Turn 2 contains U\+F0000 or U\+F0001 at character 2",
        ),
        ((user("q"), answer("", tool_calls=(ToolCall("f\U000f0000", "{}"),))), r"U\+F0000"),
        ((user("q"), answer("", tool_calls=(ToolCall("f", '{"a": "\0"}'),))), "NUL"),
        ((user("q"), answer("", tool_calls=(ToolCall("f", r'["\uDB80\udc00"]'),))), r"U\+F0000"),
        ((Message("user", "q", train=True), answer("a")), "asks to be trained"),
    ],
)
def test_turns_are_refused(messages: tuple[Message, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_conversation(Conversation(messages))


def test_a_document_may_hold_any_character_but_nul_and_surrogates() -> None:
    check_conversation(Conversation((Message("text", "\U000f0000\U000f0001", train=True),)))
    with pytest.raises(DataError, match="tool definitions contains a NUL"):
        check_conversation(Conversation((user("q"), answer("a")), tools="[\0]"))


KINDS = {
    "unknown_role": turns("user:q", "asistant:a"),
    "wrong_role_order": turns("user:q", "user:q", "assistant:a"),
    "late_system_turn": turns("user:q", "system:s", "assistant:a"),
    "tool_result_without_call": turns("user:q", "tool:t", "assistant:a"),
    "unanswered_turn": turns("user:q", "assistant:a", "user:q"),
    "empty_turn": turns("user: ", "assistant:a"),
    "empty_answer": turns("user:q", "assistant:\n"),
    "bad_message_list": ["q", "a"],
    "missing_content": [*turns("user:q"), {"role": "assistant", "content": None}],
    "wrong_type": [*turns("user:q"), {"role": "assistant", "content": 7}],
    "unknown_content_part": [*turns("user:q"), {"role": "assistant", "content": [{"type": "x"}]}],
    "bad_tool_call": [*turns("user:q"), {"role": "assistant", "tool_calls": [{}]}],
    "nul_character": turns("user:q\0", "assistant:a"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_refusals_say_their_kind(kind: str) -> None:
    with pytest.raises(DataError) as caught:
        convert("openai", {"messages": KINDS[kind]})
    assert caught.value.kind == kind


@pytest.mark.parametrize(
    ("name", "row", "kind"),
    [
        ("alpaca", {"instruction": "i", "output": ""}, "missing_answer"),
        ("alpaca", {"instruction": "", "output": "o"}, "missing_column"),
        ("alpaca", {"instruction": "i", "output": ["a", "b"]}, "preference_data"),
        ("alpaca", {"instruction": "i", "output": "o", "history": "h"}, "bad_history"),
        ("alpaca", {"instruction": "i", "output": "o", "tools": "{}"}, "bad_tools"),
        ("qa", {"question": "q"}, "missing_answer"),
        ("qa", {"question": "q", "answer": 7}, "wrong_type"),
        ("think", {"question": "q", "think": "t", "answer": None}, "missing_answer"),
        ("text", {"texts": "t"}, "missing_column"),
    ],
)
def test_columns_say_their_kind(name: str, row: dict[str, Any], kind: str) -> None:
    with pytest.raises(DataError) as caught:
        convert(name, row)
    assert caught.value.kind == kind


def test_think() -> None:
    row = {"question": "q", "think": "t", "answer": "a", "instruction": "q", "metrics": {"x": 1}}
    assert convert("think", row).messages == (user("q"), answer("a", thinking="t"))
    assert convert("think", row | {"think": ""}).messages[1] == answer("a")


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"question": "q", "answer": "a"}, "q"),
        ({"Question": "q", "Answer": "a"}, "q"),
        ({"instruction": "q", "output": "a"}, "q"),
        ({"instruction": "q", "response": "a", "input": "x"}, "q\nx"),
        ({"department": "d", "title": "t", "ask": "q", "answer": "a"}, "t\nq"),
        ({"title": "t", "ask": "", "answer": "a"}, "t"),
        ({"问": "q", "答": "a"}, "q"),
        ({"问题": "q", "答案": "a"}, "q"),
        ({"prompt": "q", "completion": "a"}, "q"),
        ({"input": "q", "output": "a"}, "q"),
    ],
)
def test_qa(row: dict[str, Any], prompt: str) -> None:
    assert convert("qa", row).messages == (user(prompt), answer("a"))


def test_text() -> None:
    assert convert("text", {"text": " a\n"}).messages == (Message("text", " a\n", train=True),)
    assert convert("text", {"content": "a"}).messages == (Message("text", "a", train=True),)
    row = {"messages": [{"role": "pretrain", "content": "a\n"}]}
    assert convert("openai", row).messages == (Message("text", "a\n", train=True),)


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"instruction": "i", "input": "", "output": "o"}, "alpaca"),
        ({"instruction": "i", "input": "", "output": "o", "text": "t"}, "alpaca"),
        ({"instruction": "i", "response": "o"}, "qa"),
        ({"instruction": "q", "question": "q", "think": "t", "answer": "a"}, "think"),
        ({"question": "q", "answer": "a", "text": "x"}, "qa"),
        ({"conversations": [{"from": "human", "value": "q"}], "id": "1"}, "sharegpt"),
        ({"messages": [{"from": "human", "value": "q"}]}, "sharegpt"),
        ({"messages": turns("user:q", "assistant:a"), "tools": "[]"}, "openai"),
        ({"conversations": turns("user:q", "assistant:a")}, "openai"),
        ({"text": "t", "url": "u"}, "text"),
        ({"content": "t"}, "text"),
    ],
)
def test_format_is_inferred(row: dict[str, Any], name: str) -> None:
    formats = load_formats(open_formats(None))
    assert pick_format(formats, row, columns=None, tags=None).name == name


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q", "response_j": "a", "response_k": "b"}, "No dataset format fits"),
        ({"prompt": [{"role": "user", "content": "q"}], "response": "a"}, "No dataset format fits"),
        ({"question": "q"}, "No dataset format fits"),
        ({"text": 7}, "No dataset format fits"),
        ({"conversations": [], "chosen": {}, "rejected": {}}, "preference data"),
    ],
)
def test_no_format(row: dict[str, Any], message: str) -> None:
    formats = load_formats(open_formats(None))
    with pytest.raises(DataError, match=message):
        pick_format(formats, row, columns=None, tags=None)
