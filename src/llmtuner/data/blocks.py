"""Working on rows in blocks, in one process or several, with a sign of life for people."""

import gc
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import chain, islice
from multiprocessing import get_context
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from llmtuner.data.conversation import Conversation
from llmtuner.extras.env import num_usable_cores, tokenizers_in_one_thread
from llmtuner.extras.errors import DistributedError

BLOCK = 256
"""Rows that are tokenised together."""

_FEW_BLOCKS = 8  # about as long as processes take to start
_NEW_OBJECTS = 50_000  # between two searches for garbage
_MOST_WORKERS = 12  # the process that reads and writes cannot keep more of them busy

T = TypeVar("T")
Work = Callable[[list[Conversation]], T]


@contextmanager
def older_objects_at_rest() -> Iterator[None]:
    """Keep Python from looking for garbage in all that was there before, while rows go by.

    Rows make so many objects that the whole heap (a million of them after the imports) is searched
    again and again; this takes a quarter of the time. Garbage of the rows is found as before, but
    not in every block anew: hardly any of its objects is garbage that counting does not find.
    """
    if gc.get_freeze_count():  # somebody else does so, and decides until when
        yield
        return
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(_NEW_OBJECTS)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def map_blocks(
    conversations: Iterable[Conversation], work: Work[T], *, num_workers: int | None
) -> Iterator[T]:
    """Yield what `work` makes of every block of conversations, in order.

    One process gives the tokenizer whole blocks, which it spreads over the cores by itself; more
    processes also render side by side. The results are the same.

    Args:
        conversations: the rows.
        work: what is done with a block.
        num_workers: processes; None starts one for each core when there are many rows.
    """
    blocks = _read_blocks(iter(conversations))
    if num_workers is None:
        first = list(islice(blocks, _FEW_BLOCKS))
        is_many = len(first) == _FEW_BLOCKS
        num_workers = min(num_usable_cores(), _MOST_WORKERS) if is_many else 1
        blocks = chain(first, blocks)
    if num_workers > 1:
        yield from _in_processes(blocks, work, num_workers)
        return
    for block in blocks:
        yield work(_readable(block))


def _read_blocks(rows: Iterator[Conversation]) -> Iterator[list[Conversation] | Exception]:
    """Yield the blocks; last what stops the reading, for what comes before is told first."""
    try:
        while block := list(islice(rows, BLOCK)):
            yield block
    except Exception as problem:
        yield problem


def _readable(block: list[Conversation] | Exception) -> list[Conversation]:
    if isinstance(block, Exception):
        raise block
    return block


def _in_processes(
    blocks: Iterator[list[Conversation] | Exception], work: Work[T], num_workers: int
) -> Iterator[T]:
    # fork: the encoder with its tokenizer is inherited, not pickled
    pool = ProcessPoolExecutor(
        num_workers, mp_context=get_context("fork"), initializer=_become_worker, initargs=(work,)
    )
    waiting: deque[Future[T] | Exception] = deque()
    with pool, tokenizers_in_one_thread():
        try:
            for block in blocks:
                if isinstance(block, Exception):
                    waiting.append(block)
                else:
                    waiting.append(pool.submit(_run_work, block))
                if len(waiting) > 2 * num_workers:
                    yield _result(waiting.popleft())
            while waiting:
                yield _result(waiting.popleft())
        except BrokenProcessPool as error:
            raise DistributedError(
                "A process that tokenises rows was killed, perhaps as memory ran out.",
                fix="give --preprocessing_num_workers 1, or free memory",
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _result(done: "Future[T] | Exception") -> T:
    if isinstance(done, Exception):
        raise done
    return done.result()


def show_progress(title: str, items: Iterable[T]) -> Iterator[T]:
    """Yield the items, showing on stderr how many rows went by."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TextColumn("{task.completed} rows"),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    if not console.is_terminal:
        yield from items
        return
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=None)
        for item in items:
            progress.advance(task)
            yield item


def _become_worker(work: Work[Any]) -> None:
    # In the memory of the main thread, which the imports have left full of small holes, tokenizing
    # takes a tenth longer; a thread of its own has its own memory.
    _worker.update(work=work, thread=ThreadPoolExecutor(1))


def _run_work(block: list[Conversation]) -> Any:
    return _worker["thread"].submit(_worker["work"], block).result()


_worker: dict[str, Any] = {}  # filled in worker processes only, once, when they start
