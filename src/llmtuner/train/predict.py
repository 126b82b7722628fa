"""Prediction: the model's answers beside those of the data, and how near they come.

Prompts of similar length share a batch, the longest first. Batches are planned for all questions,
and each one is sampled with a seed of its own; so neither a resumed run nor another number of
processes changes an answer. Results are in the order of the file.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from rich.progress import track
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from llmtuner.data.questions import QuestionSet
from llmtuner.eval.metrics import measure
from llmtuner.extras.dist import agree, gather
from llmtuner.extras.env import process_env
from llmtuner.extras.errors import ConfigError
from llmtuner.extras.files import write_text
from llmtuner.extras.logs import get_logger
from llmtuner.hparams.config import RunConfig
from llmtuner.hparams.generating import GeneratingArgs
from llmtuner.inference.generate import Answer, generate_answers, generation_config
from llmtuner.model.context import context_tokens
from llmtuner.model.fingerprint import weights_digest
from llmtuner.model.load import load_config
from llmtuner.train.answer_journal import append_answers, journal_of, open_journal

logger = get_logger(__name__)


@dataclass(frozen=True)
class Predictions:
    """The answers to a set of questions, in order.

    Attributes:
        questions: what was asked.
        labels: the texts of the data.
        answers: what the model wrote.
        num_kept: answers that an earlier, killed run had given.
        runtime_s: seconds spent on the others.
        settings: all that decides the answers.
    """

    questions: QuestionSet
    labels: Sequence[str]
    answers: Sequence[Answer]
    num_kept: int
    runtime_s: float
    settings: Mapping[str, Any]


def predictions_file(output_dir: Path, name: str) -> Path:
    """Return where the answers for an evaluation set go; the nameless one is the only set."""
    suffix = f"_{name.replace('/', '_')}" if name else ""
    return output_dir / f"generated_predictions{suffix}.jsonl"


def plan_room(config: RunConfig) -> tuple[RunConfig, int | None]:
    """Return the settings and the longest prompt that leaves the model room for an answer.

    The default of `max_new_tokens` gives way to a small context, at most half of which is for the
    answer; a value that the user gave does not.

    Raises:
        ConfigError: no room is left for a prompt.
    """
    generating = config.generating
    context = context_tokens(load_config(config.model, max_tokens=config.data.cutoff_len))
    if generating.max_new_tokens == 0:  # max_length is for prompt and answer together
        limits = [limit for limit in (context, generating.max_length) if limit is not None]
        return config, max(1, min(limits) - 1)
    if context is None:
        return config, None
    if generating.max_new_tokens > context // 2 and "max_new_tokens" not in config.given:
        half = context // 2
        line = f"max_new_tokens is {half}: the model reads {context} tokens, half are the prompt's."
        logger.info("%s", line)
        generating = replace(generating, max_new_tokens=half)
        config = replace(config, generating=generating, notices=(*config.notices, line))
    if generating.max_new_tokens >= context:
        raise ConfigError(
            "max_new_tokens leaves no room for a prompt.",
            where="--max_new_tokens",
            got=generating.max_new_tokens,
            allowed=f"less than the {context} tokens that the model reads",
        )
    return config, context - generating.max_new_tokens


def plan_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Return the numbers of the prompts in each batch: similar lengths together, longest first."""
    order = sorted(range(len(lengths)), key=lambda number: (-lengths[number], number))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def write_predictions(
    questions: QuestionSet,
    *,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    generating: GeneratingArgs,
    stop_ids: Sequence[int],
    use_kv_cache: bool,
    batch_size: int,
    path: Path,
    precision: AbstractContextManager[object],
    seed: int,
    number_type: str,
) -> Predictions:
    """Answer every question and write one line for each, going on where a killed run ended.

    The ranks share the batches; under ZeRO-3, where each forward pass needs all of them, they
    answer every prompt together. Rank 0 writes.

    Args:
        questions: prompts, and the answers of the data.
        model: to generate with, on its device.
        tokenizer: decodes.
        generating: how to choose tokens.
        stop_ids: ids that end an answer.
        use_kv_cache: keep keys and values between tokens.
        batch_size: prompts per batch.
        path: the file to write, once all answers are there.
        precision: the number type of the forward pass.
        seed: of sampling.
        number_type: the name of that type.
    """
    started = time.monotonic()
    model.eval()
    settings = {
        **_settings_of(questions, generating),
        "per_device_eval_batch_size": batch_size,
        "seed": seed,
        "precision": number_type,
        "stop_ids": list(stop_ids),
        "weights": agree(weights_digest(model)),
    }
    config = generation_config(
        generating, tokenizer=tokenizer, stop_ids=stop_ids, use_kv_cache=use_kv_cache
    )
    rows = _shown(questions, tokenizer, skip_special_tokens=generating.skip_special_tokens)
    batches = plan_batches([len(question.prompt) for question in questions.questions], batch_size)

    def ask(number: int) -> dict[int, Answer]:
        torch.manual_seed(seed + number)
        given = generate_answers(
            model,
            tokenizer,
            [questions.questions[index].prompt for index in batches[number]],
            config=config,
            skip_special_tokens=generating.skip_special_tokens,
        )
        return dict(zip(batches[number], given, strict=True))

    with precision:
        answers, num_kept = _answer_all(batches, ask, rows, journal_of(path), settings)
    if process_env().rank == 0:
        lines = (
            json.dumps({**row, "predict": answer.text}, ensure_ascii=False) + "\n"
            for row, answer in zip(rows, answers, strict=True)
        )
        write_text(path, "".join(lines))
    labels = [row["label"] for row in rows]
    seconds = time.monotonic() - started
    return Predictions(questions, labels, answers, num_kept, seconds, settings)


def _answer_all(
    batches: Sequence[Sequence[int]],
    ask: Callable[[int], dict[int, Answer]],
    rows: Sequence[Mapping[str, str]],
    journal: Path,
    settings: Mapping[str, Any],
) -> tuple[list[Answer], int]:
    """Return all answers in order, and how many of them the journal had."""
    is_main = process_env().rank == 0
    found = agree(open_journal(journal, settings) if is_main else {})
    left = [number for number, batch in enumerate(batches) if not found.keys() >= set(batch)]
    asked = {index for number in left for index in batches[number]}
    answers = {index: answer for index, answer in found.items() if index not in asked}
    num_kept = len(answers)
    kept = f"; {num_kept} are there from a run before" if num_kept else ""
    logger.info("Predicting: %d answers in %d batches%s.", len(rows), len(batches), kept)
    for some in _rounds(left, ask, num_batches=len(batches)):
        answers |= some
        if is_main:
            append_answers(journal, some, {index: rows[index] for index in some})
    return [answers[index] for index in range(len(rows))], num_kept


def _rounds(
    left: Sequence[int], ask: Callable[[int], dict[int, Answer]], *, num_batches: int
) -> Iterator[dict[int, Answer]]:
    """Yield, on every rank, what all ranks have answered in each round of one batch a rank."""
    env = process_env()
    num_shares = 1 if is_deepspeed_zero3_enabled() else env.world_size
    rounds = [left[start : start + num_shares] for start in range(0, len(left), num_shares)]
    num_done = (num_batches - len(left)) // num_shares
    console = Console(stderr=True)
    for batches in track(
        rounds,
        description="Predicting",
        total=num_done + len(rounds),
        completed=num_done,
        console=console,
        transient=True,
        disable=env.rank != 0 or not console.is_terminal,
    ):
        if num_shares == 1:
            yield ask(batches[0])
            continue
        own = ask(batches[env.rank]) if env.rank < len(batches) else {}
        yield {index: answer for part in gather(own) for index, answer in part.items()}


def _settings_of(questions: QuestionSet, generating: GeneratingArgs) -> dict[str, Any]:
    asked = [[question.prompt, question.label] for question in questions.questions]
    digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]
    return {"questions": digest, **asdict(generating)}


def _shown(
    questions: QuestionSet, tokenizer: PreTrainedTokenizerBase, *, skip_special_tokens: bool
) -> list[dict[str, str]]:
    """Return what the predictions file says of each question."""
    prompts = [question.prompt for question in questions.questions]
    labels = [question.label for question in questions.questions]
    return [
        {"prompt": prompt, "label": label}
        for prompt, label in zip(
            tokenizer.batch_decode(prompts, skip_special_tokens=False),
            tokenizer.batch_decode(labels, skip_special_tokens=skip_special_tokens),
            strict=True,
        )
    ]


def summarise(sets: Mapping[str, Predictions]) -> dict[str, Any]:
    """Return what `predict_results.json` says: of each named set, and of all answers together."""
    results: dict[str, Any] = {}
    for name, found in sets.items():
        if name:
            metrics = measure([answer.text for answer in found.answers], found.labels)
            results |= metrics.to_dict(f"predict_{name}")
            results[f"predict_{name}_samples"] = len(found.answers)
    answers = [answer for found in sets.values() for answer in found.answers]
    labels = [label for found in sets.values() for label in found.labels]
    questions = [question for found in sets.values() for question in found.questions.questions]
    num_kept = sum(found.num_kept for found in sets.values())
    seconds = sum(found.runtime_s for found in sets.values())
    not_finished = sum(not answer.is_finished for answer in answers)
    settings = [found.settings for found in sets.values()]
    if not_finished and process_env().rank == 0:
        line = "%d of %d answers did not end before they ran out of room."
        logger.warning(line, not_finished, len(answers))
    return {
        **results,
        **measure([answer.text for answer in answers], labels).to_dict("predict"),
        "predict_samples": len(answers),
        "predict_samples_kept": num_kept,
        "predict_tokens": sum(answer.num_tokens for answer in answers),
        "predict_unfinished": not_finished,
        "predict_prompts_cut": sum(question.is_cut for question in questions),
        "predict_rows_left_out": sum(found.questions.num_left_out for found in sets.values()),
        "predict_runtime": round(seconds, 4),
        "predict_samples_per_second": round((len(answers) - num_kept) / max(seconds, 1e-9), 3),
        "predict_settings": {
            name: value for name, value in settings[0].items() if name != "questions"
        },
    }
