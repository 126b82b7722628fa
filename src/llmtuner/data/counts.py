"""The counts of one data set for `run.json`: what was read, kept, cut and left out."""

from collections.abc import Iterable
from typing import Any

from llmtuner.data.dataset_info import DatasetSpec
from llmtuner.data.records import BadRows
from llmtuner.data.render import Encoded
from llmtuner.extras.files import sha256_of

_NUM_LISTED = 20
_SUMS = (
    "rows", "samples", "tokens", "supervised_tokens", "rows_left_out", "rows_cut",
    "thoughts_unasked",  # answers that think otherwise than serving does
)  # fmt: skip

Counts = dict[str, Any]
"""JSON values, so that they can be stored and reported as they are."""


def start_counts(spec: DatasetSpec) -> Counts:
    """Return counts of zero, with the files and their hashes."""
    return {
        "files": [
            {"path": str(path), "bytes": path.stat().st_size, "sha256": sha256_of(path)}
            for path in spec.files
        ],
        **count_rows(()),
        "bad_rows": 0,
        "bad_row_examples": [],
    }


def count_rows(rows: Iterable[Encoded]) -> Counts:
    """Return what became of some rows."""
    counts: Counts = {**dict.fromkeys(_SUMS, 0), "left_out_examples": []}
    for encoded in rows:
        tally(counts, encoded)
    return counts


def add_counts(counts: Counts, more: Counts) -> None:
    """Add what became of the rows behind those that are counted."""
    for name in _SUMS:
        counts[name] += more[name]
    examples = counts["left_out_examples"]
    examples += more["left_out_examples"][: _NUM_LISTED - len(examples)]


def tally(counts: Counts, encoded: Encoded) -> None:
    """Add what became of one row."""
    counts["rows"] += 1
    counts["rows_cut"] += encoded.is_truncated
    counts["thoughts_unasked"] += encoded.num_thoughts_unasked
    if encoded.is_left_out:
        counts["rows_left_out"] += 1
        if len(counts["left_out_examples"]) < _NUM_LISTED:
            counts["left_out_examples"].append(encoded.source)
    for sample in encoded.samples:
        counts["samples"] += 1
        counts["tokens"] += len(sample.input_ids)
        counts["supervised_tokens"] += sample.supervised_tokens


def note_bad_rows(counts: Counts, bad_rows: BadRows) -> None:
    """Take over the rows that were skipped."""
    counts["bad_rows"] = bad_rows.count
    counts["bad_row_examples"] = list(bad_rows.examples)
