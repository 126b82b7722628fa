"""What the golden file of the templates holds."""

from pathlib import Path
from typing import Any

from example_chats import CHATS, tool_chat
from tiny_tokenizers import byte_level

from llmtuner.data.conversation import IGNORE_INDEX
from llmtuner.data.render import Sample, encode_conversation
from llmtuner.data.template import load_template

GOLDENS = Path(__file__).parent / "goldens/templates.json"


def golden_texts(name: str) -> dict[str, Any]:
    """Return what the template makes of every example chat: texts of samples, learned parts."""
    tokenizer = byte_level()
    template = load_template(name, tokenizer)
    chats = CHATS | ({"tools": tool_chat()} if template.abilities.tool_calls else {})
    return {
        kind: [
            {"text": tokenizer.decode(sample.input_ids), "learned": learned_texts(sample)}
            for sample in encode_conversation(chat, template=template, tokenizer=tokenizer).samples
        ]
        for kind, chat in chats.items()
    }


def learned_texts(sample: Sample, tokenizer: Any = None) -> list[str]:
    """Return the text of each run of learned tokens."""
    runs: list[list[int]] = [[]]
    for label in sample.labels:
        if label != IGNORE_INDEX:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [(tokenizer or byte_level()).decode(run) for run in runs if run]
