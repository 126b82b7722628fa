"""When activations are recomputed, and why (that gradients stay: test_attention)."""

import pytest

from llmtuner.hparams.model import ModelArgs
from llmtuner.model.gradient_checkpointing import pick_gradient_checkpointing


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
