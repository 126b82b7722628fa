"""The Modelfile says what the chat template says, or there is none."""

import json
import re
from pathlib import Path

import pytest
from tiny_models import tiny_tokenizer

from llmtuner.model.modelfile import turns_of, write_modelfile

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe \"kind\".<|im_end|>\n' }}"
    "{% endif %}"
) + CHATML
LLAMA = "{{ bos_token }}" + CHATML
LLAMA_3 = (
    "{% for m in messages %}{{ (bos_token if loop.first else '') + '<|start_header_id|>' + m.role +"
    " '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
SEPARATED = (
    "{% for m in messages %}{% if not loop.first %}{{ '\n' }}{% endif %}"
    "{{ m.role + ': ' + m.content }}{% endfor %}{{ '\nassistant: ' }}"
)
SYSTEM_IN_USER = (
    "{% for m in messages %}{% if m.role == 'system' %}{% elif m.role == 'user' %}"
    "{{ '[' + (messages[0].content if loop.index0 == 1 else '') + m.content + ']' }}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHATML
CUT = "{% for m in messages[-1:] %}{{ m.content }}{% endfor %}"
ENDLESS = "{% for n in range(10**9) %}{% endfor %}" + CHATML


def write(folder: Path, template: str) -> str | None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    tokenizer.bos_token = "<s>"
    tokenizer.save_pretrained(folder)
    config = {"eos_token_id": tokenizer.eos_token_id, "max_position_embeddings": 2048}
    (folder / "config.json").write_text(json.dumps(config))
    return (folder / "Modelfile").read_text() if write_modelfile(folder) else None


def go_render(modelfile: str, chat: list[tuple[str, str]]) -> str:
    """Do what Ollama does with the few actions that are used."""
    template = re.search(r'TEMPLATE """(.*?)"""\n', modelfile, re.DOTALL)[1]
    loop, prompt = template.split("{{- end -}}\n{{- end -}}\n")
    lead = re.search(r'{{- if ne \(index \.Messages 0\)\.Role "system" -}}(.*){{- end', loop)
    branches = dict(re.findall(r'if eq \.Role "(\w+)" -}}(.*)', loop))

    def fill(text: str, content: str) -> str:
        actions = re.findall(r'{{ (\.Content|".*?") }}', text)
        return "".join(content if one == ".Content" else json.loads(one) for one in actions)

    start = fill(lead[1], "") if lead and chat[0][0] != "system" else ""
    return start + "".join(fill(branches[role], text) for role, text in chat) + fill(prompt, "")


@pytest.mark.parametrize(
    "template", [CHATML, DEFAULT_SYSTEM, LLAMA, LLAMA_3, SEPARATED, SYSTEM_IN_USER]
)
def test_modelfile_renders_as_the_template(template: str, tmp_path: Path) -> None:
    modelfile = write(tmp_path, template)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template, tokenizer.bos_token = template, "<s>"
    turns = [("user", 'a "b"'), ("assistant", "你好"), ("user", "c\nd")]
    for chat in (turns, turns[:1], [("system", "x"), *turns]):
        messages = [{"role": role, "content": text} for role, text in chat]
        wanted = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        # Ollama itself puts the token in front that begins a text.
        assert go_render(modelfile, chat) == wanted.removeprefix("<s>")
    lines = modelfile.splitlines()
    assert lines[0] == "FROM ."
    assert {'PARAMETER stop "<|im_end|>"', "PARAMETER num_ctx 2048"} <= set(lines)


@pytest.mark.parametrize(
    "template", [NO_SYSTEM, CUT, ENDLESS, "{{ messages.nothing[0] }}", "{% if %}"]
)
def test_no_modelfile_rather_than_a_wrong_one(
    template: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="llmtuner"):
        assert write(tmp_path, template) is None
    assert "No Modelfile" in caplog.text
    assert not (tmp_path / "Modelfile").exists()


def test_mark_of_every_turn_is_no_start() -> None:
    turns = turns_of(CHATML, {"bos_token": "<|im_start|>"})
    assert turns.start == ""
    assert turns.around["user"][0].endswith("<|im_start|>user\n")
