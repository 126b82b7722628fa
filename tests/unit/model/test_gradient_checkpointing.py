"""When activations are recomputed, and why (that gradients stay: test_attention)."""

import pytest

from llmtuner.hparams.model import ModelArgs
from llmtuner.model.gradient_checkpointing import MemoryForecast, pick_gradient_checkpointing


@pytest.mark.parametrize(
    ("disabled", "asked", "device", "expected"),
    [
        (False, None, "cpu", False),
        (False, None, "cuda", True),
        (False, True, "cpu", True),
        (False, False, "cuda", False),
        (True, None, "cuda", False),
        (True, True, "cpu", False),
    ],
)
def test_choice(disabled: bool, asked: bool | None, device: str, expected: bool) -> None:
    args = ModelArgs(disable_gradient_checkpointing=disabled)
    choice = pick_gradient_checkpointing(args, asked=asked, device_type=device)
    assert choice.enabled is expected
    assert choice.reason


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("peak", "expected"), [(79.0, False), (80.0, False), (81.0, True)])
def test_memory_decides_with_a_margin(device: str, peak: float, expected: bool) -> None:
    memory = MemoryForecast(peak * 1e9, 100e9)
    choice = pick_gradient_checkpointing(ModelArgs(), asked=None, device_type=device, memory=memory)
    assert choice.enabled is expected
    assert f"{peak:.2f} GB of the 100.00 GB" in choice.reason


@pytest.mark.parametrize(
    ("disabled", "asked", "peak", "expected"),
    [(False, True, 1.0, True), (False, False, 1e12, False), (True, None, 1e12, False)],
)
def test_what_was_given_is_obeyed_whatever_the_memory(
    disabled: bool, asked: bool | None, peak: float, expected: bool
) -> None:
    args = ModelArgs(disable_gradient_checkpointing=disabled)
    choice = pick_gradient_checkpointing(
        args, asked=asked, device_type="cuda", memory=MemoryForecast(peak, 1e10)
    )
    assert choice.enabled is expected
    assert "was given" in choice.reason
