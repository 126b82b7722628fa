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
    is_new_question = prints.questions != 0
    for number, _ in _repeats(prints.rows):
        is_new_question[number] = False
    asked = np.flatnonzero(is_new_question)
    for number, first in _repeats(prints.questions[asked]):
        original = prints.places[int(asked[first])]
        yield int(asked[number]), Hit(None, f"same question as {original}")


def _repeats(digests: Digests) -> Iterator[tuple[int, int]]:
    """Yield each place of a value that stands before, with the first place of it.

    Only the order of all digests is held, which for millions of rows is some bytes a row.
    """
    order = np.argsort(digests, kind="stable")
    sorted_ = digests[order]
    is_same = sorted_[1:] == sorted_[:-1]
    if not is_same.any():
        return
    starts = np.flatnonzero(np.concatenate([[True], ~is_same]))
    at = np.flatnonzero(is_same) + 1
    numbers, firsts = order[at], order[starts[np.searchsorted(starts, at, side="right") - 1]]
    for place in np.argsort(numbers):
        yield int(numbers[place]), int(firsts[place])
