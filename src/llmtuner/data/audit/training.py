"""The audit of a training run, from what tokenising has stored."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from datasets import Dataset
from filelock import FileLock

from llmtuner.data.audit.findings import SetAudit, from_dict
from llmtuner.data.audit.limits import Limits
from llmtuner.data.audit.overlap import (
    Overlaps,
    RowSet,
    add_overlaps,
    add_repeats,
    exact_overlap,
    ngram_overlap,
    usable_rows,
)
from llmtuner.data.audit.report import Audit
from llmtuner.data.audit.row import Hit
from llmtuner.data.dataset_info import DatasetSpec
from llmtuner.data.stored_column import stored_column
from llmtuner.data.token_store import Tokens, content_key
from llmtuner.extras.env import process_env
from llmtuner.extras.files import read_json, write_json
from llmtuner.hparams.data import DataArgs

SPLIT = "validation split"
"""What the audit calls the rows that `val_size` holds out."""

_CODE_VERSION = 1  # raised when the same rows would have other n-grams

Named = tuple[DatasetSpec, Tokens]


def audit_run(
    train: Sequence[Named],
    evals: Sequence[Named],
    *,
    parts: Mapping[str, Dataset],
    args: DataArgs,
    limits: Limits,
) -> Audit:
    """Return the audit of the data sets of a run, with what evaluation shares with training.

    Args:
        train: tokenised with their audits.
        evals: the same for evaluation.
        parts: the samples of the run; a split is compared with the rest by whole rows only.
        args: how the files are read.
        limits: from `parse_limits`.
    """
    train_audits = {spec.name: from_dict(tokens.counts["audit"]) for spec, tokens in train}
    eval_audits = {spec.name: from_dict(tokens.counts["audit"]) for spec, tokens in evals}
    add_repeats([(train_audits[spec.name], row_set(tokens.dataset)) for spec, tokens in train])
    if train and evals and "train" in parts:
        pairs = [(eval_audits[spec.name], row_set(tokens.dataset)) for spec, tokens in evals]
        ngrams = _stored_ngram_overlap(train, evals, args)
        add_overlaps(pairs, [row_set(tokens.dataset) for _, tokens in train], ngrams=ngrams)
    elif {"train", "validation"} <= set(parts):
        eval_audits[SPLIT] = audit_split(parts["train"], parts["validation"])
    return Audit(train_audits, eval_audits, limits)


def audit_split(train: Dataset, validation: Dataset) -> SetAudit:
    """Return which rows of a split say what a training row says."""
    held_out = row_set(validation)
    audit = SetAudit(rows=len(set(validation["source"])))
    for place, hit in exact_overlap(row_set(train), held_out).items():
        audit.add("eval_row_in_train", place, [hit])
    return audit


def row_set(samples: Dataset) -> RowSet:
    """Return the rows that samples come from."""
    digests = np.asarray(stored_column(samples, "digest"), np.int64)
    return RowSet(digests, samples["source"])


def _stored_ngram_overlap(
    train: Sequence[Named], evals: Sequence[Named], args: DataArgs
) -> Overlaps:
    """Read the texts again for their n-grams, unless the same files were compared before."""
    key = content_key(
        {
            "code": _CODE_VERSION,
            "rows": [
                [(spec.reading_settings(), tokens.counts["files"]) for spec, tokens in part]
                for part in (train, evals)
            ],
            "reading": [args.encoding, args.max_samples, args.custom_formats],
        }
    )
    path = process_env().cache_dir / "overlaps" / f"{key}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        is_stored = path.is_file() and not any(spec.hub for spec, _ in (*train, *evals))
        found = _read(path) if is_stored and not args.overwrite_cache else None
        if found is None:
            specs = [[spec for spec, _ in part] for part in (train, evals)]
            found = ngram_overlap(usable_rows(specs[0], args), usable_rows(specs[1], args))
            write_json(path, {place: hit.note for place, hit in found.items()})
    return found


def _read(path: Path) -> Overlaps | None:
    try:
        return {place: Hit(None, note) for place, note in read_json(path).items()}
    except (OSError, ValueError, AttributeError):
        return None  # damaged, so it is made again
