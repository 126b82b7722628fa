"""The model that generates is the base with its adapters."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tiny_models import make_adapter
from transformers import AutoModelForCausalLM

from llmtuner.extras.errors import ConfigError
from llmtuner.hparams.model import ModelArgs
from llmtuner.model import inference
from llmtuner.model.inference import load_for_inference, pick_inference_dtype

ArgsOf = Callable[..., ModelArgs]
IDS = torch.tensor([[5, 60, 7, 200, 31]])


@pytest.mark.parametrize("bits", [None, 4])
def test_adapter_takes_part(
    bits: int | None, tiny_model: Path, tmp_path: Path, args_of: ArgsOf
) -> None:
    folder = make_adapter(tiny_model, tmp_path / "adapter")
    args = args_of(
        tiny_model,
        adapter_name_or_path=(str(folder),),
        infer_dtype="float32",
        quantization_bit=bits,
    )
    model = load_for_inference(args, use_cpu=True)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        found = model(input_ids=IDS).logits
        without = base(input_ids=IDS).logits
        expected = PeftModel.from_pretrained(base, folder)(input_ids=IDS).logits
    assert not model.training
    assert isinstance(model, PeftModel) == (bits is not None)
    error = (found - expected).norm() / (without - expected).norm()
    assert error < (1e-4 if bits is None else 0.7)


def test_quantised_base_takes_one_adapter(
    tiny_model: Path, tmp_path: Path, args_of: ArgsOf
) -> None:
    folder = str(make_adapter(tiny_model, tmp_path / "adapter"))
    args = args_of(tiny_model, adapter_name_or_path=(folder, folder), quantization_bit=4)
    with pytest.raises(ConfigError, match="one adapter"):
        load_for_inference(args, use_cpu=True)


@pytest.mark.parametrize(
    ("asked", "has_bf16", "on_gpu", "expected"),
    [
        ("float16", True, False, torch.float16),
        ("auto", True, False, torch.bfloat16),
        ("auto", False, False, torch.float32),
        ("auto", False, True, torch.float16),
    ],
)
def test_dtype(
    asked: str,
    has_bf16: bool,
    on_gpu: bool,
    expected: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inference, "device_has_bf16", lambda *, on_gpu: has_bf16)
    assert pick_inference_dtype(asked, on_gpu=on_gpu) == expected
