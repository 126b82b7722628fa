"""Tokenise one data set into its store, counting what is kept, cut and left out."""

from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
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
from llmtuner.data.token_store import TokenRow, Tokens, content_key, load_or_build
from llmtuner.extras.env import process_env
from llmtuner.extras.logs import get_logger
from llmtuner.hparams.data import DataArgs

CODE_VERSION = 1
"""Raised when the same rows would become other tokens."""

_WORKER_CHUNK = 64

logger = get_logger(__name__)


class Encoder(Protocol):
    """Turns a conversation into samples; the stage decides which kind."""

    def __call__(self, conversation: Conversation) -> Encoded:
        """Return the samples of one conversation and what was lost on the way."""
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
        for number, encoded in enumerate(_encoded(conversations, encode, args)):
            progress.advance(task)
            tally(counts, encoded)
            for sample in encoded.samples:
                yield TokenRow(sample.input_ids, sample.labels, sample.source, number)


def _encoded(
    conversations: Iterator[Conversation], encode: Encoder, args: DataArgs
) -> Iterator[Encoded]:
    workers = args.preprocessing_num_workers or 1
    first = list(islice(conversations, _WORKER_CHUNK * workers))
    if workers == 1 or len(first) < _WORKER_CHUNK * workers:
        yield from map(encode, first)
        yield from map(encode, conversations)
        return
    # fork: the encoder with its tokenizer is inherited, not pickled
    pool = ProcessPoolExecutor(
        workers, mp_context=get_context("fork"), initializer=_set_encoder, initargs=(encode,)
    )
    with pool:
        yield from pool.map(_encode_one, first, chunksize=_WORKER_CHUNK)
        while block := list(islice(conversations, _WORKER_CHUNK * workers * 8)):
            yield from pool.map(_encode_one, block, chunksize=_WORKER_CHUNK)


def _set_encoder(encode: Encoder) -> None:
    _worker["encode"] = encode


def _encode_one(conversation: Conversation) -> Encoded:
    return _worker["encode"](conversation)


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
