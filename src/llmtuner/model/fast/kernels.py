"""Builds and calls `kernels.c`: the element-wise work of a training step on a CPU.

The source is compiled once per machine (about a second) into the user's cache. Everything takes
contiguous tensors on the CPU; those named x, y, grad, … are bfloat16.
"""

import ctypes
import hashlib
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from llmtuner.extras.env import process_env
from llmtuner.extras.logs import get_logger

logger = get_logger(__name__)

_SOURCE = Path(__file__).with_name("kernels.c")
_COMPILERS = ("cc", "gcc", "clang")
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp")
_X86_FLAGS = ("-mprefer-vector-width=512",)
_BUILD_SECONDS = 120

_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
# Every function takes its tensors first, then whole numbers, then at most one float.
_SIGNATURES = {
    "rms_norm": (6, 2, 1),
    "rms_norm_backward": (6, 2, 0),
    "rms_norm_backward_weight": (4, 2, 0),
    "swiglu": (2, 2, 0),
    "swiglu_backward": (4, 2, 0),
    "split_heads": (7, 4, 0),
    "split_heads_backward": (7, 4, 0),
    "reorder_heads": (3, 4, 0),
    "causal_softmax": (2, 5, 1),
    "causal_softmax_backward": (2, 5, 1),
    "cross_entropy": (3, 2, 0),
}


@cache
def load_kernels() -> "Kernels | None":
    """Return the kernels for this machine, or None where they cannot be built; says why."""
    if platform.system() != "Linux":
        logger.info("Fast CPU kernels: off, they are built on Linux only.")
        return None
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        logger.info("Fast CPU kernels: off, there is no C compiler (%s).", ", ".join(_COMPILERS))
        return None
    try:
        library = ctypes.CDLL(str(_build(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("Fast CPU kernels: off, they cannot be built: %s", error)
        return None
    return Kernels(library)


def _build(compiler: str) -> Path:
    flags = [*_FLAGS, *(_X86_FLAGS if platform.machine() == "x86_64" else ())]
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, check=True, timeout=_BUILD_SECONDS
    ).stdout
    capabilities = repr(sorted(torch.cpu.get_capabilities().items())).encode()
    parts = [_SOURCE.read_bytes(), version, " ".join(flags).encode(), capabilities]
    folder = process_env().cache_dir / "kernels"
    built = folder / f"{hashlib.sha256(b'|'.join(parts)).hexdigest()[:24]}.so"
    if built.is_file():
        return built
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=folder) as staging:
        staged = Path(staging) / built.name
        command = [compiler, *flags, "-shared", "-fPIC", "-o", str(staged), str(_SOURCE), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_SECONDS)
        if done.returncode != 0:
            raise OSError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else command)
        staged.replace(built)
    return built


class Kernels:
    """The compiled functions, on tensors; tensors without memory (a plan's) only get shapes."""

    def __init__(self, library: ctypes.CDLL) -> None:
        """Declare the argument types of every function."""
        self._functions = {name: library[name] for name in _SIGNATURES}
        for name, (pointers, integers, floats) in _SIGNATURES.items():
            function = self._functions[name]
            function.argtypes = [_POINTER] * pointers + [_INT] * integers + [_FLOAT] * floats
            function.restype = None

    def _call(self, name: str, tensors: Sequence[Tensor | None], *numbers: float) -> None:
        present = [tensor for tensor in tensors if tensor is not None]
        assert all(tensor.is_contiguous() for tensor in present), "kernels take contiguous tensors"
        if any(isinstance(tensor, FakeTensor) or tensor.is_meta for tensor in present):
            return
        addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        self._functions[name](*addresses, *numbers)

    def rms_norm(
        self, x: Tensor, branch: Tensor | None, weight: Tensor, epsilon: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return x + branch, its normed value, both [T, n], and 1 / rms, float32 [T]."""
        total = x if branch is None else torch.empty_like(x)
        y, inverse = torch.empty_like(x), x.new_empty(len(x), dtype=torch.float32)
        self._call("rms_norm", (x, branch, weight, total, y, inverse), *x.shape, epsilon)
        return total, y, inverse

    def rms_norm_backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, beside: Tensor | None
    ) -> Tensor:
        """Return the gradient in x, plus `beside`."""
        grad_x = torch.empty_like(x)
        self._call("rms_norm_backward", (grad, x, weight, inverse, beside, grad_x), *x.shape)
        return grad_x

    def rms_norm_backward_weight(self, grad: Tensor, x: Tensor, inverse: Tensor) -> Tensor:
        """Return the gradient in the weight, float32 [n]."""
        total = inverse.new_empty(x.shape[1])
        self._call("rms_norm_backward_weight", (grad, x, inverse, total), *x.shape)
        return total

    def swiglu(self, x: Tensor) -> Tensor:
        """Return silu(gate) * up, [T, n], of gate and up side by side, [T, 2n]."""
        y = x.new_empty(x.shape[0], x.shape[1] // 2)
        self._call("swiglu", (x, y), *y.shape)
        return y

    def swiglu_backward(self, grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return swiglu's output again, and the gradient in x."""
        y, grad_x = torch.empty_like(grad), torch.empty_like(x)
        self._call("swiglu_backward", (grad, x, y, grad_x), *y.shape)
        return y, grad_x

    def split_heads(
        self, x: Tensor, angles: tuple[Tensor, Tensor], borders: Tensor, shape: tuple[int, int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return rotated queries and keys, and values, in sample order, [T, heads * dim] each.

        Args:
            x: [T, (heads + 2 kv_heads) * dim].
            angles: cosines and sines, float32 [T, dim / 2].
            borders: int32 [samples + 1].
            shape: heads, kv_heads, dim.
        """
        heads, kv_heads, dim = shape
        q = x.new_empty(len(x), heads * dim)
        k, v = (x.new_empty(len(x), kv_heads * dim) for _ in range(2))
        self._call("split_heads", (x, *angles, borders, q, k, v), len(borders) - 1, *shape)
        return q, k, v

    def split_heads_backward(
        self,
        grads: tuple[Tensor, Tensor, Tensor],
        angles: tuple[Tensor, Tensor],
        borders: Tensor,
        shape: tuple[int, int, int],
    ) -> Tensor:
        """Return the gradient of `split_heads` in x."""
        q, k, v = grads
        x = q.new_empty(len(q), q.shape[1] + k.shape[1] + v.shape[1])
        self._call("split_heads_backward", (*grads, *angles, borders, x), len(borders) - 1, *shape)
        return x

    def reorder_heads(self, x: Tensor, borders: Tensor, heads: int, *, to_samples: bool) -> Tensor:
        """Return x [T, heads * dim] in sample order, or back in the order of tokens."""
        y = torch.empty_like(x)
        numbers = len(borders) - 1, heads, x.shape[1] // heads, int(to_samples)
        self._call("reorder_heads", (x, y, borders), *numbers)
        return y

    def causal_softmax_(
        self,
        scores: Tensor,
        logarithms: Tensor | None = None,
        *,
        queries: int,
        seen: int,
        window: int,
        scale: float,
    ) -> Tensor:
        """Turn scores [n, rows, keys] into shares; a row sees keys up to its own place.

        Args:
            scores: changed in place.
            logarithms: float32 [n, rows], set to those of the sums behind the shares.
            queries: rows after which the places start again.
            seen: keys that the first row sees, its own included.
            window: how many last keys a row sees at most; 0: all.
            scale: factor of the scores.
        """
        rows, keys = scores.shape[0] * scores.shape[1], scores.shape[2]
        numbers = rows, keys, queries, seen, window, scale
        self._call("causal_softmax", (scores, logarithms), *numbers)
        return scores

    def causal_softmax_backward_(
        self, shares: Tensor, grad: Tensor, *, queries: int, seen: int, window: int, scale: float
    ) -> Tensor:
        """Turn the gradient in the shares into that in the scores, in place."""
        rows, keys = grad.shape[0] * grad.shape[1], grad.shape[2]
        numbers = rows, keys, queries, seen, window, scale
        self._call("causal_softmax_backward", (shares, grad), *numbers)
        return grad

    def cross_entropy_(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return losses, float32 [N]; logits [N, V] become their gradients."""
        losses = logits.new_empty(len(targets), dtype=torch.float32)
        self._call("cross_entropy", (logits, targets, losses), *logits.shape)
        return losses
