"""Which number type a run takes, and what it refuses."""

import pytest
import torch

from llmtuner.extras.errors import ConfigError
from llmtuner.model import precision as module
from llmtuner.model.precision import Precision, device_has_bf16, pick_precision


@pytest.fixture
def cpu_bf16(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(module.torch.cpu, "get_capabilities", lambda: {"amx_bf16": request.param})


def pick(**changes: object) -> Precision:
    values = {"bf16": None, "fp16": False, "pure_bf16": False, "use_cpu": True} | changes
    return pick_precision(**values)


@pytest.mark.parametrize(
    ("cpu_bf16", "given", "name", "pure", "reason"),
    [
        (True, {}, "bf16", False, "in hardware"),
        (False, {}, "fp32", False, "no bfloat16 units"),
        (True, {"bf16": False}, "fp32", False, "ruled out"),
        (True, {"bf16": True}, "bf16", False, "asked for by bf16"),
        (False, {"bf16": True}, "bf16", False, "fp32 is likely faster"),
        (False, {"pure_bf16": True}, "bf16", True, "asked for by pure_bf16"),
    ],
    indirect=["cpu_bf16"],
)
def test_choice(cpu_bf16: None, given: dict, name: str, pure: bool, reason: str) -> None:
    picked = pick(**given)
    assert (picked.name, picked.pure) == (name, pure)
    assert reason in picked.reason


@pytest.mark.parametrize("cpu_bf16", [True], indirect=True)
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"fp16": True}, "Fix: use --bf16"),
        ({"fp16": True, "bf16": True}, "contradict"),
        ({"pure_bf16": True, "bf16": False}, "contradict"),
    ],
)
def test_refusals(cpu_bf16: None, given: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pick(**given)


def test_trained_weights_are_float32_unless_pure() -> None:
    assert Precision("bf16", pure=False, reason="").trained_dtype == torch.float32
    assert Precision("bf16", pure=True, reason="").trained_dtype == torch.bfloat16


def test_autocast_joins_two_types() -> None:
    layer = torch.nn.Linear(2, 2)
    with Precision("bf16", pure=False, reason="").autocast("cpu"):
        assert layer(torch.ones(1, 2)).dtype == torch.bfloat16
    with Precision("fp32", pure=False, reason="").autocast("cpu"):
        assert layer(torch.ones(1, 2)).dtype == torch.float32


def test_torch_still_names_the_features_we_look_for() -> None:
    features = torch.cpu.get_capabilities()
    if features["architecture"] == "x86_64":
        assert "amx_bf16" in features
        assert "avx512_bf16" in features
    assert device_has_bf16(on_gpu=False) in (True, False)
