"""Causal attention inside each sample of a flat batch, without scores in memory.

torch's attention kernel for CPUs is slow in its backward pass, and plain matrix products of whole
samples keep scores that are larger than everything else: `attention.c` takes a fifth of their time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from llmtuner.model.fast.kernels import Heads, Kernels, Pair, note_operations

_FORWARD_PRODUCTS, _BACKWARD_PRODUCTS = 2, 5


@dataclass(frozen=True)
class Places:
    """Where the tokens of a flat batch stand.

    Attributes:
        borders: int32 [samples + 1].
        lengths: tokens of each sample.
        angles: cosines and sines of the rotary embedding, float32 [T, half of what turns].
    """

    borders: Tensor
    lengths: Sequence[int]
    angles: Pair


class Attention(Function):
    """[q, k, v] side by side -> norms, rotary embedding, causal attention inside each sample."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, places: Places, heads: Heads, kernels: Kernels, *norms: Tensor
    ) -> Tensor:
        """Return [T, heads * dim] of x [T, (heads + 2 kv_heads) * dim].

        Args:
            ctx: autograd's.
            x: queries, keys and values.
            places: of the tokens.
            heads: what they look like.
            kernels: to compute with.
            norms: weights [dim] of the norms of queries and of keys; or nothing.
        """
        weights = _joined(norms)
        turned, inverse = _turned(x, places, heads, kernels, weights)
        y, logarithms = kernels.attention(turned, places.borders, heads)
        note_operations(y, _FORWARD_PRODUCTS * _num_keys(places.lengths))
        # what was normed is needed once more, and gives the turned heads again
        ctx.save_for_backward(turned if weights is None else x, inverse, y, logarithms, *norms)
        ctx.places, ctx.heads, ctx.kernels = places, heads, kernels
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients in x and in the norms."""
        x, inverse, y, logarithms, *norms = ctx.saved_tensors
        places, heads, kernels = ctx.places, ctx.heads, ctx.kernels
        weights, grad = _joined(norms), grad.contiguous()
        turned = x
        if weights is not None:
            turned, _ = kernels.norm_heads(x, weights, places.angles, heads)
        grad_x = kernels.attention_backward(turned, y, grad, logarithms, places.borders, heads)
        note_operations(grad, _BACKWARD_PRODUCTS * _num_keys(places.lengths))
        if weights is None:
            if heads.is_turned:
                kernels.rotate_heads_back_(grad_x, places.angles, heads)
            return grad_x, None, None, None
        normed = x, places.angles, inverse, heads
        of_norms: list[Tensor | None] = [None, None]
        if any(ctx.needs_input_grad[4:]):
            both = kernels.norm_heads_backward_weights(grad_x, *normed)
            of_norms = [own.to(norm.dtype) for own, norm in zip(both, norms, strict=True)]
        grad_x = kernels.norm_heads_backward_(grad_x, x, weights, *normed[1:])
        return grad_x, None, None, None, *of_norms


@dataclass
class SharedPrefix:
    """What every sample of a batch has before its own tokens.

    Attributes:
        layers: per layer turned queries and keys, and values of the prefix,
            [tokens, (heads + 2 kv_heads) * dim].
        is_recording: the batch is the prefix itself; its rows are to be kept.
    """

    layers: dict[int, Tensor]
    is_recording: bool


def attend_behind(
    x: Tensor,
    places: Places,
    heads: Heads,
    kernels: Kernels,
    norms: Sequence[Tensor],
    *,
    prefix: SharedPrefix,
    number: int,
) -> Tensor:
    """Return the attention of layer `number` without gradients, each sample behind the prefix."""
    turned, _ = _turned(x, places, heads, kernels, _joined(norms))
    if prefix.is_recording:
        prefix.layers[number] = turned
    before = None if prefix.is_recording else prefix.layers[number]
    return kernels.attention(turned, places.borders, heads, prefix=before)[0]


def _turned(
    x: Tensor, places: Places, heads: Heads, kernels: Kernels, weights: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return x as the attention takes it, and 1 / rms of heads that are normed."""
    if weights is not None:
        return kernels.norm_heads(x, weights, places.angles, heads)
    return (kernels.rotate_heads(x, places.angles, heads) if heads.is_turned else x), None


def _joined(norms: Sequence[Tensor]) -> Tensor | None:
    return torch.stack([norm.detach().float() for norm in norms]) if norms else None


def _num_keys(lengths: Sequence[int]) -> int:
    """Return how many keys a query meets on average."""
    return round(sum(length * (length + 1) // 2 for length in lengths) / sum(lengths))
