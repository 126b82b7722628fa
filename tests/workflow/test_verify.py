"""The contract with serving: as a command, before training, and in what training saves."""

import json
import shutil
from pathlib import Path

import pytest

from llmtuner.cli.main import main
from llmtuner.extras.errors import ModelError
from llmtuner.hparams.model import ModelArgs
from llmtuner.train.companions import check_companions

from .conftest import Train, read_json


def verify(model_dir: Path, data_dir: Path, *flags: str) -> int:
    argv = ["--model_name_or_path", str(model_dir), "--dataset_dir", str(data_dir), *flags]
    return main(["data", "verify", *argv])


def test_the_command_proves_every_row(
    model_dir: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify(model_dir, data_dir, "--dataset", "qa,few", "--json") == 0
    contract = json.loads(capsys.readouterr().out)
    assert {name: one["turns"] for name, one in contract["datasets"].items()} == {
        "qa": 24,
        "few": 4,
    }


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("assistant\\n{% endif", "helper\\n{% endif", "does not train what is served"),
        (
            "+ '<|im_end|>\\n'",
            "+ ('' if message['role'] == 'assistant' else '<|im_end|>') + '\\n'",
            "no special token follows the answer",
        ),
    ],
)
def test_a_broken_template_file_is_refused_with_the_row(
    model_dir: Path,
    data_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    old: str,
    new: str,
    said: str,
) -> None:
    text = (model_dir / "chat_template.jinja").read_text(encoding="utf-8")
    old, new = old.replace("\\n", "\n"), new.replace("\\n", "\n")
    assert old in text
    (tmp_path / "own.jinja").write_text(text.replace(old, new), encoding="utf-8")
    template = ("--template", str(tmp_path / "own.jinja"), "--dataset", "qa")
    assert verify(model_dir, data_dir, *template) == 3
    message = capsys.readouterr().err
    assert said in message
    assert "Traceback" not in message


def test_pre_training_has_nothing_to_prove(model_dir: Path, data_dir: Path) -> None:
    assert verify(model_dir, data_dir, "--dataset", "texts", "--stage", "pt") == 2


def test_training_proves_saves_and_records_the_contract(
    train: Train, model_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    output_dir = train("--max_steps", "1")
    contract = read_json(output_dir / "run.json")["contract"]
    assert contract["datasets"]["qa"] == {
        "rows": 24, "bad_rows": 0, "turns": 24, "unprovable": 0, "failures": 0, "examples": [],
    }  # fmt: skip
    check_companions(output_dir, contract["digest"], config=ModelArgs())
    assert verify(output_dir, data_dir, "--dataset", "qa") == 0
    for name, old, new in (
        ("chat_template.jinja", "im_start|>assistant", "im_start|>Assistant"),
        ("generation_config.json", "eos_token_id", "min_length"),
        ("tokenizer.json", '"add_prefix_space": false', '"add_prefix_space": true'),
    ):
        other = tmp_path / name
        shutil.copytree(output_dir, other)
        text = (other / name).read_text(encoding="utf-8")
        assert old in text
        (other / name).write_text(text.replace(old, new), encoding="utf-8")
        with pytest.raises(ModelError, match="not those that were trained with"):
            check_companions(other, contract["digest"], config=ModelArgs())
