"""The counts of one data set for `run.json`: what was read, kept, cut and left out."""

from typing import Any

from llmtuner.data.audit.inspect import supervised_tokens
from llmtuner.data.dataset_info import DatasetSpec
from llmtuner.data.records import BadRows
from llmtuner.data.render import Encoded
from llmtuner.extras.files import sha256_of

_NUM_LISTED = 20

Counts = dict[str, Any]
"""JSON values, so that they can be stored and reported as they are."""


def start_counts(spec: DatasetSpec) -> Counts:
    """Return counts of zero, with the files and their hashes."""
    zeros = ["rows", "samples", "tokens", "supervised_tokens", "rows_left_out", "rows_cut"]
    zeros.append("thoughts_unasked")  # answers that think otherwise than serving does
    return {
        "files": [
            {"path": str(path), "bytes": path.stat().st_size, "sha256": sha256_of(path)}
            for path in spec.files
        ],
        **dict.fromkeys(zeros, 0),
        "left_out_examples": [],
        "bad_rows": 0,
        "bad_row_examples": [],
    }


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
        counts["supervised_tokens"] += supervised_tokens(sample)


def note_bad_rows(counts: Counts, bad_rows: BadRows) -> None:
    """Take over the rows that were skipped."""
    counts["bad_rows"] = bad_rows.count
    counts["bad_row_examples"] = list(bad_rows.examples)
