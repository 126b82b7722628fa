"""The formulas of docs/scaling.md against the bytes that real ranks send, keep and save."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
EXTRA_SENT = 12  # the norm of the gradient and a flag for overflow
EXTRA_SAVED = 8_192  # names, shapes and settings in a file of the optimizer
LARGEST_WEIGHT = 500 * 64 * 2  # bytes; ZeRO 2 keeps weights whole that lie on a border of shares


@pytest.fixture(scope="module")
def rows(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return what `benchmarks/scale.py` finds with so many ranks, by ZeRO stage."""
    pytest.importorskip("deepspeed")
    output = tmp_path_factory.mktemp("scale") / "scale.json"
    command = [sys.executable, str(ROOT / "benchmarks/scale.py"), "--ranks", str(request.param)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    ran = subprocess.run(
        [*command, "--output", str(output)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    return {row["stage"]: row for row in json.loads(output.read_text())}


RANKS = [1, 2, *(pytest.param(count, marks=pytest.mark.slow) for count in (3, 4))]


@pytest.mark.parametrize("rows", RANKS, indirect=True)
@pytest.mark.parametrize("stage", range(4))
def test_ranks_send_keep_and_save_what_the_formulas_say(rows: Any, stage: int) -> None:
    row = rows[stage]
    formula, measured = row["formula"], row["measured"]
    assert 0 <= measured["sent"] - formula["sent"] <= EXTRA_SENT
    if row["ranks"] > 1:  # alone, DeepSpeed leaves out what would be gathered
        assert measured["gathered"] == formula["gathered"]
    assert measured["scattered"] == formula["scattered"]
    assert set(row["others"].values()) == {0}
    kept = dict(row["formula_kept"])
    border = row["measured_kept"]["gradients"] - kept.pop("gradients")
    assert 0 <= border <= (2 * LARGEST_WEIGHT if stage == 2 and row["ranks"] > 1 else 0)
    assert {name: row["measured_kept"][name] for name in kept} == kept
    shares = [size for name, size in row["measured_saved"].items() if "optim" in name]
    assert len(shares) == (row["ranks"] if stage else 0)
    for size in shares:
        assert 0 < size - row["formula_saved"]["per_rank"] < EXTRA_SAVED
