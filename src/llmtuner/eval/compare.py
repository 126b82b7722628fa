"""A model against another one on the same questions: which answers changed, and is it chance?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from llmtuner.eval.results import RESULTS_FILE, RUN_FILE, Answer, Letters
from llmtuner.eval.statistics import mcnemar_p_value
from llmtuner.extras.errors import EvalError
from llmtuner.extras.files import read_json
from llmtuner.extras.logs import get_logger

logger = get_logger(__name__)

SAME_QUESTIONS = ("task", "split", "benchmark_version")
"""Entries of two run records that must agree; those of `SAME_PROMPTS` should."""

SAME_PROMPTS = ("n_shot", "lang", "template", "scoring")


@dataclass(frozen=True)
class Comparison:
    """How the answers changed.

    Attributes:
        base: where the old answers are.
        num_questions: asked in both.
        num_base_correct: right answers of the old model.
        num_gained: wrong before, right now.
        num_lost: right before, wrong now.
    """

    base: str
    num_questions: int
    num_base_correct: int
    num_gained: int
    num_lost: int

    @property
    def p_value(self) -> float:
        """Of the exact McNemar test."""
        return mcnemar_p_value(self.num_gained, self.num_lost)

    def line(self) -> str:
        """Return one line for people."""
        difference = 100 * (self.num_gained - self.num_lost) / self.num_questions
        verdict = "significant at 5 %" if self.p_value < 0.05 else "may be chance"
        return (
            f"Against {self.base}: {difference:+.2f} points, {self.num_gained} gained, "
            f"{self.num_lost} lost; exact McNemar test p = {self.p_value:.4f}, {verdict}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the values for JSON."""
        return {
            "base": self.base,
            "questions": self.num_questions,
            "base_correct": self.num_base_correct,
            "gained": self.num_gained,
            "lost": self.num_lost,
            "mcnemar_p": self.p_value,
        }


@dataclass(frozen=True)
class BaseResults:
    """The results of another model.

    Attributes:
        path: the file.
        letters: its predictions.
        record: `run.json` beside it; empty if there is none.
    """

    path: Path
    letters: Letters
    record: Mapping[str, Any]


def load_base_results(path: Path) -> BaseResults:
    """Read the results of another model: `results.json`, or the folder that holds it.

    Raises:
        EvalError: it is not there, or no such file.
    """
    path = path / RESULTS_FILE if path.is_dir() else path
    letters = _read(path)
    is_whole = isinstance(letters, dict) and all(
        isinstance(found, dict) and all(isinstance(letter, str) for letter in found.values())
        for found in letters.values()
    )
    if not is_whole:
        allowed = '{"subject": {"0": "A", …}, …}'
        problem = "The file holds no results of an evaluation."
        raise EvalError(problem, where=f"--compare {path}", allowed=allowed)
    beside = path.with_name(RUN_FILE)
    record = _read(beside) if beside.is_file() else {}
    return BaseResults(path, letters, record if isinstance(record, dict) else {})


def compare(answers: Sequence[Answer], base: BaseResults, record: Mapping[str, Any]) -> Comparison:
    """Compare the answers with those of another model.

    Args:
        answers: with labels.
        base: may hold more questions than were asked now.
        record: of this run.

    Raises:
        EvalError: the other results are of other questions.
    """
    _check_same(base, record)
    pairs = []
    for answer in answers:
        other = base.letters.get(answer.subject, {}).get(str(answer.index))
        if other is None:
            raise EvalError(
                f"The other results have no answer to {answer.subject} #{answer.index}.",
                where=f"--compare {base.path}",
                fix="compare with results of the same --task, --split and --subjects",
            )
        pairs.append((other == answer.label, answer.is_correct))
    return Comparison(
        str(base.path),
        len(pairs),
        sum(before for before, _ in pairs),
        pairs.count((False, True)),
        pairs.count((True, False)),
    )


def _check_same(base: BaseResults, record: Mapping[str, Any]) -> None:
    for name in (*SAME_QUESTIONS, *SAME_PROMPTS):
        before, now = base.record.get(name), record[name]
        if before in (None, now):
            continue
        if name in SAME_QUESTIONS:
            raise EvalError(
                f"The other results are of another {name.replace('_', ' ')}.",
                where=f"--compare {base.path}",
                got=before,
                allowed=str(now),
            )
        logger.warning("The other results were made with %s %s, these with %s.", name, before, now)
    shots = base.record.get("shots") or {}
    others = [key for key, rows in record["shots"].items() if shots.get(key, rows) != rows]
    if others and base.record.get("n_shot") == record["n_shot"]:
        logger.warning("The other results were made with other examples: %s.", ", ".join(others))


def _read(path: Path) -> Any:
    try:
        return read_json(path)
    except (OSError, JSONDecodeError, UnicodeDecodeError) as error:
        problem = f"The other results cannot be read: {error}."
        raise EvalError(problem, where=f"--compare {path}", fix="name a results.json") from None
