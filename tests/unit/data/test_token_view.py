"""Samples token by token: nothing is lost, characters stay whole, the mask is the labels'."""

import pytest
from example_chats import CHATS, chat, thought_chat, tool_chat
from tiny_tokenizers import byte_level, sentence_piece

from llmtuner.data.conversation import IGNORE_INDEX, Conversation, Message
from llmtuner.data.encoders import ENCODERS
from llmtuner.data.render import Encoded, Sample
from llmtuner.data.token_view import row_report, token_view, visible
from llmtuner.hparams.data import DataArgs

HARD = chat("Hi 👩‍🔬 你好 龘", "Well, 我是 👍🏽\n\ntwo  spaces\t.")
TOKENIZERS = {"byte level": byte_level, "sentence piece": sentence_piece}
DOCUMENT = Conversation((Message("text", "高血压 is 👍. " * 9, train=True),), source="t.jsonl:4")


def shown(row: Conversation, *, make=byte_level, stage="sft", template="qwen", **options):
    """Return the tokenizer, what the encoder made of the row, its views and its JSON values."""
    tokenizer = make.__wrapped__()
    args = DataArgs(template=template, **options)
    (encoded,) = ENCODERS.get(stage)(args, tokenizer)([row])
    report = row_report(encoded, tokenizer, template=template)
    return tokenizer, encoded, token_view(encoded, tokenizer), report


def check(tokenizer, encoded, views, report) -> None:
    """Compare views and JSON with the encoder's own samples."""

    def decode(ids):
        return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    assert report["source"] == encoded.source
    assert report["ids"] == [number for s in encoded.samples for number in s.input_ids]
    labels = [label for sample in encoded.samples for label in sample.labels]
    assert report["mask"] == [int(label != IGNORE_INDEX) for label in labels]
    assert report["text"] == decode(report["ids"])
    places = [(s["start"], s["end"]) for s in report["samples"]]
    for sample, view, (start, end) in zip(encoded.samples, views, places, strict=True):
        assert report["ids"][start:end] == sample.input_ids == list(view.ids)
        assert [n for cell in view.cells for n in cell.ids] == sample.input_ids
        assert "".join(cell.text for cell in view.cells) == view.text == decode(sample.input_ids)
        for cell in view.cells:
            covered = view.mask[cell.start : cell.start + len(cell.ids)]
            assert set(covered) == {int(cell.is_trained)}
    turns = [(s["start"], turn) for s in report["samples"] for turn in s["turns"]]
    texts = zip(report["prompt_text"], report["trained_text"], strict=True)
    for (start, turn), (prompt, trained) in zip(turns, texts, strict=True):
        assert prompt == decode(report["ids"][start : turn["start"]])
        assert trained == decode(report["ids"][turn["start"] : turn["end"]])


@pytest.mark.parametrize("make", TOKENIZERS.values(), ids=TOKENIZERS)
@pytest.mark.parametrize("row", [*CHATS.values(), HARD], ids=[*CHATS, "hard"])
def test_views_are_the_encoders_samples(row, make) -> None:
    parts = shown(row, make=make)
    check(*parts)
    answers = [message.content for message in row.messages if message.train]
    assert parts[3]["trained_text"] == [f"{answer}<|im_end|>" for answer in answers]
    assert all(text.rstrip().endswith("assistant") for text in parts[3]["prompt_text"])


@pytest.mark.parametrize("make", TOKENIZERS.values(), ids=TOKENIZERS)
def test_a_character_of_several_tokens_is_one_cell(make) -> None:
    _, _, (view,), _ = shown(HARD, make=make)
    cells = {cell.text: cell for cell in view.cells}
    for character in ("👩", "🔬", "龘", "👍", "🏽"):
        assert len(cells[character].ids) > 1, character
    assert not any("\ufffd" in cell.text for cell in view.cells)
    special = {cell.text for cell in view.cells if cell.is_special}
    assert special == {"<|im_start|>", "<|im_end|>"}


@pytest.mark.parametrize("make", TOKENIZERS.values(), ids=TOKENIZERS)
def test_broken_characters_spoil_no_others(make) -> None:
    row = chat("half \ufffd龘", "a<|im_end|>\ufffd")
    _, encoded, (view,), report = shown(row, make=make)
    assert [n for cell in view.cells for n in cell.ids] == encoded.samples[0].input_ids
    assert "龘" in [cell.text for cell in view.cells]
    assert "half \ufffd龘" in report["text"]
    # The text of a user or an answer only looks like a control token.
    assert sum(cell.is_special for cell in view.cells if cell.is_trained) == 1


def test_no_cell_reaches_over_the_border_of_the_mask() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("龘龘", add_special_tokens=False)
    (view,) = token_view(Encoded((Sample(ids, ((4, len(ids)),), "x"),)), tokenizer)
    assert [(cell.start, cell.is_trained) for cell in view.cells[:2]] == [(0, False), (3, False)]
    assert [cell.is_trained for cell in view.cells[2:]] == [True] * (len(ids) - 4)


def test_tool_calls_and_two_answers() -> None:
    parts = shown(tool_chat())
    check(*parts)
    call, answer = parts[3]["trained_text"]
    assert '"name": "get_weather"' in call
    assert answer == "It is clear.<|im_end|>"
    assert '{"sky": "clear"}' in parts[3]["prompt_text"][1]


def test_rewritten_history_gives_samples_end_to_end() -> None:
    parts = shown(thought_chat(), template="qwen3")
    check(*parts)
    report = parts[3]
    assert len(report["samples"]) == 3
    assert [(s["start"], s["end"]) for s in report["samples"]] == [
        (0, report["samples"][0]["end"]),
        (report["samples"][0]["end"], report["samples"][1]["end"]),
        (report["samples"][1]["end"], len(report["ids"])),
    ]
    assert [turn["message"] for s in report["samples"] for turn in s["turns"]] == [1, 3, 5]


@pytest.mark.parametrize(
    ("row", "options", "found", "note"),
    [
        (chat("word " * 60, "word " * 60), {}, (True, True, 0), "an answer was cut"),
        (chat("Q " * 60, "A", "Q2", "A2"), {}, (True, False, 1), "1 trained turn was dropped"),
        (chat("Q " * 90, "A"), {"truncation": "llamafactory"}, (True, False, 0), "not one that"),
        (chat("Q", "A"), {}, (False, False, 0), ""),
    ],
)
def test_what_was_cut_is_said(row, options, found, note) -> None:
    parts = shown(row, cutoff_len=64, **options)
    check(*parts)
    names = ("is_prompt_cut", "is_answer_cut", "num_turns_dropped")
    assert tuple(parts[3][name] for name in names) == found
    (view,) = parts[2]
    assert note in "; ".join(view.notes)
    assert bool(view.notes) == bool(note)
    assert view.turns[-1].is_cut == found[1]


def test_everything_is_marked_when_the_prompt_is_learned_too() -> None:
    parts = shown(CHATS["system"], train_on_prompt=True)
    check(*parts)
    assert set(parts[3]["mask"]) == {1}
    assert parts[3]["num_supervised_tokens"] == len(parts[3]["ids"]) - 1  # the first is no target


def test_texts_for_pretraining_have_no_prompt() -> None:
    tokenizer, encoded, views, report = shown(DOCUMENT, stage="pt", cutoff_len=50)
    assert report["ids"] == [number for s in encoded.samples for number in s.input_ids]
    assert len(views) > 1
    assert report["prompt_text"] == [""] * len(views)
    assert report["trained_text"] == [view.text for view in views]
    assert report["trained_text"][-1].endswith(tokenizer.eos_token)
    assert set(report["mask"]) == {1}


def test_a_row_without_anything_trained_is_empty() -> None:
    row = Conversation((Message("user", "Q"), Message("assistant", "A")), source="x.json#1")
    _, _, views, report = shown(row)
    assert views == []
    assert (report["ids"], report["text"], report["samples"]) == ([], "", [])


@pytest.mark.parametrize(
    ("text", "signs"),
    [
        ("a\nb", "a⏎\nb"),
        ("\t\r\x1b[31m\x00\x7f", "⇥␍␛[31m␀␡"),
        ("\u202eabc\u200d\u2028", "\\u{202e}abc\\u{200d}\\u{2028}"),
        ("你好 👍🏽", "你好 👍🏽"),
    ],
)
def test_what_one_would_not_see_gets_a_sign(text, signs) -> None:
    assert visible(text) == signs
