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
    first = _first_equal(prints.rows)
    for number in np.flatnonzero(first != np.arange(len(first))):
        place, original = prints.places[int(number)], prints.places[int(first[number])]
        if place != original:  # else the row was drawn twice, as the user asked
            yield int(number), Hit(None, f"same as {original}")


def conflicting_answers(prints: SetPrint) -> Iterator[Comparison]:
    """Find rows that answer a question otherwise than the first row that has it."""
    asked = np.flatnonzero(prints.questions)
    is_new = _first_equal(prints.rows) == np.arange(len(prints.rows))
    asked = asked[is_new[asked]]
    first = _first_equal(prints.questions[asked])
    for number in np.flatnonzero(first != np.arange(len(first))):
        original = prints.places[int(asked[first[number]])]
        yield int(asked[number]), Hit(None, f"same question as {original}")


def _first_equal(digests: Digests) -> Digests:
    """Return, for each place, the first place of the same value."""
    _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
    found: Digests = first[inverse].astype(np.int64)
    return found
