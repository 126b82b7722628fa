"""Samples that are too long: what is dropped, what is cut, and that it is said."""

from functools import cache

import pytest
from example_chats import chat, encode_conversation, tool_chat
from golden_texts import learned_texts
from tiny_tokenizers import byte_level

from llmtuner.data.conversation import IGNORE_INDEX, Conversation, Message
from llmtuner.data.template import load_template
from llmtuner.data.truncation import TRUNCATIONS
from llmtuner.data.truncation.llamafactory import shares

LONG = "".join(f"word{n} " for n in range(60))


def encode(conversation, cutoff_len: int | None = None, name: str = "chatml", **options):
    return encode_conversation(
        conversation,
        template=template_of(name),
        tokenizer=byte_level(),
        cutoff_len=cutoff_len,
        **options,
    )


@cache
def template_of(name: str):
    return load_template(name, byte_level())


def text_of(encoded, number: int = 0) -> str:
    return byte_level().decode(encoded.samples[number].input_ids)


def size_of(conversation, **options) -> int:
    return max(len(sample.input_ids) for sample in encode(conversation, **options).samples)


def test_what_fits_exactly_is_not_touched():
    conversation = chat("Q1", "A1", "Q2", "A2", system="S")
    whole = encode(conversation)
    assert encode(conversation, size_of(conversation)) == whole
    assert not whole.is_truncated
    assert encode(conversation, size_of(conversation) - 1).is_truncated


def test_oldest_turns_are_dropped_and_the_system_prompt_stays():
    conversation = chat("Q1", "A1", "Q2", "A2", "Q3", "A3", system="Sys")
    encoded = encode(conversation, size_of(conversation) - 1)
    expected = chat("Q2", "A2", "Q3", "A3", system="Sys")
    assert encoded.samples == encode(expected).samples
    assert encoded.num_turns_dropped == 1
    assert encoded.is_prompt_cut
    assert not encoded.is_answer_cut
    only_last = encode(conversation, size_of(chat("Q3", "A3", system="Sys")))
    assert learned_texts(only_last.samples[0]) == ["A3<|im_end|>"]
    assert only_last.num_turns_dropped == 2


def test_turns_are_dropped_as_few_as_needed():
    turns = [text for n in range(9) for text in (f"Q{n}", f"A{n}" * (n + 1))]
    conversation = chat(*turns)
    for num_kept in range(1, 10):
        kept = chat(*turns[-2 * num_kept :])
        assert encode(conversation, size_of(kept)).samples == encode(kept).samples


def test_a_long_question_is_cut_inside_its_text():
    encoded = encode(chat(LONG + "Why?", "Because.", system="Sys"), 60)
    text = text_of(encoded)
    assert 58 <= len(encoded.samples[0].input_ids) <= 60
    assert text.startswith("<|im_start|>system\nSys<|im_end|>\n<|im_start|>user\n")
    assert text.endswith("Why?<|im_end|>\n<|im_start|>assistant\nBecause.<|im_end|>")
    assert learned_texts(encoded.samples[0]) == ["Because.<|im_end|>"]
    assert encoded.is_prompt_cut
    assert not encoded.is_answer_cut


def test_a_long_answer_loses_its_tail_and_its_end_token():
    encoded = encode(chat("Why?", LONG), 60)
    (sample,) = encoded.samples
    assert len(sample.input_ids) == 60
    (learned,) = learned_texts(sample)
    assert LONG.startswith(learned)
    assert "<|im_end|>" not in learned
    assert "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n" in text_of(encoded)
    assert encoded.is_answer_cut
    assert not encoded.is_prompt_cut


def test_both_too_long_share_the_room():
    encoded = encode(chat(LONG, LONG), 80)
    labels = encoded.samples[0].labels
    assert len(labels) == 80
    assert 38 <= sum(label == IGNORE_INDEX for label in labels) <= 40
    assert encoded.is_answer_cut
    assert encoded.is_prompt_cut


def test_a_row_that_cannot_be_kept_is_left_out_and_counted():
    encoded = encode(chat("Q", "A", system=LONG), 60)
    assert encoded.is_left_out
    assert encoded.is_truncated
    assert encoded.num_turns_dropped == 1
    assert encoded.source == "chat.json#0"


def test_every_length_keeps_the_headers_and_something_to_learn():
    conversation = chat("Q1", LONG, LONG, "A2", system="Sys")
    for cutoff_len in range(24, 400, 29):
        encoded = encode(conversation, cutoff_len)
        (sample,) = encoded.samples
        assert len(sample.input_ids) <= cutoff_len
        text = text_of(encoded)
        assert text.startswith("<|im_start|>system\nSys<|im_end|>\n<|im_start|>user\n")
        assert text.count("<|im_start|>assistant\n") == len(learned_texts(sample))
        ends = [part.endswith("<|im_end|>") for part in learned_texts(sample)]
        assert all(ends[:-1])
        assert ends[-1] != encoded.is_answer_cut


@pytest.mark.parametrize("cutoff_len", [130, 160, 175])
def test_an_exchange_with_tools_is_kept_together(cutoff_len: int):
    encoded = encode(tool_chat(), cutoff_len)
    kept = sum(len(learned_texts(sample)) for sample in encoded.samples)
    assert kept + encoded.num_turns_dropped == 2
    assert encoded.is_truncated == (size_of(tool_chat()) > cutoff_len)
    for number in range(len(encoded.samples)):
        assert "How is the weather" in text_of(encoded, number)


def test_samples_of_rewritten_history_are_fitted_one_by_one():
    conversation = chat("Q1", "A1", LONG, "A2", "Q3", "A3")
    encoded = encode(conversation, 60, "qwen3")
    assert [learned_texts(sample) for sample in encoded.samples] == [
        ["A1<|im_end|>"],
        ["A2<|im_end|>"],
        ["A3<|im_end|>"],
    ]
    assert encoded.num_turns_dropped == 0
    assert all(len(sample.input_ids) <= 60 for sample in encoded.samples)


def test_mask_history_counts_only_what_it_would_learn():
    conversation = chat("Q1", "A1", "Q2", "A2")
    encoded = encode(conversation, size_of(conversation) - 1, mask_history=True)
    assert encoded.num_turns_dropped == 0
    assert encoded.is_prompt_cut
    assert learned_texts(encoded.samples[0]) == ["A2<|im_end|>"]


def test_an_opening_answer_goes_with_the_first_exchange():
    messages = (
        Message("assistant", "Hello!", train=True),
        Message("user", "Q"),
        Message("assistant", "A", train=True),
    )
    conversation = Conversation(messages, source="x:1")
    encoded = encode(conversation, size_of(conversation) - 1)
    assert text_of(encoded) == text_of(encode(chat("Q", "A")))


# --- as LLaMA-Factory cuts --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "answer", "room", "kept"),
    [
        (10, 10, 20, (10, 10)),
        (200, 10, 60, (50, 10)),  # a short answer stays whole
        (10, 200, 60, (10, 50)),  # a short prompt stays whole
        (100, 100, 60, (30, 30)),  # both lose their share
        (150, 50, 60, (45, 15)),
        (5, 5, 3, (2, 1)),
    ],
)
def test_llamafactory_shares_the_room(prompt: int, answer: int, room: int, kept) -> None:
    assert shares(prompt, answer, room) == kept


def test_llamafactory_cuts_the_header_and_says_that_it_cannot_be_proved():
    encoded = encode(chat(LONG, "short answer"), 60, truncation="llamafactory")
    (draft,) = encoded.drafts
    assert len(draft.ids) == 60
    assert not draft.is_provable
    assert encoded.is_prompt_cut
    assert not encoded.is_answer_cut
    assert "assistant" not in text_of(encoded)[40:]
    assert learned_texts(encoded.samples[0]) == ["short answer<|im_end|>"]


def test_llamafactory_keeps_the_oldest_turns_and_cuts_the_last():
    encoded = encode(chat("Q1", "A1", "Q2", LONG, "Q3", "A3"), 60, truncation="llamafactory")
    learned = learned_texts(encoded.samples[0])
    assert learned[0] == "A1<|im_end|>"
    assert LONG.startswith(learned[1])
    assert encoded.is_answer_cut
    assert encoded.num_turns_dropped == 1
    assert encoded.drafts[0].is_provable


@pytest.mark.parametrize("truncation", TRUNCATIONS.names())
def test_no_truncation_makes_a_sample_longer_or_touches_one_that_fits(truncation: str):
    conversation = chat("Q1 " + LONG, "A1 " + LONG, "Q2", LONG, system="Sys")
    assert encode(conversation, 10_000, truncation=truncation) == encode(conversation)
    for cutoff_len in (8, 20, 60, 200):
        encoded = encode(conversation, cutoff_len, truncation=truncation)
        assert all(len(sample.input_ids) <= cutoff_len for sample in encoded.samples)
        assert encoded.is_truncated
