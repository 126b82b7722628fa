"""The parts of a plan: workload, sizes, advice, disk, machine, record."""

import json
import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_training import make_trainer, samples, tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from llmtuner.data.build import BuiltData
from llmtuner.extras.errors import ConfigError, LlmtunerError
from llmtuner.hparams.parser import parse
from llmtuner.model.attention import VARLEN
from llmtuner.model.precision import Precision
from llmtuner.train.plan import forecast as forecast_module
from llmtuner.train.plan import machine
from llmtuner.train.plan import memory as memory_module
from llmtuner.train.plan.advice import advise
from llmtuner.train.plan.disk import disk_of
from llmtuner.train.plan.memory import Memory, Situation, estimate, sizes_of
from llmtuner.train.plan.probe import _correct, _settings, run_probe
from llmtuner.train.plan.record import StepClock, add_actual, predict_run
from llmtuner.train.plan.simulate import Pass
from llmtuner.train.plan.skeleton import layers_of
from llmtuner.train.plan.workload import lengths_of, work_of

FP32 = Precision("fp32", pure=False, reason="test")
BF16 = Precision("bf16", pure=False, reason="test")
LENGTHS = (4, 9, 5, 30, 8, 7, 6)


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    ends = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    LlamaForCausalLM(LlamaConfig(vocab_size=50, **shape, **heads, **ends)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def configure(model_dir: Path, tmp_path: Path):
    def run(*words: str):
        fixed = ("--model_name_or_path", str(model_dir), "--dataset", "x", "--no_bf16")
        return parse("plan", [*fixed, "--output_dir", str(tmp_path / "new" / "out"), *words])

    return run


def data_of(lengths=LENGTHS, evals=()) -> BuiltData:
    return BuiltData(samples(lengths), {"": samples(evals)} if evals else {}, None, {})


def situation_of(config) -> Situation:
    return Situation(config, tiny_tokenizer(), FP32, VARLEN, "cpu", 1)


def workload_of(config, data: BuiltData | None = None, **weights: float):
    work = work_of(config, data or data_of(), world_size=1, is_packed=False)
    return work.workload(**{"token_weight": 1.0, "kept_weight": 0.0, **weights})


# ---- workload ----


def test_lengths_are_counted_as_the_collator_does():
    rows = samples(LENGTHS).select([3, 0, 5])
    found = lengths_of(rows)
    kept = [sum(label != -100 for label in row["labels"][1:]) for row in rows]
    assert found.tokens.tolist() == [30, 4, 7]
    assert found.kept.tolist() == kept
    assert found.cut(6).tokens.tolist() == [6, 4, 6]


@pytest.mark.parametrize(
    ("words", "steps", "passes"),
    [
        ("--per_device_train_batch_size 2 --num_train_epochs 2", 8, 1),
        ("--per_device_train_batch_size 2 --gradient_accumulation_steps 2", 6, 2),
        ("--per_device_train_batch_size 2 --gradient_accumulation_steps 3", 6, 3),
        ("--per_device_train_batch_size 2 --max_steps 5", 5, 1),
        ("--per_device_train_batch_size 4 --num_train_epochs 0.5", 1, 1),
    ],
)
def test_steps(configure, words, steps, passes):
    found = workload_of(configure(*words.split()))
    assert (found.steps, found.micro_batches) == (steps, passes)
    assert (found.samples, found.tokens) == (7, sum(LENGTHS))


def test_the_largest_micro_batch_is_one_that_the_run_has(configure):
    found = workload_of(configure("--per_device_train_batch_size", "2", "--disable_shuffling"))
    assert found.largest.lengths == (5, 30)
    by_head = workload_of(configure("--per_device_train_batch_size", "1"), kept_weight=1e6)
    assert by_head.largest.num_kept == max(lengths_of(samples(LENGTHS)).kept)
    few = workload_of(
        configure("--per_device_train_batch_size", "1", "--max_steps", "1", "--disable_shuffling")
    )
    assert few.largest.lengths == (4,)


def test_the_plan_sees_the_levelled_micro_batches_of_the_run(configure, tmp_path):
    words = "--per_device_train_batch_size 2 --gradient_accumulation_steps 3 --disable_shuffling"
    found = workload_of(configure(*words.split()))
    assert found.largest.lengths == (30,)  # in file order it would be (5, 30)
    trainer = make_trainer(
        *(tmp_path,),
        **{"train": samples(LENGTHS), "shuffle": False, "per_device_train_batch_size": 2},
        gradient_accumulation_steps=3,
    )
    batches = [[LENGTHS[n] for n in one] for one in trainer.get_train_dataloader().batch_sampler]
    assert [30] in batches


def test_evaluation_counts_when_it_is_asked_for(configure):
    data = data_of(evals=(3, 20, 21))
    words = ("--per_device_eval_batch_size", "2")
    assert workload_of(configure(*words), data).largest_eval is None
    asked = workload_of(configure(*words, "--do_eval", "--val_size", "0.1"), data)
    assert asked.largest_eval.lengths == (3, 20)


def test_a_stream_is_planned_for_full_batches(configure):
    config = configure(
        *("--streaming", "--max_steps", "7", "--cutoff_len", "32"),
        *("--per_device_train_batch_size", "3"),
    )
    found = workload_of(config, replace(data_of(), train=None))
    assert (found.samples, found.steps, found.largest.lengths) == (None, 7, (32, 32, 32))


# ---- memory ----


@pytest.mark.parametrize(
    ("optim", "states"),
    [("adamw_torch", 2), ("sgd", 0), ("adafactor", 0.01), ("lion_32bit", 1), ("adamw_8bit", 0.5)],
)
def test_optimizer_states(configure, optim, states):
    situation = situation_of(configure("--finetuning_type", "full", "--optim", optim))
    sizes = sizes_of(situation, situation.build())
    numbers = sum(p.numel() for p in situation.build().parameters())
    assert sizes.weights == sizes.gradients == sizes.saved == 4 * numbers
    assert sizes.optimizer == pytest.approx(4 * numbers * states)
    assert (sizes.parameters.trainable, sizes.parameters.total) == (numbers, numbers)


@pytest.mark.parametrize(
    ("precision", "stage", "per_weight"),
    [
        (FP32, 1, (4, 4, 12 / 4, 4 / 4)),
        (FP32, 2, (4, 4 / 4, 12 / 4, 4 / 4)),
        (BF16, 1, (2, 2, 12 / 4, 6 / 4)),
        (BF16, 2, (2, 2 / 4, 12 / 4, 6 / 4)),
        (BF16, 3, (2 / 4, 2 / 4, 12 / 4, 6 / 4)),
    ],
    ids=str,
)
def test_zero_spreads_what_it_says(configure, tmp_path, monkeypatch, precision, stage, per_weight):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    config = configure("--finetuning_type", "full", "--deepspeed", str(file))
    situation = replace(situation_of(config), world_size=4, precision=precision)
    model = situation.build()
    sizes = sizes_of(situation, model)
    numbers = sizes.parameters.total
    block = 2 * sum(p.numel() for p in layers_of(model)[0].parameters())
    gathered = 2 * block if stage == 3 else 0
    found = (sizes.weights - gathered, sizes.gradients, sizes.optimizer, sizes.update)
    assert found == pytest.approx(tuple(numbers * size for size in per_weight))
    assert sizes.optimizer_file == 12 * numbers
    alone = replace(situation, world_size=1)
    assert sizes_of(alone, model).weights == numbers * (4 if precision is FP32 else 2)
    monkeypatch.setattr(memory_module, "simulate", lambda *given: Pass(1, 0, 0, 0, 0))
    memory, _, _ = estimate(situation, workload_of(config), baseline=0.0)
    held = sizes.weights + sizes.optimizer
    assert memory.train_peak == held + sizes.gradients + sizes.update


@pytest.mark.parametrize(("stage", "share"), [(1, 1.0), (2, 0.25), (3, 0.25)])
def test_zero_2_keeps_its_share_of_a_gradient_that_arrives(
    configure, tmp_path, monkeypatch, stage, share
):
    seen = []
    monkeypatch.setattr(
        memory_module,
        "simulate",
        lambda build, batches, setting: seen.append(setting) or Pass(0, 0, 0, 0, 0),
    )
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    config = configure("--finetuning_type", "full", "--deepspeed", str(file))
    estimate(replace(situation_of(config), world_size=4), workload_of(config), baseline=0.0)
    assert [setting.gradient_share for setting in seen] == [share]


def test_quantised_weights_are_counted_in_full_and_held_packed(configure):
    config = configure("--quantization_bit", "4")
    situation = situation_of(config)
    plain = situation_of(replace(config, model=replace(config.model, quantization_bit=None)))
    packed, whole = (sizes_of(s, s.build()) for s in (situation, plain))
    assert packed.parameters == whole.parameters
    assert packed.weights < 0.8 * whole.weights


@pytest.mark.parametrize("working", [None, 1.0], ids=["activations", "update"])
@pytest.mark.parametrize(
    ("words", "steps", "passes"),
    [("", 4, 1), ("--gradient_accumulation_steps 2", 2, 2), ("--max_steps 1", 1, 1)],
)
def test_the_training_peak_adds_up(configure, monkeypatch, words, steps, passes, working):
    if working is not None:
        only = Pass(working, 0, 0, 0, 0)
        monkeypatch.setattr(memory_module, "simulate", lambda build, batches, setting: only)
    config = configure(
        *("--finetuning_type", "full", "--per_device_train_batch_size", "2", *words.split()),
        *("--num_train_epochs", "1"),
    )
    workload = workload_of(config)
    memory, work, sizes = estimate(situation_of(config), workload, baseline=1000.0)
    assert (workload.steps, workload.micro_batches) == (steps, passes)
    lasting = 1000 + sizes.weights + (sizes.optimizer if steps > 1 else 0)
    during = work.peak_bytes + (sizes.gradients if passes > 1 else 0)
    update = sizes.gradients + (0 if steps > 1 else sizes.optimizer)
    assert memory.train_peak == lasting + max(during, update)
    assert memory.working == work.peak_bytes > 0


def test_evaluating_holds_weights_and_the_optimizer(configure, monkeypatch):
    monkeypatch.setattr(memory_module, "simulate", lambda *given: Pass(5, 0, 0, 0, 0))
    config = configure("--finetuning_type", "full", "--do_eval", "--val_size", "0.1")
    workload = workload_of(config, data_of(evals=(3,)))
    memory, _, sizes = estimate(situation_of(config), workload, baseline=1000.0)
    assert memory.eval_peak == 1000 + sizes.weights + sizes.optimizer + 5


def test_files_are_in_memory_while_they_are_loaded(configure, model_dir):
    config = configure("--finetuning_type", "full")
    situation, workload = situation_of(config), workload_of(config)
    memory, _, sizes = estimate(situation, workload, baseline=1000.0)
    files = (model_dir / "model.safetensors").stat().st_size
    assert memory.load_peak == 1000 + sizes.weights + files
    scratch = configure("--finetuning_type", "full", "--train_from_scratch")
    memory, _, _ = estimate(situation_of(scratch), workload, baseline=1000.0)
    assert memory.load_peak == 1000 + sizes.weights


def test_the_peak_is_the_worst_of_loading_training_and_evaluating(configure):
    config = configure("--finetuning_type", "full", "--do_eval", "--val_size", "0.1")
    data = data_of(evals=(60,) * 40)
    memory, _, sizes = estimate(situation_of(config), workload_of(config, data), baseline=1000.0)
    logits = 4 * 50 * 8 * 59  # float32, of a batch of 8
    assert memory.eval_peak > 1000 + sizes.weights + sizes.optimizer + logits
    assert memory.peak == max(memory.load_peak, memory.train_peak, memory.eval_peak)
    moved = memory.with_baseline(3000.0)
    for name in ("baseline", "load_peak", "train_peak", "eval_peak", "peak"):
        assert getattr(moved, name) == getattr(memory, name) + 2000
    assert replace(memory, eval_peak=0.0).with_baseline(3000.0).eval_peak == 0
    assert Memory(**vars(memory)).to_dict()["peak_bytes"] == round(memory.peak)


# ---- advice ----


def test_advice_goes_from_harmless_to_harmful(configure):
    config = configure(
        *("--finetuning_type", "full", "--per_device_train_batch_size", "6"),
        *("--cutoff_len", "512"),
    )
    changes = advise(config, limit_bytes=0, peak_of=lambda changed: 1.0)
    assert [change.flags for change in changes] == [
        "--per_device_train_batch_size 3 --gradient_accumulation_steps 2",
        "--per_device_train_batch_size 1 --gradient_accumulation_steps 6",
        "--gradient_checkpointing",
        "--cutoff_len 256",
        "--finetuning_type lora",
        "--quantization_bit 4",
    ]
    assert not any(change.fits for change in changes)


def test_advice_stops_when_it_fits(configure):
    config = configure("--per_device_train_batch_size", "8")
    changes = advise(
        config,
        limit_bytes=2,
        peak_of=lambda changed: changed.train.per_device_train_batch_size,
    )
    assert [change.fits for change in changes] == [False, True]
    assert all(change.flags and change.effect for change in changes)


# ---- gradient checkpointing ----


LONG = (64, 64, 60, 64)


def foretell(config, monkeypatch, *, limit_bytes: float):
    monkeypatch.setattr(forecast_module, "memory_limit", lambda *a, **k: limit_bytes)
    monkeypatch.setattr(forecast_module, "resident_bytes", lambda: 0)
    return forecast_module.forecast(
        config, data=data_of(LONG), tokenizer=tiny_tokenizer(), precision=FP32
    )


def test_activations_are_computed_again_only_where_they_will_not_fit(configure, monkeypatch):
    config = configure("--per_device_train_batch_size", "4")
    roomy = foretell(config, monkeypatch, limit_bytes=1e12)
    peak = roomy.memory.train_peak
    fits = foretell(config, monkeypatch, limit_bytes=1.26 * peak)
    tight = foretell(config, monkeypatch, limit_bytes=1.2 * peak)
    assert not roomy.checkpointing.enabled
    assert not fits.checkpointing.enabled
    assert tight.checkpointing.enabled
    assert "20% are to stay free" in tight.checkpointing.reason
    assert tight.memory.working < 0.9 * fits.memory.working == 0.9 * roomy.memory.working
    assert tight.to_dict()["gradient_checkpointing"]["enabled"]


@pytest.mark.parametrize(
    ("flag", "enabled"),
    [
        ("--gradient_checkpointing", True),
        ("--no_gradient_checkpointing", False),
        ("--disable_gradient_checkpointing", False),
    ],
)
def test_a_given_choice_is_planned_for(configure, monkeypatch, flag, enabled):
    for limit in (1.0, 1e12):
        found = foretell(configure(flag), monkeypatch, limit_bytes=limit)
        assert found.checkpointing.enabled is enabled
        assert "was given" in found.checkpointing.reason


def test_the_run_gets_what_was_planned(configure, monkeypatch):
    monkeypatch.setattr(forecast_module, "memory_limit", lambda *a, **k: 1)
    found = predict_run(
        configure("--do_train"), data=data_of(), tokenizer=tiny_tokenizer(), precision=FP32
    )
    assert found.checkpointing.enabled
    assert "predicted" in found.plan


# ---- disk ----


@pytest.mark.parametrize(
    ("words", "count"),
    [
        ("--save_strategy no", 0),
        ("--save_steps 4", 3),
        ("--save_steps 4 --save_total_limit 1", 2),
        (
            "--save_steps 5 --save_total_limit 1 --load_best_model_at_end --eval_strategy steps"
            " --eval_steps 5 --val_size 0.1",
            3,
        ),
        ("--save_steps 0.25", 4),
        ("--save_steps 100", 1),
        ("--save_strategy epoch", 2),
    ],
)
def test_checkpoints(configure, words, count):
    config = configure(
        *("--per_device_train_batch_size", "2", "--max_steps", "12", "--finetuning_type", "full"),
        *words.split(),
    )
    workload = replace(workload_of(config), steps=12, epochs=2.0)
    situation = situation_of(config)
    sizes = sizes_of(situation, situation.build())
    disk = disk_of(config, workload, sizes)
    assert disk.checkpoints == count
    assert disk.checkpoint_bytes - disk.model_bytes == sizes.optimizer_file
    assert disk.total_bytes == disk.model_bytes + count * disk.checkpoint_bytes
    assert disk.model_bytes - sizes.saved > 500  # the tokenizer and the settings too
    assert disk.free_bytes > 0


# ---- machine ----


def test_this_process_is_measured():
    before = machine.resident_bytes()
    block = np.ones(40 * 2**20, dtype=np.uint8)
    assert machine.resident_bytes() - before > 30e6
    del block
    assert machine.peak_resident_bytes() >= machine.resident_bytes()
    assert machine.memory_limit("cpu", ranks_here=2) < machine.memory_limit("cpu")
    assert machine.memory_limit("cpu") <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_a_container_s_limit_counts(monkeypatch, tmp_path):
    limit = tmp_path / "memory.max"
    limit.write_text("12345\n")
    monkeypatch.setattr(machine, "_CGROUP_LIMITS", (limit,))
    assert machine.memory_limit("cpu") == 12345
    limit.write_text("max\n")
    assert machine.memory_limit("cpu") > 12345


def test_speed_is_measured(monkeypatch):
    monkeypatch.setattr(machine, "_MEASURE_S", 0.01)
    speed = machine.measure_speed("cpu", torch.float32, shape=(64, 64, 64))
    assert speed.flops > 1e6
    assert speed.copied_bytes > 1e6


# ---- time ----


def test_seconds_are_work_over_speed(configure):
    workload = replace(workload_of(configure()), micro_batches=3, mean_tokens=5.0)
    largest = Pass(0, 0, 0, flops=100.0, moved_bytes=40.0)
    worth = 3 * 5 / workload.largest.num_tokens  # of the largest micro-batch
    found = forecast_module._seconds(workload, largest, machine.Speed(10.0, 20.0), 50)
    assert found == pytest.approx(worth * (100 / 10 + 40 / 20) + 50 * 8 * 4 / 20)


# ---- record ----


def test_predicted_and_actual_stand_side_by_side():
    plan = {"predicted": {"peak_bytes": 10**9, "seconds_per_step": 2.0}}
    found = add_actual(plan, StepClock([9.0, 4.0, 4.0]), device_type="cpu")
    assert found["actual"]["seconds_per_step"] == 4.0  # the first step warms up
    assert found["actual"]["first_step_seconds"] == 9.0
    assert found["seconds_ratio"] == 0.5
    assert found["peak_ratio"] == round(1e9 / found["actual"]["peak_bytes"], 4)
    assert add_actual({}, StepClock([1.0]), device_type="cpu") == {}


def test_a_run_that_cannot_be_foretold_is_trained_all_the_same(configure, caplog):
    config = configure("--do_train")
    found = predict_run(config, data=None, tokenizer=tiny_tokenizer(), precision=FP32)
    assert set(found.plan) == {"problem"}
    assert found.checkpointing is None
    assert "actual" in add_actual(found.plan, StepClock([1.0]), device_type="cpu")


def test_a_probe_corrects_by_what_is_beside_the_baseline():
    memory = SimpleNamespace(peak=1100.0, baseline=100.0)
    planned = SimpleNamespace(memory=memory, flops=30.0)
    predicted = {"peak_bytes": 600, "baseline_bytes": 100, "flops_per_step": 10}
    actual = {"peak_bytes": 850, "seconds_per_step": 2.0}
    probe = _correct(planned, {"predicted": predicted, "actual": actual})
    assert (probe.corrected_peak_bytes, probe.corrected_seconds_per_step) == (1600, 6.0)


def test_a_probe_is_two_steps_that_leave_nothing(configure, tmp_path):
    config = configure(
        *("--do_eval", "--val_size", "0.1", "--save_steps", "5", "--learning_rate", "1e-3"),
        *("--tokenized_path", str(tmp_path / "gone"), "--probe", "--report_to", "wandb"),
    )
    found = _settings(config, tmp_path / "run")
    assert not {"do_eval", "tokenized_path", "probe"} & set(found)
    assert (found["max_steps"], found["save_strategy"], found["report_to"]) == (2, "no", "none")
    assert found["output_dir"] == str(tmp_path / "run")
    assert (found["learning_rate"], found["val_size"]) == (1e-3, 0.1)  # as the run will


@pytest.mark.parametrize(("code", "words"), [(-9, "signal 9; memory"), (3, "b | c | d")])
def test_a_probe_that_fails_says_why(configure, monkeypatch, code, words):
    done = subprocess.CompletedProcess([], code, "", "a\nb\n\nc\nd\n")
    monkeypatch.setattr("subprocess.run", lambda *given, **named: done)
    with pytest.raises(LlmtunerError, match=re.escape(words)):
        run_probe(configure(), SimpleNamespace(world_size=1))


def test_a_probe_is_one_process(configure):
    with pytest.raises(ConfigError, match="one process"):
        run_probe(configure(), SimpleNamespace(world_size=2))


def test_no_prediction_no_ratio():
    planned = SimpleNamespace(memory=None, flops=1.0)
    probe = _correct(planned, {"actual": {"peak_bytes": 7, "seconds_per_step": 2.0}})
    assert (probe.corrected_peak_bytes, probe.corrected_seconds_per_step) == (7, 2.0)
