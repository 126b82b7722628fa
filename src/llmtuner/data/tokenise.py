"""Tokenise one data set into its store, counting what is kept, cut and left out."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from llmtuner.data.audit.defects import AUDIT_VERSION
from llmtuner.data.audit.findings import Auditor, BlockNotes, block_notes
from llmtuner.data.audit.inspect import inspect_rows
from llmtuner.data.audit.row import Vocabulary, vocabulary_of
from llmtuner.data.blocks import map_blocks, older_objects_at_rest, show_progress
from llmtuner.data.conversation import Conversation
from llmtuner.data.counts import Counts, add_counts, count_rows, note_bad_rows, start_counts
from llmtuner.data.dataset_info import DatasetSpec
from llmtuner.data.records import BadRows
from llmtuner.data.render import Encoded
from llmtuner.data.rows import load_conversations
from llmtuner.data.template import Template
from llmtuner.data.token_store import Tokens, behind, content_key, load_or_build, token_batch
from llmtuner.extras.env import process_env
from llmtuner.extras.logs import get_logger
from llmtuner.hparams.data import DataArgs

CODE_VERSION = 5
"""Raised when the same rows would become other tokens, or are stored in another way."""

logger = get_logger(__name__)


class Encoder(Protocol):
    """Turns conversations into samples; the stage decides which kind."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """What turns texts into ids."""
        ...

    @property
    def template(self) -> Template | None:
        """What renders the conversations; None where texts are shown as they are."""
        ...

    def __call__(self, conversations: Sequence[Conversation]) -> list[Encoded]:
        """Return, for each conversation, its samples and what was lost on the way."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """Return everything beside the rows that decides the tokens, as JSON values."""
        ...


def tokenise(
    spec: DatasetSpec, args: DataArgs, encode: Encoder, *, with_audit: bool = False
) -> Tokens:
    """Return the tokenised rows of one data set, from its store when nothing has changed.

    With an audit, `counts["audit"]` holds it, and the rows carry their digests.
    """
    start = start_counts(spec)

    def build(counts: Counts) -> Iterator[pa.RecordBatch]:
        counts |= start
        auditor = Auditor() if with_audit else None
        bad_rows = BadRows(args.on_bad_row, on_bad=auditor.audit.refuse if auditor else None)
        conversations = load_conversations(spec, data_args=args, bad_rows=bad_rows)
        yield from _encode_rows(
            conversations, encode, counts=counts, args=args, name=spec.name, auditor=auditor
        )
        note_bad_rows(counts, bad_rows)
        if auditor is not None:
            counts["audit"] = auditor.finish().to_dict()

    key = content_key(
        {
            "code": CODE_VERSION,
            "files": [file["sha256"] for file in start["files"]],
            # paths show in `source` of every row, so the same bytes elsewhere are another store
            "paths": [file["path"] for file in start["files"]],
            "reading": spec.reading_settings(),
            "encoding": args.encoding,
            "max_samples": args.max_samples,
            "on_bad_row": args.on_bad_row,
            "audit": AUDIT_VERSION if with_audit else None,
            "encoder": encode.fingerprint(),
        }
    )
    folder = process_env().cache_dir / "tokens" / key
    # what a hub serves under a name can change without us knowing
    rebuild = args.overwrite_cache or spec.hub is not None
    with older_objects_at_rest():
        tokens = load_or_build(folder, build=build, rebuild=rebuild)
    _log_counts(spec.name, tokens.counts)
    return tokens


@dataclass(frozen=True)
class _Done:
    """What became of a block of rows, in few objects, which cross processes quickly."""

    samples: pa.RecordBatch
    counts: Counts
    notes: BlockNotes | None


@dataclass(frozen=True)
class _Work:
    """What is done with a block of rows, in this process or another one."""

    encode: Encoder
    vocabulary: Vocabulary | None

    def __call__(self, block: list[Conversation]) -> _Done:
        """Encode the rows, and look at them where there is an audit."""
        encoded = self.encode(block)
        counts = count_rows(encoded)
        if self.vocabulary is None:
            return _Done(token_batch(encoded), counts, None)
        notes = inspect_rows(block, encoded, self.vocabulary)
        samples = token_batch(encoded, [one.digest for one in notes])
        return _Done(samples, counts, block_notes(notes))


def _encode_rows(
    conversations: Iterator[Conversation],
    encode: Encoder,
    *,
    counts: Counts,
    args: DataArgs,
    name: str,
    auditor: Auditor | None,
) -> Iterator[pa.RecordBatch]:
    vocabulary = vocabulary_of(encode.tokenizer, encode.template) if auditor else None
    work = _Work(encode, vocabulary)
    shown = show_progress(f"Tokenising {name}", conversations)
    for done in map_blocks(shown, work, num_workers=args.preprocessing_num_workers):
        yield behind(done.samples, counts["rows"])
        add_counts(counts, done.counts)
        if auditor is not None and done.notes is not None:
            auditor.add(done.notes)


def _log_counts(name: str, counts: Mapping[str, Any]) -> None:
    logger.info(
        "%s: %d rows, %d samples, %d tokens, %d of them trained; %d rows cut, %d left out, %d bad.",
        name,
        *(counts[key] for key in ("rows", "samples", "tokens", "supervised_tokens")),
        *(counts[key] for key in ("rows_cut", "rows_left_out", "bad_rows")),
    )
    if counts["thoughts_unasked"]:
        logger.warning(
            "%s: %d answers have no thought where serving thinks, or one where it does not. They "
            "are trained with the prompt for answers like them. Serve with the other "
            "enable_thinking to get such answers, or set --enable_thinking to match the data.",
            name,
            counts["thoughts_unasked"],
        )
