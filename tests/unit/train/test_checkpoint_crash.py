"""F01, F05, F06: a save is stopped at each of its I/O calls in turn, by an error and by death.

For k = 1, 2, … a new save is stopped at its k-th call, until k is more than a save needs. Whatever
happens, the earlier checkpoint verifies and the new one is whole or absent.
"""

import builtins
import errno
import io
import os
import resource
import shutil
import signal
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_parts import RUN, make_store, write_files
from safetensors.torch import save_file

from llmtuner.extras.errors import LlmtunerError, StorageError
from llmtuner.train.checkpoint import (
    MANIFEST,
    CheckpointStore,
    list_checkpoints,
    newest_valid_checkpoint,
    read_manifest,
    verify_checkpoint,
)

# What a save does to the disk; reading is among it, since a manifest is made of what is read.
WATCHED: list[tuple[Any, str]] = [
    (io, "open"),
    (builtins, "open"),
    (os, "open"),
    (os, "fdopen"),
    (os, "fsync"),
    (os, "mkdir"),
    (os, "rename"),
    (os, "replace"),
    (os, "chmod"),
    (os, "rmdir"),
    (os, "unlink"),
    (os, "stat"),
    (tempfile, "mkstemp"),
]


class CrashEngine:
    """Calls `strike` at the k-th watched call, and counts the calls."""

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path) -> None:
        self.count = 0
        self.at = 0
        self.strike: Callable[[], None] = lambda: None
        self._folder = str(folder)
        self._is_busy = False
        for owner, name in WATCHED:
            patch.setattr(owner, name, self._watched(getattr(owner, name)))

    def _watched(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._is_busy or not self._is_ours(args, kwargs):
                return original(*args, **kwargs)
            self.count += 1
            if self.count == self.at:
                self._is_busy = True  # cleaning up after an error must work
                self.strike()
            return original(*args, **kwargs)

        return call

    def _is_ours(self, args: Any, kwargs: Any) -> bool:
        """Tell whether a call is about the folder; a handle can only be a file of ours."""
        subject = args[0] if args else kwargs.get("dir", "")
        return isinstance(subject, int) or str(subject).startswith(self._folder)

    def arm(self, at: int, strike: Callable[[], None]) -> None:
        self.count, self.at, self.strike, self._is_busy = 0, at, strike, False


def save(store: CheckpointStore, step: int) -> None:
    """Save two small files; more would only repeat the same calls."""
    with store.stage(step, {}) as folder:
        (folder / "deep").mkdir()
        for name in ("weights", "deep/optimizer"):
            (folder / name).write_bytes(f"{name} {step}".encode() * 100)


def prepare(folder: Path, *, exists: bool) -> CheckpointStore:
    shutil.rmtree(folder, ignore_errors=True)
    store = make_store(folder)
    save(store, 1)
    if exists:
        save(store, 2)
    return store


def check(store: CheckpointStore, *, call: int) -> None:
    """The oracle: the earlier one is whole, the new one whole or absent, resuming works."""
    assert verify_checkpoint(store.path_of(1)) == [], call
    steps = [step for step, _ in list_checkpoints(store.output_dir)]
    newest = newest_valid_checkpoint(store.output_dir, RUN)
    if verify_checkpoint(store.path_of(2)) == []:
        assert newest == store.path_of(2), call
        return
    assert newest == store.path_of(1), call
    if 2 in steps:  # only the remains of the replaced one: without files, or named as damaged
        assert read_manifest(store.path_of(2)) is None or verify_checkpoint(store.path_of(2)), call


@pytest.fixture(autouse=True)
def _fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.mark.parametrize("exists", [False, True], ids=["new", "replaced"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["full", "broken"])
def test_an_error_at_any_call_of_a_save_costs_at_most_the_new_checkpoint(
    tmp_path: Path, exists: bool, code: int
) -> None:
    reported = []
    for call in count(1):
        store = prepare(tmp_path / "run", exists=exists)
        error, num_calls = save_with_error_at(call, store, code)
        check(store, call=call)
        if num_calls < call:  # the save has fewer calls: all of them had their turn
            assert error is None
            break
        if error is not None:
            assert str(store.output_dir) in str(error)
            assert os.strerror(code) in str(error)
            reported.append(error.exit_code)
    assert set(reported) == {6}
    assert len(reported) > 30


def save_with_error_at(
    call: int, store: CheckpointStore, code: int
) -> tuple[StorageError | None, int]:
    """Save step 2; return what it raised, and the calls until it ended."""

    def strike() -> None:
        raise OSError(code, os.strerror(code), "injected")

    with pytest.MonkeyPatch.context() as patch:
        engine = CrashEngine(patch, store.output_dir)
        engine.arm(call, strike)
        try:
            save(store, 2)
        except StorageError as error:
            return error, engine.count
    return None, engine.count


@pytest.mark.parametrize("exists", [False, True], ids=["new", "replaced"])
def test_death_at_any_call_of_a_save_costs_at_most_the_new_checkpoint(
    tmp_path: Path, exists: bool
) -> None:
    outcomes = []
    for call in count(1):
        store = prepare(tmp_path / "run", exists=exists)
        code = run_in_child(partial(die_at, call, store))
        check(store, call=call)
        if code == 0:
            break
        assert code == 137, call
        outcomes.append(verify_checkpoint(store.path_of(2)) == [])
        save(store, 2)  # the next try of the same run gets through
        assert verify_checkpoint(store.path_of(2)) == [], call
        assert not list(store.output_dir.glob(".staging-*")), call
    assert len(outcomes) > 30
    assert True in outcomes  # killed after the commit
    # killed before; where the step is replaced, the old version is there again
    assert exists or False in outcomes


def test_the_only_checkpoint_survives_death_while_it_is_replaced(tmp_path: Path) -> None:
    for call in count(1):
        store = prepare(tmp_path / "run", exists=True)
        shutil.rmtree(store.path_of(1))
        code = run_in_child(partial(die_at, call, store))
        assert newest_valid_checkpoint(store.output_dir, RUN) == store.path_of(2), call
        if code == 0:
            break


def test_a_step_can_be_saved_again_after_two_deaths_while_replacing(tmp_path: Path) -> None:
    store = prepare(tmp_path, exists=True)
    for _ in range(2):
        (store.path_of(2) / MANIFEST).unlink()  # what a killed removal leaves
        save(store, 2)
    assert verify_checkpoint(store.path_of(2)) == []


def die_at(call: int, store: CheckpointStore) -> None:
    engine = CrashEngine(pytest.MonkeyPatch(), store.output_dir)
    engine.arm(call, lambda: os._exit(137))
    save(store, 2)


def run_in_child(action: Callable[[], object]) -> int:
    """Run in a forked process, which ends without any clean-up; return its exit code."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            action()
            code = 0
        except LlmtunerError as error:
            code = error.exit_code
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# ---- a disk that is really full: the kernel refuses to let a file grow ----


def with_full_disk(action: Callable[[], object], *, limit: int) -> int:
    def run() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        action()

    return run_in_child(run)


def write_plain(folder: Path) -> None:
    write_files(folder, 2)


def write_torch(folder: Path) -> None:
    torch.save({"moments": torch.zeros(4096)}, folder / "optimizer.pt")


def write_safetensors(folder: Path) -> None:
    save_file({"weight": torch.zeros(4096)}, folder / "model.safetensors")


@pytest.mark.parametrize("write", [write_plain, write_torch, write_safetensors])
def test_a_full_disk_ends_with_the_code_of_storage(
    tmp_path: Path, write: Callable[[Path], None]
) -> None:
    store = make_store(tmp_path)
    save(store, 1)

    def stage() -> None:
        with store.stage(2, {}) as folder:
            write(folder)

    code = with_full_disk(stage, limit=512)
    assert newest_valid_checkpoint(tmp_path, RUN) == store.path_of(1)
    assert not store.path_of(2).exists()
    assert code == StorageError.exit_code
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-1"}  # the space is free again


def test_the_limit_of_the_test_above_is_what_refuses(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    assert with_full_disk(partial(save, store, 2), limit=1 << 20) == 0
    assert verify_checkpoint(store.path_of(2)) == []


def test_the_oracle_sees_a_save_that_is_not_atomic(tmp_path: Path) -> None:
    """Negative control: writing straight into the folder is caught."""
    store = make_store(tmp_path)
    save(store, 1)
    shutil.copytree(store.path_of(1), store.path_of(2))
    (store.path_of(2) / "weights").unlink()
    assert newest_valid_checkpoint(tmp_path, RUN) == store.path_of(1)
    assert verify_checkpoint(store.path_of(2)) != []
