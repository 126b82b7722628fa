"""The log file holds one readable line a log; a tracker gets numbers only and cannot hurt."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from llmtuner.hparams.parser import parse
from llmtuner.train.callbacks import LogFileCallback, Metrics, TrackerCallback
from llmtuner.train.loggers import LOGGERS

LOSS = {"loss": 1.5, "learning_rate": 1e-3, "grad_norm": 0.25, "epoch": 0.5}


class Bench:
    """Calls a callback as the Trainer does."""

    def __init__(self, callback: Any, *, step: int = 0, is_main: bool = True) -> None:
        self.callback = callback
        self.state = TrainerState(max_steps=10, global_step=step)
        self.state.is_world_process_zero = is_main
        self.control = TrainerControl()
        self.args = TrainingArguments(output_dir="unused", use_cpu=True)

    def begin(self) -> None:
        self.callback.on_train_begin(self.args, self.state, self.control)

    def step_to(self, step: int) -> None:
        self.state.global_step = step
        self.callback.on_step_end(self.args, self.state, self.control)

    def log(self, logs: Metrics | None, *, step: int | None = None) -> None:
        if step is not None:
            self.state.global_step = step
        self.callback.on_log(self.args, self.state, self.control, logs=logs)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "trainer_log.jsonl"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_a_line_tells_progress_loss_rate_and_time(path: Path) -> None:
    bench = Bench(LogFileCallback(path))
    bench.begin()
    bench.log(LOSS, step=4)
    (line,) = lines(path)
    assert line.pop("elapsed_time") == "0:00:00"
    assert line.pop("remaining_time") == "0:00:00"
    assert line == {"current_steps": 4, "total_steps": 10, "percentage": 40.0, **LOSS}


def test_an_evaluation_has_a_line_with_all_its_numbers(path: Path) -> None:
    bench = Bench(LogFileCallback(path))
    bench.begin()
    metrics = {"eval_qa_loss": 2.0, "eval_qa_perplexity": 7.4, "epoch": 1.0}
    bench.log(metrics, step=5)
    (line,) = lines(path)
    assert metrics.items() <= line.items()
    assert "loss" not in line
    assert "learning_rate" not in line


@pytest.mark.parametrize(
    "logs", [None, {}, {"epoch": 1.0}, {"train_loss": 1.0, "train_runtime": 2.0}], ids=str
)
def test_what_is_no_progress_has_no_line(path: Path, logs: Metrics | None) -> None:
    bench = Bench(LogFileCallback(path))
    bench.begin()
    bench.log(logs, step=3)
    assert not path.exists()


def test_a_new_run_starts_a_new_file(path: Path) -> None:
    path.write_text('{"loss": 9}\n')
    bench = Bench(LogFileCallback(path))
    bench.begin()
    bench.log(LOSS, step=1)
    assert len(lines(path)) == 1


def test_a_resumed_run_goes_on_in_its_file(path: Path) -> None:
    path.write_text('{"loss": 9}\n')
    bench = Bench(LogFileCallback(path), step=4)
    bench.begin()
    bench.log(LOSS, step=5)
    assert [line["loss"] for line in lines(path)] == [9, 1.5]


def test_other_ranks_write_nothing_and_remove_nothing(path: Path) -> None:
    path.write_text('{"loss": 9}\n')
    bench = Bench(LogFileCallback(path), is_main=False)
    bench.begin()
    bench.log(LOSS, step=1)
    assert path.read_text() == '{"loss": 9}\n'


def test_the_remaining_time_counts_the_steps_of_this_process_only(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("llmtuner.train.callbacks.time.monotonic", lambda: now[0])
    bench = Bench(LogFileCallback(path), step=4)
    bench.begin()
    now[0] = 120.0
    bench.log(LOSS, step=6)
    (line,) = lines(path)
    assert (line["elapsed_time"], line["remaining_time"]) == ("0:02:00", "0:04:00")


@pytest.mark.parametrize(("step", "expected"), [(9, False), (10, True), (11, True)])
def test_the_last_step_is_always_logged(path: Path, step: int, expected: bool) -> None:
    bench = Bench(LogFileCallback(path))
    bench.step_to(step)
    assert bench.control.should_log is expected


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_line_is_json_even_if_a_loss_is_not_finite(path: Path, value: float) -> None:
    def refuse(word: str) -> None:
        raise AssertionError(word)

    bench = Bench(LogFileCallback(path))
    bench.begin()
    bench.log({"eval_loss": value}, step=1)
    json.loads(path.read_text(), parse_constant=refuse)


# ---- trackers ----


class Tracker:
    """A tracker as a library might give one; it fails where it is told to."""

    def __init__(self, fails: str = "") -> None:
        self.fails = fails
        self.calls: list[Any] = []

    def open(self) -> "Tracker":
        return self._do("open", self)

    def log(self, metrics: Metrics, step: int) -> None:
        self._do("log", None, metrics, step)

    def close(self) -> None:
        self._do("close", None)

    def _do(self, name: str, value: Any, *what: Any) -> Any:
        self.calls.append((name, *what))
        if name == self.fails:
            raise ConnectionError(f"no network for {name}")
        return value


def run_all(tracker: Tracker, *, is_main: bool = True) -> None:
    callback = TrackerCallback("cloud", tracker.open)
    bench = Bench(callback, is_main=is_main)
    bench.begin()
    for step in (1, 2, 3):
        bench.log({"loss": 1.0 / step}, step=step)
    callback.close()


def test_a_tracker_is_opened_fed_and_closed() -> None:
    tracker = Tracker()
    run_all(tracker)
    assert tracker.calls == [
        ("open",),
        ("log", {"loss": 1.0}, 1),
        ("log", {"loss": 0.5}, 2),
        ("log", {"loss": 1 / 3}, 3),
        ("close",),
    ]


@pytest.mark.parametrize(
    ("fails", "calls"), [("open", 1), ("log", 2), ("close", 5)], ids=["open", "log", "close"]
)
def test_a_failing_tracker_is_reported_once_and_left_alone(
    caplog: pytest.LogCaptureFixture, fails: str, calls: int
) -> None:
    tracker = Tracker(fails)
    run_all(tracker)
    assert len(tracker.calls) == calls
    (record,) = caplog.records
    text = record.getMessage()
    assert text == f"Tracker cloud failed and is switched off: no network for {fails}"


def test_a_failed_tracker_is_not_opened_again() -> None:
    tracker = Tracker("open")
    bench = Bench(TrackerCallback("cloud", tracker.open))
    bench.begin()
    bench.begin()
    assert tracker.calls == [("open",)]


def test_other_ranks_do_not_track() -> None:
    tracker = Tracker()
    run_all(tracker, is_main=False)
    assert tracker.calls == []


def test_only_numbers_reach_a_tracker() -> None:
    tracker = Tracker()
    bench = Bench(TrackerCallback("cloud", tracker.open))
    bench.begin()
    bench.log({"loss": 1.0, "n": 2, "flag": True, "text": "secret", "list": [1], "none": None})
    bench.log(None)
    assert tracker.calls[1:] == [("log", {"loss": 1.0, "n": 2}, 0), ("log", {}, 0)]


def test_the_settings_of_a_tracker_hold_no_secret() -> None:
    secret = "hf_canary0123456789"
    words = ["--model_name_or_path", "m", "--dataset", "d", "--output_dir", "o", "--do_train"]
    config = parse("train", [*words, "--hub_token", secret, "--hf_hub_token", secret])
    assert config.train.hub_token == secret
    assert secret not in json.dumps(config.to_dict())


def test_the_local_tracker_writes_event_files(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    open_logger: Callable[..., Any] = LOGGERS.get("tensorboard")
    callback = TrackerCallback(
        "tensorboard", lambda: open_logger(settings={}, folder=tmp_path / "logs", run_name="r")
    )
    bench = Bench(callback)
    bench.begin()
    bench.log({"loss": 0.125}, step=3)
    callback.close()
    (events,) = (tmp_path / "logs").iterdir()
    assert b"loss" in events.read_bytes()
