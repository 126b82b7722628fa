"""Defects that only show when rows of one data set are compared."""

import tempfile
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

    Equal values fall into the same part, so that only one part at a time is held and sorted; what
    is found waits in a file.
    """
    starts = range(0, len(digests), _PART)
    if not starts:
        return
    with tempfile.TemporaryFile() as file:  # which is there as long as it is mapped
        firsts = np.memmap(file, np.int64, "w+", shape=len(digests))
    for part in range(len(starts)):
        own = [_of_part(digests[at : at + _PART], part, len(starts)) + at for at in starts]
        places = np.concatenate(own)
        order = places[np.argsort(digests[places], kind="stable")]
        is_first = np.ones(len(order), bool)
        is_first[1:] = np.diff(digests[order]) != 0
        first_of = order[is_first][np.cumsum(is_first) - 1]
        firsts[order[~is_first]] = 1 + first_of[~is_first]
    for at in starts:
        found = firsts[at : at + _PART]
        for place in np.flatnonzero(found):
            yield int(at + place), int(found[place]) - 1


def _of_part(digests: Digests, part: int, num_parts: int) -> Digests:
    """Return where the values of one part stand."""
    return np.flatnonzero((digests % num_parts == part) & (digests != 0))
