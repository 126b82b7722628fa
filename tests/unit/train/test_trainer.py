"""The trainer's loss and evaluation are those of a token-by-token reference, in every layout."""

import copy
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_parts import manifest_of
from tiny_training import (
    COLLATORS,
    make_trainer,
    reference_loss,
    samples,
    tiny_llama,
    tiny_mixtral,
)
from transformers import TrainerCallback

from llmtuner.data.packing import pack
from llmtuner.extras.errors import NonFiniteError
from llmtuner.train.checkpoint import verify_checkpoint
from llmtuner.train.trainer import LlmTrainer

LENGTHS = [5, 9, 2, 12, 7, 3, 8, 6, 4, 11]
LAYOUTS = ("flat", "padded")


def ids_of(loader: Iterable[dict[str, Any]]) -> list[list[int]]:
    return [batch["input_ids"].flatten().tolist() for batch in loader]


def weights_of(trainer: LlmTrainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


# ---- loss ----


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_loss_is_the_mean_over_trained_tokens(tmp_path: Path, layout: str) -> None:
    data = samples(LENGTHS)
    trainer = make_trainer(tmp_path, train=data, layout=layout)
    loss = trainer.compute_loss(trainer.model, COLLATORS[layout](list(data)))
    total, num_trained = reference_loss(trainer.model, list(data))
    assert loss.item() == pytest.approx(total / num_trained, rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_losses_of_the_micro_batches_add_up_to_that_of_the_step(
    tmp_path: Path, layout: str
) -> None:
    rows = list(samples(LENGTHS))
    trainer = make_trainer(tmp_path, train=samples(LENGTHS), layout=layout)
    batches = [COLLATORS[layout](rows[:3]), COLLATORS[layout](rows[3:]), COLLATORS[layout]([])]
    number = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
    total, num_trained = reference_loss(trainer.model, rows)
    assert int(number) == num_trained
    parts = [
        trainer.compute_loss(trainer.model, batch, num_items_in_batch=number) for batch in batches
    ]
    assert sum(part.item() for part in parts) == pytest.approx(total / num_trained, rel=1e-5)
    assert parts[-1].item() == 0.0


def test_the_tokens_that_were_seen_are_counted(tmp_path: Path) -> None:
    rows = list(samples(LENGTHS))
    trainer = make_trainer(tmp_path, train=samples(LENGTHS))
    for part in (rows[:4], rows[4:]):
        trainer._get_num_items_in_batch([COLLATORS["flat"](part)], torch.device("cpu"))
    assert trainer.state.num_input_tokens_seen == sum(LENGTHS)
    assert trainer.supervised_tokens_seen == reference_loss(trainer.model, rows)[1]


def test_a_step_without_any_trained_token_does_not_divide_by_zero(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, train=samples(LENGTHS))
    assert int(trainer._get_num_items_in_batch([COLLATORS["flat"]([])], torch.device("cpu"))) == 1


def test_label_smoothing_mixes_in_the_mean_over_the_vocabulary(tmp_path: Path) -> None:
    data = samples([6])
    trainer = make_trainer(tmp_path, train=data, label_smoothing_factor=0.2)
    batch = COLLATORS["flat"](list(data))
    loss = trainer.compute_loss(trainer.model, batch)
    logits = trainer.model(
        **{name: value for name, value in batch.items() if name not in ("kept", "targets")}
    ).logits[0, batch["kept"]]
    log_probs = logits.log_softmax(-1)
    exact = -log_probs.gather(1, batch["targets"][:, None]).mean()
    expected = 0.8 * exact - 0.2 * log_probs.mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mixture_of_experts_adds_its_balance_once_a_step(tmp_path: Path, layout: str) -> None:
    data = samples([6, 9])
    model = tiny_mixtral(layout)
    trainer = make_trainer(tmp_path, train=data, model=model, layout=layout)
    trainer.current_gradient_accumulation_steps = 2
    batch = COLLATORS[layout](list(data))
    loss, outputs = trainer.compute_loss(model, batch, return_outputs=True)
    assert outputs["aux_loss"] > 0
    total, num_trained = reference_loss(model, list(data))
    expected = total / num_trained + 0.5 * outputs["aux_loss"].item() / 2
    assert loss.item() == pytest.approx(expected, rel=1e-4)


# ---- steps ----


@pytest.mark.parametrize(
    ("layout", "batch", "accumulation"), [("flat", 4, 2), ("flat", 2, 4), ("padded", 8, 1)]
)
def test_one_step_is_the_same_in_every_layout(
    tmp_path: Path, layout: str, batch: int, accumulation: int
) -> None:
    def train(layout: str, batch: int, accumulation: int) -> LlmTrainer:
        trainer = make_trainer(
            tmp_path,
            train=samples(LENGTHS),
            layout=layout,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=3,
        )
        trainer.train()
        return trainer

    golden, other = train("flat", 8, 1), train(layout, batch, accumulation)
    for (name, ours), theirs in zip(
        golden.model.state_dict().items(), other.model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=name)
    losses = [
        [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        for trainer in (golden, other)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert len(losses[0]) == 3


def test_a_step_is_dealt_out_in_level_micro_batches(tmp_path: Path) -> None:
    lengths = [30, 3, 28, 2, 4, 29, 3, 31] * 2

    def tokens(**how: Any) -> list[int]:
        trainer = make_trainer(
            tmp_path, train=samples(lengths), per_device_train_batch_size=2, **how
        )
        loader = trainer.get_train_dataloader()
        return [batch["input_ids"].numel() for batch in loader]

    assert max(tokens(gradient_accumulation_steps=1)) > 45
    assert max(tokens(gradient_accumulation_steps=4)) < 40
    assert sum(tokens(gradient_accumulation_steps=4)) == sum(lengths)


def test_padded_batches_and_packs_are_not_levelled(tmp_path: Path) -> None:
    data, how = samples(LENGTHS), {"per_device_train_batch_size": 2}
    plain = make_trainer(tmp_path, train=data, shuffle=False, layout="padded", **how)
    dealt = make_trainer(
        *(tmp_path,),
        **{"train": data, "shuffle": False, "layout": "padded", "gradient_accumulation_steps": 3},
        **how,
    )
    packed = make_trainer(
        *(tmp_path,),
        **{"train": data, "shuffle": False, "packs": [[n] for n in range(len(LENGTHS))]},
        **{"gradient_accumulation_steps": 3, **how},
    )
    numbers = [list(t.get_train_dataloader().batch_sampler) for t in (plain, dealt, packed)]
    assert numbers[0][:4] == numbers[1][:4] == numbers[2][:4] == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_packed_samples_have_the_loss_of_separate_ones(tmp_path: Path) -> None:
    data = samples(LENGTHS)
    packs = pack(LENGTHS, capacity=16, seed=0)
    assert len(packs) < len(LENGTHS)
    trainer = make_trainer(
        tmp_path, train=data, packs=packs, per_device_train_batch_size=len(packs)
    )
    (batch,) = trainer.get_train_dataloader()
    loss = trainer.compute_loss(trainer.model, batch)
    total, num_trained = reference_loss(trainer.model, list(data))
    assert batch["input_ids"].numel() == sum(LENGTHS)
    assert loss.item() == pytest.approx(total / num_trained, rel=1e-5)


def test_the_first_loss_in_the_log_is_that_of_the_first_step(tmp_path: Path) -> None:
    data = samples(LENGTHS)
    trainer = make_trainer(
        tmp_path, train=data, shuffle=False, per_device_train_batch_size=4, max_steps=1
    )
    before = copy.deepcopy(trainer.model)
    trainer.train()
    total, num_trained = reference_loss(before, list(data)[:4])
    logged = trainer.state.log_history[0]["loss"]
    assert logged == pytest.approx(total / num_trained, rel=1e-4)


# ---- batches ----


def test_without_shuffling_the_order_is_that_of_the_file(tmp_path: Path) -> None:
    data = samples(LENGTHS)
    for how in ({"shuffle": False}, {"train_sampling_strategy": "sequential"}):
        trainer = make_trainer(tmp_path, train=data, per_device_train_batch_size=1, **how)
        assert ids_of(trainer.get_train_dataloader()) == list(data["input_ids"])


def test_every_sample_is_trained_once_an_epoch_in_another_order(tmp_path: Path) -> None:
    data = samples(LENGTHS)
    trainer = make_trainer(tmp_path, train=data, per_device_train_batch_size=1)
    loader = trainer.get_train_dataloader()
    orders = []
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        orders.append(ids_of(loader))
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(data["input_ids"])
    assert orders[0] != orders[1]


def test_the_order_follows_the_data_seed_and_else_the_seed(tmp_path: Path) -> None:
    data = samples(LENGTHS)

    def order(**seeds: int) -> list[list[int]]:
        trainer = make_trainer(tmp_path, train=data, per_device_train_batch_size=1, **seeds)
        return ids_of(trainer.get_train_dataloader())

    assert order(seed=1) == order(seed=2, data_seed=1) != order(seed=2)
    assert order(seed=1, data_seed=0) == order(seed=0)


def test_samples_of_like_length_can_share_a_batch(tmp_path: Path) -> None:
    lengths = [3, 12] * 8
    trainer = make_trainer(
        tmp_path,
        train=samples(lengths),
        per_device_train_batch_size=4,
        train_sampling_strategy="group_by_length",
    )
    for batch in trainer.get_train_dataloader():
        assert len(set(batch["cu_seq_lens_q"].diff().tolist())) == 1


# ---- not finite (F11) ----


class PoisonAt(TrainerCallback):
    """Makes one weight NaN before a step, and keeps the weights as they then are."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.seen: dict[str, torch.Tensor] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            model = kwargs["model"]
            model.lm_head.weight.data[0, 0] = math.nan
            self.seen = {name: value.clone() for name, value in model.state_dict().items()}


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, train=samples(LENGTHS), max_steps=5, save_steps=1)
    poison = PoisonAt(3)
    trainer.add_callback(poison)
    with pytest.raises(NonFiniteError, match="The loss of step 3 is not finite") as caught:
        trainer.train()
    assert caught.value.exit_code == 5
    assert math.isnan(float(str(caught.value.got)))
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(value, poison.seen[name], rtol=0, atol=0, equal_nan=True)
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_stops_before_the_weights_change(
    tmp_path: Path, value: float
) -> None:
    trainer = make_trainer(tmp_path, train=samples(LENGTHS), max_steps=5)
    before = weights_of(trainer)
    parameter = trainer.model.model.layers[0].mlp.up_proj.weight
    parameter.register_hook(lambda gradient: torch.full_like(gradient, value))
    with pytest.raises(NonFiniteError, match="The gradient norm of step 1 is not finite"):
        trainer.train()
    for name, weight in trainer.model.state_dict().items():
        torch.testing.assert_close(weight, before[name], rtol=0, atol=0)


def test_a_bad_gradient_stops_the_run_without_clipping_too(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, train=samples(LENGTHS), max_steps=1, max_grad_norm=0.0)
    parameter = trainer.model.model.layers[0].mlp.up_proj.weight
    parameter.register_hook(lambda gradient: torch.full_like(gradient, math.nan))
    with pytest.raises(NonFiniteError):
        trainer.train()


# ---- evaluation ----


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", [1, 3, 16])
def test_evaluation_is_the_mean_over_all_trained_tokens(
    tmp_path: Path, layout: str, batch: int
) -> None:
    data = samples(LENGTHS)
    trainer = make_trainer(
        tmp_path, evals={"": data}, layout=layout, per_device_eval_batch_size=batch
    )
    metrics = trainer.evaluate()
    total, num_trained = reference_loss(trainer.model, list(data))
    assert metrics["eval_loss"] == pytest.approx(total / num_trained, rel=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(total / num_trained), rel=1e-4)
    assert metrics["eval_supervised_tokens"] == num_trained
    assert "eval_accuracy" not in metrics


def test_accuracy_is_the_share_of_right_guesses(tmp_path: Path) -> None:
    data = samples(LENGTHS)
    model = tiny_llama("padded")
    rows = []
    num_right = 0
    for number, row in enumerate(data):
        guesses = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].argmax(-1).tolist()
        # teach every second sample what the model says anyway
        wanted = [0, *guesses[:-1]] if number % 2 else [0] * len(guesses)
        num_right += sum(a == b for a, b in zip(wanted[1:], guesses[:-1], strict=True))
        rows.append({**row, "labels": wanted})
    trainer = make_trainer(
        tmp_path,
        evals={"": data.from_list(rows)},
        model=model,
        layout="padded",
        with_accuracy=True,
    )
    num_tokens = sum(LENGTHS) - len(LENGTHS)
    assert trainer.evaluate()["eval_accuracy"] == pytest.approx(num_right / num_tokens)
    assert 0 < num_right < num_tokens


def test_each_set_is_evaluated_under_its_name(tmp_path: Path) -> None:
    sets = {"a": samples([5, 6]), "b/c": samples([7], seed=1)}
    trainer = make_trainer(tmp_path, evals=sets)
    metrics = trainer.evaluate()
    sums = [0.0, 0.0]
    for name, data in sets.items():
        total, num_trained = reference_loss(trainer.model, list(data))
        assert metrics[f"eval_{name}_loss"] == pytest.approx(total / num_trained, rel=1e-5)
        sums = [sums[0] + total, sums[1] + num_trained]
    assert metrics["eval_loss"] == pytest.approx(sums[0] / sums[1], rel=1e-5)


def test_evaluation_does_not_change_training(tmp_path: Path) -> None:
    def train(**values: Any) -> LlmTrainer:
        evals = {"": samples([5, 6], seed=3)}
        trainer = make_trainer(tmp_path, train=samples(LENGTHS), evals=evals, **values)
        trainer.train()
        return trainer

    plain = train(max_steps=3)
    evaluated = train(max_steps=3, eval_strategy="steps", eval_steps=1)
    assert sum("eval_loss" in entry for entry in evaluated.state.log_history) == 3
    for ours, theirs in zip(plain.model.parameters(), evaluated.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


# ---- saving ----


def test_a_checkpoint_of_the_trainer_is_whole_and_holds_no_pickled_arguments(
    tmp_path: Path,
) -> None:
    data = samples(LENGTHS)
    trainer = make_trainer(tmp_path, train=data, max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    folder = tmp_path / "checkpoint-2"
    assert verify_checkpoint(folder) == []
    manifest = manifest_of(folder)
    assert manifest["progress"]["tokens_seen"] == trainer.state.num_input_tokens_seen > 0
    assert manifest["progress"]["supervised_tokens_seen"] == trainer.supervised_tokens_seen
    needed = {"model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"}
    assert needed <= set(manifest["files"])
    assert "training_args.bin" not in manifest["files"]


def test_a_checkpoint_of_the_model_only_has_no_optimizer(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        train=samples(LENGTHS),
        max_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_only_model=True,
    )
    trainer.train()
    files = set(manifest_of(tmp_path / "checkpoint-1")["files"])
    assert "model.safetensors" in files
    assert not files & {"optimizer.pt", "scheduler.pt", "rng_state.pth"}


def test_resumed_training_ends_with_the_weights_of_uninterrupted_training(tmp_path: Path) -> None:
    def train(name: str, steps: int, resume: Path | None = None) -> LlmTrainer:
        trainer = make_trainer(
            tmp_path / name,
            train=samples(LENGTHS),
            per_device_train_batch_size=4,
            max_steps=steps,
            save_strategy="steps",
            save_steps=2,
            optim="adamw_torch",
        )
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        return trainer

    golden = train("golden", 4)
    train("run", 2)
    resumed = train("run", 4, tmp_path / "run" / "checkpoint-2")
    for ours, theirs in zip(golden.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
