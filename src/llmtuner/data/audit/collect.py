"""`llmtuner data audit`: read, encode and look at every row; bad rows are findings, no stop."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from llmtuner.data.audit.findings import Auditor, BlockNotes, SetAudit, block_notes
from llmtuner.data.audit.inspect import inspect_rows
from llmtuner.data.audit.limits import Limits
from llmtuner.data.audit.overlap import (
    RowSet,
    add_overlaps,
    add_repeats,
    ngram_overlap,
    usable_rows,
)
from llmtuner.data.audit.report import Audit
from llmtuner.data.audit.row import Vocabulary, vocabulary_of
from llmtuner.data.blocks import map_blocks, show_progress
from llmtuner.data.conversation import Conversation
from llmtuner.data.dataset_info import DatasetSpec, load_dataset_specs
from llmtuner.data.records import BadRows
from llmtuner.data.render import Encoded
from llmtuner.data.rows import load_conversations
from llmtuner.data.tokenise import Encoder
from llmtuner.extras.errors import DataError
from llmtuner.hparams.data import DataArgs


@dataclass(frozen=True)
class _Looked:
    """One data set that was looked at."""

    spec: DatasetSpec
    audit: SetAudit
    rows: RowSet


def audit_datasets(args: DataArgs, encode: Encoder, *, limits: Limits) -> Audit:
    """Look at every row of the training and evaluation sets.

    Args:
        args: names the data sets.
        encode: makes the samples of training.
        limits: from `parse_limits`.
    """
    args = replace(args, on_bad_row="skip", max_bad_rows=1.0)
    train = _look_at_all(args, args.dataset or (), encode)
    evals = _look_at_all(args, args.eval_dataset or (), encode)
    add_repeats([(one.audit, one.rows) for one in train])
    if train and evals:
        add_overlaps(
            [(one.audit, one.rows) for one in evals],
            [one.rows for one in train],
            ngrams=ngram_overlap(
                usable_rows([one.spec for one in train], args),
                usable_rows([one.spec for one in evals], args),
            ),
        )
    return Audit(
        {one.spec.name: one.audit for one in train},
        {one.spec.name: one.audit for one in evals},
        limits,
    )


def _look_at_all(args: DataArgs, names: Sequence[str], encode: Encoder) -> list[_Looked]:
    return [_look_at(spec, args, encode) for spec in load_dataset_specs(args, names)]


def _look_at(spec: DatasetSpec, args: DataArgs, encode: Encoder) -> _Looked:
    auditor = Auditor()
    bad_rows = BadRows("skip", on_bad=auditor.audit.refuse)
    rows = load_conversations(spec, data_args=args, bad_rows=bad_rows)
    work = _Work(encode, vocabulary_of(encode.tokenizer, encode.template))
    readable = _readable(rows, auditor.audit)
    shown = show_progress(f"Auditing {spec.name}", readable)
    for block in map_blocks(shown, work, num_workers=args.preprocessing_num_workers):
        auditor.add(block)
    prints = auditor.prints()
    return _Looked(spec, auditor.finish(), RowSet(prints.rows, prints.places))


def _readable(rows: Iterator[Conversation], audit: SetAudit) -> Iterator[Conversation]:
    """Yield the rows before the place from which on a set cannot be read."""
    try:
        yield from rows
    except DataError as error:
        audit.unreadable = str(error)
        if error.kind != "no_usable_rows":  # then each row has said why
            audit.refuse(error)


@dataclass(frozen=True)
class _Work:
    """What is done with a block of rows, in this process or another one."""

    encode: Encoder
    vocabulary: Vocabulary

    def __call__(self, block: list[Conversation]) -> BlockNotes:
        """Encode and look at the rows."""
        return block_notes(inspect_rows(block, encode_each(block, self.encode), self.vocabulary))


def encode_each(block: Sequence[Conversation], encode: Encoder) -> Sequence[Encoded | DataError]:
    """Return what becomes of each row, or why nothing can; one bad row spoils no other."""
    try:
        return encode(block)
    except DataError as error:
        if len(block) == 1:
            return [error]
        half = len(block) // 2
        return [*encode_each(block[:half], encode), *encode_each(block[half:], encode)]
