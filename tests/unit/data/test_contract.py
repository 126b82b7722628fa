"""What a template is served with: dates, thoughts, control tokens, ends, headers, JSON."""

import logging

import pytest
from example_chats import chat, encode_conversation
from golden_texts import learned_texts
from tiny_tokenizers import byte_level

from llmtuner.data.conversation import Conversation, Message, ToolCall
from llmtuner.data.prompt import prompt_ids
from llmtuner.data.render import Encoded
from llmtuner.data.template import Template, load_template
from llmtuner.data.verify import as_served, verify_encoded
from llmtuner.extras.errors import TemplateError

TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
LOOP = "{% for m in messages %}" + TURN + "{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = LOOP + PROMPT
GLM = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
R1 = (
    "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}{% else %}<|assistant|>"
    "{{ m.content.split('</think>')[-1] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)


def own(text: str, *tokens: str, special: bool = False, **options: bool | None):
    tokenizer = byte_level.__wrapped__()
    tokenizer.add_tokens(list(tokens), special_tokens=special)
    tokenizer.chat_template = text
    return tokenizer, load_template(None, tokenizer, **options)


def proved(conversation: Conversation, tokenizer, template: Template) -> Encoded:
    """Encode, and compare with the saved and reloaded tokenizer."""
    encoded = encode_conversation(conversation, template=template, tokenizer=tokenizer)
    tokenizer.chat_template = template.serving_text()
    served = as_served(tokenizer, template, trust_remote_code=False)
    assert verify_encoded(encoded, served) == sum(m.train for m in conversation.messages)
    return encoded


def learned(encoded: Encoded, tokenizer) -> list[str]:
    return [text for sample in encoded.samples for text in learned_texts(sample, tokenizer)]


def test_an_answer_may_end_in_the_token_of_the_next_role() -> None:
    tokenizer, template = own(GLM)
    encoded = proved(chat("Q", "A", "R", "B"), tokenizer, template)
    assert learned(encoded, tokenizer) == ["A<|user|>", "B<|user|>"]
    assert template.stop_tokens[0] == "<|user|>"


def test_an_end_that_is_missing_is_not_the_next_role() -> None:
    broken = CHATML.replace("<|im_end|>", "{{ '<|im_end|>' if m.role == 'user' }}")
    with pytest.raises(TemplateError, match="ends its turns in nothing"):
        own(broken)


@pytest.mark.parametrize("thought", [None, "Hm."])
def test_a_thought_that_the_prompt_begins_is_ended_by_the_answer(thought: str | None) -> None:
    tokenizer, template = own(R1)
    answer = Message("assistant", "A", train=True, thinking=thought)
    conversation = Conversation((Message("user", "Q"), answer, Message("user", "R"), answer))
    encoded = proved(conversation, tokenizer, template)
    assert learned(encoded, tokenizer) == [f"{thought or ''}\n</think>\n\nA</s>"] * 2
    assert encoded.num_thoughts_unasked == (0 if thought else 2)


@pytest.mark.parametrize(("asked", "count"), [(True, 1), (False, 0), (None, 0)])
def test_answers_that_think_otherwise_than_serving_are_counted(
    asked: bool | None, count: int
) -> None:
    template = load_template("qwen3", byte_level(), enable_thinking=asked)
    encoded = encode_conversation(chat("Q", "A"), template=template, tokenizer=byte_level())
    assert encoded.num_thoughts_unasked == count


@pytest.mark.parametrize("asked", [True, False])
def test_the_saved_template_thinks_as_training_does(asked: bool) -> None:
    tokenizer = byte_level.__wrapped__()
    template = load_template("qwen3", tokenizer, enable_thinking=asked)
    tokenizer.chat_template = template.serving_text()
    question = [Message("user", "Q")]
    wire = [{"role": "user", "content": "Q"}]
    told = prompt_ids(question, template=template, tokenizer=tokenizer)
    served = tokenizer.apply_chat_template(wire, add_generation_prompt=True, return_dict=False)
    assert served == told
    other = prompt_ids(question, template=template, tokenizer=tokenizer, enable_thinking=not asked)
    assert other != told


def test_the_date_is_the_same_tomorrow(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        tokenizer, template = own("\n{{ strftime_now('%d %b %Y') }}" + CHATML)
    assert "fixed to 2024-07-26" in caplog.text
    encoded = proved(chat("Q", "A"), tokenizer, template)
    assert tokenizer.decode(encoded.samples[0].input_ids).startswith("\n26 Jul 2024<|im_start|>")
    caplog.clear()
    tokenizer.chat_template = template.serving_text()
    load_template(None, tokenizer)
    assert not caplog.text
    with pytest.raises(TemplateError, match="cannot be found out"):
        own("{{ strftime_now('%' ~ 'Y') }}" + CHATML)


def test_a_tokenizer_with_two_templates_gets_both() -> None:
    tokenizer = byte_level.__wrapped__()
    tokenizer.chat_template = {"default": " D" + CHATML + "\n", "tool_use": "\nT" + CHATML + "\n\n"}
    wire = [{"role": "user", "content": "Q"}]
    told = {}
    for tools in (None, [{"type": "function", "function": {"name": "f"}}]):
        told[tools is None] = tokenizer.apply_chat_template(wire, tools=tools, tokenize=False)
    tokenizer.chat_template = load_template(None, tokenizer).serving_text()
    for is_plain, expected in told.items():
        tools = None if is_plain else [{"type": "function", "function": {"name": "f"}}]
        assert tokenizer.apply_chat_template(wire, tools=tools, tokenize=False) == expected


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_what_a_template_writes_is_text_inside_texts(role: str, special: bool) -> None:
    tokenizer, template = own("{# #}<mark>" + CHATML, "<mark>", special=special)
    number = tokenizer.convert_tokens_to_ids("<mark>")
    says = {"system": "S", "user": "U", "assistant": "A", role: "a <mark> b"}
    messages = (
        Message("system", says["system"]),
        Message("user", says["user"]),
        Message("assistant", says["assistant"], train=True),
        Message("user", "V"),
        Message("assistant", "B", train=True),
    )
    encoded = proved(Conversation(messages), tokenizer, template)
    counts = [sample.input_ids.count(number) for sample in encoded.samples]
    # A model may write tags itself; in the history of its next turn serving has them as text.
    assert counts == ([2, 1] if role == "assistant" and not special else [1])


def test_guarded_tokens_are_those_of_transformers() -> None:
    tokenizer, template = own("<mark>" + CHATML, "<mark>", "<other>")
    expected = tokenizer._get_control_tokens(template.serving_text())
    assert {token for token in tokenizer.get_vocab() if template.guards.fullmatch(token)} == {
        *expected
    }
    assert "<mark>" in expected
    assert "<other>" not in expected


def test_a_turn_may_end_in_a_token_that_is_not_special() -> None:
    tokenizer, template = own(CHATML.replace("<|im_end|>", "<over>"), "<over>")
    assert template.stop_tokens[0] == "<over>"
    encoded = proved(chat("Q", "say <over> twice"), tokenizer, template)
    assert learned(encoded, tokenizer) == ["say <over> twice<over>"]
    assert encoded.samples[0].input_ids.count(template.stop_ids[0]) == 2


def test_a_lost_tool_call_is_refused() -> None:
    text = CHATML.replace("{{ m.content }}", "{{ m.content }}{% if m.tool_calls %}CALL{% endif %}")
    text = "{{ tools | tojson if tools }}" + text.replace("CALL", "{{ m.tool_calls[0] | tojson }}")
    tokenizer, template = own(text)
    calls = (ToolCall("f", '{"a": "x"}'), ToolCall("f", '{"a": ["Berlin"]}'))
    tools = '[{"name": "f", "description": "d", "parameters": {}}]'

    def encode(*some: ToolCall) -> Encoded:
        messages = (Message("user", "Q"), Message("assistant", "", train=True, tool_calls=some))
        conversation = Conversation(messages, tools=tools)
        return encode_conversation(conversation, template=template, tokenizer=tokenizer)

    assert encode(calls[0]).samples
    with pytest.raises(TemplateError, match=r"changes a tool call .*Got: 'Berlin'"):
        encode(*calls)
