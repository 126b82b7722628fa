"""A template that is broken on purpose is refused every time, or serving still sends what we train.

Rewritten history is the one change that is allowed: it becomes one sample per trained turn.
"""

from functools import cache
from random import Random
from typing import Any

import pytest
from example_chats import chat
from mutations import MUTATIONS
from real_templates import SHARED, fitting_tokenizer, real_template
from tiny_tokenizers import byte_level
from transformers import PreTrainedTokenizerBase

from llmtuner.data.chat_jinja import render_chat
from llmtuner.data.render import Encoded, encode_conversations
from llmtuner.data.template import load_template, serving_text
from llmtuner.data.templates import read_template
from llmtuner.data.verify import as_served, verify_encoded
from llmtuner.extras.errors import TemplateError

NAMED: list[Any] = [
    "chatml", "deepseekr1", "gemma", "glm4", "gpt_oss", "llama3", "mistral", "phi3", "qwen3",
    "zephyr",
]  # fmt: skip
NAMED += [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("cohere", "deepseek3", "llama2", "qwen", "vicuna", "yi")
]
REAL = [
    "Qwen-Qwen2.5-7B-Instruct", "Qwen-Qwen3-0.6B", "Qwen3.5-4B", "GLM-4.6", "openai-gpt-oss-120b",
    "meta-llama-Llama-3.1-8B-Instruct", "google-gemma-2-2b-it", "microsoft-Phi-3.5-mini-instruct",
    "mistralai-Mistral-Nemo-Instruct-2407", "deepseek-ai-DeepSeek-R1-Distill-Llama-8B",
    "HuggingFaceTB-SmolLM3-3B", "ibm-granite-granite-4.0", "Kimi-K2-Instruct",
]  # fmt: skip
TURNS = ("What is it?", "Nothing much.", "And now?", "Still nothing.", "Why?", "Because of rain.")
CHATS = [chat(*TURNS), chat(*TURNS[:4], system="Be brief.")]


def without_header(text: str) -> str:
    """Return a named template as models have it: without marks and without named tokens."""
    return serving_text(text).replace("control:", "").replace("stop:", "")


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[Encoded]:
    tokenizer.chat_template = text
    template = load_template(None, tokenizer)
    chats = CHATS if template.abilities.system else CHATS[:1]
    encoded = encode_conversations(chats, template=template, tokenizer=tokenizer)
    tokenizer.chat_template = template.serving_text()
    served = as_served(tokenizer, template, trust_remote_code=False)
    assert all(verify_encoded(one, served) for one in encoded)
    return encoded


def renderings(tokenizer: PreTrainedTokenizerBase, text: str) -> list[object]:
    """Return what the template makes of every beginning of the chats."""
    shown: list[object] = []
    for one in CHATS:
        wire = [{"role": m.role, "content": m.content} for m in one.messages]
        for number in range(1, len(wire) + 1):
            for flag in (False, True):
                try:
                    options = {"variables": tokenizer.special_tokens_map, "tools": None}
                    shown.append(
                        render_chat(text, wire[:number], generation_prompt=flag, **options)
                    )
                except TemplateError:
                    shown.append(None)
    return shown


def check(tokenizer: PreTrainedTokenizerBase, text: str, kind: str, seed: str) -> None:
    mutant = MUTATIONS[kind](text, Random(f"{seed} {kind}"))
    if mutant is None or renderings(tokenizer, mutant) == renderings(tokenizer, text):
        return  # not a change
    tokenizer.chat_template = text
    if kind == "system dropped" and not load_template(None, tokenizer).abilities.system:
        return  # there was nothing to drop
    try:
        encoded = encode(tokenizer, mutant)
        if kind == "system dropped":  # nothing is wrong until somebody has a system prompt
            template = load_template(None, tokenizer)
            encode_conversations(CHATS[1:], template=template, tokenizer=tokenizer)
    except TemplateError:
        return
    assert kind == "history rewritten"
    assert [len(one.samples) for one in encoded] == [3, 2][: len(encoded)]


@cache
def tokenizer_of_named() -> PreTrainedTokenizerBase:
    return byte_level.__wrapped__()


@pytest.mark.parametrize("name", NAMED)
def test_the_templates_are_whole_before(name: str) -> None:
    for text in (read_template(name), without_header(read_template(name))):
        assert encode(tokenizer_of_named(), text)


@pytest.mark.parametrize("kind", MUTATIONS)
@pytest.mark.parametrize("name", NAMED)
def test_mutants_of_named_templates_are_caught(name: str, kind: str) -> None:
    text = read_template(name)
    check(tokenizer_of_named(), text, kind, name)
    check(tokenizer_of_named(), without_header(text), kind, name)


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="there is no folder `shared` with real templates")
@pytest.mark.parametrize("kind", MUTATIONS)
@pytest.mark.parametrize("name", REAL)
def test_mutants_of_real_templates_are_caught(name: str, kind: str) -> None:
    text = real_template(name)
    check(fitting_tokenizer(name, text), text, kind, name)
