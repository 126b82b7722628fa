"""The parts of the selfcheck: what counts as a difference, how steps are laid out, what is off."""

import math
from itertools import chain
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tiny_training import samples, tiny_llama, tiny_mixtral

from llmtuner.extras.errors import LayoutError, StorageError
from llmtuner.train import selfcheck_layouts
from llmtuner.train.selfcheck import SelfcheckReport, plan_layouts
from llmtuner.train.selfcheck_compare import (
    GradientProbe,
    StepResult,
    TensorDifference,
    replace_gradients,
)
from llmtuner.train.selfcheck_layouts import switch_off_randomness


def step(
    *, loss: float = 2.0, norm: float = 4.0, tensor: float = 0.0, late: int = 0, of: float = 2.0
) -> StepResult:
    worst = TensorDifference("layers.1.weight", 1.5, 1.0, tensor)
    return StepResult("packed", 3, loss, of, norm, 4.0, worst, late)


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (step(), None),
        (step(loss=2 * (1 + 0.9e-5), norm=4 * (1 - 0.9e-5), tensor=0.9e-4), None),
        (step(loss=2 * (1 + 1.1e-5)), "packed, step 3: loss 2.000022, reference 2, relative"),
        (step(loss=math.nan), "loss nan"),
        (step(norm=4 * (1 - 1.1e-5)), "global gradient norm 3.999956, reference 4,"),
        (step(tensor=1.1e-4), "gradient of layers.1.weight (norm) 1.5, reference 1,"),
        (step(tensor=math.inf), "gradient of layers.1.weight"),
        (step(late=2), "positions do not restart with every sample in 2 forward passes"),
        (step(loss=1e-3 + 0.9e-6, of=1e-3), None),  # a small loss: rounding of the logits
        (step(loss=1e-3 + 1.1e-6, of=1e-3), "loss 0.0010011"),
    ],
)
def test_what_differs_is_named_with_both_values(result: StepResult, words: str | None) -> None:
    faults = result.faults()
    assert [words in fault for fault in faults] == [True] * (words is not None)
    report = SelfcheckReport([step(), result], {}, 1.0)
    assert report.to_dict()["is_equal"] == (words is None)
    if words is None:
        assert result.excess <= 1
        report.check()
    else:
        assert result.excess > 1
        with pytest.raises(LayoutError, match="changes what is learned: layout packed, step 3"):
            report.check()


def test_gradients_are_compared_one_by_one_and_replaced(tmp_path: Path) -> None:
    model = torch.nn.ParameterDict(
        {name: torch.nn.Parameter(torch.ones(4)) for name in ("same", "near", "none", "gone")}
    )
    model["frozen"] = torch.nn.Parameter(torch.ones(4), requires_grad=False)
    for name in ("same", "near", "gone"):
        model[name].grad = torch.ones(4)
    model["near"].grad[0] += 0.5
    expected = {"same": torch.ones(4), "near": torch.ones(4), "gone": torch.full((4,), 0.9)}
    save_file(expected, tmp_path / "file")
    worst = replace_gradients(model, tmp_path / "file", floor=0.1)
    assert (worst.name, worst.expected_norm, worst.difference) == ("near", 2.0, 0.25)
    assert model["none"].grad is None
    for name, gradient in expected.items():
        assert torch.equal(model[name].grad, gradient)
    # What is missing in the file was zero there; the floor keeps the quotient finite.
    model["none"].grad = torch.full((4,), 1e-6)
    worst = replace_gradients(model, tmp_path / "file", floor=0.1)
    assert (worst.name, worst.difference) == ("none", pytest.approx(2e-5))
    model["gone"].grad[0] = math.nan
    assert replace_gradients(model, tmp_path / "file", floor=0.1).name == "gone"


def test_gradients_that_cannot_be_written_end_the_check(tmp_path: Path) -> None:
    model = tiny_llama()
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    probe = GradientProbe("1 x 8", tmp_path / "missing", None)
    state = type("State", (), {"global_step": 0})()
    with pytest.raises(StorageError, match="cannot be written"):
        probe.on_pre_optimizer_step(None, state, None, model=model)


@pytest.mark.parametrize("batch", [2, 6, 8, 12])
def test_every_layout_has_the_samples_of_the_step(batch: int) -> None:
    layouts, skipped = plan_layouts(batch, is_flat=True)
    for layout in layouts:
        ranks = max(layout.num_processes, 1)
        assert layout.micro_batch_size * layout.accumulation_steps * ranks == batch
    assert not skipped
    assert layouts[0].name == f"1 x {batch}"
    padded, skipped = plan_layouts(batch, is_flat=False)
    assert {layout.name for layout in layouts} - {layout.name for layout in padded} == set(skipped)


@pytest.mark.parametrize(("capacity", "expected"), [(30, 6), (1000, 4), (5, 12)])
def test_each_step_is_packed_on_its_own(capacity: int, expected: int) -> None:
    lengths = [9, 4, 7, 3, 12, 8, 2, 2, 2, 2, 2, 2, 1]
    steps = [[0] * 6, [0] * 6, [0]]
    packs = selfcheck_layouts._packs_of(samples(lengths), steps, capacity=capacity)
    assert len(packs) % len(steps) == 0
    each = len(packs) // len(steps)
    numbers = [sorted(chain(*packs[i : i + each])) for i in range(0, len(packs), each)]
    assert numbers == [list(range(6)), list(range(6, 12)), [12]]
    assert len([group for group in packs if group]) >= 5
    assert max(sum(lengths[n] for n in group) for group in packs) <= max(capacity, 12, 22)
    assert len(packs) >= expected


def test_everything_random_is_switched_off() -> None:
    model = tiny_llama()
    for module in model.modules():
        if "attention_dropout" in vars(module):
            module.attention_dropout = 0.5
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], lora_dropout=0.5))
    model.train()
    assert switch_off_randomness(model) == ["attention_dropout", "dropout"]
    assert switch_off_randomness(model) == []
    assert switch_off_randomness(tiny_mixtral()) == ["balance of experts"]
    batch = {"input_ids": torch.arange(2, 12)[None], "position_ids": torch.arange(10)[None]}
    batch["cu_seq_lens_q"] = torch.tensor([0, 10], dtype=torch.int32)
    first, second = (model(**batch, use_cache=False).logits for _ in range(2))
    assert torch.equal(first, second)
