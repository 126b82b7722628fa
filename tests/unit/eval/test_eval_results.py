"""Scores, intervals, files, and the comparison with another model."""

import json
import resource
import subprocess
from pathlib import Path
from typing import Any

import pytest

from llmtuner.eval.compare import compare, load_base_results
from llmtuner.eval.results import (
    Answer,
    letters_of,
    result_folder,
    scores_by_category,
    scores_by_subject,
    write_results,
)
from llmtuner.eval.statistics import mcnemar_p_value, wilson_interval
from llmtuner.extras.errors import EvalError, StorageError

RECORD = {"task": "ceval", "split": "validation", "benchmark_version": 1}
RECORD |= {"n_shot": 5, "lang": "zh", "template": "x", "scoring": "likelihood"}
RECORD |= {"shots": {"law": [0, 1, 2, 3, 4]}}


def answers(predictions: str, labels: str | None = "AABBCD") -> list[Answer]:
    places = [("law", "Social Sciences", n) for n in range(4)] + [
        ("art", "STEM", n) for n in (0, 1)
    ]
    return [
        Answer(subject, category, index, prediction, labels[n] if labels else None, "0" * 64, 9)
        for n, ((subject, category, index), prediction) in enumerate(
            zip(places, predictions, strict=True)
        )
    ]


def test_scores_are_counted_over_questions_in_the_usual_order() -> None:
    found = answers("AABACA")
    assert [(s.name, s.num_correct, s.num_questions) for s in scores_by_category(found)] == [
        ("Average", 4, 6),
        ("STEM", 1, 2),
        ("Social Sciences", 3, 4),
    ]
    assert [(s.name, s.percent) for s in scores_by_subject(found)] == [("law", 75), ("art", 50)]
    assert scores_by_category(found)[0].line().startswith("        Average: 66.67 ")


@pytest.mark.parametrize(
    ("correct", "count", "low", "high"),
    # 5 of 10 and 15 of 148: values of the literature (Wilson without correction)
    [(5, 10, 0.2366, 0.7634), (15, 148, 0.0624, 0.1605), (0, 10, 0, 0.2775), (10, 10, 0.7225, 1)],
)
def test_wilson(correct: int, count: int, low: float, high: float) -> None:
    assert wilson_interval(correct, count) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(
    ("gained", "lost", "p"),
    [(0, 0, 1), (1, 1, 1), (5, 0, 0.0625), (0, 6, 0.03125), (9, 1, 22 / 1024)],
)
def test_mcnemar(gained: int, lost: int, p: float) -> None:
    assert mcnemar_p_value(gained, lost) == pytest.approx(p)


def write(folder: Path, predictions: str, labels: str | None = "AABBCD", **record: Any) -> Path:
    with result_folder(folder) as staging:
        assert staging is not None
        found, record = answers(predictions, labels), {**RECORD, **record}
        write_results(staging, found, ["a line"], record, save_dir=folder)
    return folder


def test_files(tmp_path: Path) -> None:
    folder = write(tmp_path / "new" / "out", "AABACA")
    assert sorted(path.name for path in folder.iterdir()) == [
        *("details.jsonl", "results.json", "results.log", "run.json")
    ]
    found = json.loads((folder / "results.json").read_text())
    assert found == {"law": {"0": "A", "1": "A", "2": "B", "3": "A"}, "art": {"0": "C", "1": "A"}}
    lines = (folder / "details.jsonl").read_text().splitlines()
    assert json.loads(lines[3])["correct"] is False
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


def test_a_split_without_labels_has_a_submission(tmp_path: Path) -> None:
    folder = write(tmp_path / "out", "AABACA", None)
    submission = json.loads((folder / "submission.json").read_text())
    assert submission == letters_of(answers("AABACA"))
    assert json.loads((folder / "details.jsonl").read_text().splitlines()[0])["correct"] is None


def test_nothing_is_left_of_a_failed_run(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), result_folder(tmp_path / "out"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").symlink_to("nowhere")
    with pytest.raises(EvalError, match="exists already"), result_folder(tmp_path / "out"):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError), result_folder(tmp_path / "file" / "out"):
        pass


def test_a_full_disk_and_a_killed_run(tmp_path: Path) -> None:
    killed = subprocess.Popen(["true"])
    killed.wait()
    (tmp_path / f".out.staging-{killed.pid}").mkdir()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
    try:
        with pytest.raises(StorageError, match=r"--save_dir \S+/out: .* cannot be written"):
            write(tmp_path / "out", "AABACA")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_comparison(tmp_path: Path) -> None:
    base = load_base_results(write(tmp_path / "base", "BBBBCD"))
    found = compare(answers("AABACD"), base, RECORD)
    assert (found.num_base_correct, found.num_gained, found.num_lost) == (4, 2, 1)
    assert "+16.67 points, 2 gained, 1 lost; exact McNemar test p = 1.0000" in found.line()


def test_other_questions_are_not_compared(tmp_path: Path, caplog: Any) -> None:
    base = load_base_results(write(tmp_path / "base", "BBBBCD", split="test"))
    with pytest.raises(EvalError, match="of another split"):
        compare(answers("AABACD"), base, RECORD)
    base = load_base_results(write(tmp_path / "shots", "BBBBCD", n_shot=0) / "results.json")
    compare(answers("AABACD"), base, RECORD)
    assert "n_shot 0, these with 5" in caplog.text
    assert "other examples" not in caplog.text
    base = load_base_results(write(tmp_path / "drawn", "BBBBCD", shots={"law": [0, 1, 3, 4, 7]}))
    compare(answers("AABACD"), base, RECORD)
    assert "other examples: law" in caplog.text
    (tmp_path / "few.json").write_text('{"law": {"0": "A"}}')
    with pytest.raises(EvalError, match="no answer to law #1"):
        compare(answers("AABACD"), load_base_results(tmp_path / "few.json"), RECORD)


@pytest.mark.parametrize("text", ["", "[]", '{"law": "A"}', '{"law": {"0": 1}}'])
def test_a_file_that_holds_no_results(tmp_path: Path, text: str) -> None:
    (tmp_path / "base.json").write_text(text)
    with pytest.raises(EvalError, match="--compare"):
        load_base_results(tmp_path / "base.json")
