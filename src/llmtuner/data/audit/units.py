"""Texts as units to compare: words, and single characters where a script has no spaces.

Case and everything that is neither letter nor digit are left out.
"""

import re
from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

NGRAM = 13
"""Units that two texts share before it is worth a word. Source: GPT-3 (2020), appendix C."""

_SINGLE = ((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x2E80, 0x30FF),
           (0x3400, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF))  # fmt: skip
_RANGES = "".join(f"{chr(low)}-{chr(high)}" for low, high in _SINGLE)
_UNIT = re.compile(rf"(?![\W_])[{_RANGES}]|(?:(?![{_RANGES}_])\w)+")
_BORDER, _SPACE, _WORD, _CHARACTER = range(4)
_LETTER_FACTOR = np.uint64(0x100000001B3)
_UNIT_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_LONGEST_WORD = 64  # behind it letters count again as the first ones did

Hashes = NDArray[np.uint64]
Numbers = NDArray[np.int64]


def has_units(text: str, count: int) -> bool:
    """Say whether a text has that many words or single characters."""
    return any(number >= count for number, _ in enumerate(_UNIT.finditer(text), start=1))


def ngram_hashes(texts: Sequence[str]) -> tuple[Hashes, Numbers]:
    """Return the hash of every n-gram of the texts, and the number of the text it is in.

    The hashes are the same in every process and on every machine.
    """
    units, owners = _unit_hashes(texts)
    num_ngrams = len(units) - NGRAM + 1
    if num_ngrams <= 0:
        return units[:0], owners[:0]
    hashes = np.zeros(num_ngrams, np.uint64)
    for offset in range(NGRAM):
        hashes = hashes * _UNIT_FACTOR + units[offset : offset + num_ngrams]
    is_inside = owners[:num_ngrams] == owners[NGRAM - 1 :]
    return hashes[is_inside], owners[:num_ngrams][is_inside]


def _unit_hashes(texts: Sequence[str]) -> tuple[Hashes, Numbers]:
    """Return the hash of every unit, and the number of the text it is in."""
    joined = "\0".join(text.lower() for text in texts)  # no text holds NUL: the reader refuses it
    codes = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32)
    kinds = _kinds()[codes]
    owners = np.cumsum(kinds == _BORDER)
    is_unit = kinds >= _WORD
    follows = np.zeros(len(codes), bool)
    follows[1:] = (kinds[1:] == _WORD) & (kinds[:-1] == _WORD)
    starts = np.flatnonzero((is_unit & ~follows)[is_unit])
    if not len(starts):
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    letters = codes[is_unit].astype(np.uint64)
    lengths = np.diff(np.append(starts, len(letters)))
    places = np.arange(len(letters)) - np.repeat(starts, lengths)
    units = np.add.reduceat(letters * _powers()[places % _LONGEST_WORD], starts)
    units = (units ^ (units >> np.uint64(29))) * _UNIT_FACTOR
    return units, owners[is_unit][starts].astype(np.int64)


@cache
def _kinds() -> NDArray[np.uint8]:
    """Return, for every code point, what it is."""
    is_letter = np.fromiter((chr(code).isalnum() for code in range(0x110000)), bool, 0x110000)
    kinds = np.where(is_letter, _WORD, _SPACE).astype(np.uint8)
    for low, high in _SINGLE:
        block = kinds[low : high + 1]
        block[block == _WORD] = _CHARACTER
    kinds[0] = _BORDER
    return kinds


@cache
def _powers() -> Hashes:
    return np.cumprod(np.full(_LONGEST_WORD, _LETTER_FACTOR), dtype=np.uint64)
