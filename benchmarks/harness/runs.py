"""Starts a contender with the probe inside, waits, and reads what the probe wrote."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from harness.jobs import Contender, Launch
from harness.results import Measured, read_probes

_PROBE = Path(__file__).parents[1] / "probe"
_TOLD_LINES = 200
_TIMED_OUT = 124  # as the command `timeout` says it


def run_contender(contender: Contender, launch: Launch, *, timeout_s: float) -> Measured:
    """Train once; a failure is a result too, with its reason.

    Args:
        contender: who trains.
        launch: where; its output folder is emptied before and loses its weights afterwards.
        timeout_s: the processes are ended after this time.
    """
    folder = launch.output_dir
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "probe").mkdir(parents=True)
    for lock in folder.parent.glob("torch_extensions/**/lock"):
        lock.unlink()  # of a run that was ended while it compiled; the next one would wait for ever
    words = contender.command(launch)
    start = time.monotonic()
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        code = _wait(words, _environment(contender, folder, start), log, folder, timeout_s)
    wall_s = time.monotonic() - start
    probes = [path.read_text(encoding="utf-8") for path in sorted((folder / "probe").iterdir())]
    _remove_weights(folder)
    if code != 0 or len(probes) != contender.ranks:
        lines = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
        reason = failure_reason(lines[-_TOLD_LINES:], code=code)
        return Measured(wall_s=wall_s, failure=f"{reason} (see {folder / 'log.txt'})")
    return read_probes(probes, wall_s=wall_s)


def _environment(contender: Contender, folder: Path, start: float) -> dict[str, str]:
    """Return the caller's environment with the probe, offline, and with caches of this run alone.

    Every contender reads and tokenises its rows itself: nothing is left from a run before.
    """
    path = [str(_PROBE), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        **contender.env,
        "PYTHONPATH": os.pathsep.join(path),
        "TRAINING_PROBE_DIR": str(folder / "probe"),
        "TRAINING_PROBE_START": repr(start),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "cache"),
        "LLMTUNER_CACHE": str(folder / "cache"),
        # Our own: a lock that some killed process left in the user's must not stop us.
        "TORCH_EXTENSIONS_DIR": str(folder.parent / "torch_extensions"),
        "CUDA_VISIBLE_DEVICES": "",
        "WANDB_DISABLED": "true",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _wait(
    words: Sequence[str], env: dict[str, str], log: object, folder: Path, timeout_s: float
) -> int:
    child = subprocess.Popen(
        words, env=env, cwd=folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        return child.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return _TIMED_OUT
    finally:  # ranks that a launcher left behind belong to the group that we made
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def failure_reason(lines: Sequence[str], *, code: int) -> str:
    """Return the line that says why a process failed: the last one that names an error."""
    if code == _TIMED_OUT:
        return "it took longer than --timeout allows"
    named = [line.strip() for line in lines if "Error" in line and not line.startswith(" ")]
    told = named or [line.strip() for line in lines if line.strip()]
    return f"exit code {code}: {told[-1][:300] if told else 'it said nothing'}"


def _remove_weights(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.suffix in {".safetensors", ".pt", ".bin"}:
            path.unlink()
    shutil.rmtree(folder / "cache", ignore_errors=True)
