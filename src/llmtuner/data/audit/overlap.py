"""Evaluation rows that training has seen: whole, or 13 words or CJK characters in a row.

What stands in many rows is boilerplate and tells nothing: n-grams of three training rows or more,
or of three evaluation rows, do not count. System prompts and tool definitions do not either.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from llmtuner.data.audit.findings import SetAudit
from llmtuner.data.audit.fingerprint import Digests, Places
from llmtuner.data.audit.row import Hit
from llmtuner.data.audit.units import Hashes, Numbers, ngram_hashes
from llmtuner.data.conversation import Conversation
from llmtuner.data.dataset_info import DatasetSpec
from llmtuner.data.records import BadRows
from llmtuner.data.rows import load_conversations
from llmtuner.extras.errors import DataError
from llmtuner.hparams.data import DataArgs

_BOILERPLATE = 3
_BLOCK = 256
_PART = 1 << 16  # training rows that are compared at once
_COMPARED = ("user", "assistant", "tool", "text")

Overlaps = dict[str, Hit]
"""Place of an evaluation row -> where in the training data it was found."""


@dataclass(frozen=True)
class RowSet:
    """Rows by their hashes.

    Attributes:
        digests: of each row, as `row_digest` gives them.
        places: `file:line` of each.
    """

    digests: Digests
    places: Sequence[str] | Places


def exact_overlap(train: RowSet, evaluation: RowSet) -> Overlaps:
    """Return the evaluation rows that say exactly what a training row says."""
    wanted, which = np.unique(evaluation.digests, return_inverse=True)
    first = np.full(len(wanted), -1)
    if not len(wanted):
        return {}
    for start in reversed(range(0, len(train.digests), _PART)):  # the first row stays
        part = train.digests[start : start + _PART][::-1]
        at = np.minimum(np.searchsorted(wanted, part), len(wanted) - 1)
        is_known = wanted[at] == part
        first[at[is_known]] = start + len(part) - 1 - np.flatnonzero(is_known)
    found = [(number, which[number]) for number in np.flatnonzero(first[which] >= 0)]
    return {
        evaluation.places[int(number)]: Hit(None, f"same as {train.places[int(first[at])]}")
        for number, at in found
    }


def add_repeats(sets: Sequence[tuple[SetAudit, RowSet]]) -> None:
    """Add to the audits of training sets what an earlier set has too.

    A row that its own set has before is reported there, and a file that is named twice is meant so.
    """
    for number, (audit, rows) in enumerate(sets[1:], start=1):
        _, firsts = np.unique(rows.digests, return_index=True)
        own = {rows.places[int(first)] for first in firsts}
        repeats: Overlaps = {}
        for _, earlier in sets[:number]:
            repeats = exact_overlap(earlier, rows) | repeats
        for place, hit in repeats.items():
            if place in own and hit.note != f"same as {place}":
                audit.add("duplicate_row", place, [hit])


def ngram_overlap(train: Iterable[Conversation], evaluation: Iterable[Conversation]) -> Overlaps:
    """Return the evaluation rows that share n-grams with one or two training rows.

    Only the evaluation rows' n-grams are held in memory; training rows are read once.
    """
    places = Places()
    blocks = [*_row_ngrams(evaluation, places)]
    hashes = np.concatenate([hashes for hashes, _ in blocks] or [np.zeros(0, np.uint64)])
    rows = np.concatenate([rows for _, rows in blocks] or [np.zeros(0, np.int64)])
    order = np.argsort(hashes, kind="stable")
    hashes, rows = hashes[order], rows[order]
    ngrams, starts, counts = np.unique(hashes, return_index=True, return_counts=True)
    if not len(ngrams):
        return {}
    seen = np.zeros(len(ngrams), np.int64)
    seen_in = np.zeros(len(ngrams), np.int64)
    train_places = Places()
    for block_hashes, block_rows in _row_ngrams(train, train_places):
        at = np.minimum(np.searchsorted(ngrams, block_hashes), len(ngrams) - 1)
        is_known = ngrams[at] == block_hashes
        at, in_rows = at[is_known], block_rows[is_known]
        seen_in[at[seen[at] == 0][::-1]] = in_rows[seen[at] == 0][::-1]  # the first row stays
        np.add.at(seen, at, 1)
    tells = (seen > 0) & (seen < _BOILERPLATE) & (counts < _BOILERPLATE)
    return _by_row(tells, seen_in, starts, counts, rows, places, train_places)


def add_overlaps(
    evals: Sequence[tuple[SetAudit, RowSet]], train: Sequence[RowSet], *, ngrams: Overlaps
) -> None:
    """Add to the audits of evaluation sets what is in the training sets too.

    A row that is there as a whole is not reported for its n-grams.
    """
    for audit, rows in evals:
        exact: Overlaps = {}
        for one in reversed(train):  # the first set wins
            exact |= exact_overlap(one, rows)
        own = {rows.places[number] for number in range(len(rows.digests))}
        partly = {place: hit for place, hit in ngrams.items() if place in own - set(exact)}
        for name, found in (("eval_row_in_train", exact), ("eval_ngram_in_train", partly)):
            for place, hit in found.items():
                audit.add(name, place, [hit])


def usable_rows(specs: Sequence[DatasetSpec], args: DataArgs) -> Iterator[Conversation]:
    """Yield the usable rows of several data sets, as far as each can be read."""
    args = replace(args, on_bad_row="skip", max_bad_rows=1.0)
    for spec in specs:
        try:
            yield from load_conversations(spec, data_args=args, bad_rows=BadRows("skip"))
        except DataError:
            continue  # it is in the audit of the set already


def _by_row(
    tells: NDArray[np.bool_],
    seen_in: Numbers,
    starts: Numbers,
    counts: Numbers,
    rows: Numbers,
    places: Places,
    train_places: Places,
) -> Overlaps:
    """Return, for each evaluation row, how many n-grams it shares and with which row the most."""
    chosen = np.flatnonzero(tells)
    times = counts[chosen]
    offsets = np.arange(times.sum()) - np.repeat(np.cumsum(times) - times, times)
    in_rows = rows[np.repeat(starts[chosen], times) + offsets]
    pairs = np.stack([in_rows, np.repeat(seen_in[chosen], times)], axis=1)
    distinct, shared = np.unique(pairs, axis=0, return_counts=True)
    found: Overlaps = {}
    best: dict[int, int] = {}
    for (row, train_row), count in zip(distinct.tolist(), shared.tolist(), strict=True):
        if count > best.get(row, 0):
            best[row] = count
            note = f"{count} n-grams are in {train_places[train_row]}"
            found[places[row]] = Hit(None, note)
    return found


def _row_ngrams(
    conversations: Iterable[Conversation], places: Places
) -> Iterator[tuple[Hashes, Numbers]]:
    """Yield the n-grams of each block, once a row, with the numbers of their rows."""
    rest = iter(conversations)
    while block := list(islice(rest, _BLOCK)):
        texts, owners = [], []
        for conversation in block:
            own = [m.content for m in conversation.messages if m.role in _COMPARED]
            texts += own
            owners += [len(places)] * len(own)
            places.append(conversation.source)
        hashes, numbers = ngram_hashes(texts)
        rows = np.array(owners, np.int64)[numbers]
        order = np.lexsort((hashes, rows))
        hashes, rows = hashes[order], rows[order]
        is_new = np.ones(len(rows), bool)
        is_new[1:] = (hashes[1:] != hashes[:-1]) | (rows[1:] != rows[:-1])
        yield hashes[is_new], rows[is_new]
