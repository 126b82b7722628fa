"""`--do_eval`: the loss and perplexity of every stage are those of a plain forward pass."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmtuner.cli.main import main
from llmtuner.eval.metrics import measure

from .conftest import Train, read_json


def mean_loss(model_dir: Path, samples: list[tuple[str, str]], adapter: Path | None) -> float:
    """Return the mean loss over the tokens of the second texts, one sample at a time."""
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    losses = []
    for read, learned in samples:
        prompt, answer = tokenizer.encode(read), tokenizer.encode(learned)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0]
        first = max(len(prompt), 1)  # nothing predicts the first token of a text
        targets = torch.tensor((prompt + answer)[first:])
        losses.append(F.cross_entropy(logits[first - 1 : -1], targets, reduction="none"))
    return float(torch.cat(losses).mean())


def samples_of(data_dir: Path, stage: str) -> list[tuple[str, str]]:
    if stage == "pt":
        rows = json.loads((data_dir / "texts.json").read_text("utf-8"))
        return [("", row["text"] + "<|im_end|>") for row in rows]
    rows = json.loads((data_dir / "qa.json").read_text("utf-8"))
    prompt = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    return [(prompt.format(row["instruction"]), row["output"] + "<|im_end|>") for row in rows]


@pytest.mark.parametrize("stage", ["pt", "sft"])
def test_evaluation_alone_gives_the_loss_of_a_forward_pass(
    train: Train, model_dir: Path, data_dir: Path, tmp_path: Path, stage: str
) -> None:
    name = {"pt": "texts", "sft": "qa"}[stage]
    adapter = train("--stage", stage, "--max_steps", "2", dataset=name)
    samples = samples_of(data_dir, stage)
    expected = {part: mean_loss(model_dir, samples, part) for part in (None, adapter)}
    runs = [
        (None, []),
        (adapter, []),
        (adapter, ["--packing", "true"]),
        (adapter, ["--packing", "false", "--flash_attn", "off"]),
    ]
    for number, (part, flags) in enumerate(runs):
        output_dir = tmp_path / f"eval{number}"
        argv = [
            "train", "--do_eval", "--stage", stage, "--model_name_or_path", str(model_dir),
            "--dataset_dir", str(data_dir), "--dataset", name, "--no_bf16", *flags,
            "--output_dir", str(output_dir), "--per_device_eval_batch_size", "5",
            *(["--adapter_name_or_path", str(part)] if part else []),
        ]  # fmt: skip
        assert main(argv) == 0
        results = read_json(output_dir / "eval_results.json")
        assert results["eval_loss"] == pytest.approx(expected[part], rel=1e-5)
        assert results["eval_perplexity"] == pytest.approx(math.exp(expected[part]), rel=1e-4)
        assert read_json(output_dir / "eval_run.json")["status"] == "finished"
    assert expected[adapter] < expected[None]


def test_predictions_are_scored(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--max_steps", "1", "--eval_dataset", "few,qa", "--eval_on_each_dataset", "true"]
    output_dir = train(*flags, "--do_predict", "--max_new_tokens", "12")
    results = read_json(output_dir / "predict_results.json")
    lines = {
        name: [
            json.loads(line)
            for line in (output_dir / f"generated_predictions_{name}.jsonl")
            .read_text("utf-8")
            .splitlines()
        ]
        for name in ("few", "qa")
    }
    assert [len(rows) for rows in lines.values()] == [4, 24]
    assert all(list(row) == ["prompt", "label", "predict"] for row in lines["qa"])
    for name, rows in lines.items():
        scores = measure([row["predict"] for row in rows], [row["label"] for row in rows])
        expected = scores.to_dict(f"predict_{name}")
        assert {key: results[key] for key in expected} == expected
    assert results["predict_samples"] == 28
    assert results["predict_settings"]["max_new_tokens"] == 12
    assert results["predict_settings"]["seed"] == 42
    assert not list(output_dir.glob("*.partial*"))
    assert f"predict_rouge-l: {results['predict_rouge-l']:.4f}" in capsys.readouterr().out


def test_predicting_needs_its_extra_before_anything_is_loaded(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    output_dir = train("--do_predict", code=2)
    assert "pip install 'llmtuner[metrics]'" in capsys.readouterr().err
    assert not output_dir.exists()
