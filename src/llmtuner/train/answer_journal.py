"""Answers on their way: what a killed prediction has written is not asked again.

The first line says under which settings the answers were given; every other line is one answer,
appended as soon as its batch is done. A line that was not written to its end is dropped.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llmtuner.extras.files import write_text
from llmtuner.extras.logs import get_logger
from llmtuner.inference.generate import Answer

logger = get_logger(__name__)

_SUFFIX = ".partial.jsonl"


def journal_of(path: Path) -> Path:
    """Return where the answers of a predictions file are kept until all are there."""
    return path.with_name(path.stem + _SUFFIX)


def open_journal(path: Path, settings: Mapping[str, Any]) -> dict[int, Answer]:
    """Return the answers given under these settings, by the number of their question.

    Afterwards the journal holds exactly these, and can be appended to. Answers of other settings
    are dropped with a notice, as nothing may be mixed.

    Args:
        path: of the journal; it need not exist.
        settings: all that decides the answers, as JSON values.
    """
    lines = _whole_lines(path)
    found: dict[int, Answer] = {}
    if lines:
        changed = _changed(lines[0], settings)
        if changed:
            logger.warning(
                "%s holds answers to other questions or settings (%s); predicting starts over.",
                path,
                ", ".join(changed),
            )
        else:
            found = {line["index"]: Answer(**line["answer"]) for line in lines[1:]}
    kept = lines[1:] if found else []
    head = {"settings": dict(settings)}
    write_text(path, "".join(_to_line(line) for line in [head, *kept]))
    return found


def append_answers(
    path: Path, answers: Mapping[int, Answer], rows: Mapping[int, Mapping[str, str]]
) -> None:
    """Write answers to the disk.

    Args:
        path: of an opened journal.
        answers: by the number of their question.
        rows: what the predictions file will say of them, for people who cannot wait.
    """
    lines = [
        _to_line({"index": number, **rows[number], "answer": asdict(answer)})
        for number, answer in answers.items()
    ]
    with path.open("a", encoding="utf-8", newline="\n") as file:
        file.write("".join(lines))
        file.flush()
        os.fsync(file.fileno())


def discard_journals(folder: Path) -> None:
    """Remove the journals of predictions whose results are written."""
    for path in folder.glob(f"generated_predictions*{_SUFFIX}"):
        path.unlink()


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines up to the first one that is not whole."""
    lines: list[dict[str, Any]] = []
    if not path.is_file():
        return lines
    for text in path.read_bytes().split(b"\n"):
        try:
            line = json.loads(text)
            if lines:
                line["index"], Answer(**line["answer"])
            else:
                dict(line["settings"])
        except (ValueError, TypeError, KeyError):
            break
        lines.append(line)
    return lines


def _changed(head: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    then = head["settings"]
    wanted = json.loads(json.dumps(dict(settings)))
    names = [*wanted, *(name for name in then if name not in wanted)]
    return [name for name in names if then.get(name) != wanted.get(name)]


def _to_line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"
