"""Every question to the model: prompts, scores or written answers, and what they cost."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from llmtuner.eval.answers import extract_letter
from llmtuner.eval.benchmark import Benchmark
from llmtuner.eval.generation import write_answers
from llmtuner.eval.multiple_choice import score_prompts, sharing_difference
from llmtuner.eval.prompts import Prompt, PromptWriter, check_lengths
from llmtuner.eval.reader import Reader
from llmtuner.eval.reading import Model
from llmtuner.eval.results import Answer
from llmtuner.eval.sources import BenchmarkData
from llmtuner.extras.logs import get_logger
from llmtuner.hparams.config import RunConfig
from llmtuner.hparams.generating import GeneratingArgs
from llmtuner.inference.generate import generation_config

logger = get_logger(__name__)

_TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-3}
_HALF_PRECISION_TOLERANCE = 0.25  # rounding alone moves a probability by up to some 0.1
_WRITTEN_TOKENS = 256

OnDone = Callable[[int], None]


@dataclass(frozen=True)
class Costs:
    """What scoring took.

    Attributes:
        seconds: from the first prompt to the last answer, without loading.
        num_tokens_read: tokens that went through the model, padding included.
        num_tokens_whole: tokens of all prompts, as reading each one alone takes.
        sharing_difference: largest change of a probability by sharing, of the probe question.
    """

    seconds: float = 0.0
    num_tokens_read: int = 0
    num_tokens_whole: int = 0
    sharing_difference: float | None = None


def ask(
    config: RunConfig, benchmark: Benchmark, data: BenchmarkData, reader: Reader
) -> tuple[list[Answer], Costs]:
    """Ask the model every question.

    Returns:
        The answers in the order of the questions, and what they cost.
    """
    args = config.evaluating
    started = time.perf_counter()
    lang = args.lang if "lang" in config.given else None
    writer = PromptWriter(benchmark, reader.template, reader.tokenizer, lang)
    is_generated = args.scoring == "generate"
    generating = _generating(config) if is_generated else None
    write = writer.for_generation if is_generated else writer.for_letters
    prompts = [write(found) for found in data.subjects]
    for part in prompts:
        check_lengths(
            part,
            limit=reader.limit,
            num_new_tokens=generating.max_new_tokens if generating else 0,
        )
    with Progress(console=Console(stderr=True), transient=True) as progress:
        on_done = partial(progress.advance, progress.add_task("Asking", total=data.num_questions))
        if generating is not None:
            answers = _generate(config, reader, prompts, generating, on_done, benchmark.letters)
            costs = Costs(num_tokens_whole=sum(len(p.ids) for part in prompts for p in part))
        else:
            answers, costs = _score(config, reader, prompts, on_done, benchmark.letters)
    return answers, replace(costs, seconds=time.perf_counter() - started)


def _score(
    config: RunConfig,
    reader: Reader,
    prompts: Sequence[Sequence[Prompt]],
    on_done: OnDone,
    letters: str,
) -> tuple[list[Answer], Costs]:
    args = config.evaluating
    answers: list[Answer] = []
    num_read = num_whole = 0
    difference = _try_sharing(reader.model, prompts) if args.share_prefix else None
    share_prefix = args.share_prefix and _is_small(difference, reader.model)
    for part in prompts:
        scores = score_prompts(
            reader.model,
            part,
            batch_size=args.batch_size,
            share_prefix=share_prefix,
            on_done=on_done,
        )
        num_read += scores.num_tokens_read
        num_whole += scores.num_tokens_whole
        for prompt, shares in zip(part, scores.probabilities, strict=True):
            best = letters[max(range(len(shares)), key=shares.__getitem__)]
            named = dict(zip(letters, shares, strict=True))
            answers.append(_answer(prompt, best, probabilities=named))
    return answers, Costs(0.0, num_read, num_whole, difference)


def _try_sharing(model: Model, prompts: Sequence[Sequence[Prompt]]) -> float | None:
    """Return what sharing changes in a probe question; None where nothing is shared."""
    several = [part for part in prompts if len(part) > 1]
    if not several:
        return None
    shortest = min(several, key=lambda part: min(len(prompt.ids) for prompt in part))
    return sharing_difference(model, shortest)


def _is_small(difference: float | None, model: Model) -> bool:
    if difference is None:
        return True
    tolerance = _TOLERANCES.get(model.dtype, _HALF_PRECISION_TOLERANCE)
    if math.isfinite(difference) and difference <= tolerance:
        return True
    logger.warning(
        "This model's cache cannot be shared between questions (a probability moved by %.2g); "
        "every prompt is read whole.",
        difference,
    )
    return False


def _generate(
    config: RunConfig,
    reader: Reader,
    prompts: Sequence[Sequence[Prompt]],
    generating: GeneratingArgs,
    on_done: OnDone,
    letters: str,
) -> list[Answer]:
    settings = generation_config(
        generating,
        tokenizer=reader.tokenizer,
        stop_ids=reader.template.stop_ids,
        use_kv_cache=config.model.use_kv_cache,
    )
    answers = []
    for part in prompts:
        texts = write_answers(
            reader.model,
            reader.tokenizer,
            part,
            config=settings,
            batch_size=config.evaluating.batch_size,
            on_done=on_done,
        )
        answers += [
            _answer(prompt, extract_letter(_without_stops(text, reader), letters), text=text)
            for prompt, text in zip(part, texts, strict=True)
        ]
    return answers


def _without_stops(text: str, reader: Reader) -> str:
    for token in (*reader.template.stop_tokens, str(reader.tokenizer.pad_token)):
        text = text.replace(token, "")
    return text


def _generating(config: RunConfig) -> GeneratingArgs:
    """Return how answers are written: greedily and short, unless the user says otherwise."""
    values: dict[str, Any] = {"do_sample": False, "max_new_tokens": _WRITTEN_TOKENS}
    chosen = {name: value for name, value in values.items() if name not in config.given}
    return replace(config.generating, **chosen)


def _answer(prompt: Prompt, prediction: str, **what: Any) -> Answer:
    return Answer(
        prompt.subject.key,
        prompt.subject.category,
        prompt.question.index,
        prediction,
        prompt.question.answer,
        prompt.digest,
        len(prompt.ids),
        **what,
    )
