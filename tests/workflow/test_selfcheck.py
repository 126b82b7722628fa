"""The layouts of a step are one step, and each way to get that wrong is found."""

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    GPT2Config,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from llmtuner.cli.main import main
from llmtuner.data.batches import Layout
from llmtuner.data.collate import Batch
from llmtuner.data.conversation import IGNORE_INDEX
from llmtuner.extras.errors import DistributedError, ModelError
from llmtuner.hparams.config import RunConfig
from llmtuner.hparams.parser import parse
from llmtuner.model import attention
from llmtuner.train.selfcheck import plan_layouts, run_selfcheck
from llmtuner.train.selfcheck_compare import StepResult
from llmtuner.train.selfcheck_layouts import (
    CheckLayout,
    CheckTask,
    load_samples,
    quiet_config,
    run_layout,
    takes_flat_batches,
)
from llmtuner.train.selfcheck_ranks import run_in_processes
from llmtuner.train.trainer import LlmTrainer

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
CONFIGS: dict[str, Callable[..., PreTrainedConfig]] = {
    "qwen2": lambda **ids: Qwen2Config(**SHAPE, **ids),
    "qwen3": lambda **ids: Qwen3Config(**SHAPE, tie_word_embeddings=True, **ids),
    "mistral with a window": lambda **ids: MistralConfig(**SHAPE, sliding_window=6, **ids),
    "gpt2": lambda **ids: GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=256, **ids),
    "mixtral": lambda **ids: MixtralConfig(
        **SHAPE, num_local_experts=4, output_router_logits=True, router_jitter_noise=0.1, **ids
    ),
    "gemma2, padded": lambda **ids: Gemma2Config(**SHAPE, **ids),
}
Ask = Callable[..., RunConfig]


@pytest.fixture(scope="module", autouse=True)
def _fast_collections() -> Iterator[None]:
    """The training loop collects garbage at its start: most of the time of a tiny run."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def models(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that gives the folder of a tiny random model."""

    def folder_of(name: str) -> Path:
        if name == "llama":
            return model_dir
        folder = tmp_path_factory.getbasetemp() / f"selfcheck-{name.replace(' ', '-')}"
        if not folder.exists():
            tokenizer = AutoTokenizer.from_pretrained(model_dir)
            end = tokenizer.eos_token_id
            ids = {"pad_token_id": 0, "bos_token_id": end, "eos_token_id": end}
            torch.manual_seed(0)
            config = CONFIGS[name](vocab_size=len(tokenizer), **ids)
            model = AutoModelForCausalLM.from_config(config)
            for parameter in model.parameters():  # tokens that matter to each other
                if parameter.ndim == 2:
                    parameter.data.normal_(std=0.2)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return folder

    return folder_of


@pytest.fixture
def ask(models: Callable[[str], Path], data_dir: Path) -> Ask:
    """Return a function that parses a selfcheck of a tiny model."""

    def parsed(model: str = "llama", *flags: str) -> RunConfig:
        words = ["--model_name_or_path", str(models(model)), "--dataset_dir", str(data_dir)]
        words += ["--dataset", "qa", "--learning_rate", "1e-2", "--use_cpu", "--lora_rank", "4"]
        return parse("selfcheck", [*words, *flags])

    return parsed


def compare(
    config: RunConfig,
    folder: Path,
    *,
    trainer_class: type[LlmTrainer] = LlmTrainer,
    only: str = "",
) -> dict[str, list[StepResult]]:
    """Run the layouts of this process (or the reference and `only` one), without the ranks."""
    task = CheckTask(quiet_config(config, folder), folder, trainer_class)
    layouts, _ = plan_layouts(8, is_flat=takes_flat_batches(task.config))
    samples = load_samples(task.config)
    found: dict[str, list[StepResult]] = {}
    for layout in layouts:
        if layout.num_processes == 0 and (not found or only in layout.name):
            reference = next(iter(found.values()), None)
            found[layout.name] = run_layout(task, layout, samples, reference=reference)
    return found


METHODS = {
    "full": ["--finetuning_type", "full"],
    "lora": ["--lora_dropout", "0.3"],
    "freeze": ["--finetuning_type", "freeze", "--freeze_trainable_layers", "1"],
    "dora": ["--use_dora", "--gradient_checkpointing"],
    "few rows": ["--dataset", "few"],
    "pt": ["--stage", "pt", "--dataset", "texts", "--cutoff_len", "32"],
}
CASES = [("llama", name) for name in METHODS] + [("qwen2", "lora")]
CASES += [(name, "full") for name in CONFIGS]


@pytest.mark.parametrize(("model", "method"), CASES)
def test_every_layout_has_the_same_loss_and_gradient(
    ask: Ask, tmp_path: Path, model: str, method: str
) -> None:
    found = compare(ask(model, *METHODS[method]), tmp_path)
    names = ["1 x 8", "2 x 4", "8 x 1", "packed", "padded"]
    assert list(found) == (names[:3] if "padded" in model else names)
    for name, results in found.items():
        assert [result.step for result in results] == [1, 2]
        for result, expected in zip(results, found["1 x 8"], strict=True):
            assert result.faults() == []
            assert result.loss == pytest.approx(expected.loss, rel=1e-5)
            assert result.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-5)
            assert (result.worst.difference > 0) == (name != "1 x 8")
    first, second = found["1 x 8"]
    assert first.loss != second.loss


@pytest.mark.parametrize("flags", [[], ["--packing"], ["--streaming", "--max_steps", "9"]])
def test_the_reference_is_the_gradient_of_the_mean_over_trained_tokens(
    ask: Ask, tmp_path: Path, flags: list[str]
) -> None:
    config = ask("llama", "--finetuning_type", "full", *flags)
    (result, _), *_ = compare(config, tmp_path, only="none").values()
    samples = load_samples(quiet_config(config, tmp_path))
    model = AutoModelForCausalLM.from_pretrained(
        config.model.model_name_or_path, attn_implementation="eager"
    )
    total, num_trained = torch.zeros(()), 0
    for number in json.loads((tmp_path / "samples.json").read_text())[0]:
        row = samples.train[number]
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        labels = torch.tensor(row["labels"][1:])
        total = total + torch.nn.functional.cross_entropy(
            logits[:-1], labels, ignore_index=IGNORE_INDEX, reduction="sum"
        )
        num_trained += int((labels != IGNORE_INDEX).sum())
    (total / num_trained).backward()
    assert result.loss == pytest.approx(total.item() / num_trained, rel=1e-5)
    written = load_file(tmp_path / "gradients-1.safetensors")
    for name, parameter in model.named_parameters():
        distance = (written[name] - parameter.grad).norm()
        assert distance <= 1e-4 * parameter.grad.norm(), name


# ---- each mistake is found ----


class MeanOfMeans(LlmTrainer):
    """Divides by the tokens of the micro-batch, then by the number of micro-batches."""

    def compute_loss(self, model: Any, inputs: Batch, *args: Any, **kwargs: Any) -> Any:
        kwargs["num_items_in_batch"] = None
        loss = super().compute_loss(model, inputs, **kwargs)
        return loss / self.current_gradient_accumulation_steps


class LatePositions(LlmTrainer):
    """Counts positions through the whole row."""

    def _kept_rows(self, model: Any, inputs: Batch) -> Any:
        if "position_ids" in inputs:
            places = torch.arange(inputs["position_ids"].numel())
            inputs = {**inputs, "position_ids": places[None]}
        return super()._kept_rows(model, inputs)


class LostSample(LlmTrainer):
    """Leaves out the last target of a micro-batch of more than one sample."""

    def _kept_rows(self, model: Any, inputs: Batch) -> Any:
        rows, targets, outputs = super()._kept_rows(model, inputs)
        more = len(inputs.get("cu_seq_lens_q", ())) > 2
        return (rows[:-1], targets[:-1], outputs) if more else (rows, targets, outputs)


FLAT = {"2 x 4", "8 x 1", "packed"}


@pytest.mark.parametrize(
    ("trainer_class", "model", "wrong"),
    [
        (MeanOfMeans, "llama", {"2 x 4", "8 x 1", "packed", "padded"}),
        (LatePositions, "llama", FLAT),
        (LatePositions, "gpt2", FLAT),
        (LostSample, "llama", FLAT),
    ],
)
def test_a_wrong_trainer_is_found(
    ask: Ask, tmp_path: Path, trainer_class: type[LlmTrainer], model: str, wrong: set[str]
) -> None:
    config = ask(model, "--finetuning_type", "full", "--selfcheck_steps", "1")
    found = compare(config, tmp_path, trainer_class=trainer_class)
    assert {name for name, results in found.items() if results[0].faults()} == wrong


@pytest.mark.parametrize("method", ["full", "lora"])
def test_attention_across_samples_is_found(
    ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def leaking(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        found = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return found.transpose(1, 2), None

    monkeypatch.setattr(attention, "varlen_attention", leaking)
    found = compare(ask("llama", *METHODS[method], "--selfcheck_steps", "1"), tmp_path)
    wrong = {name for name, results in found.items() if results[0].faults()}
    assert wrong == FLAT


# ---- two processes ----


class Failing(LlmTrainer):
    """Cannot train with others."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        if self.args.process_index == 1:
            raise ModelError("This rank has no model.")
        return super().compute_loss(*args, **kwargs)


class SameShare(LlmTrainer):
    """Gives the first rank's samples to every rank."""

    def _layout(self, *args: Any, **kwargs: Any) -> Layout:
        return replace(super()._layout(*args, **kwargs), rank=0)


class CountedTwice(LlmTrainer):
    """Multiplies by the number of ranks once too often."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs) * self.args.world_size


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainer_class", "method", "wrong"),
    [
        (LlmTrainer, "full", set()),
        (LlmTrainer, "lora", set()),
        (SameShare, "lora", {"2 ranks"}),
        (CountedTwice, "full", {"2 ranks"}),
    ],
)
def test_two_ranks(ask: Ask, trainer_class: type[LlmTrainer], method: str, wrong: set[str]) -> None:
    report = run_selfcheck(ask("qwen2", *METHODS[method]), trainer_class=trainer_class)
    assert {result.layout for result in report.results if result.faults()} == wrong
    assert report.results[-1].layout == "2 ranks"


@pytest.mark.slow
def test_a_rank_that_fails_ends_the_check_with_its_reason(ask: Ask, tmp_path: Path) -> None:
    task = CheckTask(quiet_config(ask(), tmp_path), tmp_path, Failing)
    layout = CheckLayout("2 ranks", 2, 2, num_processes=2)
    with pytest.raises(DistributedError, match="This rank has no model") as caught:
        run_in_processes(task, layout, reference=None)
    assert caught.value.exit_code == 7


# ---- the command ----


@pytest.mark.slow
def test_sigterm_leaves_neither_processes_nor_folders(
    model_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    words = ["--model_name_or_path", str(model_dir), "--dataset_dir", str(data_dir)]
    words += ["--dataset", "qa", "--stage", "sft", "--output_dir", str(tmp_path / "out")]
    (tmp_path / "temporary").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "llmtuner.cli.main", "selfcheck", *words, "--do_train"],
        env={**os.environ, "TMPDIR": str(tmp_path / "temporary")},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not list(tmp_path.glob("temporary/*/meeting")) and process.poll() is None:
        time.sleep(0.01)
    process.terminate()
    said = process.communicate()[1]
    assert process.returncode == 143, said
    assert "Traceback" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["temporary"]
    assert list((tmp_path / "temporary").iterdir()) == []
    with pytest.raises(ProcessLookupError):
        _wait_for_the_end_of_group(process.pid)


def _wait_for_the_end_of_group(number: int) -> None:
    """Look at the group for 10 s: helpers of multiprocessing notice the end a moment later."""
    for _ in range(100):
        os.killpg(number, 0)
        time.sleep(0.1)


@pytest.fixture
def without_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan the layouts of this process only: two more processes take many seconds to start."""

    def plan(*args: Any, **kwargs: Any) -> tuple[list[CheckLayout], dict[str, str]]:
        layouts, skipped = plan_layouts(*args, **kwargs)
        return layouts[:-1], skipped

    monkeypatch.setattr("llmtuner.train.selfcheck.plan_layouts", plan)


@pytest.mark.usefixtures("without_ranks")
def test_the_command_takes_a_training_file_and_writes_only_its_report(
    model_dir: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {
        "model_name_or_path": str(model_dir), "dataset_dir": str(data_dir), "dataset": "qa",
        "stage": "sft", "do_train": True, "output_dir": str(tmp_path / "out"), "bf16": True,
        "eval_strategy": "epoch", "val_size": 2, "neftune_noise_alpha": 5, "packing": True,
        "lora_dropout": 0.5, "max_grad_norm": 0.1, "deepspeed": "none.json", "warmup_steps": 3,
        "plot_loss": True, "report_to": "tensorboard", "label_smoothing_factor": 0.1,
    }  # fmt: skip
    (tmp_path / "sft.json").write_text(json.dumps(settings))
    report = tmp_path / "report.json"
    words = [str(tmp_path / "sft.json"), "--selfcheck_steps", "4", "--selfcheck_report"]
    assert main(["selfcheck", *words, str(report)]) == 0
    shown = capsys.readouterr()
    assert "Every layout gives the same loss and gradient." in shown.out
    assert "bf16 or fp16, NEFTune, DeepSpeed" in shown.err
    found = json.loads(report.read_text())
    assert found["is_equal"]
    assert found["faults"] == []
    assert {step["layout"] for step in found["steps"]} == {"1 x 8", *FLAT, "padded"}
    assert {path.name for path in tmp_path.iterdir()} == {"sft.json", "report.json"}


@pytest.mark.usefixtures("without_ranks")
def test_a_difference_ends_with_its_own_code_and_names_it(
    model_dir: Path,
    data_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wrong = partial(run_selfcheck, trainer_class=MeanOfMeans)
    monkeypatch.setattr("llmtuner.train.selfcheck.run_selfcheck", wrong)
    words = ["--model_name_or_path", str(model_dir), "--dataset_dir", str(data_dir)]
    assert main(["selfcheck", *words, "--dataset", "qa", "--selfcheck_steps", "1"]) == 8
    shown = capsys.readouterr()
    assert "DIFFERENT" in shown.out
    assert "layout 2 x 4, step 1: loss " in shown.err


def test_it_is_not_started_by_a_launcher(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["selfcheck", "--model_name_or_path", "m", "--dataset", "qa"]) == 2
    assert "selfcheck starts its processes itself" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--selfcheck_batch", "5"], "selfcheck_batch must be even"),
        (["--selfcheck_steps", "0"], "selfcheck_steps"),
        (["--selfcheck_steps", "2"], "dataset is missing"),
    ],
)
def test_wrong_settings_are_refused(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["selfcheck", "--model_name_or_path", "m", *flags]) == 2
    assert words in capsys.readouterr().err
