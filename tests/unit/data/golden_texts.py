"""What the golden files of the templates hold: the ids and the mask of every example chat."""

from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

from example_chats import CHATS, encode_conversation, long_tool_chat, thought_chat, tool_chat
from tiny_tokenizers import byte_level, control_tokens, extend, plain_byte_level
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llmtuner.data.conversation import IGNORE_INDEX, Conversation
from llmtuner.data.render import Sample
from llmtuner.data.template import Template, load_template
from llmtuner.data.templates import template_aliases, template_names

FOLDER = Path(__file__).parent / "goldens"
MINIMIND = Path(__file__).parents[3].parent / "shared/data/tokenizers/minimind"
ONE_CALL = {"chatglm3", "chatglm3_system", "glm4", "gpt_oss", "llama3.1"}  # in a turn
GOLDEN_NAMES = [name for name in template_names() if name not in template_aliases()]


@cache
def golden_tokenizer(kind: str, template: str) -> PreTrainedTokenizerBase:
    """Return a tokenizer whose control tokens are its own and those of one template.

    Args:
        kind: "byte_level" for one that is trained on the spot, "minimind" for a real one.
        template: a new template moves no id in the goldens of the others.
    """
    if kind == "byte_level":
        tokenizer: PreTrainedTokenizerBase = plain_byte_level()
    else:
        tokenizer = AutoTokenizer.from_pretrained(MINIMIND)
    extend(tokenizer, control_tokens(template))
    return tokenizer


def golden_chats(template: Template) -> dict[str, Conversation]:
    """Return the example chats that a template can show."""
    can = template.abilities
    num_calls = 1 if template.name in ONE_CALL else 2
    tools = {"tools": tool_chat(), "calls": long_tool_chat(num_calls)} if can.tool_calls else {}
    return CHATS | tools | ({"thoughts": thought_chat()} if can.thinking else {})


def golden_ids(kind: str, name: str) -> dict[str, list[list[str]]]:
    """Return, for every chat and sample, the ids and the lengths of the runs of the mask.

    The first run is not learned, the second is, and so on.
    """
    tokenizer = golden_tokenizer(kind, name)
    template = load_template(name, tokenizer)
    return {
        title: [
            [" ".join(map(str, sample.input_ids)), " ".join(map(str, run_lengths(sample)))]
            for sample in encode_conversation(chat, template=template, tokenizer=tokenizer).samples
        ]
        for title, chat in golden_chats(template).items()
    }


def run_lengths(sample: Sample) -> list[int]:
    """Return the lengths of the runs of the mask, beginning with tokens that are not learned."""
    runs = groupby(sample.labels, key=lambda label: label == IGNORE_INDEX)
    lengths = [len(list(run)) for _, run in runs]
    return lengths if sample.labels[0] == IGNORE_INDEX else [0, *lengths]


def learned_texts(sample: Sample, tokenizer: Any = None) -> list[str]:
    """Return the text of each run of learned tokens."""
    runs: list[list[int]] = [[]]
    for label in sample.labels:
        if label != IGNORE_INDEX:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [(tokenizer or byte_level()).decode(run) for run in runs if run]
