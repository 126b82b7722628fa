"""Bad input: one clear message with what, got, allowed, fix; the right exit code; no traceback."""

import json
from pathlib import Path

import pytest
import torch

from llmtuner.cli.main import main

from .conftest import Train


def fails(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Run the command line; return its exit code and what it said on stderr."""
    code = main(argv)
    return code, capsys.readouterr().err


@pytest.fixture
def base(model_dir: Path, data_dir: Path, tmp_path: Path) -> list[str]:
    """Return the flags of a run that would work."""
    return [
        "train", "--do_train", "--model_name_or_path", str(model_dir), "--dataset", "qa",
        "--dataset_dir", str(data_dir), "--output_dir", str(tmp_path / "out"), "--max_steps", "1",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (["--lora_rnak", "4"], 2, ["lora_rnak", "lora_rank"]),
        (["--finetuning_type", "lorra"], 2, ["lorra", "full", "freeze", "lora"]),
        (["--stage", "dpo"], 2, ["dpo", "trl"]),
        (["--lora_rank", "x", "--cutoff_len", "-1"], 2, ["lora_rank", "cutoff_len"]),
        (["--dataset", "qaa"], 2, ["qaa", "qa", "few", "texts"]),
        (["--dataset", "missing.jsonl"], 2, ["missing.jsonl"]),
        (["--template", "qwenn"], 3, ["qwenn", "qwen"]),
        (["--template", "llama3"], 3, ["<|start_header_id|>"]),
        (["--model_name_or_path", "./nowhere"], 4, ["nowhere"]),
        (["--adapter_name_or_path", "./nowhere"], 4, ["nowhere"]),
        (["--finetuning_type", "full", "--quantization_bit", "4"], 2, ["quantization_bit"]),
        (["--fp16"], 2, ["fp16", "bf16"]),
        (["--fp16", "--bf16"], 2, ["fp16", "bf16"]),
        (["--lora_target", "q_prj"], 2, ["q_prj", "q_proj"]),
        (["--deepspeed", "nowhere.json"], 2, ["nowhere.json"]),
        (["--val_size", "24"], 3, ["val_size"]),
        (["--resume_from_checkpoint", "nowhere"], 4, ["nowhere"]),
        (["--report_to", "mlflow"], 2, ["mlflow", "tensorboard"]),
        (["--stage", "pt"], 3, ["qa.json#0", "--stage sft"]),
        (["--stage", "sft", "--dataset", "texts"], 3, ["texts.json#0"]),
        (["--lr_scheduler_type", "sawtooth"], 2, ["sawtooth"]),
        (["--cutoff_len", "2"], 3, ["no usable row"]),
    ],
)
def test_one_message_says_it(
    base: list[str],
    flags: list[str],
    code: int,
    said: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    got, message = fails([*base, *flags], capsys)
    assert got == code, message
    for word in said:
        assert word in message
    assert "Traceback" not in message


def test_an_output_folder_that_cannot_be_made(
    base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    code, message = fails([*base, "--output_dir", str(tmp_path / "file" / "out")], capsys)
    assert code in (2, 6)
    assert "output_dir" in message


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        (
            "broken.jsonl",
            '{"instruction": "a", "output": "b"}\n{"instruction": \n',
            "broken.jsonl:2",
        ),
        ("twice.json", '[{"instruction": "a", "instruction": "c", "output": "b"}]', "instruction"),
        ("number.json", '[{"instruction": "a", "output": 7}]', "number.json#0"),
        ("empty.jsonl", "", "empty.jsonl"),
        ("latin.jsonl", '{"instruction": "caf\xe9", "output": "b"}\n'.encode("latin-1"), "latin"),
    ],
)
def test_bad_files_are_located(
    base: list[str],
    tmp_path: Path,
    name: str,
    content: str | bytes,
    place: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    code, message = fails([*base, "--dataset", str(path)], capsys)
    assert code == 3, message
    assert place in message


def test_skipped_rows_are_counted(train: Train, tmp_path: Path) -> None:
    rows = [{"instruction": f"q {n}", "output": "a"} for n in range(8)]
    lines = [json.dumps(row) for row in rows] + ['{"instruction": 5, "output": "a"}', "{"]
    path = tmp_path / "some.jsonl"
    path.write_text("\n".join(lines))
    flags = ["--on_bad_row", "skip", "--max_steps", "1"]
    output_dir = train(*flags, dataset=str(path))
    counts = next(
        iter(json.loads((output_dir / "run.json").read_text())["data"]["datasets"].values())
    )
    assert (counts["rows"], counts["bad_rows"]) == (8, 2)
    assert "some.jsonl:9" in counts["bad_row_examples"][0]


def test_adapter_of_another_base(
    train: Train, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    adapter = train("--max_steps", "1")
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    with torch.no_grad():
        model.model.norm.weight.mul_(2.0)
    model.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(tmp_path / "other")
    argv = [
        "export", "--model_name_or_path", str(tmp_path / "other"), "--adapter_name_or_path",
        str(adapter), "--export_dir", str(tmp_path / "merged"),
    ]  # fmt: skip
    code, message = fails(argv, capsys)
    assert code == 4
    assert "another base" in message
    assert not (tmp_path / "merged").exists()


def test_a_diverging_run_stops_before_the_weights_change(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    train(
        "--learning_rate", "1e30", "--finetuning_type", "full", "--max_grad_norm", "0",
        "--max_steps", "20", code=5,
    )  # fmt: skip
    assert "not finite" in capsys.readouterr().err


def test_a_failed_upload_says_that_the_result_is_whole(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    output_dir = train(
        "--max_steps", "1", "--push_to_hub", "--hub_model_id", "nobody/nothing", code=6
    )
    assert "Trained and saved" in capsys.readouterr().err
    assert json.loads((output_dir / "run.json").read_text("utf-8"))["status"] == "finished"


def test_training_never_writes_over_the_model_it_starts_from(
    base: list[str], model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path.name for path in model_dir.iterdir())
    flags = ["--output_dir", str(model_dir), "--overwrite_output_dir"]
    code, message = fails([*base, *flags], capsys)
    assert code == 2
    assert "starts from" in message
    assert sorted(path.name for path in model_dir.iterdir()) == before
