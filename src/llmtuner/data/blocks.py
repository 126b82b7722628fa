"""Working on rows in blocks, in one process or several, with a sign of life for people."""

import gc
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from multiprocessing import get_context
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from llmtuner.data.conversation import Conversation

BLOCK = 256
"""Rows that are tokenised together."""

_NUM_THREADS = 2  # one renders while the tokenizer works for the other; more only wait

T = TypeVar("T")
Work = Callable[[list[Conversation]], list[T]]


@contextmanager
def older_objects_at_rest() -> Iterator[None]:
    """Keep Python from looking for garbage in all that was there before, while rows go by.

    Rows make so many objects that the whole heap (a million of them after the imports) is searched
    again and again; this takes a quarter of the time. Garbage of the rows is found as before.
    """
    if gc.get_freeze_count():  # somebody else does so, and decides until when
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def map_blocks(
    conversations: Iterable[Conversation], work: Work[T], *, num_workers: int
) -> Iterator[T]:
    """Yield what `work` makes of every conversation, in order.

    One process gives the tokenizer whole blocks, which it spreads over the cores by itself, and
    renders the next block meanwhile; more processes also render side by side. The results are the
    same.
    """
    rows = iter(conversations)
    blocks = iter(lambda: list(islice(rows, BLOCK)), [])
    if num_workers == 1:
        yield from _in_threads(blocks, work)
        return
    # fork: the encoder with its tokenizer is inherited, not pickled
    pool = ProcessPoolExecutor(
        num_workers, mp_context=get_context("fork"), initializer=_set_work, initargs=(work,)
    )
    with pool:
        while some := list(islice(blocks, num_workers * 4)):
            for results in pool.map(_run_work, some):
                yield from results


def _in_threads(blocks: Iterator[list[Conversation]], work: Work[T]) -> Iterator[T]:
    """Work on two blocks at a time: the tokenizer leaves Python to the other one."""
    waiting: deque[Future[list[T]]] = deque()
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        try:
            unreadable: Exception | None = None
            while True:
                try:
                    block = next(blocks, None)
                except Exception as problem:  # raised below: what comes before it is told first
                    unreadable, block = problem, None
                if block is None:
                    break
                waiting.append(pool.submit(work, block))
                if len(waiting) > _NUM_THREADS:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
            if unreadable is not None:
                raise unreadable
        finally:
            for future in waiting:
                future.cancel()


def show_progress(title: str, items: Iterable[T]) -> Iterator[T]:
    """Yield the items, showing on stderr how many rows went by."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TextColumn("{task.completed} rows"),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    is_watched = console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not is_watched) as progress:
        task = progress.add_task(title, total=None)
        for item in items:
            progress.advance(task)
            yield item


def _set_work(work: Work[Any]) -> None:
    _worker["work"] = work


def _run_work(block: list[Conversation]) -> list[Any]:
    return _worker["work"](block)


_worker: dict[str, Work[Any]] = {}  # filled in worker processes only, once, when they start
