"""`llmtuner plan` and `llmtuner targets` on the command line; the plan in `run.json`."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from llmtuner.cli.main import main

from .conftest import Train, read_json

Words = Callable[..., list[str]]


@pytest.fixture
def words(model_dir: Path, data_dir: Path) -> Words:
    def make(*more: str) -> list[str]:
        return [
            *("--model_name_or_path", str(model_dir), "--dataset_dir", str(data_dir)),
            *("--dataset", "qa", "--per_device_train_batch_size", "4", "--no_bf16", *more),
        ]

    return make


def planned(capsys: pytest.CaptureFixture[str], argv: list[str]) -> dict:
    capsys.readouterr()  # what training printed
    assert main(["plan", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_run_json_holds_what_was_foretold_and_what_it_took(train: Train, words, capsys):
    out = train("--num_train_epochs", "1", "--gradient_accumulation_steps", "2")
    run = read_json(out / "run.json")
    plan, steps = run["plan"], read_json(out / "trainer_state.json")["global_step"]
    assert plan["predicted"]["steps"] == steps == 3
    assert plan["actual"]["timed_steps"] == steps
    assert plan["predicted"]["peak_bytes"] == pytest.approx(plan["actual"]["peak_bytes"], rel=0.15)
    found = planned(capsys, words("--num_train_epochs", "1", "--gradient_accumulation_steps", "2"))
    for name in ("trainable_parameters", "parameters"):
        assert found[name] == run["model"][name]
    assert found["tokens"] == run["metrics"]["train_tokens_seen"]
    assert found["supervised_tokens"] == run["metrics"]["train_supervised_tokens_seen"]


@pytest.mark.parametrize("stage", [("sft", "qa"), ("pt", "texts")], ids=lambda stage: stage[0])
def test_the_steps_are_those_of_training(train: Train, words, capsys, stage):
    name, dataset = stage
    flags = ("--stage", name, "--cutoff_len", "64", "--num_train_epochs", "1")
    out = train(*flags, dataset=dataset)
    found = planned(capsys, words(*flags, "--dataset", dataset))
    assert found["steps"] == read_json(out / "trainer_state.json")["global_step"]


def test_the_disk_is_what_training_writes(train: Train, words, capsys, tmp_path):
    flags = ("--finetuning_type", "full", "--max_steps", "2", "--save_steps", "2")
    out = train(*flags)
    disk = planned(capsys, words(*flags, "--output_dir", str(out)))["disk"]
    sizes = [path.stat().st_size for path in (out / "checkpoint-2").iterdir()]
    assert disk["checkpoints"] == len(list(out.glob("checkpoint-*"))) == 1
    assert disk["checkpoint_bytes"] == pytest.approx(sum(sizes), rel=0.1)


def test_a_plan_writes_nothing_and_reads_well(words, capsys, tmp_path):
    out = tmp_path / "never"
    assert main(["plan", *words("--output_dir", str(out), "--tokenized_path", str(out))]) == 0
    text = capsys.readouterr().out
    assert "optimizer steps" in text
    assert "It fits" in text
    assert not out.exists()


def test_what_does_not_fit_gets_advice(words, capsys, monkeypatch):
    monkeypatch.setattr("llmtuner.train.plan.forecast.memory_limit", lambda *a, **k: 10**6)
    assert main(["plan", *words("--finetuning_type", "full")]) == 0
    text = capsys.readouterr().out
    assert "It will not fit" in text
    assert text.index("--per_device_train_batch_size 2") < text.index("--finetuning_type lora")
    assert "Nothing of this is enough" in text


@pytest.mark.slow
def test_a_probe_measures_two_real_steps(words, capsys):
    found = planned(capsys, words("--probe"))
    assert found["probe"]["peak_bytes"] > 10**8
    assert found["probe"]["seconds_per_step"] > 0


@pytest.mark.parametrize(
    ("flags", "code"),
    [(["--dataset", "gone"], 2), (["--model_name_or_path", "./gone"], 4), (["--row", "1"], 2)],
)
def test_bad_input_is_one_line(words, capsys, flags, code):
    assert main(["plan", *words(*flags)]) == code
    assert "Traceback" not in capsys.readouterr().err


def test_targets_need_no_weights(model_dir, tmp_path, capsys):
    folder = tmp_path / "shape"
    folder.mkdir()
    (folder / "config.json").write_bytes((model_dir / "config.json").read_bytes())
    assert main(["targets", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["lora_target"] == "down_proj,gate_proj,k_proj,o_proj,q_proj,up_proj,v_proj"
    assert main(["targets", str(folder)]) == 0
    assert "--lora_target down_proj," in capsys.readouterr().out
