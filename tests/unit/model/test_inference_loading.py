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


def test_adapters_are_merged(tiny_model: Path, tmp_path: Path, args_of: ArgsOf) -> None:
    folder = make_adapter(tiny_model, tmp_path / "adapter")
    args = args_of(tiny_model, adapter_name_or_path=(str(folder),), infer_dtype="float32")
    model = load_for_inference(args, use_cpu=True)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        found = model(input_ids=IDS).logits
        expected = PeftModel.from_pretrained(base, folder)(input_ids=IDS).logits
    assert not model.training
    assert not isinstance(model, PeftModel)
    assert (found - expected).abs().max() < 1e-4


def test_adapter_stays_beside_quantised_weights(
    tiny_model: Path, tmp_path: Path, args_of: ArgsOf
) -> None:
    pytest.importorskip("bitsandbytes")
    folder = make_adapter(tiny_model, tmp_path / "adapter")
    options = {"infer_dtype": "float32", "quantization_bit": 8}
    plain = load_for_inference(args_of(tiny_model, **options), use_cpu=True)
    args = args_of(tiny_model, adapter_name_or_path=(str(folder),), **options)
    model = load_for_inference(args, use_cpu=True)
    assert isinstance(model, PeftModel)
    assert not model.training
    with torch.no_grad():
        found, base = model(input_ids=IDS).logits, plain(input_ids=IDS).logits
        with model.disable_adapter():
            assert torch.equal(model(input_ids=IDS).logits, base)
    assert (found - base).abs().max() > 0.1


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
