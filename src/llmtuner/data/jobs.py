"""Tokenising the texts of many rows in one call of the tokenizer.

A job renders what it needs, yields the texts, and goes on when it is sent their ids. Jobs run side
by side, so that each round of texts is one batch, which the Rust tokenizer spreads over the cores.
"""

from collections.abc import Generator, Iterable, Sequence
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from llmtuner.data.batch_ids import batch_ids
from llmtuner.data.prompt import GUARD_END, GUARD_START, encode

Result = TypeVar("Result")

Job = Generator[list[str], list[list[int]], Result]
"""Yields texts, is sent their ids, returns what it made of them."""


def run_jobs(jobs: Iterable[Job[Result]], tokenizer: PreTrainedTokenizerBase) -> list[Result]:
    """Run the jobs to their ends and return their results, in order."""
    results: dict[int, Result] = {}
    waiting: dict[int, tuple[Job[Result], list[str]]] = {}

    def advance(number: int, job: Job[Result], ids: list[list[int]] | None) -> None:
        try:
            texts = next(job) if ids is None else job.send(ids)
        except StopIteration as end:
            results[number] = end.value
        else:
            waiting[number] = (job, texts)

    for number, job in enumerate(jobs):
        advance(number, job, None)
    while waiting:
        round_ = dict(waiting)
        waiting.clear()
        encoded = iter(encode_all([t for _, texts in round_.values() for t in texts], tokenizer))
        for number, (job, texts) in round_.items():
            advance(number, job, [next(encoded) for _ in texts])
    return [results[number] for number in sorted(results)]


def encode_all(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return the ids of rendered texts; guarded tokens in them become ordinary text."""
    is_plain = [GUARD_START not in text and GUARD_END not in text for text in texts]
    plain = [text for text, is_one in zip(texts, is_plain, strict=True) if is_one]
    of_plain = iter(batch_ids(plain, tokenizer))
    return [
        next(of_plain) if is_one else encode(text, tokenizer)
        for text, is_one in zip(texts, is_plain, strict=True)
    ]
