"""The loss behind the head, a few rows at a time: logits of a whole batch never exist.

Where a model does nothing behind its head but return the logits, its forward pass is run with a
head that passes hidden states on, and the loss and its gradients are computed in chunks.
"""

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from llmtuner.model.fast.kernels import load_kernels
from llmtuner.model.fast.products import products_for

_CHUNK_NUMBERS = 1 << 24  # logits at once: 341 rows of 49k words, 64 of 262k
_MIN_ROWS = 16
_LOGITS_ARE_SET = re.compile(r"^\s+logits = ", re.MULTILINE)
_SOFTCAP = "final_logit_softcapping"
_SOFTCAP_LINES = 3


def separable_head(model: nn.Module) -> nn.Linear | None:
    """Return the head if logits are `head(hidden states)` and nothing else, or None."""
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    head = inner.get_output_embeddings()
    if is_deepspeed_zero3_enabled():  # the weight is only there while the head's forward runs
        return None
    if type(head) is not nn.Linear or head.bias is not None or head._forward_hooks:
        return None
    source = inspect.getsource(inspect.unwrap(type(inner).forward))
    settings = inner.config.get_text_config().to_dict()
    expected = 1 + (_SOFTCAP_LINES if _SOFTCAP in source else 0)
    if len(_LOGITS_ARE_SET.findall(source)) != expected or settings.get(_SOFTCAP) is not None:
        return None
    return head


@contextmanager
def passing_on(head: nn.Linear) -> Iterator[None]:
    """Let the head return what it is given, so that a model's "logits" are hidden states."""
    head.forward = _identity  # type: ignore[method-assign]
    try:
        yield
    finally:
        del head.forward


def head_loss(
    hidden: Tensor, head: nn.Linear, targets: Tensor, *, dtype: torch.dtype, smoothing: float
) -> Tensor:
    """Return the summed cross-entropy, float32 [].

    Args:
        hidden: [N, n] hidden states.
        head: computes the logits, [N, V].
        targets: [N].
        dtype: type of the matrix products.
        smoothing: share of the probability that is spread over all words.
    """
    loss: Tensor = _HeadLoss.apply(hidden, head.weight, targets, dtype, smoothing)
    return loss


@torch.no_grad()
def head_metrics(
    hidden: Tensor, head: nn.Linear, targets: Tensor, *, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy, float64 [], and how many targets are the likeliest word."""
    loss, right = (torch.zeros((), dtype=torch.float64, device=hidden.device) for _ in range(2))
    weight = head.weight.to(dtype)
    for rows in _chunks(len(targets), len(weight)):
        some = hidden[rows].to(dtype)
        logits = products_for(some).multiply(some, weight, is_turned=True).float()
        loss += nn.functional.cross_entropy(logits, targets[rows], reduction="sum")
        right += (logits.argmax(-1) == targets[rows]).sum()
    return loss, right


class _HeadLoss(Function):
    """Computes the gradients on the way forward, while a chunk of logits is there."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        dtype: torch.dtype,
        smoothing: float,
    ) -> Tensor:
        weight_now = weight.detach().to(dtype)
        rows_now = hidden.detach().to(dtype)
        grad_hidden = torch.empty_like(rows_now)
        grad_weight: Tensor | None = None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        products = products_for(rows_now)
        for rows in _chunks(len(targets), len(weight)):
            logits = products.multiply(rows_now[rows], weight_now, is_turned=True)
            losses, grad = _losses_and_grad(logits, targets[rows], smoothing)
            loss += losses
            products.multiply(grad, weight_now, out=grad_hidden[rows])
            if not weight.requires_grad:
                continue
            factor = products.as_factor(grad)
            if grad_weight is None:
                grad_weight = products.transposed(factor, rows_now[rows], torch.float32)
            else:
                products.add_transposed_(grad_weight, factor, rows_now[rows])
        if weight.requires_grad and grad_weight is None:  # no token is trained
            grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        to_weight = None
        if grad_weight is not None:
            is_whole = weight_dtype == torch.float32  # then no second copy of the head is made
            to_weight = grad_weight if is_whole else grad_weight.new_empty(0, dtype=weight_dtype)
            torch.mul(grad_weight, grad, out=to_weight)
        return (grad_hidden * grad).to(hidden_dtype), to_weight, None, None, None


def _losses_and_grad(logits: Tensor, targets: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """Return the summed loss and its gradient in the logits, of their type."""
    kernels = load_kernels() if logits.device.type == "cpu" else None
    if kernels is not None and logits.dtype == torch.bfloat16 and not smoothing:
        return kernels.cross_entropy_(logits, targets).sum(), logits
    with torch.enable_grad():
        free = logits.detach().float().requires_grad_()
        loss = nn.functional.cross_entropy(
            free, targets, reduction="sum", label_smoothing=smoothing
        )
        (grad,) = torch.autograd.grad(loss, free)
    return loss.detach(), grad.to(logits.dtype)


def _chunks(num_rows: int, num_words: int) -> Iterator[slice]:
    most = max(_CHUNK_NUMBERS // num_words, _MIN_ROWS)
    num_chunks = max(-(-num_rows // most), 1)
    size = max(-(-num_rows // num_chunks), 1)  # no short one at the end
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


def _identity(hidden: Tensor) -> Tensor:
    return hidden
