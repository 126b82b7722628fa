"""Ranks on one machine lend each other the cores that they do not use."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Rank 0 of two, with one core of its own; what rank 1 says of itself is written by hand.
_SCRIPT = """
import ctypes, json, struct, sys, time
import torch
from llmtuner.model.fast import kernels as module
from llmtuner.model.fast.kernels import load_kernels

torch.set_num_threads(1)
kept = []
opened = ctypes.CDLL
module.ctypes.CDLL = lambda path: kept.append(opened(path)) or kept[0]
kernels = load_kernels()
library = kept[0]


class Team(ctypes.Structure):
    _fields_ = [("threads", ctypes.c_int)]


library.gather.restype = Team


def threads(given, is_computing, stopped_ns):
    if kernels._shared is not None:
        kernels._shared[64:88] = struct.pack("qqq", given, is_computing, stopped_ns)
    team = library.gather()
    library.scatter(ctypes.byref(team))
    return team.threads


now = time.monotonic_ns()
seen = {
    "no other": threads(0, 0, 0),
    "computes": threads(1, 1, 0),
    "has just computed": threads(1, 0, time.monotonic_ns()),
    "waits": threads(1, 0, now - 10**9),
    "has many cores": threads(1000, 0, 0),
}
own = struct.unpack("qqq", kernels._shared[:24]) if kernels._shared is not None else None
print(json.dumps({"seen": seen, "own": own, "since": now}))
"""


def _rank(tmp_path: Path, **env: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT],
        env={**os.environ, "LLMTUNER_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is no core to lend")
def test_a_rank_uses_the_cores_of_those_that_wait(tmp_path: Path) -> None:
    done = _rank(tmp_path, WORLD_SIZE="2", RANK="0", LOCAL_RANK="0")
    assert done["seen"] == {
        "no other": 1,
        "computes": 1,
        "has just computed": 1,
        "waits": 2,
        "has many cores": len(os.sched_getaffinity(0)),
    }
    given, is_computing, stopped_ns = done["own"]
    assert (given, is_computing) == (1, 0)
    assert stopped_ns > done["since"], "others must see when this rank stopped"
    assert not list((tmp_path / "cores").iterdir()), "the file goes with the process"


def test_a_single_process_keeps_its_threads(tmp_path: Path) -> None:
    done = _rank(tmp_path, WORLD_SIZE="1")
    assert set(done["seen"].values()) == {1}
    assert done["own"] is None
    assert not (tmp_path / "cores").exists()
