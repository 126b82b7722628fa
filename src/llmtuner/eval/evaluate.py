"""One evaluation from its settings to its report: read, load, score, sum up."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmtuner.eval.answers import UNKNOWN
from llmtuner.eval.asking import Costs, ask
from llmtuner.eval.compare import Comparison, compare, load_base_results
from llmtuner.eval.reader import load_reader
from llmtuner.eval.record import run_record
from llmtuner.eval.results import (
    Answer,
    Score,
    result_folder,
    scores_by_category,
    scores_by_subject,
    write_results,
)
from llmtuner.eval.sources import BenchmarkData, load_benchmark
from llmtuner.eval.task import Task, find_task
from llmtuner.extras.errors import EvalError
from llmtuner.hparams.config import RunConfig


@dataclass(frozen=True)
class EvalReport:
    """What an evaluation found.

    Attributes:
        answers: of all questions.
        categories: the average and each category; empty without labels.
        subjects: each subject; empty without labels.
        comparison: with other results, if asked for.
        costs: of the scoring.
        lines: what people read, also in `results.log`.
        record: what was run, also in `run.json`.
        save_dir: where the files are; None if none were asked for.
    """

    answers: tuple[Answer, ...]
    categories: tuple[Score, ...]
    subjects: tuple[Score, ...]
    comparison: Comparison | None
    costs: Costs
    lines: tuple[str, ...]
    record: Mapping[str, Any] = field(repr=False)
    save_dir: Path | None = None

    @property
    def percent(self) -> float:
        """The average over all questions."""
        return self.categories[0].percent


def run_evaluation(config: RunConfig) -> EvalReport:
    """Evaluate a model on a benchmark; everything but the model is checked before it is loaded.

    Raises:
        ConfigError: there is no such benchmark or split.
        EvalError: files are missing or damaged, a prompt does not fit, or there are no labels to
            compare with.
        ModelError: the model cannot be loaded.
        StorageError: the results cannot be written.
    """
    args = config.evaluating
    task = find_task(str(args.task), config.data.split)
    data = load_benchmark(
        task.benchmark,
        Path(args.task_dir),
        split=task.split,
        num_shots=args.n_shot,
        wanted=args.subjects,
        seed=config.train.seed if "seed" in config.given else None,
        encoding=config.data.encoding,
    )
    has_labels = data.num_labels > 0
    if not has_labels and (args.compare or args.fail_below is not None):
        raise EvalError(
            f"The {task.split} split has no labels, so there is no score.",
            where="--compare" if args.compare else "--fail_below",
            fix="choose another --split",
        )
    base = load_base_results(Path(args.compare)) if args.compare else None
    save_dir = Path(args.save_dir) if args.save_dir else None
    with result_folder(save_dir) as folder:
        reader = load_reader(config)
        answers, costs = ask(config, task.benchmark, data, reader)
        record = run_record(config, task, data, reader, costs)
        comparison = compare(answers, base, record) if base else None
        lines = _lines(task, data, answers, comparison)
        record |= _outcome(answers, comparison)
        if folder is not None and save_dir is not None:
            write_results(folder, answers, lines, record, save_dir=save_dir)
    return EvalReport(
        answers=tuple(answers),
        categories=tuple(scores_by_category(answers)) if has_labels else (),
        subjects=tuple(scores_by_subject(answers)) if has_labels else (),
        comparison=comparison,
        costs=costs,
        lines=tuple(lines),
        record=record,
        save_dir=save_dir,
    )


def _lines(
    task: Task, data: BenchmarkData, answers: Sequence[Answer], comparison: Comparison | None
) -> list[str]:
    """Return the lines of `results.log`."""
    if data.num_labels == 0:
        lines = [
            f"No labels: the answers to {task.benchmark.name} {task.split} are not public, so "
            f"there is no score. {len(answers)} predictions."
        ]
    else:
        lines = [score.line() for score in scores_by_category(answers)]
    unknown = sum(answer.prediction == UNKNOWN for answer in answers)
    if unknown:
        lines.append(f"{unknown} of {len(answers)} answers name no letter, or several.")
    if data.missing:
        all_subjects = len(data.missing) + len(data.subjects)
        lines.append(
            f"Only {len(data.subjects)} of {all_subjects} subjects have a file; this is no score "
            "of the whole benchmark."
        )
    if comparison is not None:
        lines.append(comparison.line())
    return lines


def _outcome(answers: Sequence[Answer], comparison: Comparison | None) -> dict[str, Any]:
    if answers[0].label is None:
        return {"scores": None, "num_questions": len(answers)}
    return {
        "scores": {score.name: score.to_dict() for score in scores_by_category(answers)},
        "subjects": {score.name: score.to_dict() for score in scores_by_subject(answers)},
        "num_questions": len(answers),
        "num_unknown": sum(answer.prediction == UNKNOWN for answer in answers),
        "comparison": None if comparison is None else comparison.to_dict(),
    }
