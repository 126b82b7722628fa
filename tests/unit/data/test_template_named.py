"""Every named template: names, goldens, headers, refusals, ends of turns, the page about them."""

import json
import re
from pathlib import Path

import pytest
from example_chats import encode_conversation, long_tool_chat
from golden_texts import (
    FOLDER,
    GOLDEN_NAMES,
    MINIMIND,
    ONE_CALL,
    golden_chats,
    golden_ids,
    golden_tokenizer,
)
from tiny_tokenizers import control_tokens, extend, plain_byte_level

from llmtuner.data.conversation import IGNORE_INDEX
from llmtuner.data.template import load_template
from llmtuner.data.templates import read_template, template_aliases, template_names
from llmtuner.extras.errors import TemplateError

NAMES = template_names()
# The names of LLaMA-Factory 0.7, and vanilla of 0.4
OLD_NAMES = """
    alpaca aquila atom baichuan baichuan2 belle bluelm breeze chatglm2 chatglm3 chatglm3_system
    chatml chatml_de codegeex2 cohere cpm dbrx deepseek deepseekcoder default empty falcon fewshot
    gemma intern intern2 llama2 llama2_zh llama3 mistral olmo openchat orion phi qwen solar starchat
    vicuna xuanyuan xverse yayi yi yi_vl yuan zephyr ziya vanilla
"""
LATER_NAMES = """
    cpm3 cpm4 deepseek3 deepseekr1 gemma2 gemma3 glm4 glm4_moe gpt_oss hunyuan internlm2 llama3.1
    llama3.2 llama3.3 ministral mistral_nemo mistral_small mistral_v3 phi3 phi4 qwen2 qwen2.5 qwen3
    qwen3_nothink
"""
# What looks like a control token and is ordinary text to the tokenizer of the model
PLAIN = {
    "breeze": {"[INST]", "[/INST]"},
    "intern": {"<|User|>", "<|Bot|>"},
    "llama2": {"[INST]", "[/INST]"},
    "llama2_zh": {"[INST]", "[/INST]"},
    "mistral": {
        "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]",
        "[TOOL_RESULTS]", "[/TOOL_RESULTS]",
    },
    "olmo": {"<|user|>", "<|assistant|>"},
    "zephyr": {"<|system|>", "<|user|>", "<|assistant|>"},
}  # fmt: skip
PAGE = Path(__file__).parents[3] / "docs/templates.md"
GOLDENS = {
    kind: json.loads((FOLDER / f"{kind}.json").read_text(encoding="utf-8"))
    for kind in ("byte_level", "minimind")
}


def test_all_names_that_users_know_are_there() -> None:
    assert set(NAMES) == {*OLD_NAMES.split(), *LATER_NAMES.split()}
    assert len(OLD_NAMES.split()) == 47


def test_further_names_stand_for_templates() -> None:
    for alias, name in template_aliases().items():
        assert name in GOLDEN_NAMES
        assert read_template(alias) == read_template(name)


def test_there_are_goldens_of_every_template() -> None:
    for goldens in GOLDENS.values():
        assert list(goldens) == GOLDEN_NAMES


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_ids_and_masks_are_the_golden_ones(name: str) -> None:
    assert golden_ids("byte_level", name) == GOLDENS["byte_level"][name]


@pytest.mark.skipif(
    not MINIMIND.is_dir(), reason="there is no folder `shared` with a real tokenizer"
)
@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_ids_and_masks_of_a_real_tokenizer_are_the_golden_ones(name: str) -> None:
    assert golden_ids("minimind", name) == GOLDENS["minimind"][name]


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_every_answer_is_learned_and_ends_where_serving_stops(name: str) -> None:
    tokenizer = golden_tokenizer("byte_level", name)
    template = load_template(name, tokenizer)
    for chat in golden_chats(template).values():
        encoded = encode_conversation(chat, template=template, tokenizer=tokenizer)
        ends = [
            label
            for sample in encoded.samples
            for label, after in zip(sample.labels, [*sample.labels[1:], IGNORE_INDEX], strict=True)
            if label != IGNORE_INDEX and after == IGNORE_INDEX
        ]
        assert len(ends) == sum(message.train for message in chat.messages)
        assert set(ends) <= set(template.stop_ids)


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_the_header_names_the_control_tokens(name: str) -> None:
    text = read_template(name)
    written = re.sub(r"\{#.*?#\}", "", text, flags=re.DOTALL)
    found = set(re.findall(r"<[|｜][^<>\n]*?[|｜]>|\[/?[A-Z_]{3,}\]|\[\|.*?\|\]:", written))
    assert found - PLAIN.get(name, set()) <= set(control_tokens(name))
    stops = re.search(r"\{#- stop: (.+?) -#\}", text)
    assert stops is not None
    assert all(token in written + stops[1] for token in control_tokens(name))


@pytest.mark.parametrize("name", [name for name in GOLDEN_NAMES if control_tokens(name)])
def test_missing_control_tokens_are_all_named(name: str) -> None:
    wanted = control_tokens(name)
    for missing in (wanted, wanted[-1:]):
        tokenizer = plain_byte_level(without=tuple(missing))
        extend(tokenizer, [token for token in wanted if token not in missing])
        with pytest.raises(TemplateError) as caught:
            load_template(name, tokenizer)
        assert caught.value.got == missing
        assert f"'{name}' has control tokens that this tokenizer lacks" in str(caught.value)


@pytest.mark.parametrize("name", sorted(ONE_CALL))
def test_two_calls_are_refused_where_the_model_makes_one(name: str) -> None:
    tokenizer = golden_tokenizer("byte_level", name)
    template = load_template(name, tokenizer)
    with pytest.raises(TemplateError, match="This template shows one tool call in a turn"):
        encode_conversation(long_tool_chat(2), template=template, tokenizer=tokenizer)


def facts(name: str) -> list[str]:
    """Return what the page says of a template."""
    template = load_template(name, golden_tokenizer("byte_level", name))
    has_default = re.search(r"set system = (?:system or )?(['\"]).+?\1 -%\}", template.text)
    stop = re.search(r"\{#- stop: (\S+)", template.text)
    assert stop is not None
    can = template.abilities
    return [
        "yes" if can.tool_calls and can.tool_results else "no",
        "yes" if can.thinking else "no",
        "yes" if has_default else "no",
        f"`{stop[1]}`".replace("|", "\\|"),
    ]


def test_the_page_tells_of_every_template() -> None:
    table = PAGE.read_text(encoding="utf-8").partition("\n## All names\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\S+)` \|.*?(?<!\\)\| (.*) \|$", table, re.MULTILINE)
    told = {name: re.split(r" (?<!\\)\| ", row) for name, row in rows}
    assert told == {name: facts(template_aliases().get(name, name)) for name in NAMES}
