"""Defects that only show when rows of one data set are compared."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from llmtuner.data.audit.fingerprint import Digests, Places
from llmtuner.data.audit.row import Hit


@dataclass(frozen=True)
class SetPrint:
    """The fingerprints of the rows of one data set, in file order.

    Attributes:
        rows: hash of each row.
        questions: hash of what comes before the last answer; 0 where there is none.
        places: `file:line` of each row.
    """

    rows: Digests
    questions: Digests
    places: Places


_PART = 1 << 17  # rows that are compared at once

Comparison = tuple[int, Hit]
"""Number of a row, and what is the matter with it."""

SetDetector = Callable[[SetPrint], Iterator[Comparison]]
"""Says which rows of a set have the defect."""


def duplicate_row(prints: SetPrint) -> Iterator[Comparison]:
    """Find rows that say exactly what an earlier row says."""
    for number, first in _repeats(prints.rows):
        place, original = prints.places[number], prints.places[first]
        if place != original:  # else the row was drawn twice, as the user asked
            yield number, Hit(None, f"same as {original}")


def conflicting_answers(prints: SetPrint) -> Iterator[Comparison]:
    """Find rows that answer a question otherwise than the first row that has it."""
    is_repeated = np.zeros(len(prints.rows), bool)
    for number, _ in _repeats(prints.rows):
        is_repeated[number] = True
    for number, first in _repeats(prints.questions):
        if not is_repeated[number]:
            yield number, Hit(None, f"same question as {prints.places[first]}")


def _repeats(digests: Digests) -> Iterator[tuple[int, int]]:
    """Yield each place of a value other than 0 that stands before, with the first place of it.

    Equal values fall into the same part, so that only one part at a time is held and sorted.
    """
    num_parts = 1 + len(digests) // _PART
    found = [_repeats_in(digests, part, num_parts) for part in range(num_parts)]
    numbers, firsts = np.concatenate(found, axis=1)
    for place in np.argsort(numbers):
        yield int(numbers[place]), int(firsts[place])


def _repeats_in(digests: Digests, part: int, num_parts: int) -> Digests:
    """Return the places of repeated values of one part, and the first places of each."""
    blocks = [(start, digests[start : start + _PART]) for start in range(0, len(digests), _PART)]
    own = [start + np.flatnonzero((b % num_parts == part) & (b != 0)) for start, b in blocks]
    places = np.concatenate([np.zeros(0, np.int64), *own])
    order = places[np.argsort(digests[places], kind="stable")]
    is_same = np.diff(digests[order]) == 0
    starts = np.flatnonzero(np.concatenate([[True], ~is_same]))
    at = np.flatnonzero(is_same) + 1
    firsts = order[starts[np.searchsorted(starts, at, side="right") - 1]]
    return np.stack([order[at], firsts])
