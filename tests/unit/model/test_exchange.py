"""Ranks of one machine add up tensors and hand them round in shared memory."""

import mmap
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from llmtuner.extras.errors import DistributedError
from llmtuner.model.fast import exchange as module
from llmtuner.model.fast.exchange import Exchange, join_exchange
from llmtuner.model.fast.kernels import load_kernels

pytestmark = pytest.mark.skipif(load_kernels() is None, reason="no C compiler")

LIMIT = timedelta(seconds=60)
TYPES = [torch.float32, torch.bfloat16]
# Of a part's length, of several, of less than a cache line for each rank, of nothing.
COUNTS = [0, 1, 5, 100, (1 << 17) + 3, (1 << 19) + 1]


def joined(size: int) -> list[Exchange | None]:
    """Let as many threads, which are ranks of one group, find each other."""
    store = dist.HashStore()

    def be(rank: int) -> Exchange | None:
        return join_exchange(store, rank=rank, size=size, limit=LIMIT)

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(be, range(size)))


def in_ranks(size: int, work: Callable[[Exchange, int], Tensor]) -> list[Tensor]:
    """Run `work` in as many threads; calls of C functions free Python's lock."""
    exchanges = joined(size)
    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(work, exchanges, range(size)))


def numbers(rank: int, count: int, dtype: torch.dtype) -> Tensor:
    """Return what a rank sends."""
    source = torch.Generator().manual_seed(rank)
    return torch.randn(count, generator=source).to(dtype)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("dtype", TYPES)
def test_sums_are_rounded_once_and_equal_on_all_ranks(size: int, dtype: torch.dtype) -> None:
    def add_up(exchange: Exchange, rank: int) -> Tensor:
        every = [numbers(rank, count, dtype) for count in COUNTS]
        for x in every:
            exchange.add_up_(x)
        return torch.cat(every)

    found = in_ranks(size, add_up)
    sent = [torch.cat([numbers(rank, n, dtype) for n in COUNTS]) for rank in range(size)]
    expected = sent[0].float()
    for other in sent[1:]:
        expected = expected + other.float()
    for one in found:
        torch.testing.assert_close(one, expected.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("is_in_place", [False, True])
def test_every_rank_gets_what_all_have(size: int, is_in_place: bool) -> None:
    def gather(exchange: Exchange, rank: int) -> Tensor:
        every = []
        for count in COUNTS:
            own, out = numbers(rank, count, torch.bfloat16), torch.zeros(size, count).bfloat16()
            if is_in_place:
                own = out[rank].copy_(own)
            exchange.hand_round(own, out)
            every.append(out.flatten())
        return torch.cat(every)

    found = in_ranks(size, gather)
    rows = [[numbers(r, count, torch.bfloat16) for r in range(size)] for count in COUNTS]
    expected = torch.cat([one for row in rows for one in row])
    for one in found:
        torch.testing.assert_close(one, expected, rtol=0, atol=0)


def test_parts_are_not_filled_before_all_have_read_them() -> None:
    def many(exchange: Exchange, rank: int) -> Tensor:
        total = torch.zeros(1)
        for turn in range(2000):
            x = torch.full((3,), float(turn * (rank + 1)))
            exchange.add_up_(x)
            total += x[0]
            out = torch.empty(2, 1)
            exchange.hand_round(torch.full((1,), float(turn + rank)), out)
            total += out.sum()
        return total

    expected = sum(3.0 * turn + 2 * turn + 1 for turn in range(2000))
    assert [one.item() for one in in_ranks(2, many)] == [expected, expected]


def test_only_what_it_adds_is_taken() -> None:
    can = in_ranks(
        2,
        lambda exchange, rank: torch.tensor(
            [
                exchange.can_add(torch.ones(2)),
                exchange.can_add(torch.ones(2).bfloat16()),
                exchange.can_add(torch.ones(2, dtype=torch.int64)),
                exchange.can_add(torch.ones(2, 2).t()),
            ]
        ),
    )
    assert can[0].tolist() == can[1].tolist() == [True, True, False, False]


def _alone(process: int, limit_s: int) -> Exchange:
    """Return rank 0 of two; rank 1 is a process that never comes."""
    kernels = load_kernels()
    assert kernels is not None
    memory = mmap.mmap(-1, module._num_bytes(2))
    struct.pack_into("=Ii", memory, module._MARK_BYTES, 0, process)
    limit = timedelta(seconds=limit_s)
    return Exchange(kernels.library, memory, rank=0, size=2, limit=limit)


def test_a_rank_that_has_ended_is_named() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    with pytest.raises(DistributedError, match="Rank 1 has ended"):
        _alone(ended.pid, limit_s=60).add_up_(torch.ones(3))


def test_a_rank_that_does_not_come_is_named() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as waiting:
        with pytest.raises(DistributedError, match="Rank 1 has not sent its tensors in 1 s"):
            _alone(waiting.pid, limit_s=1).hand_round(torch.ones(3), torch.ones(2, 3))
        waiting.terminate()


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FOLDER", tmp_path)
    assert all(joined(2))
    assert not list(tmp_path.iterdir())


def test_all_ranks_do_without_where_there_is_no_shared_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_FOLDER", tmp_path / "nowhere")
    with caplog.at_level("INFO"):
        assert joined(2) == [None, None]
    assert "over the network: there is no shared memory" in caplog.text


def test_all_ranks_do_without_where_one_cannot_see_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_FOLDER", tmp_path)
    mapped = module._map
    places = iter([mapped, lambda path, size: mmap.mmap(-1, module._num_bytes(size))])
    lock = threading.Lock()

    def one_elsewhere(path: Path, size: int) -> mmap.mmap:
        with lock:
            return next(places)(path, size)

    monkeypatch.setattr(module, "_map", one_elsewhere)
    assert joined(2) == [None, None]
    assert not list(tmp_path.iterdir())
