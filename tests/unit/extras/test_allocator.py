"""What libraries read when a program starts: huge pages, one heap for all threads, cores; and
memory that stays once it was used."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmtuner.extras import env
from llmtuner.extras.env import share_out_cores, tune_allocator


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "enabled"
    monkeypatch.setattr(env, "_HUGE_PAGES", path)
    monkeypatch.setenv("GLIBC_TUNABLES", "")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return path


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", "glibc.malloc.hugetlb=1"),
        ("glibc.malloc.check=1", "glibc.malloc.check=1:glibc.malloc.hugetlb=1"),
    ],
)
def test_the_users_tunables_stay(
    setting: Path, monkeypatch: pytest.MonkeyPatch, before: str, after: str
) -> None:
    setting.write_text("always [madvise] never\n")
    monkeypatch.setenv("GLIBC_TUNABLES", before)
    assert tune_allocator()
    assert os.environ["GLIBC_TUNABLES"] == after
    assert not tune_allocator(), "a program must not start itself for ever"


@pytest.mark.parametrize("text", ["[always] madvise never\n", "always madvise [never]\n", None])
def test_nothing_changes_where_they_are_not_given_on_request(
    setting: Path, text: str | None
) -> None:
    if text is not None:
        setting.write_text(text)
    assert not tune_allocator()
    assert os.environ["GLIBC_TUNABLES"] == ""


def test_what_the_user_chose_wins(setting: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting.write_text("always [madvise] never\n")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")
    assert not tune_allocator()
    assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=0"


@pytest.mark.parametrize(
    ("ranks", "after"), [("1", ""), ("", ""), ("2", "glibc.malloc.arena_max=1"), ("two", "")]
)
def test_ranks_share_one_heap_among_their_threads(
    setting: Path, monkeypatch: pytest.MonkeyPatch, ranks: str, after: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", ranks)
    assert tune_allocator() == bool(after)
    assert os.environ["GLIBC_TUNABLES"] == after


_USE_TWICE = """
import resource
from llmtuner.extras.memory import keep_freed_memory

print(int({call}))
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    data = b"x" * 100_000_000
    del data
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults)
"""


def _use_twice(call: str, **env: str) -> tuple[int, int]:
    """Return what the call says, and the page faults of the second 100 MB."""
    done = subprocess.run(
        [sys.executable, "-c", _USE_TWICE.format(call=call)],
        env={**os.environ, "GLIBC_TUNABLES": "", **env},
        capture_output=True,
        text=True,
        check=True,
    )
    said, faults = done.stdout.split()
    return int(said), int(faults)


def test_freed_memory_stays() -> None:
    assert _use_twice("0")[1] > 10_000, "the C library would keep it anyway"
    is_set, faults = _use_twice("keep_freed_memory()")
    assert is_set
    assert faults < 1_000


@pytest.mark.parametrize(
    "own",
    [
        {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"},
        {"MALLOC_MMAP_THRESHOLD_": "131072"},
    ],
)
def test_the_users_thresholds_stay(own: dict[str, str]) -> None:
    is_set, faults = _use_twice("keep_freed_memory()", **own)
    assert not is_set
    assert faults > 10_000


_CORES = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
_SOON = {"GOMP_SPINCOUNT": "1000"}


@pytest.mark.parametrize(
    ("given", "added"),
    [
        ({}, {}),
        ({"LOCAL_WORLD_SIZE": "1"}, {}),
        ({"LOCAL_WORLD_SIZE": "two"}, {}),
        ({"LOCAL_WORLD_SIZE": "2"}, {"OMP_NUM_THREADS": "4"}),
        ({"LOCAL_SIZE": "2"}, {"OMP_NUM_THREADS": "4"}),
        ({"LOCAL_WORLD_SIZE": "8"}, {"OMP_NUM_THREADS": "1", **_SOON}),
        ({"LOCAL_WORLD_SIZE": "99"}, {"OMP_NUM_THREADS": "1", **_SOON}),
        ({"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}, _SOON),
        ({"LOCAL_WORLD_SIZE": "8", "OMP_NUM_THREADS": "3"}, {}),
        ({"LOCAL_WORLD_SIZE": "8", "OMP_WAIT_POLICY": "active"}, {"OMP_NUM_THREADS": "1"}),
        ({"LOCAL_WORLD_SIZE": "8", "GOMP_SPINCOUNT": "5"}, {"OMP_NUM_THREADS": "1"}),
    ],
)
def test_ranks_share_out_the_cores(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], added: dict[str, str]
) -> None:
    for name in _CORES:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(env, "num_usable_cores", lambda: 8)
    assert share_out_cores() == bool(added)
    assert {name: os.environ[name] for name in _CORES if name in os.environ} == given | added
    assert not share_out_cores(), "a program must not start itself for ever"
