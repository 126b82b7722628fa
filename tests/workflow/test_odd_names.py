"""Odd names of runs, folders and data sets are either refused in one message or just names."""

import json
import shutil
from pathlib import Path

import pytest

from .conftest import Train, read_json

ODD = ["$(touch x); `id`", "a'b\"c <script>", "\u202e数据 🙈", "%s{0}{{x}}", "-", "con", "null"]


def test_names_of_runs_folders_and_data_sets(train: Train, data_dir: Path, tmp_path: Path) -> None:
    name = " ".join(ODD).replace("/", "")
    folder = tmp_path / "data"
    shutil.copytree(data_dir, folder)
    (folder / "dataset_info.json").write_text(json.dumps({name: {"file_name": "few.json"}}))
    flags = ["--dataset_dir", str(folder), "--run_name", name, "--max_steps", "1"]
    output_dir = train(*flags, name=name, dataset=name)
    report = read_json(output_dir / "run.json")
    assert report["status"] == "finished"
    assert report["data"]["datasets"][name]["rows"] == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["data", name])


@pytest.mark.parametrize("name", ["x" * 300, "a\nb", "\x1b[2J"])
def test_names_that_are_refused(
    train: Train, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = 2 if len(name) > 255 else 3
    train("--max_steps", "1", dataset=name, code=code)
    message = capsys.readouterr().err
    assert "Traceback" not in message
    assert "Undefined data set" in message or "control character" in message


@pytest.mark.parametrize("name", ["x" * 300, "a\nb", "\x1b[2J", "\0"])
def test_folders_that_cannot_be(
    train: Train, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    train("--max_steps", "1", name=name, code=2)
    message = capsys.readouterr().err
    assert "Traceback" not in message
    assert "control character" in message or "255 bytes" in message
