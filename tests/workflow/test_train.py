"""Training from the command line: every method and stage learns, and leaves what it promises."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmtuner.cli.main import main
from llmtuner.model.gradient_checkpointing import enable_gradient_checkpointing

from .conftest import Train, losses, read_json

METHODS = {
    "lora": ["--finetuning_type", "lora", "--lora_rank", "4"],
    "dora": ["--finetuning_type", "lora", "--use_dora", "--use_rslora"],
    "freeze": ["--finetuning_type", "freeze", "--freeze_trainable_layers", "1"],
    "full": ["--finetuning_type", "full"],
    "pure": ["--finetuning_type", "full", "--pure_bf16"],
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns(train: Train, method: str) -> None:
    flags = METHODS[method]
    if method == "pure":
        flags = [*flags, "--bf16", "true"]
    output_dir = train("--stage", "sft", *flags, "--max_steps", "16")
    seen = losses(output_dir)
    assert len(seen) == 16
    # Under a frozen random head the loss of small adapters cannot fall far.
    assert seen[-1] < seen[0] - 0.4


@pytest.mark.parametrize("packing", ["true", "false"])
def test_pre_training_learns(train: Train, packing: str) -> None:
    flags = ["--stage", "pt", "--packing", packing, "--cutoff_len", "64", "--max_steps", "8"]
    output_dir = train(*flags, "--finetuning_type", "full", dataset="texts")
    seen = losses(output_dir)
    assert seen[-1] < 0.8 * seen[0]
    report = read_json(output_dir / "run.json")
    assert ("packs" in report["data"]) == (packing == "true")


def test_a_run_leaves_everything_it_promises(train: Train) -> None:
    output_dir = train(
        "--num_train_epochs", "2", "--val_size", "4", "--eval_strategy", "epoch", "--plot_loss",
        "--do_eval",
    )  # fmt: skip
    for name in (
        "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "chat_template.jinja",
        "generation_config.json", "trainer_log.jsonl", "all_results.json", "train_results.json",
        "eval_results.json", "trainer_state.json", "training_loss.png", "training_eval_loss.png",
        "run.json", "README.md", "checkpoint-10/MANIFEST.json",
    ):  # fmt: skip
        assert (output_dir / name).stat().st_size > 0, name
    assert not list(output_dir.rglob("training_args.bin"))
    assert not list(output_dir.glob(".staging-*"))
    line = json.loads((output_dir / "trainer_log.jsonl").read_text().splitlines()[0])
    assert {
        "current_steps", "total_steps", "loss", "learning_rate", "epoch", "percentage",
        "elapsed_time", "remaining_time",
    } <= set(line)  # fmt: skip
    results = read_json(output_dir / "all_results.json")
    assert results["eval_perplexity"] == pytest.approx(
        torch.tensor(results["eval_loss"]).exp().item(), rel=1e-4
    )
    report = read_json(output_dir / "run.json")
    assert report["status"] == "finished"
    assert report["data"]["datasets"]["qa"]["rows"] == 24
    assert report["data"]["samples"] == {"train": 20, "validation": 4}
    assert len(report["data"]["datasets"]["qa"]["files"][0]["sha256"]) == 64
    assert report["metrics"]["train_supervised_tokens_seen"] > 0


def test_evaluation_does_not_depend_on_the_batch_size(train: Train) -> None:
    results = [
        read_json(
            train(
                "--max_steps", "1", "--val_size", "7", "--do_eval",
                "--per_device_eval_batch_size", size, name=f"batch{size}",
            )
            / "eval_results.json"
        )
        for size in ("1", "4")
    ]  # fmt: skip
    assert results[0]["eval_loss"] == pytest.approx(results[1]["eval_loss"], rel=1e-6)


LAYOUTS = {
    "1x8": ["--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "1"],
    "2x4": ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4"],
    "8x1": ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "8"],
    "padded": ["--per_device_train_batch_size", "8", "--flash_attn", "off"],
    "checkpointed": ["--per_device_train_batch_size", "8", "--gradient_checkpointing", "true"],
}


def test_the_layout_changes_neither_loss_nor_gradient(train: Train) -> None:
    seen = {}
    for name, flags in LAYOUTS.items():
        output_dir = train(*flags, "--num_train_epochs", "1", name=name)
        lines = (output_dir / "trainer_log.jsonl").read_text().splitlines()
        entries = [json.loads(line) for line in lines]
        seen[name] = [value for entry in entries for value in (entry["loss"], entry["grad_norm"])]
    for name, values in seen.items():
        assert values == pytest.approx(seen["1x8"], rel=1e-5), name


def test_activations_are_computed_again_where_memory_is_short(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, enabled = {}, []

    def enable(model: Any, **how: Any) -> None:
        enabled.append(not any(p.is_meta for p in model.parameters()))  # else it is a plan's
        enable_gradient_checkpointing(model, **how)

    monkeypatch.setattr("llmtuner.train.loading.enable_gradient_checkpointing", enable)
    for name, limit in (("roomy", 10**12), ("short", 10**6)):
        monkeypatch.setattr("llmtuner.train.plan.forecast.memory_limit", lambda *a, n=limit, **k: n)
        output_dir = train("--max_steps", "2", name=name)
        record = json.loads((output_dir / "run.json").read_text())["model"]
        entries = (output_dir / "trainer_log.jsonl").read_text().splitlines()
        seen[name] = (record["gradient_checkpointing"], [json.loads(e)["loss"] for e in entries])
        assert enabled.count(True) == (name == "short")
        assert "GB that are there" in record["gradient_checkpointing_reason"]
    assert (seen["roomy"][0], seen["short"][0]) == (False, True)
    assert seen["roomy"][1] == pytest.approx(seen["short"][1], rel=1e-6)


def test_merged_model_equals_base_with_adapter(
    train: Train, model_dir: Path, tmp_path: Path
) -> None:
    output_dir = train("--max_steps", "6")
    merged_dir = tmp_path / "merged"
    argv = [
        "export", "--model_name_or_path", str(model_dir), "--adapter_name_or_path", str(output_dir),
        "--finetuning_type", "lora", "--export_dir", str(merged_dir), "--export_size", "2",
        "--export_device", "cpu", "--export_legacy_format", "false",
    ]  # fmt: skip
    assert main(argv) == 0
    tokenizer = AutoTokenizer.from_pretrained(merged_dir)
    assert "generation" not in tokenizer.chat_template.replace("add_generation_prompt", "")
    chat = [{"role": "user", "content": "What is ginseng 3?"}]
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    merged = AutoModelForCausalLM.from_pretrained(merged_dir)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), output_dir)
    with torch.no_grad():
        difference = (merged(ids).logits - adapted(ids).logits).abs().max()
    assert difference < 1e-4
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    with torch.no_grad():
        assert (merged(ids).logits - base(ids).logits).abs().max() > 1e-2
    assert merged.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_streaming_trains_and_counts(train: Train, data_dir: Path, tmp_path: Path) -> None:
    rows = (data_dir / "qa.json").read_text("utf-8").removesuffix("]")
    path = tmp_path / "some.json"
    path.write_text(rows + ', {"instruction": 5, "output": "x"}]', "utf-8")
    flags = ["--streaming", "true", "--max_steps", "8", "--buffer_size", "8"]
    output_dir = train(*flags, "--on_bad_row", "skip", dataset=str(path))
    assert losses(output_dir)[-1] < losses(output_dir)[0]
    (counts,) = read_json(output_dir / "run.json")["data"]["datasets"].values()
    assert (counts["rows"], counts["bad_rows"]) == (24, 1)
    assert len(counts["files"][0]["sha256"]) == 64


def test_predictions_keep_the_prompt_whole(train: Train) -> None:
    output_dir = train(
        "--max_steps", "1", "--val_size", "3", "--do_predict", "--predict_with_generate",
        "--max_new_tokens", "4", "--do_sample", "false",
    )  # fmt: skip
    lines = (output_dir / "generated_predictions.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 3
    for row in rows:
        assert row["prompt"].startswith("<|im_start|>user\n")
        assert row["prompt"].endswith("<|im_end|>\n<|im_start|>assistant\n")
        assert row["label"] in ("Rest and warm tea.", "A root used in tonics.", "我是岐黄助手。",
                                "About eight hours.")  # fmt: skip


def test_tokenized_path_is_written_then_used(train: Train, tmp_path: Path) -> None:
    from datasets import load_from_disk

    tokens = tmp_path / "tokens"
    train("--tokenized_path", str(tokens), "--max_steps", "2")
    stored = load_from_disk(str(tokens))
    assert stored.column_names == ["input_ids", "labels", "source"]
    assert len(stored) == 24
    assert stored[0]["source"].endswith("qa.json#0")
    output_dir = train("--tokenized_path", str(tokens), "--max_steps", "2")
    assert len(losses(output_dir)) == 2
    train("--tokenized_path", str(tokens), "--max_steps", "2", "--cutoff_len", "40", name="b",
          code=3)  # fmt: skip


def test_a_head_that_cannot_be_skipped_gives_the_same_loss(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = losses(train("--max_steps", "3", name="kept"))
    monkeypatch.setattr("llmtuner.train.trainer.supports_kept_logits", lambda model: False)
    assert losses(train("--max_steps", "3", name="whole")) == pytest.approx(expected, rel=1e-6)


def test_compare_takes_an_adapter(
    train: Train, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = train("--max_steps", "1")
    argv = ["compare", "--model_name_or_path", str(model_dir), "--tuned_model", str(adapter)]
    assert main([*argv, "--prompts", "你是谁?", "--max_new_tokens", "2"]) == 0
    assert "你是谁?" in capsys.readouterr().out


def test_neftune_and_loraplus_and_label_smoothing_run(train: Train) -> None:
    output_dir = train(
        "--neftune_noise_alpha", "5", "--label_smoothing_factor", "0.1", "--max_steps", "8",
        "--loraplus_lr_ratio", "4",
    )  # fmt: skip
    assert losses(output_dir)[-1] < losses(output_dir)[0]


def test_a_set_named_twice_counts_twice(train: Train) -> None:
    output_dir = train("--num_train_epochs", "1", dataset="few,few")
    assert read_json(output_dir / "run.json")["data"]["samples"] == {"train": 8}


def test_a_run_shorter_than_the_logging_steps_has_a_curve(train: Train) -> None:
    output_dir = train("--max_steps", "2", "--logging_steps", "50", "--plot_loss")
    assert len(losses(output_dir)) == 1
    assert (output_dir / "training_loss.png").is_file()


@pytest.mark.parametrize("flags", [["--no_bf16"], ["--bf16"]])
def test_evaluation_alone_reads_the_whole_set(
    model_dir: Path, data_dir: Path, tmp_path: Path, flags: list[str]
) -> None:
    argv = [
        "train", "--stage", "sft", "--do_eval", "--do_predict", "--model_name_or_path",
        str(model_dir), "--dataset_dir", str(data_dir), "--dataset", "qa", "--max_new_tokens", "2",
        "--output_dir", str(tmp_path / "eval"), *flags,
    ]  # fmt: skip
    assert main(argv) == 0
    results = read_json(tmp_path / "eval" / "eval_results.json")
    assert results["eval_loss"] == pytest.approx(6.0, abs=0.3)  # a random model: ln(400)
    assert read_json(tmp_path / "eval" / "predict_results.json")["predict_samples"] == 24
