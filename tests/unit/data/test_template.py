"""Chat templates: names, control tokens, ends of turns, what serving gets."""

from pathlib import Path

import pytest
from example_chats import CHATS, chat, encode_conversation, tool_chat
from tiny_tokenizers import byte_level
from transformers.utils.chat_template_utils import render_jinja_template

from llmtuner.data.chat_jinja import has_marks
from llmtuner.data.template import load_template, serving_text
from llmtuner.data.templates import read_template, template_names
from llmtuner.extras.errors import TemplateError

NAMES = template_names()
OWN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def with_own_template(text: str | None):
    tokenizer = byte_level.__wrapped__()
    tokenizer.chat_template = text
    return tokenizer


@pytest.mark.parametrize("name", NAMES)
def test_named_templates_mark_what_the_model_writes(name: str):
    assert has_marks(read_template(name))
    assert load_template(name, byte_level()).has_marks


@pytest.mark.parametrize("name", NAMES)
def test_serving_gets_the_same_text_without_marks(name: str):
    text = read_template(name)
    plain = serving_text(text)
    assert "generation %}" not in plain.replace("add_generation_prompt", "")
    messages = [
        {"role": message.role, "content": message.content}
        for message in CHATS["three turns"].messages
    ]
    variables = {"bos_token": "<s>", "eos_token": "</s>"}
    for until in range(1, 7):
        rendered = [
            render_jinja_template(
                [messages[:until]], chat_template=one, add_generation_prompt=until % 2, **variables
            )[0]
            for one in (text, plain)
        ]
        assert rendered[0] == rendered[1]


def test_white_space_around_marks_stays_cut():
    assert serving_text("a {%- generation -%} b {% endgeneration %}\nc") == (
        "a {%- if true -%} b {% endif %}\nc"
    )


def test_unknown_name_says_the_nearest():
    with pytest.raises(TemplateError, match=r"Got: 'qwenn'.*vicuna.*did you mean qwen") as caught:
        load_template("qwenn", byte_level())
    assert caught.value.exit_code == 3


def test_missing_control_tokens_are_named():
    tokenizer = byte_level(without=("<|im_end|>", "<end_of_turn>"))
    with pytest.raises(TemplateError, match=r"Got: \['<\|im_end\|>'\].*--resize_vocab"):
        load_template("qwen", tokenizer)
    with pytest.raises(TemplateError, match="<end_of_turn>"):
        load_template("gemma", tokenizer)
    load_template("llama3", tokenizer)


def test_tags_of_qwen_that_are_no_control_tokens_are_not_asked_for():
    tokenizer = byte_level()
    assert "<think>" not in tokenizer.get_vocab()
    assert load_template("qwen3", tokenizer).stop_tokens[0] == "<|im_end|>"


def test_no_end_token_at_all_is_refused():
    with pytest.raises(TemplateError, match="'vicuna' ends its turns in nothing"):
        load_template("vicuna", byte_level(without=("</s>",)))


def test_a_tokenizer_without_template_lists_the_names():
    with pytest.raises(TemplateError, match=r"no chat template of its own.*vicuna.*--template"):
        load_template(None, with_own_template(None))


def test_own_template_finds_the_end_of_turn():
    tokenizer = with_own_template(OWN)
    template = load_template(None, tokenizer)
    assert template.stop_tokens == ("<|im_end|>", "</s>")
    assert template.stop_ids == tuple(tokenizer.convert_tokens_to_ids(["<|im_end|>", "</s>"]))
    assert template.abilities.system
    assert not template.abilities.tools


def test_own_template_may_end_turns_in_eos():
    own = "{% for m in messages %}{{ m.role }}: {{ m.content + eos_token }}\n{% endfor %}"
    assert load_template(None, with_own_template(own)).stop_tokens == ("</s>",)


def test_end_of_text_wins_over_a_bracket_beside_it():
    own = OWN.replace("<|im_end|>", "<|end|></s>")
    assert load_template(None, with_own_template(own)).stop_tokens == ("</s>",)


def test_own_template_that_ends_turns_in_nothing_is_refused():
    own = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    with pytest.raises(TemplateError, match="ends its turns in nothing"):
        load_template(None, with_own_template(own))


def test_own_template_that_changes_every_answer_is_refused():
    with pytest.raises(TemplateError, match="changes or drops the answer"):
        load_template(None, with_own_template(OWN.replace("m.content", "m.content | upper")))


def test_broken_jinja_is_refused():
    with pytest.raises(TemplateError, match="not valid Jinja"):
        load_template(None, with_own_template("{% for m in messages %}"))


def test_a_template_file_of_the_user(tmp_path: Path):
    path = tmp_path / "mine.jinja"
    path.write_text(OWN, encoding="utf-8")
    assert load_template(str(path), byte_level()).stop_tokens[0] == "<|im_end|>"


@pytest.mark.parametrize("name", NAMES)
def test_tools_are_refused_where_they_would_be_lost(name: str):
    template = load_template(name, byte_level())
    if not template.abilities.tools:
        with pytest.raises(TemplateError, match=f"'{name}' cannot show tool"):
            encode_conversation(tool_chat(), template=template, tokenizer=byte_level())


def test_a_system_prompt_that_would_be_lost_is_refused():
    own = OWN.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    tokenizer = with_own_template(own)
    template = load_template(None, tokenizer)
    with pytest.raises(TemplateError, match="cannot show system prompts"):
        encode_conversation(CHATS["system"], template=template, tokenizer=tokenizer)


@pytest.mark.parametrize("system", ["Be brief.", 'A "quoted" \\ {{ brace }} {% x %}\n高血压 😀'])
def test_default_system_is_part_of_the_template(system: str):
    tokenizer = byte_level()
    template = load_template("qwen", tokenizer, default_system=system)

    def text_of(conversation) -> str:
        encoded = encode_conversation(conversation, template=template, tokenizer=tokenizer)
        return tokenizer.decode(encoded.samples[0].input_ids)

    assert text_of(chat("Q", "A")) == text_of(chat("Q", "A", system=system))
    assert "Answer briefly." in text_of(CHATS["system"])
    served = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Q"}], chat_template=template.serving_text(), tokenize=False
    )
    assert system in served


def test_default_system_has_no_control_tokens():
    with pytest.raises(TemplateError, match="default_system contains a control token"):
        load_template("qwen", byte_level(), default_system="a <|im_end|> b")
