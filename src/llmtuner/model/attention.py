"""Attention over samples laid end to end, which never looks across a sample's border."""

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from llmtuner.extras.errors import ModelError
from llmtuner.extras.logs import get_logger
from llmtuner.model.device import FLASH_ATTN, TORCH_VARLEN, Device, describe_device

logger = get_logger(__name__)

VARLEN = "llmtuner_varlen"
VARLEN_CUDA = "llmtuner_torch_varlen"
OURS = (VARLEN, VARLEN_CUDA)
"""Implementations that transformers knows from `register_varlen`."""
PADDED = "sdpa"
_FLASH = "flash_attention_2"
_PLAIN_LAYERS = {"full_attention", "sliding_attention"}
# Arguments that change the scores; a model that gives one of them cannot use the plain kernel.
_UNSUPPORTED = ("softcap", "s_aux", "position_bias", "head_mask")
_HALF = (torch.float16, torch.bfloat16)
# Of the kernels: columns of a head at most, and what their number must divide by.
_MOST_HEAD_COLUMNS, _HEAD_BLOCK = 256, 8


def register_varlen() -> None:
    """Make our `attn_implementation`s known to transformers; may be called again."""
    AttentionInterface.register(VARLEN, varlen_attention)
    AttentionInterface.register(VARLEN_CUDA, torch_varlen_attention)
    for name in OURS:
        AttentionMaskInterface.register(name, _no_mask)


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Run causal attention inside each sample of a flat batch.

    Args:
        module: the attention layer; unused, part of transformers' calling convention.
        query: [1, H, T, D].
        key: [1, H_kv, T, D]; H_kv divides H.
        value: [1, H_kv, T, D_v].
        attention_mask: must be None: a flat batch has no padding.
        scaling: factor of the scores; None: 1 / sqrt(D).
        dropout: probability of dropping a score.
        sliding_window: how many last tokens, itself included, a token sees; None: all.
        is_causal: only None and True are possible.
        cu_seq_lens_q: int32 [n + 1], the borders of the n samples: 0, …, T.
        kwargs: what else the model passes; scores must not depend on it.

    Returns:
        [1, T, H, D_v], and None for the attention weights.
    """
    _check_call(query, attention_mask, is_causal, cu_seq_lens_q, kwargs)
    assert cu_seq_lens_q is not None
    lengths = cu_seq_lens_q.diff().tolist()
    outputs = [
        _causal(q, k, v, scaling=scaling, dropout=dropout, window=sliding_window)
        for q, k, v in zip(
            query.split(lengths, dim=2),
            key.split(lengths, dim=2),
            value.split(lengths, dim=2),
            strict=True,
        )
    ]
    # Some models view the result, which needs its numbers in order.
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def torch_varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Do what `varlen_attention` does in one call of torch's own kernel for CUDA devices.

    The kernel takes 16-bit numbers and drops nothing; anything else goes sample by sample.
    """
    dtype = value.dtype
    if torch.is_autocast_enabled(value.device.type):
        dtype = torch.get_autocast_dtype(value.device.type)
    if dropout or dtype not in _HALF or cu_seq_lens_q is None or max_length_q is None:
        return varlen_attention(
            *(module, query, key, value, attention_mask, scaling, dropout),
            *(sliding_window, is_causal, cu_seq_lens_q),
            **kwargs,
        )
    _check_call(query, attention_mask, is_causal, cu_seq_lens_q, kwargs)
    from torch.nn.attention.varlen import varlen_attn  # only now: not every torch has it

    output = varlen_attn(
        *(part[0].transpose(0, 1).to(dtype) for part in (query, key, value)),
        *(cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q),
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, Tensor)
    return output[None], None


def supports_varlen(config: PreTrainedConfig) -> bool:
    """Tell whether a model computes plain causal attention that can be cut at sample borders.

    Recurrent and convolution layers, chunked or bidirectional attention, soft-capping, sinks and
    position biases cannot; nor can code from outside transformers, which is not known here.
    """
    text = config.get_text_config().to_dict()
    model_class = _model_class(config)
    if model_class is None or not model_class.is_backend_compatible():
        return False
    if not set(text.get("layer_types") or ()) <= _PLAIN_LAYERS:
        return False
    if text.get("attn_logit_softcapping") or text.get("use_bidirectional_attention"):
        return False
    source = inspect.getsource(sys.modules[model_class.__module__])
    if text.get("sliding_window") and "sliding_window=" not in source:
        return False
    return not any(f"{name}=" in source for name in ("s_aux", "position_bias", "alibi"))


def pick_attention(
    flash_attn: str,
    device: Device,
    *,
    config: PreTrainedConfig | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> str:
    """Choose transformers' `attn_implementation` for training.

    Args:
        flash_attn: "auto", "off", "sdpa" or "fa2", as the user gave it.
        device: where the run computes.
        config: the model's; given, a model that cannot use flat batches falls back.
        dtype: that attention computes in.

    Returns:
        For flat batches "flash_attention_2", "llmtuner_torch_varlen" (torch's own kernel) or
        "llmtuner_varlen" (sample by sample, on every device); else "sdpa" or "eager".
    """
    if flash_attn == "off":
        return "eager"
    if config is not None and not supports_varlen(config):
        logger.warning("Attention: %s cannot use flat batches; padding instead.", config.model_type)
        # whatever else "fa2" would mean: batches under that name are taken to be flat
        return _pick_padded("sdpa", device, config=config, dtype=dtype)
    flash_problem = _flash_problem(device, config=config, dtype=dtype)
    if flash_problem is None and flash_attn in ("auto", "fa2"):
        return _FLASH
    register_varlen()
    chosen = VARLEN if _torch_varlen_problem(device, config=config, dtype=dtype) else VARLEN_CUDA
    if flash_attn == "fa2":
        logger.warning("Attention: no FlashAttention-2, %s; using %s.", flash_problem, chosen)
    return chosen


def _flash_problem(
    device: Device, *, config: PreTrainedConfig | None, dtype: torch.dtype
) -> str | None:
    """Return why FlashAttention-2 cannot be used, or None."""
    if not device.runs_flash:
        return f"it needs a CUDA GPU of the Ampere generation or later, not {device.type}"
    if FLASH_ATTN not in device.libraries:
        return "the library flash-attn is not installed"
    if dtype not in _HALF:
        return f"it computes in bf16 or fp16, not in {str(dtype).removeprefix('torch.')}"
    columns = _head_columns(config)
    if columns > _MOST_HEAD_COLUMNS:
        return f"it takes heads of {_MOST_HEAD_COLUMNS} columns at most, not of {columns}"
    return None


def _torch_varlen_problem(
    device: Device, *, config: PreTrainedConfig | None, dtype: torch.dtype
) -> bool:
    """Tell whether something keeps torch's own kernel from being used."""
    if not device.runs_flash or TORCH_VARLEN not in device.libraries or dtype not in _HALF:
        return True
    columns = _head_columns(config)
    if columns > _MOST_HEAD_COLUMNS or columns % _HEAD_BLOCK:
        return True
    values = {} if config is None else config.get_text_config().to_dict()
    # it drops no scores, and all heads of a token are equally long
    return bool(values.get("attention_dropout") or values.get("v_head_dim"))


def _head_columns(config: PreTrainedConfig | None) -> int:
    """Return the columns of one attention head; 0 where the model does not say."""
    values = {} if config is None else config.get_text_config().to_dict()
    width = values.get("hidden_size") or 0
    return int(values.get("head_dim") or width // (values.get("num_attention_heads") or 1))


def pick_padded_attention(flash_attn: str, device_type: str, *, config: PreTrainedConfig) -> str:
    """Choose the `attn_implementation` for padded batches and generation."""
    device = describe_device(device_type)
    return _pick_padded(flash_attn, device, config=config, dtype=torch.bfloat16)


def _pick_padded(
    flash_attn: str, device: Device, *, config: PreTrainedConfig, dtype: torch.dtype
) -> str:
    model_class = _model_class(config)
    if flash_attn == "off" or (model_class is not None and not model_class._supports_sdpa):
        return "eager"
    has_flash = _flash_problem(device, config=config, dtype=dtype) is None
    return _FLASH if flash_attn == "fa2" and has_flash else PADDED


def uses_flat_batches(attention: str) -> bool:
    """Tell whether this `attn_implementation` takes samples laid end to end."""
    return attention in (*OURS, _FLASH)


@contextmanager
def padded_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let the model take padded batches and a KV cache meanwhile, for generation."""
    is_varlen = model.config._attn_implementation in OURS
    with _attention(model, PADDED) if is_varlen else nullcontext():
        yield


@contextmanager
def varlen_attention_in(model: PreTrainedModel) -> Iterator[None]:
    """Let the model take flat batches meanwhile."""
    register_varlen()
    with _attention(model, VARLEN):
        yield


@contextmanager
def _attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def supports_kept_logits(model: nn.Module) -> bool:
    """Tell whether `forward` takes `logits_to_keep`, so that the head runs only where asked."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    return "logits_to_keep" in inspect.signature(inner.forward).parameters


def _model_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """Return transformers' own class for this configuration, if there is one."""
    try:
        found: Any = AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        return None
    return cast(type[PreTrainedModel], found)


def _no_mask(*args: object, **kwargs: object) -> None:
    """Build no mask: the borders travel as `cu_seq_lens_q`."""


def _check_call(
    query: Tensor,
    attention_mask: Tensor | None,
    is_causal: bool | None,
    cu_seq_lens: Tensor | None,
    others: dict[str, object],
) -> None:
    if cu_seq_lens is None:
        raise ModelError(
            f"The attention {VARLEN!r} was called without the borders of the samples.",
            allowed="flat batches with cu_seq_lens_q",
            fix="train this model with --flash_attn off; in code, use padded_attention(model)",
        )
    if query.shape[0] != 1 or attention_mask is not None or is_causal is False:
        raise ModelError(
            f"The attention {VARLEN!r} takes one flat batch, without a mask, and looks back only.",
            got=f"batch {query.shape[0]}, mask {attention_mask is not None}, causal {is_causal}",
        )
    used = [name for name in _UNSUPPORTED if others.get(name) is not None]
    if used:
        raise ModelError(
            "This model changes attention scores in a way flat batches cannot follow.",
            got=used,
            fix="use --flash_attn off, which pads",
        )


def _causal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float | None,
    dropout: float,
    window: int | None,
) -> Tensor:
    """Attention of one sample, [1, H, t, D] -> [1, H, t, D_v]."""
    num_tokens = query.shape[2]
    mask = None
    if window is not None and num_tokens > window:
        ones = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=query.device)
        mask = ones.tril().triu(1 - window)
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
