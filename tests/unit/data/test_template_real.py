"""Named templates write the prompts of the models' own templates; needs the shared folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from example_chats import MANY_TOOLS, TOOLS

from llmtuner.data.chat_jinja import render_chat
from llmtuner.data.prompt import parse_tools
from llmtuner.data.templates import read_template

FOLDER = Path(__file__).parents[3].parent / "shared" / "data" / "templates"

pytestmark = pytest.mark.skipif(
    not FOLDER.is_dir(),
    reason="there is no folder `shared` with real templates beside the repository",
)

CALL = {"name": "get_weather", "arguments": {"city": "Paris"}}
QUESTIONS = [
    {"role": "user", "content": "What is 高血压?"},
    {"role": "assistant", "content": "A disease."},
    {"role": "user", "content": "Why 😀?\n\nSay it  twice."},
    {"role": "assistant", "content": "No."},
    {"role": "user", "content": "Really?"},
]
SYSTEM = {"role": "system", "content": "Answer briefly.\nAlways."}
TOOL_TURNS: list[dict[str, Any]] = [
    {"role": "user", "content": "How is the weather in Paris?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "call00000", "type": "function", "function": CALL}],
    },
    {
        "role": "tool",
        "name": "get_weather",
        "tool_call_id": "call00000",
        "content": '{"sky": "clear"}',
    },
]
SECOND = {
    "id": "call00001",
    "type": "function",
    "function": {**CALL, "arguments": {"city": "罗马"}},
}
TWO_CALLS = [
    TOOL_TURNS[0],
    {**TOOL_TURNS[1], "tool_calls": [TOOL_TURNS[1]["tool_calls"][0], SECOND]},
    TOOL_TURNS[2],
    {**TOOL_TURNS[2], "tool_call_id": "call00001", "content": "rain"},
]
THOUGHTS = [{**turn, "reasoning_content": "I look it up."} for turn in QUESTIONS[:2] + TOOL_TURNS]
CHATS = {
    "turns": QUESTIONS,
    "system": [SYSTEM, *QUESTIONS],
    "tools": TOOL_TURNS,
    "both": [SYSTEM, *TOOL_TURNS, *QUESTIONS[1:]],
    "calls": TWO_CALLS,
    "thoughts": THOUGHTS,
}
R1 = {"eos_token": "<｜end▁of▁sentence｜>"}
THINKING = [{"enable_thinking": True}, {"enable_thinking": False}, {}]

# Two of them write the date of today, which no training can know.
NO_DATE = {
    '"Current date: " + strftime_now("%Y-%m-%d") + "\\n\\n"': '"\\n"',
    "strftime_now is defined": "false",
}
# name, real template, chats, what else the templates are told
SAME = [
    ("deepseekr1", "llama_cpp/deepseek-ai-DeepSeek-R1-Distill-Llama-8B", "turns system", R1),
    ("gemma2", "llama_cpp/google-gemma-2-2b-it", "turns", {}),
    ("glm4_moe", "llama_cpp/GLM-4.6", "turns system tools both calls thoughts", THINKING),
    ("gpt_oss", "llama_cpp/openai-gpt-oss-120b", "turns system tools both", {}),
    ("llama3", "chat_templates/llama-3-instruct", "system", {}),
    ("llama3.1", "llama_cpp/meta-llama-Llama-3.1-8B-Instruct", "turns system tools both", {}),
    ("llama3.2", "llama_cpp/meta-llama-Llama-3.2-3B-Instruct", "turns system tools both", {}),
    ("llama3.3", "llama_cpp/meta-llama-Llama-3.3-70B-Instruct", "turns system tools both", {}),
    (
        "mistral_nemo",
        "llama_cpp/mistralai-Mistral-Nemo-Instruct-2407",
        "turns system tools calls",
        {},
    ),
    ("mistral_small", "llama_cpp/Mistral-Small-3.2-24B-Instruct-2506", "system both", {}),
    ("phi3", "llama_cpp/microsoft-Phi-3.5-mini-instruct", "turns system", {}),
    ("qwen2.5", "llama_cpp/Qwen-Qwen2.5-7B-Instruct", "turns system tools both calls", {}),
    ("qwen3", "llama_cpp/Qwen-Qwen3-0.6B", "turns system tools both calls thoughts", THINKING),
]


def real_template(name: str) -> str:
    """Return the text of a real template, without the line breaks its collection adds."""
    text = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    if name.startswith("chat_templates/"):
        text = text.replace("    ", "").replace("\n", "")
    for old, new in NO_DATE.items():
        text = text.replace(old, new)
    return text


def prompts(text: str, chat: Sequence[Mapping[str, Any]], tools: Any, more: Any) -> list[str]:
    """Return what is sent at every turn of the user and after every result of a tool."""
    return [
        render_chat(
            text,
            chat[: number + 1],
            tools=tools,
            variables={"bos_token": "<s>", "eos_token": "</s>"} | more,
            generation_prompt=True,
        ).text
        for number, message in enumerate(chat)
        if message["role"] in ("user", "tool")
    ]


CASES = [
    pytest.param(name, real, kind, more, id=f"{name}-{kind}-{more}")
    for name, real, kinds, choices in SAME
    for kind in kinds.split()
    for more in (choices if isinstance(choices, list) else [choices])
]


@pytest.mark.parametrize(("name", "real", "kind", "more"), CASES)
def test_prompts_are_those_of_the_model(name: str, real: str, kind: str, more: Any) -> None:
    definitions = {"turns": None, "system": None, "both": MANY_TOOLS}.get(kind, TOOLS)
    tools = parse_tools(definitions) if definitions else None
    ours = prompts(read_template(name), CHATS[kind], tools, more)
    assert ours == prompts(real_template(real), CHATS[kind], tools, more)
