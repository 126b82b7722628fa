"""Causal attention inside each sample of a flat batch, by plain matrix products.

torch's attention kernel for CPUs is slow in its backward pass: products over whole samples (or
blocks of queries, where a sample is long) and one pass for the softmax take a third of its time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from llmtuner.model.fast.kernels import Kernels

_QUERY_BLOCK = 256  # tokens; no block multiplies keys behind its last query
_KEPT_TOKENS = 256  # shares of longer samples are computed again in the backward pass


@dataclass(frozen=True)
class Heads:
    """The attention of one layer.

    Attributes:
        shape: query heads, key/value heads, dimension of a head.
        scale: factor of the scores.
        window: how many last tokens a token sees; 0: all.
    """

    shape: tuple[int, int, int]
    scale: float
    window: int


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

    def slices(self) -> Iterator[slice]:
        """Yield the places of each sample."""
        return (slice(*pair) for pair in pairwise(accumulate(self.lengths, initial=0)))


class Attention(Function):
    """[q, k, v] side by side -> rotary embedding and causal attention inside each sample."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Places, heads: Heads, kernels: Kernels) -> Tensor:
        """Return [T, heads * dim] of x [T, (heads + 2 kv_heads) * dim]."""
        q, k, v = kernels.split_heads(x, places.angles, places.borders, heads.shape)
        y = torch.empty_like(q)
        kept = []
        for block in _blocks(places.lengths, heads):
            shares = block.shares(q, k, kernels)
            block.queries(y).copy_(torch.bmm(shares, block.keys(v)).view(block.queries(y).shape))
            if block.is_kept and ctx.needs_input_grad[0]:
                kept.append(shares)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.places, ctx.heads, ctx.kernels = places, heads, kernels
        return kernels.reorder_heads(y, places.borders, heads.shape[0], to_samples=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient in x."""
        q, k, v, *kept = ctx.saved_tensors
        places, heads, kernels = ctx.places, ctx.heads, ctx.kernels
        grad = kernels.reorder_heads(
            grad.contiguous(), places.borders, heads.shape[0], to_samples=True
        )
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        kept.reverse()
        for block in _blocks(places.lengths, heads):
            shares = kept.pop() if block.is_kept else block.shares(q, k, kernels)
            outer = block.rows(grad)
            block.add(grad_v, torch.bmm(shares.transpose(1, 2), outer))
            inner = torch.bmm(outer, block.keys(v).transpose(1, 2))
            scores = block.softmax_backward(shares, inner, kernels)
            block.queries(grad_q).copy_(
                torch.bmm(scores, block.keys(k)).view(block.queries(q).shape)
            )
            block.add(grad_k, torch.bmm(scores.transpose(1, 2), block.rows(q)))
        grads = (grad_q, grad_k, grad_v)
        grad_x = kernels.split_heads_backward(grads, places.angles, places.borders, heads.shape)
        return grad_x, None, None, None


@dataclass
class SharedPrefix:
    """Keys and values of tokens that every sample of a batch has before its own.

    Attributes:
        layers: per layer keys and values, [kv_heads, tokens, dim] each.
        is_recording: the batch is the prefix itself; its keys and values are to be kept.
    """

    layers: dict[int, tuple[Tensor, Tensor]]
    is_recording: bool


def attend_behind(
    x: Tensor, places: Places, heads: Heads, kernels: Kernels, prefix: SharedPrefix, number: int
) -> Tensor:
    """Return the attention of layer `number` without gradients, each sample behind the prefix.

    All queries of the batch meet the prefix in one product; each sample meets itself; both results
    are mixed by the logarithms of their sums.
    """
    num_heads, kv_heads, dim = heads.shape
    whole = torch.tensor([0, len(x)], dtype=torch.int32)
    q, k, v = kernels.split_heads(x, places.angles, whole, heads.shape)
    grouped = (kv_heads, num_heads // kv_heads, len(x), dim)
    q, k, v = q.view(grouped), k.view(kv_heads, -1, dim), v.view(kv_heads, -1, dim)
    y, logarithms = torch.empty_like(q), q.new_empty(grouped[:3], dtype=torch.float32)
    for own in places.slices():
        rows = q[:, :, own].reshape(kv_heads, -1, dim)
        length = own.stop - own.start
        scores = torch.bmm(rows, k[:, own].transpose(1, 2))
        sums = scores.new_empty(scores.shape[:2], dtype=torch.float32)
        kernels.causal_softmax_(scores, sums, queries=length, seen=1, window=0, scale=heads.scale)
        y[:, :, own] = torch.bmm(scores, v[:, own]).view(*grouped[:2], length, dim)
        logarithms[:, :, own] = sums.view(*grouped[:2], length)
    if prefix.is_recording:
        prefix.layers[number] = (k, v)
    else:
        keys, values = prefix.layers[number]
        scores = torch.bmm(q.view(kv_heads, -1, dim), keys.transpose(1, 2))
        sums = scores.new_empty(scores.shape[:2], dtype=torch.float32)
        seen = keys.shape[1]
        kernels.causal_softmax_(scores, sums, queries=1, seen=seen, window=0, scale=heads.scale)
        share = torch.sigmoid(sums.view_as(logarithms) - logarithms)[..., None]
        behind = torch.bmm(scores, values).view(grouped)
        y = torch.lerp(y.float(), behind.float(), share).to(y.dtype)
    return kernels.reorder_heads(y.view(len(x), -1), whole, num_heads, to_samples=False)


@dataclass(frozen=True)
class _Block:
    """Queries [start, end) of the sample that begins at token `first`, and keys before `end`."""

    heads: Heads
    first: int
    length: int
    start: int
    end: int

    @property
    def is_kept(self) -> bool:
        """Tell whether the shares are worth their memory until the backward pass."""
        return self.length <= _KEPT_TOKENS

    def queries(self, x: Tensor) -> Tensor:
        """Return a view [kv_heads, heads per kv_head, queries, dim] of x in sample order."""
        num_heads, kv_heads, dim = self.heads.shape
        sample = x[self.first : self.first + self.length]
        whole = sample.view(kv_heads, num_heads // kv_heads, self.length, dim)
        return whole[:, :, self.start : self.end]

    def rows(self, x: Tensor) -> Tensor:
        """Return the same as [kv_heads, rows, dim]."""
        return self.queries(x).reshape(self.heads.shape[1], -1, self.heads.shape[2])

    def keys(self, x: Tensor) -> Tensor:
        """Return a view [kv_heads, keys, dim] of x in sample order."""
        _, kv_heads, dim = self.heads.shape
        sample = x[self.first : self.first + self.length]
        return sample.view(kv_heads, self.length, dim)[:, : self.end]

    def add(self, total: Tensor, part: Tensor) -> None:
        """Add a block's gradient in keys or values; blocks come with more and more keys."""
        keys = self.keys(total)
        keys[:, self.start :].copy_(part[:, self.start :])
        if self.start:
            keys[:, : self.start].add_(part[:, : self.start])

    def shares(self, q: Tensor, k: Tensor, kernels: Kernels) -> Tensor:
        """Return how much each row takes from each key, [kv_heads, rows, keys]."""
        scores = torch.bmm(self.rows(q), self.keys(k).transpose(1, 2))
        return kernels.causal_softmax_(scores, **self._mask())

    def softmax_backward(self, shares: Tensor, grad: Tensor, kernels: Kernels) -> Tensor:
        """Return the gradient in the scores; overwrites `grad`."""
        return kernels.causal_softmax_backward_(shares, grad, **self._mask())

    def _mask(self) -> dict[str, Any]:
        return {
            "queries": self.end - self.start,
            "seen": self.start + 1,
            "window": self.heads.window,
            "scale": self.heads.scale,
        }


def _blocks(lengths: Sequence[int], heads: Heads) -> Iterator[_Block]:
    first = 0
    for length in lengths:
        for start in range(0, length, _QUERY_BLOCK):
            yield _Block(heads, first, length, start, min(start + _QUERY_BLOCK, length))
        first += length
