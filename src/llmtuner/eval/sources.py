"""Questions from benchmark files, read strictly: every cell is text, and errors name the line."""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from llmtuner.data.encodings import pick_codec
from llmtuner.data.records import BadRows, Row
from llmtuner.data.sources import read_rows
from llmtuner.data.tables import read_csv
from llmtuner.eval.benchmark import CATEGORIES, Benchmark, Question, Subject
from llmtuner.eval.files import Layout, TableFile, find_layout, opened
from llmtuner.extras.errors import DataError, EvalError, nearest
from llmtuner.extras.files import sha256_of
from llmtuner.extras.logs import get_logger

logger = get_logger(__name__)

_ALIASES = {"input": "question", "target": "answer"}  # column names on the Hugging Face hub
_FULL_WIDTH = str.maketrans("ＡＢＣＤＥ", "ABCDE")


@dataclass(frozen=True)
class SubjectQuestions:
    """What is asked in one subject.

    Attributes:
        subject: name and category.
        shots: worked examples, the same for every question.
        questions: of the chosen split, in the order of the file.
    """

    subject: Subject
    shots: tuple[Question, ...]
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class BenchmarkData:
    """A benchmark as it was read.

    Attributes:
        subjects: in the order of the subject map.
        missing: subjects of the map without a file.
        files: label -> sha256 of every file that was read.
    """

    subjects: tuple[SubjectQuestions, ...]
    missing: tuple[str, ...]
    files: Mapping[str, str]

    @property
    def num_questions(self) -> int:
        """How many questions are asked."""
        return sum(len(found.questions) for found in self.subjects)

    @property
    def num_labels(self) -> int:
        """How many of them have a public answer."""
        return sum(q.answer is not None for found in self.subjects for q in found.questions)


def load_benchmark(
    benchmark: Benchmark,
    task_dir: Path,
    *,
    split: str,
    num_shots: int,
    wanted: Sequence[str] | None = None,
    seed: int | None = None,
    encoding: str | None = None,
) -> BenchmarkData:
    """Read the questions of a split and the examples before them.

    Args:
        benchmark: an entry of `eval/benchmarks`.
        task_dir: folder or zip file.
        split: "validation" or "test".
        num_shots: so many rows of each subject's dev file are its examples.
        wanted: keys of subjects; None for all that have a file.
        seed: draws these rows, once for each subject; None takes the first ones.
        encoding: of text files; None takes UTF-8 or GB18030.

    Raises:
        EvalError: files or subjects are missing, or a file does not hold questions.
    """
    layout = find_layout(benchmark, task_dir)
    subjects = _subjects(benchmark, layout)
    present = layout.members.get(split, {})
    if not present:
        raise EvalError(
            f"The benchmark {benchmark.name} has no {split} files here.",
            where=str(layout.root),
            allowed=[name for name in benchmark.splits if name in layout.members],
            fix="choose another --split",
        )
    keys = _keys(subjects, present, wanted, where=f"{layout.root} ({split})")
    names = [
        name
        for part in (split, *(["dev"] if num_shots else []))
        for key in keys
        for name in layout.members.get(part, {}).get(key, ())
    ]
    with opened(layout, names) as files:
        read = {name: _read_questions(file, benchmark, encoding) for name, file in files.items()}
        digests = {file.label: sha256_of(file.path) for file in files.values()}
    found = []
    for key in keys:
        questions = _joined(read, layout.members[split][key])
        shots = _shots(read, layout, key, num_shots, seed)
        found.append(SubjectQuestions(subjects[key], shots, questions))
    missing = tuple(key for key in subjects if key not in present) if wanted is None else ()
    return BenchmarkData(tuple(found), missing, digests)


def _keys(
    subjects: dict[str, Subject],
    present: Mapping[str, object],
    wanted: Sequence[str] | None,
    *,
    where: str,
) -> list[str]:
    """Return the subjects to ask; one that the map does not know is counted under Other."""
    for key in present:
        if key not in subjects:
            logger.warning("Subject %s is not in the subject map; counted under Other.", key)
            subjects[key] = Subject(key, key.replace("_", " "), "Other")
    for key in wanted or ():
        if key not in present:
            guess = nearest(key, present)
            raise EvalError(
                "There is no file of this subject.",
                where=where,
                got=key,
                allowed=sorted(present) if len(present) < 20 else f"{len(present)} subjects",
                fix=f"did you mean {guess}?" if guess else "correct --subjects",
            )
    return [key for key in subjects if key in present and (wanted is None or key in wanted)]


def _shots(
    read: Mapping[str, list[Question]],
    layout: Layout,
    key: str,
    num_shots: int,
    seed: int | None,
) -> tuple[Question, ...]:
    if num_shots == 0:
        return ()
    names = layout.members.get("dev", {}).get(key, ())
    if not names:
        raise EvalError(
            f"The subject {key} has no dev file, from which the examples come.",
            where=str(layout.root),
            fix="add it, or ask without examples: --n_shot 0",
        )
    found = _joined(read, names)
    chosen = found[:num_shots]
    if seed is not None and len(found) > num_shots:
        # In the order of the file, so that drawing all rows is the same as taking the first ones.
        places = random.Random(f"{seed} {key}").sample(range(len(found)), num_shots)
        chosen = tuple(found[place] for place in sorted(places))
    for question in chosen:
        if question.answer is None:
            problem = "An example has no answer."
            raise EvalError(problem, where=question.where, fix="use fewer examples: --n_shot")
    if len(found) < num_shots:
        logger.warning("%s has %d examples, not %d.", key, len(found), num_shots)
    return chosen


def _joined(read: Mapping[str, list[Question]], names: Sequence[str]) -> tuple[Question, ...]:
    questions = [question for name in names for question in read[name]]
    return tuple(replace(question, index=index) for index, question in enumerate(questions))


# --- one file -------------------------------------------------------------------------------------


def _read_questions(file: TableFile, benchmark: Benchmark, encoding: str | None) -> list[Question]:
    """Return the questions of a file, of which either all or none have an answer.

    Raises:
        EvalError: with the place in the file, also when it is in a zip.
    """
    try:
        rows = enumerate(_rows(file.path, benchmark, encoding))
        found = [_question(row, index, benchmark) for index, row in rows]
        if not found:
            raise EvalError("The file holds no question.", where=file.label, fix="get it again")
        unlabelled = [question for question in found if question.answer is None]
        if 0 < len(unlabelled) < len(found):
            problem = "The question has no answer, and others of this file have one."
            raise EvalError(problem, where=unlabelled[0].where, fix="correct the row")
    except (DataError, EvalError) as error:
        raise EvalError(
            error.problem,
            where=_place(error.where or file.label, file),
            got=error.got,
            allowed=error.allowed,
            fix=error.fix,
        ) from None
    return [replace(question, where=_place(question.where, file)) for question in found]


def _place(where: str, file: TableFile) -> str:
    return where.replace(str(file.path), file.label)


def _rows(path: Path, benchmark: Benchmark, encoding: str | None) -> Iterator[Row]:
    rows = read_rows(path, encoding=encoding)  # checks that it can be read at all
    if path.suffix.lower() != ".csv" or benchmark.columns is None:
        return rows
    return read_csv(path, pick_codec(path, encoding), BadRows(), columns=benchmark.columns)


def _question(row: Row, index: int, benchmark: Benchmark) -> Question:
    letters = benchmark.letters
    allowed = f"columns question, {', '.join(letters)} and, where it is public, answer"
    if not isinstance(row.value, dict):
        raise EvalError("The row has no columns.", where=row.where, got=row.value, allowed=allowed)
    cells = {_column(name): value for name, value in row.value.items()}
    choices = cells.get("choices")
    if isinstance(choices, list):
        cells |= dict(zip(map(str.lower, letters), choices, strict=False))
    missing = [name for name in ("question", *letters.lower()) if cells.get(name) is None]
    if missing:
        problem = f"The question lacks {', '.join(missing)}."
        raise EvalError(problem, where=row.where, got=list(row.value), allowed=allowed)
    text = str(cells["question"])
    if not text.strip():
        raise EvalError("The question is empty.", where=row.where, allowed=allowed)
    answer = _answer(cells.get("answer"), letters, row.where)
    return Question(index, text, tuple(str(cells[x]) for x in letters.lower()), answer, row.where)


def _column(name: str) -> str:
    lowered = name.strip().lower()
    return _ALIASES.get(lowered, lowered)


def _answer(value: Any, letters: str, where: str) -> str | None:
    if isinstance(value, int) and 0 <= value < len(letters):  # as Parquet files on the hub have it
        return letters[value]
    text = "" if value is None else str(value).strip().upper().translate(_FULL_WIDTH)
    if text and text not in tuple(letters):
        raise EvalError(
            "The answer is not one of the letters.",
            where=where,
            got=value,
            allowed=f"{', '.join(letters)}, or nothing where the answers are not public",
            fix="correct the row",
        )
    return text or None


# --- the subject map ------------------------------------------------------------------------------


def _subjects(benchmark: Benchmark, layout: Layout) -> dict[str, Subject]:
    """Return the subjects by key, from the map beside the files or from the benchmark."""
    if layout.mapping is None:
        return dict(benchmark.subjects)
    where, data = layout.mapping
    try:
        table = json.loads(data.decode("utf-8-sig"))
    except (JSONDecodeError, UnicodeDecodeError) as error:
        problem = f"The subject map cannot be read: {error}."
        raise EvalError(problem, where=where, fix="repair or remove it") from None
    if not isinstance(table, dict):
        problem = "The subject map is no JSON object."
        raise EvalError(problem, where=where, got=table, fix="repair or remove it")
    return {key: _subject(key, entry, where) for key, entry in table.items()}


def _subject(key: str, entry: Any, where: str) -> Subject:
    is_whole = (
        isinstance(entry, dict)
        and isinstance(entry.get("name"), str)
        and entry.get("category") in CATEGORIES
        and entry.get("lang") in (None, "en", "zh")
    )
    if not is_whole:
        raise EvalError(
            f"The subject {key!r} is not described as it should be.",
            where=where,
            got=entry,
            allowed=f'{{"name": text, "category": one of {", ".join(CATEGORIES)}}}, '
            'and "lang": "en" or "zh" where it is not the benchmark\'s',
        )
    return Subject(key, entry["name"], entry["category"], entry.get("lang"))
