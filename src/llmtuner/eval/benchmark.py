"""What a benchmark is: its subjects, splits, wording and files."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from llmtuner.extras.files import read_json

CATEGORIES = ("STEM", "Social Sciences", "Humanities", "Other")
"""Groups of subjects, in the order of the report."""

SPLITS: Mapping[str, str] = {
    "dev": "dev",
    "train": "dev",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
}
"""How people call a split -> how it is called here."""

Language = Literal["en", "zh"]


@dataclass(frozen=True)
class Wording:
    """The fixed words of a prompt in one language.

    Attributes:
        opening: stands before the first question; `{subject}` is the subject's name.
        cue: stands behind the choices, before the letter.
    """

    opening: str
    cue: str


COMMON_WORDINGS: Mapping[Language, Wording] = {
    "en": Wording(
        "The following are multiple choice questions (with answers) about {subject}.\n\n",
        "\nAnswer:",
    ),
    "zh": Wording(
        "以下是中国关于{subject}考试的单项选择题，请选出其中的正确答案。\n\n", "\n答案："
    ),
}
"""The wording of LLaMA-Factory since June 2024, so that scores can be compared with its own."""


@dataclass(frozen=True)
class Subject:
    """One subject.

    Attributes:
        key: as in file names and results.
        name: as in the prompt.
        category: one of `CATEGORIES`.
        lang: language of its prompt; None leaves it to the benchmark.
    """

    key: str
    name: str
    category: str
    lang: Language | None = None


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What an entry of `eval/benchmarks` says.

    Attributes:
        name: name of the task, of its folder and of its zip file.
        version: raised when scores could move.
        splits: what can be scored, the usual one first; examples come from "dev".
        lang: language of the prompt unless the user or the subject says another.
        wordings: the fixed words of the prompt, per language.
        origin: where users get the files.
        subjects: used where no mapping.json lies beside the files; empty for a benchmark that
            always has one.
        columns: of CSV files without a header; None where they have one.
        letters: names of the choices, in order.
    """

    name: str
    version: int
    splits: tuple[str, ...]
    lang: Language
    wordings: Mapping[Language, Wording]
    origin: str
    subjects: Mapping[str, Subject] = field(default_factory=dict)
    columns: tuple[str, ...] | None = None
    letters: str = "ABCD"


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        index: its place in the file, from 0.
        text: the question itself.
        choices: the choices, in the order of the letters.
        answer: the right letter, or None where it is not public.
        where: `file:line` or `file#row`.
    """

    index: int
    text: str
    choices: tuple[str, ...]
    answer: str | None
    where: str


def read_subjects(path: Path) -> dict[str, Subject]:
    """Read a table category -> key -> name that comes with a benchmark."""
    return {
        key: Subject(key, name, category)
        for category, names in read_json(path).items()
        for key, name in names.items()
    }
