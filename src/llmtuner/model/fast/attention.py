"""Causal attention inside each sample of a flat batch, without scores in memory.

torch's attention kernel for CPUs is slow in its backward pass, and plain matrix products of whole
samples keep scores that are larger than everything else: `attention.c` takes a fifth of their time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from llmtuner.model.fast.kernels import Heads, Kernels, note_operations

_FORWARD_PRODUCTS, _BACKWARD_PRODUCTS = 2, 5


@dataclass(frozen=True)
class Places:
    """Where the tokens of a flat batch stand.

    Attributes:
        borders: int32 [samples + 1].
        lengths: tokens of each sample.
        angles: cosines and sines of the rotary embedding, float32 [T, dim / 2].
    """

    borders: Tensor
    lengths: Sequence[int]
    angles: tuple[Tensor, Tensor]


class Attention(Function):
    """[q, k, v] side by side -> rotary embedding and causal attention inside each sample."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Places, heads: Heads, kernels: Kernels) -> Tensor:
        """Return [T, heads * dim] of x [T, (heads + 2 kv_heads) * dim]."""
        rotated = kernels.rotate_heads(x, places.angles, **_turned(heads))
        y, logarithms = kernels.attention(rotated, places.borders, heads)
        note_operations(y, _FORWARD_PRODUCTS * _num_keys(places.lengths))
        ctx.save_for_backward(rotated, y, logarithms)
        ctx.places, ctx.heads, ctx.kernels = places, heads, kernels
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient in x."""
        rotated, y, logarithms = ctx.saved_tensors
        places, heads, kernels = ctx.places, ctx.heads, ctx.kernels
        grad = grad.contiguous()
        grad_x = kernels.attention_backward(rotated, y, grad, logarithms, places.borders, heads)
        note_operations(grad, _BACKWARD_PRODUCTS * _num_keys(places.lengths))
        grad_x = kernels.rotate_heads_back_(grad_x, places.angles, **_turned(heads))
        return grad_x, None, None, None


@dataclass
class SharedPrefix:
    """What every sample of a batch has before its own tokens.

    Attributes:
        layers: per layer rotated queries and keys, and values of the prefix,
            [tokens, (heads + 2 kv_heads) * dim].
        is_recording: the batch is the prefix itself; its rows are to be kept.
    """

    layers: dict[int, Tensor]
    is_recording: bool


def attend_behind(
    x: Tensor, places: Places, heads: Heads, kernels: Kernels, prefix: SharedPrefix, number: int
) -> Tensor:
    """Return the attention of layer `number` without gradients, each sample behind the prefix."""
    rotated = kernels.rotate_heads(x, places.angles, **_turned(heads))
    if prefix.is_recording:
        prefix.layers[number] = rotated
    before = None if prefix.is_recording else prefix.layers[number]
    return kernels.attention(rotated, places.borders, heads, prefix=before)[0]


def _turned(heads: Heads) -> dict[str, int]:
    num_heads, kv_heads, dim = heads.shape
    return {"turned": num_heads + kv_heads, "dim": dim}


def _num_keys(lengths: Sequence[int]) -> int:
    """Return how many keys a query meets on average."""
    return round(sum(length * (length + 1) // 2 for length in lengths) / sum(lengths))
