"""Texts that are encoded piece by piece have the ids of whole texts, or are not cut."""

import random
import re
import unicodedata
from collections.abc import Callable
from typing import Any

import pytest
from tiny_tokenizers import SENTENCES, byte_level, plain_byte_level, sentence_piece
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llmtuner.data import pieces
from llmtuner.data.batch_ids import batch_ids
from llmtuner.data.pieces import LETTERS, pieces_of

WORDS = sorted(pieces._WORDS)
BITS = [
    *("a", "the", "Don", "WE", "é", "я", "ſ", "ƃ", "中文", "ไทย", "x\u0301", "ﬁ", "Ⅷ", "½", "1"),
    *("'", "'s", "'LL", "'ſ", "’s", "-", "_", ".", "…", "，", "\u3000", "\u00a0", "\u200d", "234"),
    *(" ", "  ", "\n", "\r\n", "\t", "\x85", "\u2028", "=\u0338", "<", "\u0338", "e\u0301"),
    *("<|im_start|>", "<|im_end|>", "<|im_end", "</s>", "sop", "sopa", "[gMASK]", "\U0001f600"),
]  # fmt: skip


def cut_by(*steps: Any, normalizer: Any = None) -> Tokenizer:
    """A backend with other rules of cutting texts into words."""
    backend = plain_byte_level().backend_tokenizer
    byte_level_last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, byte_level_last])
    if normalizer is not None:
        backend.normalizer = normalizer
    return backend


def split(pattern: str, behavior: str = "isolated", *, invert: bool = False) -> Any:
    return pre_tokenizers.Split(Regex(pattern), behavior, invert=invert)


def digits_and_gpt2() -> Tokenizer:
    backend = plain_byte_level().backend_tokenizer
    last = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), last])
    return backend


BACKENDS: dict[str, Callable[[], Tokenizer]] = {
    "gpt2": lambda: plain_byte_level().backend_tokenizer,
    "digits": digits_and_gpt2,
    **{pattern: lambda p=pattern: cut_by(split(p)) for pattern in WORDS},
    "nfc": lambda: cut_by(split(WORDS[0]), normalizer=normalizers.NFC()),
}


def texts(seed: int, count: int = 400) -> list[str]:
    chosen = random.Random(seed)
    return ["".join(chosen.choices(BITS, k=chosen.randint(1, 14))) for _ in range(count)]


@pytest.mark.parametrize("make", BACKENDS.values(), ids=BACKENDS)
def test_pieces_have_the_ids_of_the_whole_text(make: Callable[[], Tokenizer]) -> None:
    backend = make()
    encode = pieces_of(backend)
    assert encode is not None
    for seed in range(3):  # the second time many pieces are known
        some = [*texts(seed), *SENTENCES, ""]
        expected = backend.encode_batch(some, add_special_tokens=False)
        assert encode.ids(some) == [one.ids for one in expected]


@pytest.mark.parametrize("make", BACKENDS.values(), ids=BACKENDS)
def test_words_end_between_every_letter_and_border(make: Callable[[], Tokenizer]) -> None:
    cutting = make().pre_tokenizer
    letters = re.findall(f"[{LETTERS}]", "".join(map(chr, range(0x600))))
    borders = re.findall(f"[{pieces._BORDERS}]", "".join(map(chr, range(0x600))))
    assert len(letters) > 700
    for pair in [*(f"a{one}" for one in borders), *(f"{one} " for one in letters)]:
        found = cutting.pre_tokenize_str(f"{pair[0]}{pair}b")
        assert 2 in [end for _, (_, end) in found], pair


def test_letters_are_letters_and_borders_join_nothing() -> None:
    every = "".join(map(chr, range(0x110000)))
    found = re.findall(f"[{LETTERS}]", every)
    assert {unicodedata.category(one)[0] for one in found} == {"L"}
    for border in re.findall(f"[{pieces._BORDERS}]", every):
        assert not border.isalpha()
        assert border.isascii()
        assert unicodedata.normalize("NFC", f"e{border}") == f"e{border}"


def test_known_words_are_not_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_level.__wrapped__()
    batch_ids(["the capital <|im_end|>of the"], tokenizer)
    asked: list[str] = []

    class Watched:
        def encode_batch_fast(self, batch: list[str], **options: Any) -> Any:
            asked.extend(batch)
            return tokenizer.backend_tokenizer.encode_batch_fast(batch, **options)

    kept = pieces_of(tokenizer.backend_tokenizer)
    assert kept is not None
    monkeypatch.setattr(kept, "_backend", Watched())
    batch_ids(["the capital of<|im_end|>of the city"], tokenizer)
    assert len(asked) == 1
    assert sorted(asked[0].split(kept._separator)) == [" city", " of"]


def test_memory_does_not_grow_with_the_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "_MOST_CHARACTERS", 100)
    backend = plain_byte_level().backend_tokenizer
    encode = pieces_of(backend)
    assert encode is not None
    for number in range(50):
        text = f"word {number} of {number * number} and so on"
        assert encode.ids([text]) == [backend.encode(text, add_special_tokens=False).ids]
        assert sum(map(len, {*encode._known} - {*encode._tokens})) <= 100 + len(text)


def test_a_failure_leaves_no_piece_without_ids() -> None:
    backend = plain_byte_level().backend_tokenizer
    encode = pieces_of(backend)
    assert encode is not None
    with pytest.raises(TypeError):
        encode.ids(["fine words", "half \ud800"])
    assert encode.ids(["fine words"]) == [backend.encode("fine words").ids]


def test_a_new_token_counts_at_once() -> None:
    tokenizer = plain_byte_level()
    before = batch_ids(["a <new> b"], tokenizer)
    tokenizer.add_tokens(["<new>"], special_tokens=True)
    after = batch_ids(["a <new> b"], tokenizer)
    assert after != before
    assert after == [tokenizer.encode("a <new> b", add_special_tokens=False)]


def test_tokens_over_a_piece_and_a_separator_change_nothing() -> None:
    backend = plain_byte_level().backend_tokenizer
    separator = pieces_of(backend)._separator  # type: ignore[union-attr]
    tokens = [f"a{separator[:2]}", f"{separator}b", f"{separator[-1]}c", f"{separator} the"]
    backend.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    encode = pieces_of(backend)
    assert encode is not None
    assert encode._separator == separator
    some = ["a", "b", "c", "aa bb cc", "the a the b the c", f"a{separator}b{separator} the", " the"]
    expected = [backend.encode(one, add_special_tokens=False).ids for one in some]
    assert [encode.ids([*some, text])[-1] for text in some] == expected
    assert pieces_of(backend).ids(some) == expected  # type: ignore[union-attr]


def without_separator() -> Tokenizer:
    backend = byte_level_without_tokens()
    backend.add_tokens([AddedToken("<x<", normalized=False), AddedToken("aa", normalized=False)])
    return backend


def byte_level_without_tokens() -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(SENTENCES, trainer)
    return backend


def with_token(**options: bool) -> Tokenizer:
    backend = plain_byte_level().backend_tokenizer
    backend.add_tokens([AddedToken("<new>", **{"normalized": False, **options})])
    return backend


def with_dropout() -> Tokenizer:
    backend = plain_byte_level().backend_tokenizer
    backend.model.dropout = 0.1
    return backend


def with_prefix_space() -> Tokenizer:
    backend = plain_byte_level().backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return backend


OTHERS: dict[str, Callable[[], Tokenizer]] = {
    "no words": lambda: sentence_piece.__wrapped__().backend_tokenizer,
    "nothing cut": cut_by,
    "another rule": lambda: cut_by(split(r"\w+ ?")),
    "two rules": lambda: cut_by(split(WORDS[0]), split(r"\w+ ?")),
    "text removed": lambda: cut_by(split(WORDS[0], "removed")),
    "inverted": lambda: cut_by(split(WORDS[0], invert=True)),
    "lower case": lambda: cut_by(split(WORDS[0]), normalizer=normalizers.Lowercase()),
    "space in front": with_prefix_space,
    "chance": with_dropout,
    "no tokens": byte_level_without_tokens,
    "tokens that overlap themselves": without_separator,
    **{name: lambda n=name: with_token(**{n: True}) for name in ("lstrip", "rstrip")},
    **{name: lambda n=name: with_token(**{n: True}) for name in ("single_word", "normalized")},
}


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_other_tokenizers_get_whole_texts(make: Callable[[], Tokenizer]) -> None:
    backend = make()
    assert pieces_of(backend) is None
    if backend.model.dropout is None:
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
        some = texts(1, 50)
        expected = tokenizer(some, add_special_tokens=False)["input_ids"]
        assert batch_ids(some, tokenizer) == expected
