"""What a process knows of itself: its rank, its log lines, its group and its seed."""

import logging
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from llmtuner.extras.dist import agree, barrier
from llmtuner.extras.env import announce_single_process, process_env
from llmtuner.extras.logs import get_logger, set_up_logs
from llmtuner.extras.seed import seed_everything

LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    names = (*LAUNCHER, "LLMTUNER_CACHE", "XDG_CACHE_HOME", "USE_MODELSCOPE_HUB")
    for name in names:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def package_logger() -> Iterator[logging.Logger]:
    """Return the package's logger; its handlers and level come back afterwards."""
    logger = logging.getLogger("llmtuner")
    before = list(logger.handlers), logger.level, logger.propagate
    yield logger
    logger.handlers[:], logger.propagate = before[0], before[2]
    logger.setLevel(before[1])


def test_without_a_launcher_a_process_is_alone() -> None:
    env = process_env()
    assert (env.rank, env.local_rank, env.world_size) == (0, 0, 1)
    assert not env.use_modelscope


def test_a_launcher_tells_rank_and_world_size(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(LAUNCHER, ("5", "1", "8"), strict=True):
        monkeypatch.setenv(name, value)
    env = process_env()
    assert (env.rank, env.local_rank, env.world_size) == (5, 1, 8)


def test_being_alone_is_announced_without_overruling_a_launcher(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RANK", "3")
    for name in ("LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "x")  # so that both are removed again after the test
        monkeypatch.delenv(name)
    announce_single_process()
    assert (process_env().rank, process_env().world_size) == (3, 1)


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"LLMTUNER_CACHE": "/c/mine"}, "/c/mine"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/llmtuner"),
        ({"LLMTUNER_CACHE": "/c", "XDG_CACHE_HOME": "/x"}, "/c"),
        ({"LLMTUNER_CACHE": "", "XDG_CACHE_HOME": ""}, "/nowhere/me/.cache/llmtuner"),
        ({}, "/nowhere/me/.cache/llmtuner"),
        ({"LLMTUNER_CACHE": "~/data"}, "/nowhere/me/data"),
    ],
)
def test_the_cache_folder_follows_the_environment(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], folder: str
) -> None:
    monkeypatch.setenv("HOME", "/nowhere/me")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert process_env().cache_dir == Path(folder)


@pytest.mark.parametrize(
    ("value", "expected"),
    [("1", True), ("true", True), ("True", True), ("Y", True), ("0", False), ("", False)],
)
def test_modelscope_is_asked_for_by_the_usual_words(
    monkeypatch: pytest.MonkeyPatch, value: str, expected: bool
) -> None:
    monkeypatch.setenv("USE_MODELSCOPE_HUB", value)
    assert process_env().use_modelscope is expected


@pytest.mark.parametrize(
    ("rank", "debug", "level"),
    [
        ("0", False, logging.INFO),
        ("0", True, logging.DEBUG),
        ("1", False, logging.WARNING),
        ("1", True, logging.WARNING),
    ],
)
def test_only_rank_0_tells_what_goes_well(
    monkeypatch: pytest.MonkeyPatch,
    package_logger: logging.Logger,
    rank: str,
    debug: bool,
    level: int,
) -> None:
    monkeypatch.setenv("RANK", rank)
    set_up_logs(debug=debug)
    assert package_logger.level == level


def test_log_lines_go_to_stderr_once(
    package_logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    set_up_logs()
    set_up_logs()
    get_logger("llmtuner.train.trainer").info("one [bold]line[/bold]")
    seen = capsys.readouterr()
    assert seen.out == ""
    assert seen.err.count("one [bold]line[/bold]") == 1
    assert not package_logger.propagate


@pytest.mark.usefixtures("package_logger")
def test_a_quiet_rank_still_warns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "2")
    set_up_logs()
    get_logger("llmtuner.data").info("chatter")
    get_logger("llmtuner.data").warning("trouble")
    seen = capsys.readouterr().err
    assert "chatter" not in seen
    assert "trouble" in seen


@pytest.mark.usefixtures("package_logger")
def test_libraries_are_quiet_unless_debugging(monkeypatch: pytest.MonkeyPatch) -> None:
    library = logging.getLogger("filelock")
    monkeypatch.setattr(library, "filters", [])
    warning = logging.LogRecord("filelock", logging.WARNING, "", 0, "chatter", None, None)
    error = logging.LogRecord("filelock", logging.ERROR, "", 0, "trouble", None, None)
    set_up_logs(debug=True)
    assert library.filter(warning)
    set_up_logs()
    assert not library.filter(warning)
    assert library.filter(error)


def test_without_a_group_nobody_is_waited_for_and_the_value_is_ones_own() -> None:
    assert not dist.is_initialized()
    barrier()
    value = object()
    assert agree(value) is value


def test_a_group_of_one_agrees_with_itself() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        barrier()
        assert agree({"run": "abc"}) == {"run": "abc"}
    finally:
        dist.destroy_process_group()


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


@pytest.mark.parametrize("seed", [0, 42, 2**32 - 1, 2**32 + 5])
def test_a_seed_repeats_every_random_source(seed: int) -> None:
    seed_everything(seed)
    first = draw()
    assert all(a != b for a, b in zip(first, draw(), strict=True))
    seed_everything(seed)
    assert draw() == first


def test_another_seed_changes_every_random_source() -> None:
    seed_everything(1)
    first = draw()
    seed_everything(2)
    assert all(a != b for a, b in zip(first, draw(), strict=True))
