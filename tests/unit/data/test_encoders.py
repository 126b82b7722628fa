"""An encoder's fingerprint changes with everything that changes its tokens, and with nothing else.

The fingerprint is part of the key of stored tokens: one that stays the same serves stale tokens.
"""

import json
from typing import Any

import pytest
from example_chats import chat
from tiny_tokenizers import byte_level, sentence_piece
from transformers import AddedToken, PreTrainedTokenizerFast

from llmtuner.data.conversation import Conversation, Message
from llmtuner.data.encoders.pt import TextEncoder
from llmtuner.data.encoders.sft import ConversationEncoder, build_encoder
from llmtuner.data.tokenizer_digest import tokenizer_digest
from llmtuner.hparams.data import DataArgs

MARKS = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
CHATML = MARKS + "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def copy_of(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Return an equal tokenizer that may be changed."""
    names = {key: str(token) for key, token in tokenizer.special_tokens_map.items()}
    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def encoder(
    *,
    text: str = CHATML,
    default_system: str | None = None,
    enable_thinking: bool | None = True,
    tokenizer: PreTrainedTokenizerFast | None = None,
    **values: Any,
) -> ConversationEncoder:
    tokenizer = copy_of(tokenizer or byte_level())
    tokenizer.chat_template = text
    values |= {"default_system": default_system, "enable_thinking": enable_thinking}
    return build_encoder(DataArgs(**{"cutoff_len": 64, **values}), tokenizer)


CHANGES: dict[str, dict[str, Any]] = {
    "cutoff_len": {"cutoff_len": 63},
    "truncation": {"truncation": "llamafactory"},
    "mask_history": {"mask_history": True},
    "train_on_prompt": {"train_on_prompt": True},
    "default_system": {"default_system": "Be brief."},
    "enable_thinking": {"enable_thinking": False},
    "template": {"text": CHATML.replace("<|im_end|>\n", "<|im_end|>")},
    "stop": {"text": CHATML.replace("<|im_end|>", "<|end|>")},
    "tokenizer": {"tokenizer": sentence_piece()},
}


@pytest.mark.parametrize("setting", CHANGES)
def test_every_setting_that_matters_changes_the_fingerprint(setting: str) -> None:
    assert encoder(**CHANGES[setting]).fingerprint() != encoder().fingerprint()


def test_all_the_changes_are_told_apart() -> None:
    prints = [encoder(**change).fingerprint() for change in ({}, *CHANGES.values())]
    assert len({json.dumps(value, sort_keys=True) for value in prints}) == len(CHANGES) + 1


def test_an_equal_encoder_has_an_equal_fingerprint() -> None:
    assert encoder().fingerprint() == encoder().fingerprint()


@pytest.mark.parametrize(
    "values",
    [{"max_samples": 3}, {"val_size": 0.5}, {"dataset_dir": "x"}, {"packing": True}],
    ids=str,
)
def test_what_does_not_change_tokens_does_not_change_the_fingerprint(
    values: dict[str, Any],
) -> None:
    assert encoder(**values).fingerprint() == encoder().fingerprint()


def test_using_an_encoder_does_not_change_its_fingerprint() -> None:
    encode = encoder()
    before = encode.fingerprint()
    assert encode([chat("Q", "A")])[0].samples
    assert encode.fingerprint() == before


def test_a_fingerprint_is_json() -> None:
    for encode in (encoder(), TextEncoder(byte_level(), 8)):
        assert json.loads(json.dumps(encode.fingerprint()))


def test_the_settings_reach_the_samples() -> None:
    turns = chat("Q1", "A1", "Q2", "A2")

    def labels(**values: Any) -> list[int]:
        ((sample,),) = (row.samples for row in encoder(**values)([turns]))
        return [label for label in sample.labels if label != -100]

    both, last, everything = labels(), labels(mask_history=True), labels(train_on_prompt=True)
    assert both[-len(last) :] == last
    assert len(last) < len(both) < len(everything)


def test_a_text_encoder_is_told_apart_by_length_tokenizer_and_kind() -> None:
    texts = [
        TextEncoder(byte_level(), 8),
        TextEncoder(byte_level(), 9),
        TextEncoder(sentence_piece(), 8),
        encoder(cutoff_len=8),
    ]
    assert len({json.dumps(encode.fingerprint(), sort_keys=True) for encode in texts}) == 4


def test_a_text_encoder_cuts_documents_into_samples() -> None:
    text = "The capital of France is Paris. " * 4
    document = Conversation((Message("text", text, train=True),), source="f.txt:1")
    whole = TextEncoder(byte_level(), 10_000)([document])[0].samples
    pieces = TextEncoder(byte_level(), 8)([document])[0].samples
    assert len(whole) == 1
    assert [i for piece in pieces for i in piece.input_ids] == whole[0].input_ids
    assert {len(piece.input_ids) for piece in pieces[:-2]} == {8}


# ---- tokenizers ----


def changed_tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    more = copy_of(byte_level())
    more.add_tokens(["newword"])
    special = copy_of(byte_level())
    special.add_special_tokens({"additional_special_tokens": [AddedToken("<|new|>")]})
    renamed = copy_of(byte_level())
    renamed.eos_token = "<|im_end|>"
    split = copy_of(byte_level())
    split.split_special_tokens = True
    return {
        "more words": more,
        "more special tokens": special,
        "another end token": renamed,
        "special tokens split": split,
        "fewer tokens": copy_of(byte_level(("<|end|>",))),
        "another kind": copy_of(sentence_piece()),
    }


@pytest.mark.parametrize("name", changed_tokenizers())
def test_a_changed_tokenizer_has_another_digest(name: str) -> None:
    assert tokenizer_digest(changed_tokenizers()[name]) != tokenizer_digest(copy_of(byte_level()))


def test_equal_tokenizers_have_equal_digests() -> None:
    assert tokenizer_digest(byte_level()) == tokenizer_digest(copy_of(byte_level()))
