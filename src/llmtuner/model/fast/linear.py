"""Linear layers that read the same input, as one product; their adapters too.

`y = x W^T + b + (x A^T) (s B)^T` with W, A of all layers on top of each other and B block by block.
Frozen weights are joined once, and the layers keep views of the joined tensor.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from llmtuner.model.fast.kernels import is_without_numbers
from llmtuner.model.fast.products import Products, products_for
from llmtuner.model.quantize import dequantized, is_quantized

_DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Adapter:
    """The low-rank update of one layer: `scale * up @ down`.

    Attributes:
        down: weight [rank, inputs], named lora_A by peft.
        up: weight [outputs, rank], named lora_B.
        scale: factor of the update.
    """

    down: nn.Linear
    up: nn.Linear
    scale: float


@dataclass(frozen=True)
class Projection:
    """One linear layer.

    Attributes:
        base: the layer itself.
        adapter: what learns beside it, if anything.
    """

    base: nn.Linear
    adapter: Adapter | None


def read_projection(module: nn.Module) -> Projection | None:
    """Return the parts of a linear layer, or None if it computes anything else."""
    if isinstance(module, LoraLayer):
        return _read_lora(module)
    return Projection(module, None) if type(module) is nn.Linear else None


def _read_lora(module: LoraLayer) -> Projection | None:
    base, names = module.get_base_layer(), module.active_adapters
    is_known = type(base) is nn.Linear or is_quantized(base)
    if not is_known or len(names) != 1 or module.merged or module.disable_adapters:
        return None
    name = names[0]
    if name not in module.lora_A:
        return None
    is_plain = not module.lora_variant and not module.lora_bias[name]
    if not is_plain or not isinstance(module.lora_dropout[name], nn.Identity):
        return None
    adapter = Adapter(module.lora_A[name], module.lora_B[name], module.scaling[name])
    return Projection(base, adapter)


class LinearGroup:
    """Layers with one input [T, inputs], computed side by side: [T, outputs of all]."""

    def __init__(self, projections: Sequence[Projection]) -> None:
        """Join what does not change."""
        self.projections = projections
        self.sizes = [projection.base.out_features for projection in projections]
        weights = [projection.base.weight for projection in projections]
        is_fixed = not any(p.base.weight.requires_grad or is_quantized(p.base) for p in projections)
        self._joined = _join(weights) if is_fixed else None
        self._adapters = _AdapterGroup([p.adapter for p in projections], self.sizes)

    @property
    def trained(self) -> list[Tensor]:
        """The parameters that learn, in the order of `Product.parameter_grads`."""
        return [parameter for parameter in self._parameters() if parameter.requires_grad]

    @property
    def storage_address(self) -> int | None:
        """Where the joined weights lie; None where they are not joined."""
        if self._joined is None or is_without_numbers(self._joined):
            return None
        return self._joined.untyped_storage().data_ptr()

    def product(self, x: Tensor) -> "Product":
        """Read the parameters as they are now, to multiply x and things of its type."""
        return Product(self, self._joined, self._adapters, products_for(x))

    def weight(self) -> Tensor:
        """Return the weights on top of each other, bfloat16 [outputs of all, inputs]."""
        if self._joined is not None:
            return self._joined
        return torch.cat([dequantized(p.base).to(_DTYPE) for p in self.projections])

    def _parameters(self) -> list[Tensor]:
        found: list[Tensor] = []
        for projection in self.projections:
            found.append(projection.base.weight)
            if projection.base.bias is not None:
                found.append(projection.base.bias)
            if projection.adapter is not None:
                found += [projection.adapter.down.weight, projection.adapter.up.weight]
        return found


class Product:
    """One use of a group: its parameters in bfloat16, forward and backward.

    The adapters' memory belongs to the group: parameters do not change between the two passes.
    """

    def __init__(
        self,
        group: LinearGroup,
        joined: Tensor | None,
        adapters: "_AdapterGroup",
        products: Products,
    ) -> None:
        """Convert and join the adapters; weights that learn are converted once for both passes."""
        self._group, self._products = group, products
        is_quantized_base = any(is_quantized(p.base) for p in group.projections)
        self._weight = group.weight() if joined is None and not is_quantized_base else joined
        self._adapter = adapters.joined(products)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return y [T, outputs] and what the adapters make of x, [T, ranks]."""
        inner, beside = None, None
        if self._adapter is not None:
            down, up = self._adapter
            inner = self._products.multiply(x, down, is_turned=True)
            beside = inner, up
        weight = self._group.weight() if self._weight is None else self._weight
        y = self._products.multiply(x, weight, is_turned=True, beside=beside)
        bias = self._bias()
        if bias is not None:
            y += bias
        return y, inner

    def backward(self, grad: Tensor, *, needs_x: bool) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients in x and in what the adapters make of it."""
        grad_inner, beside = None, None
        if self._adapter is not None:
            down, up = self._adapter
            grad_inner = self._products.multiply(grad, up)
            beside = grad_inner, down
        if not needs_x:
            return None, grad_inner
        weight = self._group.weight() if self._weight is None else self._weight
        return self._products.multiply(grad, weight, beside=beside), grad_inner

    def parameter_grads(
        self, grad: Tensor, grad_inner: Tensor | None, x: Tensor, inner: Tensor | None
    ) -> list[Tensor]:
        """Return the gradients of the parameters that learn, in the order of `trained`."""
        products = self._products
        grads: list[Tensor] = []
        downs = None
        if grad_inner is not None:
            downs = products.transposed(products.as_factor(grad_inner), x, torch.float32)
        inner_factor = None if inner is None else products.as_factor(inner)
        learns = any(projection.base.weight.requires_grad for projection in self._group.projections)
        grad_factor = products.as_factor(grad) if learns else None
        row = rank = 0
        for projection, size in zip(self._group.projections, self._group.sizes, strict=True):
            rows = slice(row, row := row + size)
            base, adapter = projection.base, projection.adapter
            if grad_factor is not None and base.weight.requires_grad:
                grads.append(products.transposed(grad_factor[:, rows], x, base.weight.dtype))
            if base.bias is not None and base.bias.requires_grad:
                grads.append(grad[:, rows].sum(0, dtype=base.bias.dtype))
            if adapter is not None and downs is not None and inner_factor is not None:
                down, up = adapter.down.weight, adapter.up.weight
                ranks = slice(rank, rank := rank + len(down))
                if down.requires_grad:
                    grads.append(downs[ranks].to(down.dtype))
                if up.requires_grad:
                    own = inner_factor[:, ranks]
                    of_ranks = products.transposed_turned(own, grad[:, rows], adapter.scale)
                    grads.append(of_ranks.to(up.dtype))
        return grads

    def _bias(self) -> Tensor | None:
        bases = [projection.base for projection in self._group.projections]
        if all(base.bias is None for base in bases):
            return None
        zeros = [base.weight.new_zeros(base.out_features, dtype=_DTYPE) for base in bases]
        return torch.cat(
            [
                zero if base.bias is None else base.bias.to(_DTYPE)
                for base, zero in zip(bases, zeros, strict=True)
            ]
        )


def _join(weights: Sequence[nn.Parameter]) -> Tensor:
    """Join frozen weights; each keeps its numbers as a view, so nothing is held twice."""
    joined = torch.cat([weight.detach().to(_DTYPE) for weight in weights])
    if all(weight.dtype == _DTYPE for weight in weights):
        for weight, part in zip(weights, joined.split([len(w) for w in weights]), strict=True):
            weight.data = part
    return joined


class _AdapterGroup:
    """The adapters of a group side by side, in memory that every step uses again."""

    def __init__(self, adapters: Sequence[Adapter | None], sizes: Sequence[int]) -> None:
        """Take the adapters of layers with so many outputs."""
        self._adapters = adapters
        self._sizes = sizes
        self._joined: tuple[Tensor, Tensor] | None = None

    def joined(self, products: Products) -> tuple[Tensor, Tensor] | None:
        """Return down [ranks, inputs] and, block by block and scaled, up [outputs, ranks]."""
        if not any(self._adapters):
            return None
        if self._joined is None:
            self._joined = self._room()
        down, up = self._joined
        row = rank = 0
        for adapter, size in zip(self._adapters, self._sizes, strict=True):
            if adapter is not None:
                width = len(adapter.down.weight)
                ranks = slice(rank, rank := rank + width)
                products.round_scaled(adapter.down.weight.detach(), 1.0, down[ranks])
                block = up[row : row + size, ranks]
                products.round_scaled(adapter.up.weight.detach(), adapter.scale, block)
            row += size
        return down, up

    def _room(self) -> tuple[Tensor, Tensor]:
        present = [adapter.down.weight for adapter in self._adapters if adapter is not None]
        rank = sum(len(weight) for weight in present)
        down = present[0].new_empty(rank, present[0].shape[1], dtype=_DTYPE)
        return down, down.new_zeros(sum(self._sizes), rank)
