"""The few things that the processes of one job must agree on."""

from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def barrier() -> None:
    """Wait for every process of the job; does nothing when there is only one."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def agree(value: T) -> T:
    """Return rank 0's `value` on every rank."""
    if not (dist.is_available() and dist.is_initialized()):
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: T) -> list[T]:
    """Return every rank's `value`, by rank, on every rank."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
