"""What this machine has: memory, and how fast it multiplies matrices and copies, measured now."""

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_MEMINFO = Path("/proc/meminfo")
_CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
_MEASURE_S = 0.03
_COPY_BYTES = 32 * 2**20
_KIB = 1024


@dataclass(frozen=True)
class Speed:
    """What this device does in a second.

    Attributes:
        flops: floating point operations in large matrix products of the run's number type.
        copied_bytes: read plus written.
    """

    flops: float
    copied_bytes: float


def memory_limit(device_type: str, *, ranks_here: int = 1) -> int:
    """Return the bytes that one process of the run may use, this process's own included."""
    if device_type == "cuda":
        return int(torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved())
    limits = [_kib_of(_MEMINFO, "MemAvailable") + resident_bytes()]
    for path in _CGROUP_LIMITS:
        text = path.read_text("ascii").strip() if path.is_file() else ""
        limits += [int(text)] if text.isdigit() else []
    return min(limits) // ranks_here


def resident_bytes() -> int:
    """Return the main memory that this process holds now."""
    return _kib_of(_STATUS, "VmRSS") or peak_resident_bytes()


def peak_resident_bytes() -> int:
    """Return the most main memory that this process ever held.

    `getrusage` starts from the size of the parent process, so the kernel's own file comes first.
    """
    return _kib_of(_STATUS, "VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIB


def peak_bytes(device_type: str) -> int:
    """Return the most memory of the device that this process held at once."""
    if device_type == "cuda":
        return int(torch.cuda.max_memory_allocated())
    return peak_resident_bytes()


def measure_speed(device_type: str, dtype: torch.dtype, *, shape: tuple[int, int, int]) -> Speed:
    """Measure matrix products and copies for a fraction of a second.

    Args:
        device_type: "cpu" or "cuda".
        dtype: number type of the products.
        shape: rows, columns in and columns out of a typical product of the run.
    """
    rows, inner, columns = shape
    left = torch.ones(rows, inner, dtype=dtype, device=device_type)
    right = torch.ones(inner, columns, dtype=dtype, device=device_type)
    product = torch.empty(rows, columns, dtype=dtype, device=device_type)
    seconds = _fastest(lambda: torch.mm(left, right, out=product), device_type)
    source = torch.ones(_COPY_BYTES, dtype=torch.uint8, device=device_type)
    target = torch.empty_like(source)
    copying = _fastest(lambda: target.copy_(source), device_type)
    return Speed(2 * rows * inner * columns / seconds, 2 * _COPY_BYTES / copying)


def _fastest(work: Callable[[], object], device_type: str) -> float:
    work()
    end = time.monotonic() + _MEASURE_S
    best = float("inf")
    while time.monotonic() < end:
        started = time.perf_counter()
        work()
        if device_type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best


def _kib_of(path: Path, name: str) -> int:
    """Return the bytes of a line `Name:  123 kB`, or 0 where the kernel has no such file."""
    if not path.is_file():
        return 0
    for line in path.read_text("ascii", errors="replace").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * _KIB
    return 0
