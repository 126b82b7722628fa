"""Any text goes from file to rendered prompt to tokens and back without the change of a byte."""

import csv
import io
import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from naughty_strings import NAUGHTY
from tiny_tokenizers import byte_level

from llmtuner.data.conversation import Conversation
from llmtuner.data.dataset_info import DatasetSpec
from llmtuner.data.prompt import encode, prepare_chat, unguarded
from llmtuner.data.records import BadRows
from llmtuner.data.rows import load_conversations
from llmtuner.data.template import Template, load_template
from llmtuner.hparams.data import DataArgs

FAST = settings(derandomize=True, deadline=None, max_examples=30, database=None)

# All of Unicode but what is refused by rule.
REFUSED = "\0\U000f0000\U000f0001"
ANY = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=REFUSED), max_size=30)
TEXTS = st.one_of(
    ANY, st.sampled_from(NAUGHTY), st.tuples(st.sampled_from(" \n\r\t"), ANY).map("".join)
)
FILLED = TEXTS.filter(lambda text: bool(text.strip()))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)
OBJECTS = st.dictionaries(TEXTS, VALUES, max_size=3)
SPELLINGS = st.sampled_from(
    [
        {},
        {"ensure_ascii": False},
        {"indent": 1},
        {"separators": (" ,", ":  "), "ensure_ascii": False},
    ]
)
JSON_FILES = st.sampled_from(["jsonl", "json", "indented", "parquet", "utf-8-sig", "gb18030"])


def write(folder: Path, rows: list[dict[str, Any]], kind: str) -> Path:
    """Write one file of rows, in one of several layouts and encodings."""
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), folder / "x")
        return folder / "x"
    if kind.startswith("csv"):
        out = io.StringIO(newline="")
        writer = csv.DictWriter(out, fieldnames=list(rows[0]), quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows)
        (folder / "x.csv").write_bytes(out.getvalue().encode(kind.removeprefix("csv ")))
        return folder / "x.csv"
    if kind == "json":
        text = json.dumps(rows, ensure_ascii=False)
    elif kind == "indented":
        text = json.dumps(rows, indent=2)
    else:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows)
    codec = kind if kind in ("utf-8-sig", "gb18030") else "utf-8"
    (folder / "x.jsonl").write_bytes(text.encode(codec, errors="backslashreplace"))
    return folder / "x.jsonl"


def read(rows: list[dict[str, Any]], kind: str, **entry: Any) -> list[Conversation]:
    """Write rows to a file and read them back as conversations."""
    encoding = kind.removeprefix("csv ") if "gb18030" in kind else None
    with tempfile.TemporaryDirectory() as folder:
        spec = DatasetSpec("x", files=(write(Path(folder), rows, kind),), **entry)
        args = DataArgs(encoding=encoding)
        return list(load_conversations(spec, data_args=args, bad_rows=BadRows()))


@cache
def template(name: str) -> Template:
    return load_template(name, byte_level(), default_system=None)


def rendered(conversation: Conversation, name: str = "qwen") -> str:
    """Return the rendered text, after proving that its tokens decode to it."""
    chat = prepare_chat(conversation.messages, template=template(name), tools=conversation.tools)
    text = chat.render(
        len(conversation.messages), enable_thinking=None, generation_prompt=False
    ).text
    ids = encode(text, byte_level())
    decoded = byte_level().decode(ids, clean_up_tokenization_spaces=False)
    assert decoded == unguarded(text)
    return decoded + "\n"  # which stands between turns only


def turn(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


@pytest.mark.parametrize("name", ["chatml", "qwen"])
@FAST
@given(system=FILLED, question=FILLED, answer=FILLED, kind=JSON_FILES)
def test_messages(name: str, system: str, question: str, answer: str, kind: str) -> None:
    messages = [
        {"role": "system", "content": system},
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]
    (conversation,) = read([{"messages": messages}], kind)
    assert [message.content for message in conversation.messages] == [system, question, answer]
    expected = turn("system", system) + turn("user", question) + turn("assistant", answer)
    assert rendered(conversation, name) == expected


def test_naughty_strings() -> None:
    rows = [
        {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": text}]}
        for text in NAUGHTY
    ]
    for conversation, text in zip(read(rows, "jsonl"), NAUGHTY, strict=True):
        assert [message.content for message in conversation.messages] == [text, text]
        assert rendered(conversation).endswith(turn("user", text) + turn("assistant", text))


@FAST
@given(
    rows=st.lists(st.tuples(FILLED, FILLED, TEXTS), min_size=1, max_size=3),
    column=st.sampled_from(["date", "created_at", "modified", "type", "message", *NAUGHTY[:60]]),
    kind=st.sampled_from(["csv utf-8", "csv utf-8-sig", "csv gb18030", "jsonl", "json", "parquet"]),
)
def test_columns(rows: list[tuple[str, str, str]], column: str, kind: str) -> None:
    named = [{"ask": ask, "answer": answer, column: other} for ask, answer, other in rows]
    if kind.endswith("gb18030"):
        named = [
            {k: v.encode("gb18030", "ignore").decode("gb18030") for k, v in row.items()}
            for row in named
        ]
        named = [row for row in named if row["ask"].strip() and row["answer"].strip()]
    if not named or not column.strip() or (kind.startswith("csv") and column != column.strip()):
        return
    told = [[m.content for m in one.messages] for one in read(named, kind)]
    assert told == [[row["ask"], row["answer"]] for row in named]
    mapped = [{column: row["ask"], "answer": row["answer"]} for row in named]
    entry = {"columns": {"prompt": column, "response": "answer"}, "formatting": "alpaca"}
    assert [[m.content for m in one.messages] for one in read(mapped, kind, **entry)] == told


@FAST
@given(rows=st.lists(FILLED.filter(lambda text: "\n" not in text), min_size=1, max_size=4))
@example(rows=["a\r", "b"])
def test_documents(rows: list[str]) -> None:
    told = [one.messages[0].content for one in read([{"text": row} for row in rows], "jsonl")]
    assert told == rows


@FAST
@given(
    arguments=OBJECTS,
    parameters=OBJECTS,
    result=TEXTS,
    thought=FILLED,
    answer=FILLED,
    spelling=SPELLINGS,
    kind=JSON_FILES,
)
def test_tools(
    arguments: dict[str, Any],
    parameters: dict[str, Any],
    result: str,
    thought: str,
    answer: str,
    spelling: dict[str, Any],
    kind: str,
) -> None:
    tools = json.dumps([{"name": "f", "description": answer, "parameters": parameters}], **spelling)
    written = json.dumps(arguments, **spelling)
    call = {"name": "f", "arguments": written}
    messages = [
        {"role": "user", "content": answer},
        {"role": "assistant", "content": None, "tool_calls": [{"function": call}]},
        {"role": "tool", "content": result},
        {"role": "assistant", "content": answer, "reasoning_content": thought},
    ]
    rows = [{"messages": messages, "tools": tools}]
    flat = [
        {"from": "human", "value": answer},
        {"from": "function_call", "value": f'{{"name": "f", "arguments": {written}}}'},
        {"from": "observation", "value": result},
        {"from": "gpt", "value": answer},
    ]
    (conversation,) = read(rows, kind)
    (other,) = read([{"conversations": flat, "tools": tools}], kind)
    for one in (conversation, other):
        assert one.tools == tools
        assert one.messages[1].tool_calls[0].arguments == written
        assert (one.messages[2].content, one.messages[3].content) == (result, answer)
    assert conversation.messages[3].thinking == thought
    text = rendered(conversation)
    start = text.index("<|im_start|>assistant\n<tool_call>\n") + 34
    assert json.JSONDecoder().raw_decode(text, start)[0] == {"name": "f", "arguments": arguments}
    assert result in text
    assert text.endswith(answer + "<|im_end|>\n")
    assert thought in text
