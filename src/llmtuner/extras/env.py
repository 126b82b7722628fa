"""The only reader of environment variables."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from llmtuner.extras.errors import ConfigError

_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@dataclass(frozen=True)
class ProcessEnv:
    """What a launcher (deepspeed, torchrun) and the user's shell tell this process.

    Attributes:
        rank: number of this process in the job, 0 without a launcher.
        local_rank: number of this process on its host.
        world_size: processes in the job, 1 without a launcher.
        job_id: the same for all processes that one launcher started; empty for a single one.
        cache_dir: where tokenised data is kept between runs.
        use_modelscope: prefer the ModelScope hub over the Hugging Face hub.
    """

    rank: int
    local_rank: int
    world_size: int
    job_id: str
    cache_dir: Path
    use_modelscope: bool


def process_env() -> ProcessEnv:
    """Read the environment of this process."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    cache_dir = os.environ.get("LLMTUNER_CACHE") or f"{base}/llmtuner"
    is_launched = _number("WORLD_SIZE", 1) > 1
    return ProcessEnv(
        rank=_number("RANK", 0),
        local_rank=_number("LOCAL_RANK", 0),
        world_size=_number("WORLD_SIZE", 1),
        job_id=f"{os.uname().nodename}-{os.getppid()}" if is_launched else "",
        cache_dir=Path(cache_dir).expanduser(),
        use_modelscope=os.environ.get("USE_MODELSCOPE_HUB", "0").lower() in ("1", "true", "y"),
    )


def _number(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isascii() or not text.isdigit():
        raise ConfigError(
            "An environment variable of the launcher is no number.",
            where=name,
            got=text,
            fix=f"unset {name}, or start with deepspeed or torchrun",
        )
    return int(text)


def torch_extensions_dir() -> Path | None:
    """Return where torch compiles C++ parts, if the user says it."""
    folder = os.environ.get("TORCH_EXTENSIONS_DIR")
    return Path(folder) if folder else None


def tune_allocator() -> bool:
    """Set how the C library's allocator works; it reads this when a program starts.

    With huge pages, matrix products and fresh tensors are up to 1.5 times as fast on a CPU. Where
    ranks exchange tensors, the threads that do it share one heap, which keeps its memory; in heaps
    of their own, large tensors would be new memory each time.

    Returns:
        Whether anything changed, so that the program has to start again to gain from it.
    """
    wanted = []
    if _HUGE_PAGES.is_file() and "[madvise]" in _HUGE_PAGES.read_text():
        wanted.append("glibc.malloc.hugetlb=1")
    ranks = os.environ.get("WORLD_SIZE", "")
    if ranks.isdecimal() and int(ranks) > 1:  # a wrong one is reported later
        wanted.append("glibc.malloc.arena_max=1")
    before = os.environ.get("GLIBC_TUNABLES", "")
    missing = [one for one in wanted if one.split("=")[0] not in before]
    if missing:
        os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, [before, *missing]))
    return bool(missing)


def share_out_cores() -> bool:
    """Give each rank of this machine its part of the cores; libraries read this when they start.

    Threads of a rank with one core go to sleep soon: it has more only while it uses the cores of
    ranks that wait, and by default they would then look for work for some 6 ms, on cores that their
    owners need again.

    Returns:
        Whether anything changed, so that the program has to start again to gain from it.
    """
    ranks = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or ""
    if not ranks.isdecimal() or int(ranks) < 2:
        return False
    own = str(max(num_usable_cores() // int(ranks), 1))
    wanted = {"OMP_NUM_THREADS": own}
    if os.environ.get("OMP_NUM_THREADS", own) == "1" and "OMP_WAIT_POLICY" not in os.environ:
        wanted["GOMP_SPINCOUNT"] = "1000"  # some 20 microseconds
    missing = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ |= missing
    return bool(missing)


def sets_malloc_thresholds() -> bool:
    """Tell whether the user says from which size on memory goes back to the system."""
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    named = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_")
    return "_threshold" in tunables or any(name in os.environ for name in named)


def accelerate_starts_deepspeed() -> bool:
    """Tell whether `accelerate launch` asks for DeepSpeed, whatever the settings of the run say."""
    asked = os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower()
    return asked not in ("", "0", "f", "false", "n", "no", "off")


def announce_single_process() -> None:
    """Tell libraries that insist on a launcher's variables (DeepSpeed) that we are alone."""
    for name, value in {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}.items():
        os.environ.setdefault(name, value)


def become_process(rank: int, *, world_size: int, num_threads: int) -> None:
    """Tell libraries that this process is one of several CPU processes on this machine."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": str(num_threads),
        "GLOO_SOCKET_IFNAME": "lo",  # the host's own name may lead nowhere
    }


def calm_blas() -> None:
    """Let numpy multiply in one thread, unless the user says otherwise; call before importing it.

    The threads of its library wait busily: for thin matrices they cost more than they save.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def num_usable_cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def tokenizers_in_one_thread() -> Iterator[None]:
    """Keep the tokenizers of processes that start meanwhile from spreading over the cores.

    They read it when they are forked; told later, they would complain about it.
    """
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        del os.environ["TOKENIZERS_PARALLELISM"]
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before
