"""What a described device computes with; no GPU and none of the libraries has to be here."""

import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, Qwen3NextConfig

from llmtuner.extras.errors import ConfigError, MissingExtraError
from llmtuner.model import liger as liger_module
from llmtuner.model.attention import (
    OURS,
    VARLEN,
    VARLEN_CUDA,
    pick_attention,
    register_varlen,
    torch_varlen_attention,
    uses_flat_batches,
    varlen_attention,
)
from llmtuner.model.device import (
    FLASH_ATTN,
    LIGER_KERNEL,
    TORCH_VARLEN,
    Device,
    describe_device,
    has_torch_varlen,
)
from llmtuner.model.liger import pick_liger, use_liger

FLASH = "flash_attention_2"
EVERYTHING = frozenset({FLASH_ATTN, TORCH_VARLEN, LIGER_KERNEL})
CPU = Device("cpu", libraries=EVERYTHING)
HOPPER = Device("cuda", (9, 0), EVERYTHING)
AMPERE = Device("cuda", (8, 0), frozenset({TORCH_VARLEN}))
TURING = Device("cuda", (7, 5), EVERYTHING)
BARE = Device("cuda", (9, 0))
BF16, FP32 = torch.bfloat16, torch.float32
SHAPE: Mapping[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llama(**changes: Any) -> PreTrainedConfig:
    return LlamaConfig(**{**SHAPE, **changes})


# ---- attention ----


@pytest.mark.parametrize(
    ("flash_attn", "device", "dtype", "expected"),
    [
        ("auto", HOPPER, BF16, FLASH),
        ("auto", AMPERE, BF16, VARLEN_CUDA),
        ("auto", AMPERE, torch.float16, VARLEN_CUDA),
        ("auto", BARE, BF16, VARLEN),
        ("auto", TURING, torch.float16, VARLEN),
        ("auto", HOPPER, FP32, VARLEN),
        ("auto", CPU, BF16, VARLEN),
        ("fa2", HOPPER, BF16, FLASH),
        ("fa2", AMPERE, BF16, VARLEN_CUDA),
        ("sdpa", HOPPER, BF16, VARLEN_CUDA),
        ("sdpa", HOPPER, FP32, VARLEN),
        ("sdpa", CPU, BF16, VARLEN),
        ("off", HOPPER, BF16, "eager"),
    ],
)
def test_attention(flash_attn: str, device: Device, dtype: torch.dtype, expected: str) -> None:
    assert pick_attention(flash_attn, device, config=llama(), dtype=dtype) == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"head_dim": 256}, FLASH),
        ({"head_dim": 320}, VARLEN),
        ({"attention_dropout": 0.1}, FLASH),
    ],
)
def test_the_kernels_take_some_heads_only(changes: dict[str, Any], expected: str) -> None:
    assert pick_attention("auto", HOPPER, config=llama(**changes)) == expected


@pytest.mark.parametrize(
    "changes", [{"head_dim": 12}, {"attention_dropout": 0.1}, {"head_dim": 320}]
)
def test_what_torchs_own_kernel_cannot_do_goes_sample_by_sample(changes: dict[str, Any]) -> None:
    assert pick_attention("sdpa", HOPPER, config=llama(**changes)) == VARLEN


@pytest.mark.parametrize("flash_attn", ["auto", "fa2", "sdpa"])
def test_a_model_that_needs_padding_never_gets_a_kernel_for_flat_batches(flash_attn: str) -> None:
    chosen = pick_attention(flash_attn, HOPPER, config=Qwen3NextConfig())
    assert not uses_flat_batches(chosen)


@pytest.mark.parametrize(
    ("device", "dtype", "why"),
    [
        (CPU, BF16, "not cpu"),
        (TURING, BF16, "Ampere"),
        (AMPERE, BF16, "flash-attn is not installed"),
        (HOPPER, FP32, "not in float32"),
    ],
)
def test_flash_attention_that_was_asked_for_and_is_not_there_is_said(
    device: Device, dtype: torch.dtype, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING", logger="llmtuner"):
        pick_attention("fa2", device, config=llama(), dtype=dtype)
    assert why in caplog.text


def test_a_cpu_is_described_without_looking_for_libraries() -> None:
    assert describe_device("cpu") == Device("cpu")


# ---- torch's kernel for samples end to end ----


def _by_definition(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """Do what torch's documentation says of `varlen_attn`, [T, H, D], row by row."""
    assert query.dtype == key.dtype == value.dtype == BF16
    assert enable_gqa == (query.shape[1] != key.shape[1])
    lengths = cu_seq_q.diff()
    assert max_q == max_k == int(lengths.max())
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    left, right = window_size
    group = query.shape[1] // key.shape[1]
    output = torch.empty(*query.shape[:2], value.shape[2])
    for start, end in zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), strict=True):
        for place in range(start, end):
            first = start if left < 0 else max(start, place - left)
            last = end if right < 0 else min(end, place + right + 1)
            for head in range(query.shape[1]):
                keys = key[first:last, head // group].float()
                scores = keys @ query[place, head].float() * (scale or keys.shape[1] ** -0.5)
                output[place, head] = scores.softmax(0) @ value[first:last, head // group].float()
    return output.to(query.dtype)


@pytest.fixture
def torchs_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.nn.attention.varlen as module

    monkeypatch.setattr(module, "varlen_attn", _by_definition)


def _heads(*, kv_heads: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return tuple(torch.randn(1, heads, 21, 8).to(dtype) for heads in (4, kv_heads, kv_heads))


BORDERS = torch.tensor([0, 3, 14, 21], dtype=torch.int32)


@pytest.mark.skipif(not has_torch_varlen(), reason="this torch has no such kernel")
@pytest.mark.usefixtures("torchs_kernel")
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("scaling", [None, 0.7])
def test_torchs_kernel_is_asked_for_what_ours_computes(
    window: int | None, kv_heads: int, scaling: float | None
) -> None:
    heads = _heads(kv_heads=kv_heads, dtype=BF16)
    how: dict[str, Any] = {"scaling": scaling, "sliding_window": window, "cu_seq_lens_q": BORDERS}
    one_by_one, _ = varlen_attention(nn.Module(), *heads, None, **how)
    at_once, _ = torch_varlen_attention(nn.Module(), *heads, None, **how, max_length_q=11)
    assert at_once.shape == one_by_one.shape == (1, 21, 4, 8)
    torch.testing.assert_close(at_once, one_by_one, rtol=2e-2, atol=1e-2)


@pytest.mark.skipif(not has_torch_varlen(), reason="this torch has no such kernel")
def test_torchs_kernel_gets_what_autocast_says(torchs_kernel: None) -> None:
    heads = _heads(kv_heads=2, dtype=FP32)
    with torch.autocast("cpu", BF16):
        output, _ = torch_varlen_attention(
            nn.Module(), *heads, None, cu_seq_lens_q=BORDERS, max_length_q=11
        )
    assert output.dtype == BF16


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_what_the_kernel_cannot_take_is_computed_by_ours(dropout: float) -> None:
    dtype = FP32 if not dropout else BF16
    heads = _heads(kv_heads=2, dtype=dtype)
    outputs = []
    for attention in (varlen_attention, torch_varlen_attention):
        torch.manual_seed(1)
        how: dict[str, Any] = {"dropout": dropout, "cu_seq_lens_q": BORDERS, "max_length_q": 11}
        outputs.append(attention(nn.Module(), *heads, None, **how)[0])
    assert torch.equal(*outputs)


def test_transformers_knows_both(recwarn: pytest.WarningsRecorder) -> None:
    register_varlen()
    for name in OURS:
        model = LlamaForCausalLM._from_config(llama(), attn_implementation=name)
        assert model.config._attn_implementation == name


# ---- Liger ----


@pytest.mark.parametrize(
    ("device", "asked", "enabled", "why"),
    [
        (HOPPER, True, True, "was given"),
        (HOPPER, False, False, "not given"),
        (CPU, True, False, "GPUs, not on cpu"),
    ],
)
def test_liger(device: Device, asked: bool, enabled: bool, why: str) -> None:
    choice = pick_liger(device, asked=asked)
    assert choice.enabled is enabled
    assert why in choice.reason


def test_ligers_losses_stay_out() -> None:
    choice = pick_liger(HOPPER, asked=True, settings={"rope": False})
    assert choice.settings == {
        "rope": False,
        "cross_entropy": False,
        "fused_linear_cross_entropy": False,
    }
    with pytest.raises(ConfigError, match="computed in chunks"):
        pick_liger(HOPPER, asked=True, settings={"fused_linear_cross_entropy": True})


def test_without_the_library_one_line_names_the_extra() -> None:
    with pytest.raises(MissingExtraError) as caught:
        pick_liger(BARE, asked=True)
    assert "pip install 'llmtuner[liger]'" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def ligers_library(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Stand in for the library; returns what is applied, in order."""
    calls: list[dict[str, Any]] = []
    patching = ModuleType("liger_kernel.transformers.monkey_patch")
    vars(patching)["MODEL_TYPE_TO_APPLY_LIGER_FN"] = {"llama": None}
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, patching.__name__, patching)
    monkeypatch.setattr(
        liger_module, "apply_liger_kernel", lambda model, settings: calls.append(settings)
    )
    return calls


def test_the_kernels_go_into_models_that_liger_knows(ligers_library: list[dict[str, Any]]) -> None:
    model = LlamaForCausalLM(llama())
    choice = pick_liger(HOPPER, asked=True)
    assert use_liger(model, choice).enabled
    assert ligers_library == [{"cross_entropy": False, "fused_linear_cross_entropy": False}]


def test_a_model_that_liger_does_not_know_is_said(
    ligers_library: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    model = LlamaForCausalLM(llama())
    model.config.model_type = "own"
    with caplog.at_level("WARNING", logger="llmtuner"):
        choice = use_liger(model, pick_liger(HOPPER, asked=True))
    assert not choice.enabled
    assert not ligers_library
    assert "no kernels for own" in caplog.text


def test_liger_that_was_not_asked_for_is_not_mentioned(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="llmtuner"):
        use_liger(LlamaForCausalLM(llama()), pick_liger(CPU, asked=False))
    assert not caplog.text
