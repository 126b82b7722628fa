"""The machine: what it is, and how fast it multiplies matrices."""

import json
import os
import platform
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

_GEMM = """
import json, statistics, sys, time
import torch
size, repeats = int(sys.argv[1]), int(sys.argv[2])
left, right = (torch.randn(size, size).to(torch.bfloat16) for _ in range(2))
for _ in range(3):
    torch.mm(left, right)
seconds = []
for _ in range(repeats):
    start = time.perf_counter()
    torch.mm(left, right)
    seconds.append(time.perf_counter() - start)
flops = 2 * size**3 / statistics.median(seconds)
print(json.dumps({"flops": flops, "threads": torch.get_num_threads()}))
"""
_SIZE = 2048


@dataclass(frozen=True)
class Machine:
    """The machine of a comparison.

    Attributes:
        processor: its name and bfloat16 instructions.
        cores: that this process may use.
        memory_gb: in all.
        system: kernel and its version.
        gemm_flops: floating point operations per second of a bfloat16 product of two 2048 x 2048
            matrices, the median of several.
        gemm_threads: threads it used.
        load: processes that wanted the cores in the last minute before.
    """

    processor: str
    cores: int
    memory_gb: float
    system: str
    gemm_flops: float
    gemm_threads: int
    load: float


def measure_machine(python: Path | None = None, *, repeats: int = 30) -> Machine:
    """Look at this machine and measure its matrix product, in a process of its own."""
    load = os.getloadavg()[0]
    words = [str(python or sys.executable), "-c", _GEMM, str(_SIZE), str(repeats)]
    measured = json.loads(subprocess.run(words, capture_output=True, check=True, text=True).stdout)
    return Machine(
        processor=_processor(Path("/proc/cpuinfo").read_text(encoding="utf-8")),
        cores=len(os.sched_getaffinity(0)),
        memory_gb=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9,
        system=f"{platform.system()} {platform.release()}",
        gemm_flops=measured["flops"],
        gemm_threads=measured["threads"],
        load=load,
    )


def _processor(cpuinfo: str) -> str:
    values = dict(
        (part.strip() for part in line.split(":", 1))
        for line in cpuinfo.splitlines()
        if ":" in line
    )
    flags = set(values.get("flags", values.get("Features", "")).split())
    units = sorted(flags & {"amx_bf16", "avx512_bf16", "bf16"})
    return f"{values.get('model name', platform.machine())} ({', '.join(units) or 'no bfloat16'})"


def num_parameters(model: Path) -> int:
    """Return the stored parameters of a model from the headers of its safetensors files.

    Tied embeddings are stored once, so they count once: as the head. Reading the embedding is no
    matrix product.
    """
    total = 0
    for path in sorted(model.glob("*.safetensors")):
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(size))
        for name, tensor in header.items():
            if name != "__metadata__":
                total += _product(tensor["shape"])
    if total == 0:
        raise SystemExit(f"{model}: there are no weights in safetensors format.")
    return total


def _product(shape: list[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
