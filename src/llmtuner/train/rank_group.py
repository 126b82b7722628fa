"""The process group of CPU ranks: shared memory where they have it, gloo for everything else."""

from collections.abc import Callable, Sequence
from datetime import timedelta
from operator import methodcaller
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _create_work_from_future

from llmtuner.extras.errors import DistributedError
from llmtuner.model.fast.exchange import Exchange, join_exchange

_BACKEND = "shared_memory"
_GLOO = dist.ProcessGroup.BackendType.GLOO


def _by_gloo(name: str) -> Callable[..., dist.Work]:
    """Return a method that lets the gloo group do it.

    Left to C++, a call would find gloo by itself, but hold Python's lock while it waits for a
    thread of gloo that needs the lock to drop a tensor.
    """

    def method(self: "RankGroup", *arguments: Any, **named: Any) -> dist.Work:
        return methodcaller(name, *arguments, **named)(self.gloo)

    return method


class RankGroup(dist.ProcessGroup):
    """A gloo group whose large exchanges, of gradients and of weights, go through shared memory."""

    def __init__(self, exchange: Exchange, gloo: dist.ProcessGroup, rank: int, size: int) -> None:
        """Take both ways."""
        super().__init__(rank, size)
        self.gloo = gloo
        self._exchange = exchange
        backend = gloo._get_backend(torch.device("cpu"))
        self._register_backend(torch.device("cpu"), _GLOO, backend)
        self._set_default_backend(_GLOO)

    def allreduce(self, tensors: Sequence[Tensor], opts: Any) -> dist.Work:
        """Add up a tensor over all ranks, in place; see `torch.distributed.all_reduce`."""
        is_sum = opts.reduceOp == dist.ReduceOp.SUM
        if not is_sum or not all(map(self._exchange.can_add, tensors)):
            return self.gloo.allreduce(tensors, opts)
        for tensor in tensors:
            self._exchange.add_up_(tensor)
        return _done(tensors)

    def all_gather_single(self, output: Tensor, own: Tensor, opts: Any) -> dist.Work:
        """Put every rank's tensor side by side; see `torch.distributed.all_gather_single`."""
        if not (output.is_contiguous() and own.is_contiguous()) or output.dtype != own.dtype:
            return self.gloo.all_gather_single(output, own, opts)
        self._exchange.hand_round(own, output)
        return _done(output)

    _allgather_base = all_gather_single  # what C++ and older callers say

    all_to_all_single = _by_gloo("all_to_all_single")
    allgather = _by_gloo("allgather")
    allgather_coalesced = _by_gloo("allgather_coalesced")
    allreduce_coalesced = _by_gloo("allreduce_coalesced")
    alltoall = _by_gloo("alltoall")
    alltoall_base = _by_gloo("alltoall_base")
    barrier = _by_gloo("barrier")
    broadcast = _by_gloo("broadcast")
    gather = _by_gloo("gather")
    recv = _by_gloo("recv")
    recv_anysource = _by_gloo("recv_anysource")
    reduce = _by_gloo("reduce")
    reduce_scatter = _by_gloo("reduce_scatter")
    reduce_scatter_single = _by_gloo("reduce_scatter_single")
    _reduce_scatter_base = _by_gloo("_reduce_scatter_base")
    scatter = _by_gloo("scatter")
    send = _by_gloo("send")


def start_ranks(**how: Any) -> None:
    """Start the default process group of CPU ranks.

    Args:
        how: what `torch.distributed.init_process_group` takes beside the backend.

    Raises:
        DistributedError: the processes cannot meet.
    """
    if not hasattr(dist.Backend, _BACKEND.upper()):
        dist.Backend.register_backend(_BACKEND, _create, devices=["cpu"])
    try:
        dist.init_process_group(_BACKEND, **how)
    except (ValueError, dist.DistError) as error:
        raise DistributedError(
            "The processes of this job cannot meet.",
            got=str(error).splitlines()[0],
            fix="start with deepspeed or torchrun, and give another --master_port if it is in use",
        ) from error


def _create(store: dist.Store, rank: int, size: int, timeout: timedelta) -> Any:
    of_gloo = dist.PrefixStore("gloo/", store)
    backend = dist.ProcessGroupGloo(of_gloo, rank, size, timeout)
    exchange = join_exchange(store, rank=rank, size=size, limit=timeout)
    if exchange is None:
        return backend
    gloo = dist.ProcessGroup(of_gloo, rank, size)
    gloo._register_backend(torch.device("cpu"), _GLOO, backend)
    gloo._set_default_backend(_GLOO)
    return RankGroup(exchange, gloo, rank, size)


def _done(result: Any) -> dist.Work:
    future: torch.futures.Future[Any] = torch.futures.Future()
    future.set_result(result)
    return _create_work_from_future(future)
