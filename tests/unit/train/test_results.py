"""What a run leaves behind: curves, results, `run.json`, a model card, companions of weights."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_training import tiny_llama, tiny_tokenizer
from transformers import AutoTokenizer, GenerationConfig
from transformers.training_args_seq2seq import Seq2SeqTrainingArguments

from llmtuner.hparams.parser import parse
from llmtuner.train.companions import write_companions
from llmtuner.train.optimizer import build_optimizer
from llmtuner.train.plots import plot_losses
from llmtuner.train.report import (
    RunReport,
    begin_report,
    library_versions,
    write_model_card,
    write_results,
)

PNG = b"\x89PNG\r\n\x1a\n"
BASE = ("--model_name_or_path", "m", "--dataset", "d", "--do_train")


def report(output_dir: Path, *words: str) -> RunReport:
    config = parse("train", [*BASE, "--output_dir", str(output_dir), *words])
    return begin_report(config, run_id="abc")


# ---- curves ----


def history(name: str, count: int = 4) -> list[dict[str, Any]]:
    return [{"step": step, name: 2.0 / (1 + step)} for step in range(count)]


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("loss", "training_loss.png"),
        ("eval_loss", "training_eval_loss.png"),
        ("eval_数据_loss", "training_eval_数据_loss.png"),
        ("eval_data/qa.json_loss", "training_eval_data_qa.json_loss.png"),
        ("eval_a b_loss", "training_eval_a b_loss.png"),
        ("eval_../../x_loss", "training_eval_.._.._x_loss.png"),
        ("eval_$a_$_loss", "training_eval_$a_$_loss.png"),
    ],
)
def test_every_loss_gets_a_curve(tmp_path: Path, name: str, file: str) -> None:
    assert plot_losses(history(name), tmp_path) == [tmp_path / file]
    assert [path.name for path in tmp_path.iterdir()] == [file]
    assert (tmp_path / file).read_bytes().startswith(PNG)


def test_only_losses_are_drawn_and_not_the_summary(tmp_path: Path) -> None:
    entries = [
        *history("loss"),
        *history("eval_loss"),
        {"step": 4, "train_loss": 1.0, "train_runtime": 3.0},
        {"step": 4, "learning_rate": 1.0, "eval_accuracy": 0.5},
    ]
    names = [path.name for path in plot_losses(entries, tmp_path)]
    assert names == ["training_loss.png", "training_eval_loss.png"]


@pytest.mark.parametrize("entries", [[], [{"step": 1, "learning_rate": 1.0}]], ids=str)
def test_without_a_loss_nothing_is_drawn(tmp_path: Path, entries: list[dict[str, Any]]) -> None:
    assert plot_losses(entries, tmp_path) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("values", [[1.0], [1.0, math.nan, 2.0], [1e30, 1.0], [0.0] * 3], ids=str)
def test_odd_values_are_drawn(tmp_path: Path, values: list[float]) -> None:
    entries = [{"step": step, "loss": value} for step, value in enumerate(values)]
    (path,) = plot_losses(entries, tmp_path)
    assert path.read_bytes().startswith(PNG)


# ---- results ----


def test_results_are_written_alone_and_joined(tmp_path: Path) -> None:
    write_results(tmp_path, "train", {"train_loss": 1.0, "epoch": 1.0})
    write_results(tmp_path, "eval", {"eval_loss": 2.0, "epoch": 3.0})
    read = {path.name: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    assert read == {
        "train_results.json": {"train_loss": 1.0, "epoch": 1.0},
        "eval_results.json": {"eval_loss": 2.0, "epoch": 3.0},
        "all_results.json": {"train_loss": 1.0, "eval_loss": 2.0, "epoch": 3.0},
    }


def test_results_that_are_not_finite_can_be_written(tmp_path: Path) -> None:
    write_results(tmp_path, "eval", {"eval_loss": math.nan})


def test_run_json_is_json_with_settings_versions_and_no_secret(tmp_path: Path) -> None:
    secret = "hf_canary0123456789"
    begun = report(tmp_path, "--hub_token", secret, "--learning_rate", "1e-3")
    begun.write()
    text = (tmp_path / "run.json").read_text("utf-8")
    run = json.loads(text)
    assert secret not in text
    assert (run["status"], run["run_id"]) == ("running", "abc")
    assert run["config"]["learning_rate"] == 1e-3
    assert run["versions"] == library_versions()
    assert run["started"]


def test_the_end_replaces_the_beginning(tmp_path: Path) -> None:
    begun = report(tmp_path)
    begun.write()
    replace(begun, status="finished", metrics={"train_loss": 0.5}, wall_time_s=1.5).write()
    run = json.loads((tmp_path / "run.json").read_text())
    assert (run["status"], run["metrics"], run["wall_time_s"]) == (
        "finished", {"train_loss": 0.5}, 1.5,
    )  # fmt: skip


def test_an_evaluation_has_a_record_of_its_own(tmp_path: Path) -> None:
    words = ["--model_name_or_path", "m", "--dataset", "d", "--do_eval", "--output_dir"]
    begin_report(parse("train", [*words, str(tmp_path)]), run_id="x").write()
    assert [path.name for path in tmp_path.iterdir()] == ["eval_run.json"]


def test_versions_are_those_of_the_installed_libraries() -> None:
    versions = library_versions()
    assert versions["torch"] == torch.__version__
    assert {"python", "transformers", "peft", "datasets"} <= set(versions)
    assert all(isinstance(value, str) and value for value in versions.values())


def test_the_model_card_tells_base_method_data_and_results(tmp_path: Path) -> None:
    metrics = {"train_loss": 0.123456, "eval_perplexity": 7.0, "epoch": 3.0, "note": "loss"}
    data = {"datasets": {"a": {"rows": 10}, "b": {"rows": 4}}}
    write_model_card(replace(report(tmp_path / "my-run"), metrics=metrics, data=data))
    card = (tmp_path / "my-run" / "README.md").read_text("utf-8")
    assert card.startswith("---\nbase_model: m\nlibrary_name: peft\n")
    assert "\n# my-run\n" in card
    assert "Data: d (14 rows)" in card
    assert "| train_loss | 0.1235 |\n| eval_perplexity | 7 |\n" in card
    assert "epoch" not in card
    assert "note" not in card


def test_a_model_card_of_a_full_model_without_results_has_no_table(tmp_path: Path) -> None:
    write_model_card(report(tmp_path, "--finetuning_type", "full"))
    card = (tmp_path / "README.md").read_text("utf-8")
    assert "library_name: transformers" in card
    assert "|" not in card


# ---- companions ----


@pytest.mark.parametrize(
    ("stop_ids", "eos"), [((), 2), ((5,), 5), ((5, 7), [5, 7])], ids=["base", "one", "two"]
)
def test_generation_stops_where_training_stopped(
    tmp_path: Path, stop_ids: tuple[int, ...], eos: int | list[int]
) -> None:
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    model.generation_config.eos_token_id = 2
    model.generation_config.temperature = 0.25
    model.generation_config.do_sample = True
    write_companions(tmp_path, tokenizer=tokenizer, model=model, stop_ids=stop_ids)
    settings = GenerationConfig.from_pretrained(tmp_path)
    assert settings.eos_token_id == eos
    assert settings.pad_token_id == tokenizer.pad_token_id == 0
    assert settings.temperature == 0.25
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.chat_template == "{{ messages }}"
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert model.generation_config.eos_token_id == 2  # the model in memory is as it was


# ---- LoRA+ ----


def lora_model() -> Any:
    return get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))


def optimizer_for(tmp_path: Path, *words: str, weight_decay: float = 0.0) -> Any:
    config = parse("train", [*BASE, "--output_dir", str(tmp_path), *words])
    hf_args = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, learning_rate=1e-3, weight_decay=weight_decay
    )
    return build_optimizer(config.method, lora_model(), hf_args)


def test_the_b_matrices_learn_faster_by_the_ratio(tmp_path: Path) -> None:
    words = ["--finetuning_type", "lora", "--loraplus_lr_ratio", "16"]
    optimizer = optimizer_for(tmp_path, *words, weight_decay=0.1)
    groups = [group for group in optimizer.param_groups if group["params"]]
    # of q_proj and up_proj in two layers: one A and one B matrix each
    assert {group["lr"]: len(group["params"]) for group in groups} == {1e-3: 4, 16e-3: 4}
    assert {group["weight_decay"] for group in groups} == {0.1}


@pytest.mark.parametrize(
    "words", [("--finetuning_type", "lora"), ("--finetuning_type", "full")], ids=str
)
def test_without_a_ratio_the_usual_optimizer_is_used(
    tmp_path: Path, words: tuple[str, ...]
) -> None:
    assert optimizer_for(tmp_path, *words) is None
