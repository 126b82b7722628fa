"""Bad input: one clear message with what, got, allowed, fix; the right exit code; no traceback."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from llmtuner.cli.main import main

from .conftest import Train, read_json


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


@pytest.fixture(scope="module")
def unloadable(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model without weights: who gets as far as loading it ends with exit code 4."""
    folder = tmp_path_factory.mktemp("unloadable") / "model"
    shutil.copytree(model_dir, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


GOOD = '{"instruction": "a", "output": "b"}'
CHAT = '{"messages": [%s]}'
USER, REPLY = '{"role": "user", "content": "q"}', '{"role": "assistant", "content": "a"}'
BAD_FILES = {
    "cut": (f'{GOOD}\n{{"instruction": \n', ":2:16: The line is not JSON"),
    "comma": (f"{GOOD}\r\n\r\n{GOOD[:-1]},}}", r":3:3\d: The line is not JSON"),
    "two": (f"{GOOD} {GOOD}\n", ":1:37: "),
    "deep": (f"{GOOD}\n" + "[" * 100_000, ":2:1: "),
    "twice": ('[{"instruction": "a", "instruction": "c", "output": "b"}]', ":1:2: .*'instruction'"),
    "constant": ('{"instruction": "a", "output": "b", "score": NaN}', ":1:1: .*NaN is not JSON"),
    "empty": ("", ": The file is empty"),
    "blank": (" \n\r\n\t\n", ": The file has only blank lines"),
    "no rows": ("[]", ": 0 usable rows of 0"),
    "number": ('[{"instruction": "a", "output": 7}]', "#0: Column 'output' is not a text. Got: 7"),
    "boolean": (
        f'{GOOD}\n{{"instruction": true, "output": "b"}}',
        ":2: .*'instruction' is not a text",
    ),
    "null": ('{"instruction": "a", "output": null}', ":1: Column 'output' is missing or empty"),
    "columns": ('{"instrction": "a", "outputs": "b"}', ":1: .*instead of 'instrction'"),
    "latin": (
        '{"instruction": "caf\xe9", "output": "b"}\n'.encode("latin-1"),
        "--encoding latin-1",
    ),
    "utf-16": (GOOD.encode("utf-16"), "--encoding utf-16"),
    "byte": (f"{GOOD}\n{GOOD}\n".encode() + GOOD.encode().replace(b"b", b"\xff"), ":3:33: .*utf-8"),
    "nul": (f"{GOOD}\n{GOOD}".replace('"b"', '"b\0"'), ":2:34: .*NUL"),
    "only nul": ('{"instruction": "\0"}', ":1:18: .*NUL"),
    "half": (GOOD.replace('"b"', '"\\ud800"'), ":1:33: .*surrogate"),
    "role": (CHAT % f"{USER}, {REPLY.replace('assistant', 'asistant')}", ":1: .*mean 'assistant'"),
    "order": (CHAT % f"{USER}, {USER}, {REPLY}", r":1: Turn 2 \(user\) follows a user turn"),
    "start": (CHAT % REPLY, ":1: The conversation starts with an assistant turn"),
    "system": (
        CHAT % f"{USER}, {REPLY.replace('assistant', 'system')}",
        ":1: Turn 2 is a system turn",
    ),
    "tool": (CHAT % f"{USER}, {REPLY.replace('assistant', 'tool')}", ":1: Turn 2 is a tool result"),
    "trailing": (CHAT % f"{USER}, {REPLY}, {USER}", ":1: The conversation ends with a user turn"),
    "weight": (CHAT % f'{USER}, {REPLY[:-1]}, "weight": 0.5}}', ":1: Message 2: .*neither 0 nor 1"),
    "gzip": (b"\x1f\x8b\x08rest", ": The file is a gzip archive"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_located_before_the_model_is_loaded(
    base: list[str], unloadable: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content, said = BAD_FILES[name]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    argv = [*base, "--dataset", str(path), "--model_name_or_path", str(unloadable)]
    code, message = fails(argv, capsys)
    assert code == 3, message
    assert re.search(rf"^Error: \S*rows\.jsonl.*{said}", message, re.MULTILINE), message
    assert "Traceback" not in message


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "absent rows"])
def test_what_is_no_data_is_refused_before_the_model_is_loaded(
    base: list[str], unloadable: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    flags = []
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_text(GOOD)
        flags = ["--max_samples", "0"]
    argv = [*base, "--dataset", str(path), "--model_name_or_path", str(unloadable), *flags]
    code, message = fails(argv, capsys)
    assert code == 3, message
    assert re.search("not a regular file|no data file|max_samples is 0", message)


def test_good_data_gets_as_far_as_the_model(
    base: list[str], unloadable: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fails([*base, "--model_name_or_path", str(unloadable)], capsys)[0] == 4


def test_a_set_smaller_than_a_batch_trains(train: Train, tmp_path: Path) -> None:
    path = tmp_path / "one.jsonl"
    path.write_text(GOOD)
    output_dir = train("--max_steps", "2", dataset=str(path))
    counts = read_json(output_dir / "run.json")["data"]["datasets"][str(path)]
    assert (counts["rows"], counts["bad_rows"]) == (1, 0)


def test_too_many_skipped_rows_stop_the_run(
    base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{GOOD}\n" * 95 + "{\n" * 5)
    argv = [*base, "--dataset", str(path), "--on_bad_row", "skip"]
    for share, code in (("0.01", 3), ("0.05", 0), ("0.04", 3)):  # also with the tokens stored
        got, message = fails([*argv, "--max_bad_rows", share, "--overwrite_output_dir"], capsys)
        assert got == code, message
        if code:
            told = r"5 of 100 rows are bad \(malformed_json: 5\): .*rows\.jsonl:96:2: "
            assert re.search(told, message), message


@pytest.mark.parametrize("change", ["grown", "gone"])
def test_data_that_changed_is_not_resumed(
    train: Train, tmp_path: Path, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{GOOD}\n" * 8)
    train("--max_steps", "2", "--save_steps", "1", dataset=str(path))
    path.write_text(f"{GOOD}\n" * 9) if change == "grown" else path.unlink()
    flags = ["--max_steps", "3", "--resume_from_checkpoint", "true"]
    train(*flags, dataset=str(path), code=4 if change == "grown" else 2)
    assert re.search("other settings.*data|Undefined data set", capsys.readouterr().err)


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
    assert "The result is saved, but the upload failed" in capsys.readouterr().err
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
