"""Tokenise one data set into its store, counting what is kept, cut and left out."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import islice
from multiprocessing import get_context
from typing import Any, Protocol

from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from llmtuner.data.conversation import Conversation
from llmtuner.data.counts import Counts, note_bad_rows, start_counts, tally
from llmtuner.data.dataset_info import DatasetSpec
from llmtuner.data.records import BadRows
from llmtuner.data.render import Encoded
from llmtuner.data.rows import load_conversations
from llmtuner.data.template import Template
from llmtuner.data.token_store import TokenRow, Tokens, content_key, load_or_build
from llmtuner.extras.env import process_env
from llmtuner.extras.logs import get_logger
from llmtuner.hparams.data import DataArgs

CODE_VERSION = 2
"""Raised when the same rows would become other tokens."""

_BLOCK = 256  # rows that are tokenised together

logger = get_logger(__name__)


class Encoder(Protocol):
    """Turns conversations into samples; the stage decides which kind."""

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


def tokenise(spec: DatasetSpec, args: DataArgs, encode: Encoder) -> Tokens:
    """Return the tokenised rows of one data set, from its store when nothing has changed."""
    start = start_counts(spec)

    def build(counts: Counts) -> Iterator[TokenRow]:
        counts |= start
        bad_rows = BadRows(args.on_bad_row)
        conversations = load_conversations(spec, data_args=args, bad_rows=bad_rows)
        yield from _encode_rows(conversations, encode, counts=counts, args=args, name=spec.name)
        note_bad_rows(counts, bad_rows)

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
            "encoder": encode.fingerprint(),
        }
    )
    folder = process_env().cache_dir / "tokens" / key
    # what a hub serves under a name can change without us knowing
    rebuild = args.overwrite_cache or spec.hub is not None
    tokens = load_or_build(folder, build=build, rebuild=rebuild)
    _log_counts(spec.name, tokens.counts)
    return tokens


def _encode_rows(
    conversations: Iterator[Conversation],
    encode: Encoder,
    *,
    counts: Counts,
    args: DataArgs,
    name: str,
) -> Iterator[TokenRow]:
    with _progress() as progress:
        task = progress.add_task(f"Tokenising {name}", total=None)
        num_workers = args.preprocessing_num_workers or 1
        pairs = encode_in_blocks(conversations, encode, num_workers=num_workers)
        for number, (_, encoded) in enumerate(pairs):
            progress.advance(task)
            tally(counts, encoded)
            for sample in encoded.samples:
                yield TokenRow(sample.input_ids, sample.labels, sample.source, number)


def encode_in_blocks(
    conversations: Iterator[Conversation], encode: Encoder, *, num_workers: int
) -> Iterator[tuple[Conversation, Encoded]]:
    """Yield every conversation with what became of it, in order.

    One process gives the tokenizer whole blocks, which it spreads over the cores by itself; more
    processes also render side by side. The tokens are the same.
    """
    blocks = iter(lambda: list(islice(conversations, _BLOCK)), [])
    if num_workers == 1:
        for block in blocks:
            yield from zip(block, encode(block), strict=True)
        return
    # fork: the encoder with its tokenizer is inherited, not pickled
    pool = ProcessPoolExecutor(
        num_workers, mp_context=get_context("fork"), initializer=_set_encoder, initargs=(encode,)
    )
    with pool:
        while some := list(islice(blocks, num_workers * 4)):
            for block, encoded in zip(some, pool.map(_encode_block, some), strict=True):
                yield from zip(block, encoded, strict=True)


def _set_encoder(encode: Encoder) -> None:
    _worker["encode"] = encode


def _encode_block(block: list[Conversation]) -> list[Encoded]:
    # what a sample was made of is much larger than its tokens
    return [replace(encoded, drafts=()) for encoded in _worker["encode"](block)]


_worker: dict[str, Encoder] = {}  # filled in worker processes only, once, when they start


def _log_counts(name: str, counts: Mapping[str, Any]) -> None:
    logger.info(
        "%s: %d rows, %d samples, %d tokens, %d of them trained; %d rows cut, %d left out, %d bad.",
        name,
        *(counts[key] for key in ("rows", "samples", "tokens", "supervised_tokens")),
        *(counts[key] for key in ("rows_cut", "rows_left_out", "bad_rows")),
    )


def _progress() -> Progress:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TextColumn("{task.completed} rows"),
    )
    return Progress(*columns, TimeElapsedColumn(), transient=True)
