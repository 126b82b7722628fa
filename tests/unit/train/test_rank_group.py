"""The process group of CPU ranks does what gloo does, and large exchanges in shared memory."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import chain
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C import _distributed_c10d as c10d

from llmtuner.extras.errors import DistributedError
from llmtuner.model.fast import exchange
from llmtuner.model.fast.kernels import load_kernels
from llmtuner.train import rank_group
from llmtuner.train.rank_group import RankGroup

pytestmark = pytest.mark.skipif(load_kernels() is None, reason="no C compiler")

SIZE = 2


def in_ranks(work: Callable[[Any, int], list[Tensor]]) -> list[list[Tensor]]:
    """Run `work` in threads, which are the ranks of one group."""
    store, limit = dist.HashStore(), timedelta(seconds=60)

    def be(rank: int) -> list[Tensor]:
        return work(rank_group._create(store, rank, SIZE, limit), rank)

    with ThreadPoolExecutor(SIZE) as threads:
        return list(threads.map(be, range(SIZE)))


def exchanges(group: Any, rank: int) -> list[Tensor]:
    """Do a bit of everything; return what this rank has then."""
    done = []

    def wait(work: dist.Work, *tensors: Tensor) -> None:
        work.wait()
        done.extend(tensors)

    own = torch.arange(6.0).view(2, 3) * (rank + 1)
    for values, operation in [
        (own.clone(), dist.ReduceOp.SUM),
        (own.bfloat16(), dist.ReduceOp.SUM),
        (own.long(), dist.ReduceOp.SUM),
        (own.clone(), dist.ReduceOp.MAX),
    ]:
        options = c10d.AllreduceOptions()
        options.reduceOp = operation
        wait(group.allreduce([values], options), values)
    whole = torch.zeros(2 * SIZE, 3)
    wait(group._allgather_base(whole, own, c10d.AllgatherOptions()), whole)
    sent = own.clone()
    options = c10d.BroadcastOptions()
    options.rootRank, options.rootTensor = 1, 0
    wait(group.broadcast([sent], options), sent)
    every = [torch.zeros_like(own) for _ in range(SIZE)]
    wait(group.allgather([every], [own], c10d.AllgatherOptions()), *every)
    group.barrier(c10d.BarrierOptions()).wait()
    return done


def test_shared_memory_gives_what_gloo_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = []

    def told(group: Any, rank: int) -> list[Tensor]:
        kinds.append(type(group))
        return exchanges(group, rank)

    shared = in_ranks(told)
    monkeypatch.setattr(exchange, "_MOST_RANKS", 1)
    by_gloo = in_ranks(told)
    assert kinds == [RankGroup] * SIZE + [dist.ProcessGroupGloo] * SIZE
    for one, other in zip(chain(*shared), chain(*by_gloo), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_gradients_and_weights_do_not_go_through_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(group: Any, rank: int) -> list[Tensor]:
        def refuse(*arguments: Any) -> None:
            raise AssertionError("this was to go through shared memory")

        class Refusing:
            allreduce = staticmethod(refuse)
            all_gather_single = staticmethod(refuse)

        group.gloo = Refusing
        x, whole = torch.ones(5), torch.zeros(SIZE * 5)
        group.allreduce([x], c10d.AllreduceOptions()).wait()
        group.all_gather_single(whole, x, c10d.AllgatherOptions()).wait()
        return [x, whole]

    for x, whole in in_ranks(work):
        assert x.tolist() == [SIZE] * 5
        assert whole.tolist() == [SIZE] * 5 * SIZE


def test_processes_that_cannot_meet_are_told_what_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(DistributedError, match="MASTER_ADDR"):
        rank_group.start_ranks()
