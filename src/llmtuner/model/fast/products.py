"""Matrix products in bfloat16: our own where the CPU has the instructions for it, else torch's.

On CPUs with AVX512-BF16 and without AMX our product takes every shape at the speed that torch's
reaches in good ones, and adds an adapter's in the same pass. Nothing here is for autograd.
"""

from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from llmtuner.model.fast.kernels import Kernels, load_kernels

# oneDNN (3.x, two cores) multiplies on one thread only where there are some 350 to 1,300 rows and
# up to 800 columns, or 1,000 to 1,300 rows and up to 1,200 columns. Pieces of at most so many rows
# go to all threads; wider products and longer ones are fast whole.
_PIECE_ROWS = 320
_MOST_ROWS = 1536
_SLOW_FROM = ((800, _PIECE_ROWS), (1280, 1000))  # columns up to, rows from

Pair = tuple[Tensor, Tensor]


class Products:
    """torch's products, in the pieces that it is fast at."""

    def multiply(
        self,
        x: Tensor,
        weight: Tensor,
        *,
        is_turned: bool = False,
        beside: Pair | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Return x @ weight, plus the product of two more matrices.

        Args:
            x: [M, K]; rows may lie apart.
            weight: [K, N], or [N, K].
            is_turned: the weight is [N, K].
            beside: [M, R] and, turned like `weight`, [R, N].
            out: contiguous [M, N] to write to.
        """
        right = weight.t() if is_turned else weight
        if beside is None:
            return _in_pieces(x, right, out)
        # The small product first: the large one is added to it before it is rounded. The other way
        # round, an adapter that changes less than the last place of a number would change nothing.
        y = torch.mm(beside[0], beside[1].t() if is_turned else beside[1], out=out)
        return _in_pieces(x, right, y, adds=True)

    def as_factor(self, x: Tensor) -> Tensor:
        """Bring x [T, M] into the order in which `transposed` reads it; columns stay columns."""
        return x

    def transposed(self, factor: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
        """Return x^T @ y, [M, N]; our own product is rounded only if `dtype` is bfloat16.

        Args:
            factor: `as_factor(x)`, or some of its columns.
            y: [T, N]; rows may lie apart.
            dtype: of the result.
        """
        return torch.mm(factor.t(), y).to(dtype)

    def add_transposed_(self, total: Tensor, factor: Tensor, y: Tensor) -> None:
        """Add x^T @ y to total, contiguous [M, N]; see `transposed`."""
        total += torch.mm(factor.t(), y)

    def transposed_turned(self, factor: Tensor, y: Tensor, scale: float) -> Tensor:
        """Return scale * y^T @ x, contiguous [N, M], from what `transposed` takes."""
        # along the rows of y, which is the wide one
        return torch.mm(factor.t(), y).t().contiguous().mul_(scale)

    def round_scaled(self, x: Tensor, scale: float, out: Tensor) -> None:
        """Set out, bfloat16 with rows that may lie apart, to scale * x."""
        torch.mul(x, scale, out=out)


def products_for(x: Tensor) -> Products:
    """Return the best way to multiply tensors like x; all of them are to be of its type."""
    is_ours = x.dtype == torch.bfloat16 and x.device.type == "cpu"
    return (own_products() if is_ours else None) or Products()


@cache
def own_products() -> "OwnProducts | None":
    """Return our products if they are faster on this machine than torch's."""
    has = torch.cpu.get_capabilities()
    is_better = has.get("avx512_bf16", False) and not has.get("amx_bf16", False)
    kernels = load_kernels() if is_better else None
    return None if kernels is None else OwnProducts(kernels)


@dataclass(frozen=True)
class OwnProducts(Products):
    """The products of `products.c`; every row is summed in one order, whatever is around it."""

    kernels: Kernels

    def multiply(
        self,
        x: Tensor,
        weight: Tensor,
        *,
        is_turned: bool = False,
        beside: Pair | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """See `Products`."""
        return self.kernels.product(x, weight, is_turned=is_turned, beside=beside, out=out)

    def as_factor(self, x: Tensor) -> Tensor:
        """See `Products`."""
        return self.kernels.paired(x)

    def transposed(self, factor: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
        """See `Products`."""
        exact = dtype if dtype in (torch.float32, torch.bfloat16) else torch.float32
        out = y.new_empty(factor.shape[1], y.shape[1], dtype=exact)
        return self.kernels.product_transposed(factor, y, out, 1.0).to(dtype)

    def add_transposed_(self, total: Tensor, factor: Tensor, y: Tensor) -> None:
        """See `Products`."""
        self.kernels.product_transposed(factor, y, total, 1.0, adds=True)

    def transposed_turned(self, factor: Tensor, y: Tensor, scale: float) -> Tensor:
        """See `Products`."""
        out = y.new_empty(y.shape[1], factor.shape[1], dtype=torch.float32)
        self.kernels.product_transposed(factor, y, out.t(), scale)
        return out

    def round_scaled(self, x: Tensor, scale: float, out: Tensor) -> None:
        """See `Products`."""
        if x.dtype == torch.float32 and x.is_contiguous():
            self.kernels.round_scaled(x, scale, out)
        else:
            super().round_scaled(x, scale, out)


def _in_pieces(x: Tensor, weight: Tensor, out: Tensor | None, *, adds: bool = False) -> Tensor:
    """Return x @ weight, written to `out` or added to what is there."""
    rows, columns = len(x), weight.shape[1]
    is_slow = any(columns < most and rows > least for most, least in _SLOW_FROM)
    if rows >= _MOST_ROWS or not is_slow or x.device.type != "cpu":
        return _multiply(x, weight, out, adds=adds)
    y = x.new_empty(rows, columns) if out is None else out
    num_pieces = -(-rows // _PIECE_ROWS)
    borders = [rows * number // num_pieces for number in range(num_pieces + 1)]
    for start, end in pairwise(borders):
        _multiply(x[start:end], weight, y[start:end], adds=adds)
    return y


def _multiply(x: Tensor, weight: Tensor, out: Tensor | None, *, adds: bool) -> Tensor:
    if not adds:
        return torch.mm(x, weight, out=out)
    assert out is not None, "there is something to add to"
    return torch.addmm(out, x, weight, out=out)
