"""The parts of a decoder layer as autograd functions: each keeps little and copies nothing twice.

All activations are bfloat16 rows [T, n] of one flat batch.
"""

from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from llmtuner.model.fast.kernels import Kernels
from llmtuner.model.fast.linear import LinearGroup


class AddNorm(Function):
    """(x, branch) -> (x + branch, rms_norm(x + branch)); without a branch (x, rms_norm(x))."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor | None, weight: Tensor, epsilon: float, kernels: Kernels
    ) -> tuple[Tensor, Tensor]:
        """Compute both outputs, [T, n]."""
        weight32 = weight.detach().float()
        total, y, inverse = kernels.rms_norm(x, branch, weight32, epsilon)
        ctx.save_for_backward(total, weight, weight32, inverse)
        ctx.kernels, ctx.has_branch = kernels, branch is not None
        return (total.view_as(total) if branch is None else total), y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        """Add up what reaches the sum directly and through the norm."""
        total, weight, weight32, inverse = ctx.saved_tensors
        grad_y = grad_y.contiguous()
        grad_weight = None
        if ctx.needs_input_grad[2]:
            grad_weight = ctx.kernels.rms_norm_backward_weight(grad_y, total, inverse)
            grad_weight = grad_weight.to(weight.dtype)
        grad = ctx.kernels.rms_norm_backward(
            grad_y, total, weight32, inverse, grad_total.contiguous()
        )
        return grad, (grad if ctx.has_branch else None), grad_weight, None, None


class Linear(Function):
    """x -> [x W1, x W2, …] with adapters, side by side."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: LinearGroup, *trained: Tensor) -> Tensor:
        """Multiply; `trained` are the parameters of the group that learn."""
        product = group.product(x)
        y, inner = product.forward(x)
        ctx.product = product
        ctx.save_for_backward(x, inner)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients in x and in what learns."""
        x, inner = ctx.saved_tensors
        grad = grad.contiguous()
        product, ctx.product = ctx.product, None  # its bfloat16 weights are not needed any more
        grad_x, grad_inner = product.backward(grad, needs_x=ctx.needs_input_grad[0])
        return grad_x, None, *product.parameter_grads(grad, grad_inner, x, inner)


class GatedLinear(Function):
    """[gate, up] -> (silu(gate) * up) W, with adapters; the gated product is not kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: LinearGroup, kernels: Kernels, *trained: Tensor
    ) -> Tensor:
        """Multiply; x is [T, 2n]."""
        product = group.product(x)
        y, inner = product.forward(kernels.swiglu(x))
        ctx.product, ctx.kernels = product, kernels
        ctx.save_for_backward(x, inner)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients in x and in what learns."""
        x, inner = ctx.saved_tensors
        grad = grad.contiguous()
        product, ctx.product = ctx.product, None
        grad_gated, grad_inner = product.backward(grad, needs_x=True)
        gated, grad_x = ctx.kernels.swiglu_backward(grad_gated, x)
        return grad_x, None, None, *product.parameter_grads(grad, grad_inner, gated, inner)
