"""The ids of texts from those of their pieces, for which the tokenizer is asked once.

Most tokenizers cut a text into words before anything else, and give a word the same ids wherever it
stands. What people write is made of some ten thousand words again and again, and to look them up
takes a quarter of the time in which the tokenizer finds their ids.

A text is cut here only where these tokenizers cut it too: at added tokens, which they do first, and
between a letter and an ASCII character that is neither a letter nor an apostrophe. By all rules
named below no word goes on from a letter with such a character, and no rule looks back, or looks
ahead from a letter; so the words on either side are the same as if that side stood alone. Neither
does normalisation (NFC) join characters over such a place.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain, islice
from threading import Lock
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE

from llmtuner.data.template import any_of

# letters in every version of Unicode: Latin and Cyrillic; other scripts stay in one piece
LETTERS = "A-Za-zÀ-ÖØ-öø-ɏЀ-ҁҊ-ԯ"
_BORDERS = r"\x00-&(-@\[-`{-\x7f"
# up to the end of a run of letters with a border behind it, or to the end of the text
_PIECE = re.compile(
    f"[^{LETTERS}]*+[{LETTERS}]++(?:[^{LETTERS}{_BORDERS}][^{LETTERS}]*+[{LETTERS}]++)*+"
    f"(?:[^{LETTERS}{_BORDERS}][^{LETTERS}]*+)?|[^{LETTERS}]++"
)
_JOINED = 16  # new pieces that are encoded as one text
_MOST_CHARACTERS = 1 << 19  # of the pieces that are kept, some ten megabytes with their ids

_RULES = (
    # Qwen and Llama 3, and Qwen 3.5
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|SPACES",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|DIGITS"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|SPACES",
    # Mistral Nemo, and gpt-oss
    r"[^\r\n\p{L}\p{N}]?UPPER*LOWER+|[^\r\n\p{L}\p{N}]?UPPER+LOWER*|DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|SPACES",
    r"[^\r\n\p{L}\p{N}]?UPPER*LOWER+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?UPPER+LOWER*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|SPACES",
)
_WORDS = frozenset(
    rule.replace("UPPER", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]")
    .replace("LOWER", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]")
    .replace("SPACES", r"\s*[\r\n]+|\s+(?!\S)|\s+")
    .replace("DIGITS", digits)
    for rule in _RULES
    for digits in (r"\p{N}", r"\p{N}{1,3}")
)
"""Rules by which families cut texts into words; that of GPT-2 is in `ByteLevel` itself."""


class _Rules(NamedTuple):
    """What decides whether and where the texts of a tokenizer are cut."""

    normalizer: bytes
    cutting: bytes
    tokens: frozenset[tuple[int, AddedToken]]
    is_repeatable: bool
    vocabulary_size: int


class Pieces:
    """Encodes texts piece by piece, and keeps the ids of the pieces.

    Args:
        backend: gives the ids.
        tokens: its added tokens and their ids.
        separator: one of them, whose first character it has once: it cannot overlap itself.
    """

    def __init__(self, backend: Tokenizer, tokens: Mapping[str, int], separator: str) -> None:
        self._backend = backend
        self._tokens, self._separator = tokens, separator
        self._token = re.compile(f"({any_of(tokens).pattern})")
        self._lock = Lock()  # a new piece stands among the known before it has its ids
        self._forget()

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, without special tokens around it."""
        with self._lock:
            if self._num_characters > _MOST_CHARACTERS:
                self._forget()
            try:
                return self._ids(texts)
            except BaseException:
                self._forget()
                raise

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        num_known = len(self._known)
        own = [[*map(self._known.__getitem__, self._cut(text))] for text in texts]
        new = [*islice(reversed(self._known.items()), len(self._known) - num_known)]
        found = self._encode([piece for piece, _ in new])
        for (piece, ids), of_piece in zip(new, found, strict=True):
            ids += of_piece
            self._num_characters += len(piece)
        return [[*chain.from_iterable(one)] for one in own]

    def _encode(self, pieces: Sequence[str]) -> Iterator[list[int]]:
        """Yield the ids of each piece; many go into one text, as every text costs some time."""
        parts = [pieces[start : start + _JOINED] for start in range(0, len(pieces), _JOINED)]
        joined = [self._separator.join(part) for part in parts]
        encodings = self._backend.encode_batch_fast(joined, add_special_tokens=False)
        for part, encoding in zip(parts, encodings, strict=True):
            found = _split(encoding.ids, self._tokens[self._separator])
            if len(found) < len(part):  # a piece and a separator together make another token
                found = [self._backend.encode(one, add_special_tokens=False).ids for one in part]
            yield from found

    def _forget(self) -> None:
        ids_of_tokens = {token: [token_id] for token, token_id in self._tokens.items()}
        self._known: defaultdict[str, list[int]] = defaultdict(list, ids_of_tokens)
        self._num_characters = 0

    def _cut(self, text: str) -> list[str]:
        pieces: list[str] = []
        for number, part in enumerate(self._token.split(text)):
            if number % 2:
                pieces.append(part)
            else:
                pieces += _PIECE.findall(part)
        return pieces


def _split(ids: list[int], separator: int) -> list[list[int]]:
    parts = []
    start = 0
    for _ in range(ids.count(separator)):
        end = ids.index(separator, start)
        parts.append(ids[start:end])
        start = end + 1
    return [*parts, ids[start:]]


def pieces_of(backend: Tokenizer) -> Pieces | None:
    """Return what encodes the texts of a tokenizer; None where they must not be cut."""
    normalizer, cutting, model = backend.normalizer, backend.pre_tokenizer, backend.model
    rules = _Rules(
        b"null" if normalizer is None else normalizer.__getstate__(),
        b"null" if cutting is None else cutting.__getstate__(),
        frozenset(backend.get_added_tokens_decoder().items()),
        isinstance(model, BPE) and model.dropout is None,
        backend.get_vocab_size(),
    )
    return _pieces_of(backend, rules)


@lru_cache(maxsize=2)
def _pieces_of(backend: Tokenizer, rules: _Rules) -> Pieces | None:
    normalizer, cutting = json.loads(rules.normalizer), json.loads(rules.cutting)
    # tokens that take space from their neighbours, or are looked for later, are not found alike
    is_plain = not any(
        token.lstrip or token.rstrip or token.single_word or token.normalized
        for _, token in rules.tokens
    )
    ids = {token.content: token_id for token_id, token in rules.tokens}
    separator = next((token for token in sorted(ids) if token[0] not in token[1:]), None)
    if separator is None or not (
        rules.is_repeatable
        and is_plain
        and (normalizer is None or normalizer["type"] == "NFC")
        and cutting is not None
        and _makes_known_words(cutting)
    ):
        return None
    return Pieces(backend, ids, separator)


def _makes_known_words(cutting: dict[str, Any]) -> bool:
    """Say whether a tokenizer cuts texts by known rules: digits first or not, words, then bytes."""
    steps = cutting["pretokenizers"] if cutting["type"] == "Sequence" else [cutting]
    *before, last = steps
    before = [step for step in before if step["type"] != "Digits"]
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return False
    if last["use_regex"]:
        return not before
    return len(before) == 1 and _is_known_split(before[0])


def _is_known_split(step: dict[str, Any]) -> bool:
    return (
        step["type"] == "Split"
        and step["behavior"] == "Isolated"
        and not step["invert"]
        and step["pattern"].get("Regex") in _WORDS
    )
