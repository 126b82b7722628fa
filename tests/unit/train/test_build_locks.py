"""A lock that a killed compiler left is deleted; one that is in use is not."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmtuner.train.build_locks import clear_build_locks


@pytest.mark.parametrize("place", ["py311_cpu/deepspeed_shm_comm", "deepspeed_shm_comm"])
def test_only_locks_that_nobody_holds_go(tmp_path: Path, place: str) -> None:
    folder = tmp_path / place
    folder.mkdir(parents=True)
    lock = folder / "lock"
    code = f"import os, time; os.open({str(lock)!r}, os.O_CREAT | os.O_EXCL); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        while not lock.exists():
            time.sleep(0.01)
        clear_build_locks(tmp_path, patience_s=0)
        assert lock.exists()
    finally:
        process.kill()
        process.wait()
    started = time.monotonic()
    os.utime(lock, (time.time() - 0.5,) * 2)
    clear_build_locks(tmp_path, patience_s=0.7)
    assert not lock.exists()
    assert time.monotonic() - started >= 0.15


def test_nothing_to_clear(tmp_path: Path) -> None:
    clear_build_locks(tmp_path / "nowhere")
