"""Prompts for prediction: what serving sends, whole, whatever the answer of the data is."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from example_chats import chat, encode_conversation, thought_chat, tool_chat
from tiny_tokenizers import byte_level

from llmtuner.data.conversation import Conversation, Message
from llmtuner.data.encoders.sft import ConversationEncoder
from llmtuner.data.prompt import prompt_ids
from llmtuner.data.questions import encode_questions, load_question_sets
from llmtuner.data.template import Template, load_template
from llmtuner.extras.errors import DataError
from llmtuner.hparams.data import DataArgs

LONG = "".join(f"word{n} " for n in range(60))
HEADER = "<|im_end|>\n<|im_start|>assistant\n"


@cache
def template_of(name: str = "chatml", enable_thinking: bool | None = True) -> Template:
    return load_template(name, byte_level(), enable_thinking=enable_thinking)


def question_of(
    row: Conversation, room: int | None = None, template: Template | None = None
) -> Any:
    (found,) = encode_questions(
        [row], template=template or template_of(), tokenizer=byte_level(), room=room
    )
    return found


def text(ids: list[int]) -> str:
    return byte_level().decode(ids)


@pytest.mark.parametrize(
    "row",
    [
        chat("Q1", "A1"),
        chat("Q1", "A1", "Q2", "A2", system="S"),
        chat(LONG, LONG, LONG, LONG),
    ],
)
def test_the_prompt_is_what_serving_sends_for_the_last_answer(row: Conversation) -> None:
    found = question_of(row)
    *before, answer = row.messages
    assert found.prompt == prompt_ids(before, template=template_of(), tokenizer=byte_level())
    assert text(found.prompt).endswith(HEADER)
    assert text(found.label) == answer.content + "<|im_end|>"
    assert not found.is_cut


def test_a_tool_result_is_part_of_the_prompt() -> None:
    found = question_of(tool_chat(), template=template_of("qwen2.5"))
    assert "clear" in text(found.prompt)
    assert text(found.label) == "It is clear.<|im_end|>"


def test_a_turn_that_is_not_trained_is_not_asked() -> None:
    messages = chat("Q1", "A1", "Q2", "A2").messages
    last_is_read = Conversation((*messages[:-1], Message("assistant", "A2")))
    assert text(question_of(last_is_read).label) == "A1<|im_end|>"
    none_is_trained = Conversation((Message("user", "Q"), Message("assistant", "A")))
    assert question_of(none_is_trained) is None
    assert question_of(Conversation((Message("text", "T", train=True),))) is None


@pytest.mark.parametrize("answer", ["A", LONG * 20])
def test_the_answer_takes_no_room_from_its_question(answer: str) -> None:
    row = chat("First", "Yes", LONG + "Why?", answer, system="Sys")
    whole = question_of(chat("First", "Yes", LONG + "Why?", "A", system="Sys"))
    assert question_of(row, room=len(whole.prompt)).prompt == whole.prompt
    cut = question_of(row, room=len(whole.prompt) - 1)
    assert cut.is_cut
    expected = question_of(chat(LONG + "Why?", "A", system="Sys"))
    assert cut.prompt == expected.prompt  # the oldest exchange goes first, the system prompt stays
    short = question_of(row, room=60)
    assert 56 <= len(short.prompt) <= 60
    assert text(short.prompt).startswith("<|im_start|>system\nSys<|im_end|>\n<|im_start|>user\n")
    assert text(short.prompt).endswith("word59 Why?" + HEADER)
    assert text(short.label) == answer + "<|im_end|>"


def test_training_cuts_where_prediction_does_not() -> None:
    row = chat(LONG + "Why?", LONG)
    trained = encode_conversation(
        row, template=template_of(), tokenizer=byte_level(), cutoff_len=80
    )
    assert trained.is_prompt_cut
    assert "word0 word1 " in text(question_of(row).prompt)


def test_what_no_cut_can_shorten_is_an_error_with_its_place() -> None:
    found = question_of(chat("Q", "A", system=LONG), room=40)
    assert isinstance(found, DataError)
    assert str(found).startswith("chat.json#0: The prompt does not fit")
    assert "--max_new_tokens" in str(found)


@pytest.mark.parametrize(
    ("setting", "has_thought", "ends_thought"),
    [(True, True, False), (True, False, False), (False, True, True), (None, False, True)],
)
def test_the_prompt_asks_for_thoughts_as_the_user_says_and_not_as_the_label(
    setting: bool | None, has_thought: bool, ends_thought: bool
) -> None:
    template = template_of("qwen3", setting)
    messages = thought_chat().messages
    row = Conversation(messages[:2] if has_thought else messages[-2:])
    prompt = text(question_of(row, template=template).prompt)
    assert prompt.endswith("<think>\n\n</think>\n\n") is ends_thought
    if setting is not None:
        sent = prompt_ids(row.messages[:1], template=template, tokenizer=byte_level())
        assert text(sent) == prompt


# ---- sets ----


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name in ("one", "two"):
        rows = [{"instruction": f"{name} {n}", "input": "", "output": f"A{n}"} for n in range(4)]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    return tmp_path


def sets_of(folder: Path, held_out: list[str], **values: Any) -> dict[str, list[str]]:
    names = {key: tuple(str(folder / n) for n in some) for key, some in values.pop("names").items()}
    encode = ConversationEncoder(template_of(), byte_level(), cutoff_len=8)
    rows = Dataset.from_dict({"source": [str(folder / place) for place in held_out]})
    args = DataArgs(**names, **values)
    found = load_question_sets(args, encode, evals={"": rows}, room=None)
    return {
        Path(name).stem: [text(q.prompt).split("user\n")[1][:5] for q in some.questions]
        for name, some in found.items()
    }


def test_a_split_asks_only_what_it_holds_out(files: Path) -> None:
    held_out = ["two.json#1", "one.json#3", "one.json#3"]
    found = sets_of(files, held_out, names={"dataset": ["one.json", "two.json"]})
    assert found == {"": ["one 3", "two 1"]}


@pytest.mark.parametrize("each", [True, False])
def test_evaluation_sets_are_asked_whole_and_by_name(files: Path, each: bool) -> None:
    names = {"dataset": ["one.json"], "eval_dataset": ["two.json", "one.json"]}
    found = sets_of(files, [], names=names, eval_on_each_dataset=each)
    one, two = ([f"{name} {n}" for n in range(4)] for name in ("one", "two"))
    assert found == ({"two": two, "one": one} if each else {"": two + one})


def test_a_stream_is_read_no_further_than_needed(files: Path) -> None:
    bad = (files / "one.json").read_text()[:-1] + ', {"instruction": 5, "output": "x"}]'
    (files / "one.json").write_text(bad)
    names = {"dataset": ["one.json"]}
    found = sets_of(files, ["one.json#0", "one.json#1"], names=names, streaming=True)
    assert found == {"": ["one 0", "one 1"]}
    with pytest.raises(DataError, match="#4"):
        sets_of(files, ["one.json#0"], names=names)


def test_a_set_without_questions_is_refused(files: Path) -> None:
    with pytest.raises(DataError, match="no row to predict"):
        sets_of(files, [], names={"dataset": ["one.json"]})
