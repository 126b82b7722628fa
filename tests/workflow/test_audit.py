"""`llmtuner data audit` as a user calls it, and the audit in `run.json`."""

import json
from pathlib import Path
from typing import Any

import pytest

from llmtuner.cli.main import main

from .conftest import Train, read_json


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Return a file of nine chats: the second has no answer to speak of, the last is a copy."""
    chats = [{"instruction": f"Question {n}?", "output": f"Answer {n}."} for n in range(8)]
    chats[1]["output"] = "…"
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps(chat) for chat in [*chats, chats[0]]]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def audit(model_dir: Path, *flags: str) -> int:
    return main(["data", "audit", "--model_name_or_path", str(model_dir), *flags])


def findings(report: dict[str, Any], path: Path) -> dict[str, list[str]]:
    found = report["datasets"][str(path)]["findings"]
    return {name: [p["where"] for p in one["places"]] for name, one in found.items()}


def test_json_is_one_object_and_the_table_says_the_same(
    model_dir: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert audit(model_dir, "--dataset", str(rows), "--json") == 0
    report = json.loads(capsys.readouterr().out)
    expected = {"duplicate_row": [f"{rows}:9"], "near_empty_answer": [f"{rows}:2"]}
    assert findings(report, rows) == expected
    assert report["totals"]["rows"] == 9
    assert audit(model_dir, "--dataset", str(rows)) == 0
    shown = capsys.readouterr().out
    assert f"near_empty_answer {rows}:2 turn 2: …" in shown
    assert f"duplicate_row {rows}:9: same as {rows}:1" in shown


def test_the_report_is_json_and_a_page_with_samples(
    model_dir: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "report"
    assert audit(model_dir, "--dataset", str(rows), "--report_dir", str(folder)) == 0
    assert "near_empty_answer" in findings(read_json(folder / "audit.json"), rows)
    page = (folder / "audit.html").read_text(encoding="utf-8")
    for expected in ("duplicate_row", f"{rows}:9", "Answer", "<details>"):
        assert expected in page
    assert "://" not in page
    (tmp_path / "file").write_text("")
    assert audit(model_dir, "--dataset", str(rows), "--report_dir", str(tmp_path / "file")) == 6
    assert "--report_dir" in capsys.readouterr().err


def test_bad_rows_are_findings_and_only_limits_fail(
    model_dir: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with rows.open("a", encoding="utf-8") as file:
        file.write('\n{"instruction": "Hi"}\n{"instru')
    assert audit(model_dir, "--dataset", str(rows), "--json") == 0
    found = findings(json.loads(capsys.readouterr().out), rows)
    assert {"missing_answer", "malformed_json"} <= set(found)
    assert found["malformed_json"] == [f"{rows}:11"]
    flags = ("--dataset", str(rows), "--audit_limits", "malformed_json=0.05,duplicate_row=0.5")
    assert audit(model_dir, *flags) == 3
    said = capsys.readouterr().err
    assert f"malformed_json in 1 rows (9.09%), allowed are 5.00%; {rows}:11" in said
    assert "duplicate_row" not in said
    assert audit(model_dir, "--dataset", str(rows), "--audit_limits", "malformed=0") == 2
    assert "did you mean malformed_" in capsys.readouterr().err


def test_what_cannot_be_audited_says_so(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert audit(model_dir) == 2
    assert "--dataset" in capsys.readouterr().err
    broken = tmp_path / "broken.json"
    broken.write_text('[{"instruction": "a", "output": "b"', encoding="utf-8")
    assert audit(model_dir, "--dataset", str(broken), "--json") == 3
    output = capsys.readouterr()
    assert json.loads(output.out)["datasets"][str(broken)]["unreadable"]
    assert "broken.json:1:" in output.err
    assert "Traceback" not in output.err


def test_a_training_file_will_do_and_plain_texts_too(
    model_dir: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {
        "stage": "pt", "do_train": True, "model_name_or_path": str(model_dir), "dataset": "texts",
        "dataset_dir": str(data_dir), "output_dir": str(tmp_path / "out"), "cutoff_len": 16,
    }  # fmt: skip
    path = tmp_path / "run.json"
    path.write_text(json.dumps(settings), encoding="utf-8")
    assert main(["data", "audit", str(path), "--json"]) == 0
    one = json.loads(capsys.readouterr().out)["datasets"]["texts"]
    assert one["findings"] == {}
    assert one["rows"] == 12 < one["samples"]
    assert not (tmp_path / "out").exists()


def test_training_records_its_audit_and_stops_above_a_limit(
    train: Train, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output_dir = train("--max_steps", "1", dataset=str(rows))
    report = read_json(output_dir / "run.json")
    assert findings(report["audit"], rows) == {
        "duplicate_row": [f"{rows}:9"],
        "near_empty_answer": [f"{rows}:2"],
    }
    assert report["data"]["datasets"][str(rows)]["tokens"] == report["audit"]["totals"]["tokens"]
    limits = ("--audit_limits", "near_empty_answer=0.1")
    stopped = train("--max_steps", "1", *limits, name="stopped", dataset=str(rows), code=3)
    assert f"near_empty_answer in 1 rows (11.11%), allowed are 10.00%; {rows}:2" in (
        capsys.readouterr().err
    )
    assert not (stopped / "run.json").exists()
    plain = train("--max_steps", "1", "--audit", "false", name="plain", dataset=str(rows))
    assert read_json(plain / "run.json")["audit"] == {}
