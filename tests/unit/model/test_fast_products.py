"""Products and attention of the C files are those of float32 numbers, rounded once."""

import ctypes
import platform
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmtuner.model.fast import kernels as kernels_module
from llmtuner.model.fast.kernels import Heads, Kernels, load_kernels
from llmtuner.model.fast.products import Products

pytestmark = pytest.mark.skipif(load_kernels() is None, reason="no C compiler")

# Of this machine, of one without bfloat16 products, and of one without wide vectors.
FLAGS = {
    "native": None,
    "avx512": ("-march=x86-64-v4",),
    "avx2": ("-march=x86-64-v3",),
    "baseline": ("-march=x86-64",),
}
ROUNDING = 2.0**-8


@pytest.fixture(scope="module", params=FLAGS)
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    flags = FLAGS[request.param]
    if flags is None:
        found = load_kernels()
        assert found is not None
        return found
    if platform.machine() != "x86_64":
        pytest.skip("flags of x86")
    if request.param == "avx512" and not torch.cpu.get_capabilities().get("avx512_f"):
        pytest.skip("no AVX512 here")
    patch = pytest.MonkeyPatch()
    with patch.context() as changed:
        changed.setenv("LLMTUNER_CACHE", str(tmp_path_factory.mktemp("cache")))
        common = [flag for flag in kernels_module._FLAGS if not flag.startswith("-march")]
        changed.setattr(kernels_module, "_FLAGS", (*common, *flags))
        changed.setattr(kernels_module, "_X86_FLAGS", ())
        return Kernels(ctypes.CDLL(str(kernels_module._build("cc"))))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def half(*shape: int) -> Tensor:
    return torch.randn(*shape).to(torch.bfloat16)


def is_rounded(found: Tensor, exact: Tensor) -> bool:
    """Tell whether numbers are those of float32, up to one rounding and the order of sums."""
    exact = exact.detach()
    return bool(((found.float() - exact).abs() <= ROUNDING * exact.abs() + 1e-4).all())


SHAPES = [(1, 64, 16), (7, 64, 70), (37, 576, 100), (13, 33, 65), (5, 5001, 33), (1100, 24, 8)]


@pytest.mark.parametrize("is_turned", [False, True])
@pytest.mark.parametrize("rows", [1, 300, 800])  # whole, and in pieces
def test_small_products_beside_a_large_one_are_not_lost(rows: int, is_turned: bool) -> None:
    x, weight, x2, weight2 = half(rows, 64), half(64, 120), half(rows, 3), half(3, 120) / 2048
    turn = (lambda m: m.t().contiguous()) if is_turned else (lambda m: m)
    multiply = partial(Products().multiply, x, turn(weight), is_turned=is_turned)
    out = torch.full((rows, 120), float("nan"), dtype=torch.bfloat16)
    found = multiply(beside=(x2, turn(weight2)), out=out)
    assert found is out
    exact, small = x.float() @ weight.float(), x2.float() @ weight2.float()
    assert is_rounded(found, exact + small)
    if rows > 1:
        share = ((found.float() - exact) * small).sum() / small.square().sum()
        assert share == pytest.approx(
            1, abs=0.4
        )  # a tenth where the large product is rounded first


@pytest.mark.parametrize("is_turned", [False, True])
@pytest.mark.parametrize(("rows", "depth", "columns"), SHAPES)
def test_products(kernels: Kernels, rows: int, depth: int, columns: int, is_turned: bool) -> None:
    x, weight, x2, weight2 = (
        half(rows, depth),
        half(depth, columns),
        half(rows, 3),
        half(3, columns),
    )
    exact = x.float() @ weight.float()
    turn = (lambda m: m.t().contiguous()) if is_turned else (lambda m: m)
    assert is_rounded(kernels.product(x, turn(weight), is_turned=is_turned), exact)
    both = kernels.product(x, turn(weight), is_turned=is_turned, beside=(x2, turn(weight2)))
    assert is_rounded(both, exact + x2.float() @ weight2.float())
    apart = torch.cat([x, half(rows, 5)], dim=1)[:, :depth]  # rows that lie apart
    assert torch.equal(
        kernels.product(apart, turn(weight), is_turned=is_turned),
        kernels.product(x, turn(weight), is_turned=is_turned),
    )


@pytest.mark.parametrize(("depth", "rows", "columns"), [*SHAPES, (4099, 5, 33)])
def test_transposed_products(kernels: Kernels, rows: int, depth: int, columns: int) -> None:
    x, y = half(depth, rows), half(depth, columns)
    exact = x.float().t() @ y.float()
    pairs = kernels.paired(x)
    found = kernels.product_transposed(pairs, y, torch.empty(rows, columns), 2.0)
    assert torch.allclose(found, 2 * exact, rtol=1e-4, atol=1e-3)
    turned = torch.empty(columns, rows)
    kernels.product_transposed(pairs, y, turned.t(), 2.0)
    assert torch.equal(turned, found.t())
    some = kernels.product_transposed(
        pairs[:, rows // 2 :], y, torch.empty_like(found)[rows // 2 :], 2.0
    )
    assert torch.equal(some, found[rows // 2 :])
    rounded = kernels.product_transposed(pairs, y, torch.empty(rows, columns).bfloat16(), 2.0)
    assert torch.equal(rounded, found.bfloat16())
    before = half(rows, columns)
    added = kernels.product_transposed(pairs, y, before.float(), 2.0, adds=True)
    assert torch.equal(added, before.float() + found)
    added = kernels.product_transposed(pairs, y, before.clone(), 2.0, adds=True)
    assert torch.equal(added, (before.float() + found).bfloat16())


def test_a_row_does_not_depend_on_the_others(kernels: Kernels) -> None:
    x, weight = half(523, 192), half(320, 192)
    whole = kernels.product(x, weight, is_turned=True)
    for start, end in ((0, 1), (3, 200), (517, 523)):
        part = kernels.product(x[start:end], weight, is_turned=True)
        assert torch.equal(part, whole[start:end])


def test_an_odd_row_reads_nothing_behind_it(kernels: Kernels) -> None:
    memory = torch.full((4 * 7 + 1,), float("nan")).to(torch.bfloat16)
    x = memory[: 4 * 7].view(4, 7).copy_(half(4, 7))
    weight = half(7, 40)
    assert is_rounded(kernels.product(x, weight, is_turned=False), x.float() @ weight.float())


def turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn pairs of the first numbers of x [T, heads, dim] by angles [T, half of them]."""
    half_turned = cosine.shape[1]
    a, b, rest = x.split([half_turned, half_turned, x.shape[2] - 2 * half_turned], dim=2)
    cosine, sine = cosine[:, None], sine[:, None]
    return torch.cat([a * cosine - b * sine, b * cosine + a * sine, rest], dim=2)


def angles_of(rows: int, pairs: int) -> tuple[Tensor, Tensor]:
    angles = 6 * torch.rand(rows, pairs)
    return angles.cos(), angles.sin()


@pytest.mark.parametrize(("dim", "part"), [(16, 16), (16, 6), (80, 80), (128, 96)])
def test_heads_are_turned_and_turned_back(kernels: Kernels, dim: int, part: int) -> None:
    heads = Heads((3, 1, dim), 1.0, 0)
    x, angles = half(41, 5 * dim), angles_of(41, part // 2)
    split = x.float().unflatten(1, (5, dim))
    exact = torch.cat([turned(split[:, :4], *angles), split[:, 4:]], dim=1).flatten(1)
    found = kernels.rotate_heads(x, angles, heads)
    assert is_rounded(found, exact)
    back = kernels.rotate_heads_back_(found.clone(), angles, heads)
    assert distance(back, x.float()) < 5e-3


@pytest.mark.parametrize("shape", [(4, 2, 16), (3, 3, 128), (6, 2, 80)])
def test_heads_are_normed_and_turned(kernels: Kernels, shape: tuple[int, int, int]) -> None:
    num_heads, kv_heads, dim = shape
    heads, rows = Heads(shape, 1.0, 0, epsilon=0.1), 53
    x, angles = half(rows, (num_heads + 2 * kv_heads) * dim), angles_of(rows, dim // 2)
    free = [part.requires_grad_() for part in (x.float(), *(1 + torch.randn(2, dim)).unbind())]
    q, k, v = free[0].unflatten(1, (-1, dim)).split([num_heads, kv_heads, kv_heads], dim=1)
    norm = lambda part, weight: F.rms_norm(part, (dim,), weight, eps=0.1)  # noqa: E731
    both = torch.cat([norm(q, free[1]), norm(k, free[2])], dim=1)
    exact = torch.cat([turned(both, *angles), v], dim=1).flatten(1)
    weights = torch.stack(free[1:]).detach()
    found, inverse = kernels.norm_heads(x, weights, angles, heads)
    assert is_rounded(found, exact)
    grad = half(*x.shape)
    exact_x, *exact_weights = torch.autograd.grad(exact, free, grad.float())
    of_weights = kernels.norm_heads_backward_weights(grad, x, angles, inverse, heads)
    assert torch.allclose(of_weights, torch.stack(exact_weights), rtol=1e-4, atol=1e-4)
    found = kernels.norm_heads_backward_(grad, x, weights, angles, inverse, heads)
    assert is_rounded(found, exact_x)


def test_norms_of_heads_do_not_depend_on_the_number_of_threads(kernels: Kernels) -> None:
    heads = Heads((5, 2, 64), 1.0, 0, epsilon=1e-6)
    x, grad, angles = half(97, 9 * 64), half(97, 9 * 64), angles_of(97, 32)
    weights = torch.randn(2, 64)
    found, before = [], torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)  # of the kernels too
        y, inverse = kernels.norm_heads(x, weights, angles, heads)
        of_weights = kernels.norm_heads_backward_weights(grad, x, angles, inverse, heads)
        normed = x, weights, angles, inverse, heads
        found.append((y, of_weights, kernels.norm_heads_backward_(grad.clone(), *normed)))
    torch.set_num_threads(before)
    for some in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(some, found[0], strict=True))


CASES = {
    "tiny": ([5], (2, 1, 16), 0, 0),
    "many": ([1, 2, 3], (4, 4, 64), 0, 0),
    "grouped": ([130, 7, 300], (9, 3, 64), 0, 0),
    "window": ([130, 70, 333], (6, 2, 64), 50, 0),
    "long window": ([700], (2, 1, 64), 300, 0),
    "wide": ([600], (4, 2, 128), 0, 0),
    "odd width": ([90, 40], (4, 2, 80), 0, 0),
    "prefix": ([40, 90, 1], (9, 3, 64), 0, 133),
    "prefix of whole panels": ([40, 90, 1], (3, 1, 64), 0, 128),
}


@pytest.mark.parametrize("case", CASES)
def test_attention(kernels: Kernels, case: str) -> None:
    lengths, shape, window, seen = CASES[case]
    num_heads, kv_heads, dim = shape
    heads = Heads(shape, dim**-0.5, window)
    x = half(sum(lengths), (num_heads + 2 * kv_heads) * dim)
    prefix = half(seen, x.shape[1]) if seen else None
    borders = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    y, logarithms = kernels.attention(x, borders, heads, prefix=prefix)
    free = x.float().requires_grad_()
    exact = attention(free, lengths, heads, None if prefix is None else prefix.float())
    assert distance(y, exact) < 4e-3
    if not seen:
        grad = half(*y.shape)
        (exact_grad,) = torch.autograd.grad(exact, free, grad.float())
        found = kernels.attention_backward(x, y, grad, logarithms, borders, heads)
        assert distance(found, exact_grad) < 5e-3


def distance(found: Tensor, exact: Tensor) -> float:
    return float((found.float() - exact.detach()).norm() / exact.detach().norm())


def attention(x: Tensor, lengths: list[int], heads: Heads, prefix: Tensor | None) -> Tensor:
    """Return the attention by its definition, one sample after the other."""
    num_heads, kv_heads, dim = heads.shape
    results = []
    for sample in x.split(lengths):
        seen = 0 if prefix is None else len(prefix)
        rows = sample if prefix is None else torch.cat([prefix, sample])
        q, k, v = (
            part.unflatten(1, (-1, dim)).transpose(0, 1)
            for part in rows.split([num_heads * dim, kv_heads * dim, kv_heads * dim], dim=1)
        )
        q, k, v = q[:, seen:], *(t.repeat_interleave(num_heads // kv_heads, 0) for t in (k, v))
        query = torch.arange(len(sample))[:, None] + seen
        key = torch.arange(len(rows))[None]
        sees = key <= query
        if heads.window:
            sees &= key > query - heads.window
        scores = (q @ k.transpose(1, 2) * heads.scale).masked_fill(~sees, float("-inf"))
        results.append((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))
    return torch.cat(results)
