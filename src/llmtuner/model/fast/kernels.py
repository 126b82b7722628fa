"""Builds and calls the C files beside this one: a training step on a CPU.

They are compiled once per machine (a few seconds) into the user's cache. Everything takes tensors
on the CPU; those named x, y, grad, … are bfloat16.
"""

import ctypes
import hashlib
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from mmap import mmap
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from llmtuner.extras.env import process_env
from llmtuner.extras.logs import get_logger
from llmtuner.model.fast.cores import share_cores

logger = get_logger(__name__)

_SOURCES = tuple(sorted(Path(__file__).parent.glob("*.[ch]")))
_COMPILERS = ("cc", "gcc", "clang")
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp")
_X86_FLAGS = ("-mprefer-vector-width=512",)
_BUILD_SECONDS = 120
_PANEL = 64  # columns of a tile, at most

Pair = tuple[Tensor, Tensor]

_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
# Every function takes its tensors first, then whole numbers, then at most one float.
_SIGNATURES = {
    "rms_norm": (6, 2, 1),
    "rms_norm_backward": (6, 2, 0),
    "rms_norm_backward_weight": (4, 2, 0),
    "swiglu": (2, 2, 0),
    "swiglu_backward": (4, 2, 0),
    "rotate_heads": (4, 5, 1),
    "norm_heads": (6, 4, 1),
    "norm_heads_backward": (6, 4, 0),
    "norm_heads_backward_weights": (7, 4, 0),
    "attention": (5, 6, 1),
    "attention_backward": (7, 6, 1),
    "product": (5, 9, 0),
    "product_transposed": (3, 9, 1),
    "pair_rows": (2, 3, 0),
    "round_scaled": (2, 3, 1),
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
    return Kernels(library, share_cores(library))


def _build(compiler: str) -> Path:
    flags = [*_FLAGS, *(_X86_FLAGS if platform.machine() == "x86_64" else ())]
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, check=True, timeout=_BUILD_SECONDS
    ).stdout
    capabilities = repr(sorted(torch.cpu.get_capabilities().items())).encode()
    sources = [path.read_bytes() for path in _SOURCES]
    parts = [*sources, version, " ".join(flags).encode(), capabilities]
    folder = process_env().cache_dir / "kernels"
    built = folder / f"{hashlib.sha256(b'|'.join(parts)).hexdigest()[:24]}.so"
    if built.is_file():
        return built
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=folder) as staging:
        staged = Path(staging) / built.name
        units = [str(path) for path in _SOURCES if path.suffix == ".c"]
        command = [compiler, *flags, "-shared", "-fPIC", "-o", str(staged), *units, "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_SECONDS)
        if done.returncode != 0:
            raise OSError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else command)
        staged.replace(built)
    return built


@dataclass(frozen=True)
class Heads:
    """The attention of one layer.

    Attributes:
        shape: query heads, key/value heads, dimension of a head.
        scale: factor of the scores.
        window: how many last tokens a token sees; 0: all.
        is_turned: queries and keys turn by the angles of their token.
        epsilon: of the norms of queries and keys, where they have such norms.
    """

    shape: tuple[int, int, int]
    scale: float
    window: int
    is_turned: bool = True
    epsilon: float = 0.0


def is_without_numbers(tensor: Tensor) -> bool:
    """Tell whether a tensor has only a shape, as in a plan."""
    return isinstance(tensor, FakeTensor) or tensor.is_meta


def note_operations(out: Tensor, depth: int) -> None:
    """Let a plan, whose tensors have no numbers, see what our code would multiply.

    A product that sums `depth` numbers for each one of `out` stands for it.
    """
    if is_without_numbers(out):
        one, (rows, columns) = out.new_empty(1, 1), out.shape
        torch.mm(one.expand(rows, depth), one.expand(depth, columns), out=out)


class Kernels:
    """The compiled functions, on tensors; tensors without memory (a plan's) only get shapes."""

    def __init__(self, library: ctypes.CDLL, shared: mmap | None = None) -> None:
        """Declare the argument types of every function; hold the memory that they share."""
        self.library = library
        self._shared = shared
        self._functions = {name: library[name] for name in _SIGNATURES}
        for name, (pointers, integers, floats) in _SIGNATURES.items():
            function = self._functions[name]
            function.argtypes = [_POINTER] * pointers + [_INT] * integers + [_FLOAT] * floats
            function.restype = None

    def _call(
        self, name: str, tensors: tuple[Tensor, *tuple[Tensor | None, ...]], *numbers: float
    ) -> None:
        for tensor in tensors:
            assert tensor is None or tensor.is_contiguous(), "this takes contiguous tensors"
        self._run(name, tensors, *numbers)

    def _run(
        self, name: str, tensors: tuple[Tensor, *tuple[Tensor | None, ...]], *numbers: float
    ) -> None:
        if is_without_numbers(tensors[0]):
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

    def rotate_heads(self, x: Tensor, angles: Pair, heads: Heads) -> Tensor:
        """Return x [T, n] with queries and keys of each row turned by its angles."""
        y = torch.empty_like(x)
        self._rotate(x, angles, y, heads, 1.0)
        return y

    def rotate_heads_back_(self, x: Tensor, angles: Pair, heads: Heads) -> Tensor:
        """Undo `rotate_heads`, in place."""
        self._rotate(x, angles, x, heads, -1.0)
        return x

    def _rotate(self, x: Tensor, angles: Pair, y: Tensor, heads: Heads, sign: float) -> None:
        num_heads, kv_heads, dim = heads.shape
        numbers = *x.shape, num_heads + kv_heads, dim, 2 * angles[0].shape[1], sign
        self._call("rotate_heads", (x, *angles, y), *numbers)

    def norm_heads(
        self, x: Tensor, weights: Tensor, angles: Pair, heads: Heads
    ) -> tuple[Tensor, Tensor]:
        """Return x [T, n] with queries and keys normed and turned, and 1 / rms.

        Args:
            x: queries, keys and values.
            weights: of the norms of queries and of keys, float32 [2, dim].
            angles: cosines and sines, float32 [T, dim / 2].
            heads: what they look like.
        """
        num_heads, kv_heads, _ = heads.shape
        y = torch.empty_like(x)
        inverse = x.new_empty(len(x), num_heads + kv_heads, dtype=torch.float32)
        tensors = x, weights, *angles, y, inverse
        self._call("norm_heads", tensors, len(x), *heads.shape, heads.epsilon)
        return y, inverse

    def norm_heads_backward_(
        self, grad: Tensor, x: Tensor, weights: Tensor, angles: Pair, inverse: Tensor, heads: Heads
    ) -> Tensor:
        """Turn the gradient in the output of `norm_heads` into that in x, in place."""
        tensors = x, weights, *angles, inverse, grad
        self._call("norm_heads_backward", tensors, len(x), *heads.shape)
        return grad

    def norm_heads_backward_weights(
        self, grad: Tensor, x: Tensor, angles: Pair, inverse: Tensor, heads: Heads
    ) -> Tensor:
        """Return the gradient in the weights of `norm_heads`, float32 [2, dim]."""
        num_heads, kv_heads, dim = heads.shape
        parts = inverse.new_empty(num_heads + kv_heads, dim)
        total = inverse.new_empty(2, dim)
        tensors = grad, x, *angles, inverse, parts, total
        self._call("norm_heads_backward_weights", tensors, len(x), *heads.shape)
        return total

    def attention(
        self, x: Tensor, borders: Tensor, heads: Heads, *, prefix: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return y [T, heads * dim], and the logarithms of the sums of shares, float32 [T, heads].

        Args:
            x: rotated queries and keys, and values, [T, (heads + 2 kv_heads) * dim].
            borders: of the samples, int32 [samples + 1].
            heads: what they look like.
            prefix: such rows of tokens that every token sees too; not with a window.
        """
        num_heads, _, dim = heads.shape
        y = x.new_empty(len(x), num_heads * dim)
        logarithms = x.new_empty(len(x), num_heads, dtype=torch.float32)
        seen = 0 if prefix is None else len(prefix)
        numbers = len(borders) - 1, seen, *heads.shape, heads.window, heads.scale
        self._call("attention", (x, prefix, borders, y, logarithms), *numbers)
        return y, logarithms

    def attention_backward(
        self,
        x: Tensor,
        y: Tensor,
        grad: Tensor,
        logarithms: Tensor,
        borders: Tensor,
        heads: Heads,
    ) -> Tensor:
        """Return the gradient of `attention` in x."""
        num_heads, _, dim = heads.shape
        wide = -(-dim // _PANEL) * _PANEL
        parts = logarithms.new_empty(2, num_heads, len(x), wide)
        grad_x = torch.empty_like(x)
        tensors = x, y, grad, logarithms, borders, parts, grad_x
        numbers = len(borders) - 1, len(x), *heads.shape, heads.window, heads.scale
        self._call("attention_backward", tensors, *numbers)
        return grad_x

    def product(
        self,
        x: Tensor,
        weight: Tensor,
        *,
        is_turned: bool,
        beside: tuple[Tensor, Tensor] | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Return x @ weight plus the product of `beside`, each row summed in one fixed order.

        Args:
            x: [M, K]; rows may lie apart.
            weight: [K, N], or [N, K].
            is_turned: the weight is [N, K].
            beside: two more such matrices, whose product is added before it is rounded.
            out: contiguous [M, N].
        """
        columns = weight.shape[0 if is_turned else 1]
        y = x.new_empty(len(x), columns) if out is None else out
        x2, weight2 = beside or (None, None)
        depth2, *rows2 = (0, 0, 0) if x2 is None else (x2.shape[1], x2.stride(0), weight2.stride(0))
        sizes = len(x), columns, x.shape[1], depth2
        rows = x.stride(0), weight.stride(0), *rows2
        note_operations(y, sizes[2] + depth2)
        self._run("product", (x, weight, x2, weight2, y), *sizes, *rows, int(not is_turned))
        return y

    def paired(self, x: Tensor) -> Tensor:
        """Return x [T, M] as the left factor of `product_transposed`, int32 [T / 2, M]."""
        pairs = x.new_empty(-(-len(x) // 2), x.shape[1], dtype=torch.int32)
        self._run("pair_rows", (x, pairs), *x.shape, x.stride(0))
        return pairs

    def product_transposed(
        self, pairs: Tensor, y: Tensor, out: Tensor, factor: float, *, adds: bool = False
    ) -> Tensor:
        """Set out, float32 or bfloat16 [M, N], to factor * x^T @ y, and return it.

        Args:
            pairs: `paired(x)`, or some of its columns.
            y: [T, N]; rows may lie apart.
            out: of any layout.
            factor: of the product.
            adds: to what is in `out`.
        """
        sizes = pairs.shape[1], y.shape[1], len(y)
        rows = pairs.stride(0), y.stride(0), *out.stride()
        assert out.dtype in (torch.float32, torch.bfloat16), "the C function knows these two"
        rounds = out.dtype == torch.bfloat16
        note_operations(out, len(y))
        self._run("product_transposed", (pairs, y, out), *sizes, *rows, rounds, adds, factor)
        return out

    def round_scaled(self, x: Tensor, factor: float, y: Tensor) -> None:
        """Set y, bfloat16 with rows that may lie apart, to factor * x, contiguous float32."""
        self._run("round_scaled", (x, y), *x.shape, y.stride(0), factor)

    def cross_entropy_(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return losses, float32 [N]; logits [N, V] become their gradients."""
        losses = logits.new_empty(len(targets), dtype=torch.float32)
        self._call("cross_entropy", (logits, targets, losses), *logits.shape)
        return losses
