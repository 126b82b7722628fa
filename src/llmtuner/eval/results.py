"""What an evaluation found, and the files that it leaves."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtuner.eval.benchmark import CATEGORIES
from llmtuner.eval.statistics import wilson_interval
from llmtuner.extras.errors import EvalError, StorageError
from llmtuner.extras.files import (
    remove_abandoned,
    staging_folder,
    sync_folder,
    sync_tree,
    write_json,
    write_text,
)

RESULTS_FILE = "results.json"
RUN_FILE = "run.json"
AVERAGE = "Average"

Letters = Mapping[str, Mapping[str, str]]
"""Subject -> index of the question -> letter, as LLaMA-Factory writes it."""


@dataclass(frozen=True)
class Answer:
    """What the model answered to one question.

    Attributes:
        subject: key of the subject.
        category: of the subject.
        index: of the question in its file.
        prediction: the letter, or UNKNOWN.
        label: the right letter, or None where it is not public.
        prompt_sha256: of the prompt's ids.
        num_prompt_tokens: its length.
        probabilities: letter -> probability among the letters; None where text was generated.
        text: what was generated; None where letters were scored.
    """

    subject: str
    category: str
    index: int
    prediction: str
    label: str | None
    prompt_sha256: str
    num_prompt_tokens: int
    probabilities: Mapping[str, float] | None = None
    text: str | None = None

    @property
    def is_correct(self) -> bool:
        """Whether the prediction is the label."""
        return self.prediction == self.label

    def to_dict(self) -> dict[str, Any]:
        """Return the line of `details.jsonl`."""
        values: dict[str, Any] = {
            "subject": self.subject,
            "index": self.index,
            "prompt_sha256": self.prompt_sha256,
            "num_prompt_tokens": self.num_prompt_tokens,
            "prediction": self.prediction,
            "label": self.label,
            "correct": None if self.label is None else self.is_correct,
        }
        if self.probabilities is not None:
            values["probabilities"] = dict(self.probabilities)
        if self.text is not None:
            values["text"] = self.text
        return values


@dataclass(frozen=True)
class Score:
    """How many questions of a group were answered rightly.

    Attributes:
        name: category, subject, or "Average".
        num_correct: right answers.
        num_questions: all of them.
    """

    name: str
    num_correct: int
    num_questions: int

    @property
    def percent(self) -> float:
        """The share of right answers, 0 to 100."""
        return 100 * self.num_correct / self.num_questions

    def line(self) -> str:
        """Return the line of `results.log`; it begins as LLaMA-Factory's."""
        low, high = wilson_interval(self.num_correct, self.num_questions)
        counts = f"{self.num_correct} of {self.num_questions}"
        return (
            f"{self.name:>15}: {self.percent:.2f}   "
            f"[{100 * low:.1f}, {100 * high:.1f}] 95 % Wilson, {counts}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the values for JSON; shares in percent."""
        low, high = wilson_interval(self.num_correct, self.num_questions)
        return {
            "correct": self.num_correct,
            "questions": self.num_questions,
            "percent": round(self.percent, 4),
            "wilson_95": [round(100 * low, 4), round(100 * high, 4)],
        }


def scores_by_category(answers: Sequence[Answer]) -> list[Score]:
    """Return the average over all questions, then each category that has any."""
    groups = {name: [a for a in answers if a.category == name] for name in CATEGORIES}
    return _scores({AVERAGE: answers, **groups})


def scores_by_subject(answers: Sequence[Answer]) -> list[Score]:
    """Return the score of each subject, in the order of the answers."""
    keys = dict.fromkeys(answer.subject for answer in answers)
    return _scores({key: [a for a in answers if a.subject == key] for key in keys})


def _scores(groups: Mapping[str, Sequence[Answer]]) -> list[Score]:
    return [
        Score(name, sum(answer.is_correct for answer in group), len(group))
        for name, group in groups.items()
        if group
    ]


def letters_of(answers: Iterable[Answer]) -> dict[str, dict[str, str]]:
    """Return the predictions as `results.json` and submission files hold them."""
    found: dict[str, dict[str, str]] = {}
    for answer in answers:
        found.setdefault(answer.subject, {})[str(answer.index)] = answer.prediction
    return found


@contextmanager
def result_folder(save_dir: Path | None) -> Iterator[Path | None]:
    """Give a folder to write into, which becomes `save_dir` when all is written, or nothing.

    Raises:
        EvalError: `save_dir` exists.
        StorageError: it cannot be made; said before any model is loaded.
    """
    if save_dir is None:
        yield None
        return
    if os.path.lexists(save_dir):
        raise EvalError(
            "The folder for the results exists already.",
            where=f"--save_dir {save_dir}",
            fix="choose a new name, so that no result is lost",
        )
    staging = staging_folder(save_dir)
    try:
        with _storage_errors(save_dir):
            remove_abandoned(save_dir)
            staging.mkdir(parents=True)
        yield staging
        with _storage_errors(save_dir):
            sync_tree(staging)
            os.rename(staging, save_dir)
            sync_folder(save_dir.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _storage_errors(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"The results cannot be written: {error.strerror or error}.",
            where=f"--save_dir {place}",
            fix="choose a folder that you may write to, with free space",
        ) from error


def write_results(
    folder: Path,
    answers: Sequence[Answer],
    log: Sequence[str],
    record: Mapping[str, Any],
    *,
    save_dir: Path,
) -> None:
    """Write the files of one evaluation.

    Args:
        folder: from `result_folder`.
        answers: all of them.
        log: the lines of `results.log`.
        record: what was run, for `run.json`.
        save_dir: what messages call the folder.

    Raises:
        StorageError: they cannot be written.
    """
    letters = letters_of(answers)
    lines = (json.dumps(answer.to_dict(), ensure_ascii=False) for answer in answers)
    with _storage_errors(save_dir):
        write_json(folder / RESULTS_FILE, letters)
        if all(answer.label is None for answer in answers):
            write_json(folder / "submission.json", letters)
        write_text(folder / "details.jsonl", "".join(f"{line}\n" for line in lines))
        write_text(folder / "results.log", "".join(f"{line}\n" for line in log))
        write_json(folder / RUN_FILE, record)
