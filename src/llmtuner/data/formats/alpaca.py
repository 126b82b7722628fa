"""Rows {"instruction", "input", "output"}, optionally with "history" and "system".

The user turn is instruction, line feed, input; an empty part is left out with its line feed. Turns
of `history` are [user, assistant] pairs that come before, and their answers are trained too.
"""

from collections.abc import Mapping
from typing import Any

from llmtuner.data.conversation import Conversation, Message
from llmtuner.data.fields import missing_column, optional_text, required_text, tools_text
from llmtuner.extras.errors import DataError

COLUMNS = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "history": "history",
    "system": "system",
    "tools": "tools",
}


def matches(row: Mapping[str, Any]) -> bool:
    """Tell whether the row has an instruction and an output, and no column of reasoning."""
    return {"instruction", "output"} <= set(row) and "think" not in row


def to_conversation(row: Mapping[str, Any]) -> Conversation:
    """Turn the history and the instruction into user and assistant turns."""
    if isinstance(row.get("output"), list):
        raise DataError(
            "Column 'output' is a list, as in preference data.",
            got=row["output"],
            allowed="a text",
            fix="choose the answer to train on; stage pt and sft learn from one answer",
            kind="preference_data",
        )
    messages = []
    if system := optional_text(row, "system"):
        messages.append(Message("system", system))
    messages += _history(row.get("history"))
    parts = (optional_text(row, "instruction"), optional_text(row, "input"))
    prompt = "\n".join(part for part in parts if part)
    if not prompt.strip():
        raise missing_column(row, "instruction")
    messages.append(Message("user", prompt))
    messages.append(
        Message("assistant", required_text(row, "output", kind="missing_answer"), train=True)
    )
    return Conversation(tuple(messages), tools=tools_text(row.get("tools")))


def _history(pairs: object) -> list[Message]:
    if pairs is None or pairs == "":
        return []
    if not isinstance(pairs, list):
        raise _bad_history(pairs)
    messages = []
    for pair in pairs:
        is_pair = isinstance(pair, list) and len(pair) == 2
        if not is_pair or not all(isinstance(text, str) for text in pair):
            raise _bad_history(pair)
        messages.append(Message("user", pair[0]))
        messages.append(Message("assistant", pair[1], train=True))
    return messages


def _bad_history(got: object) -> DataError:
    problem = "Column 'history' is not a list of [user text, assistant text] pairs."
    fix = "write it as [[question, answer], …]"
    return DataError(problem, got=got, fix=fix, kind="bad_history")
