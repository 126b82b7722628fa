"""Callbacks: one log line per logging step in `trainer_log.jsonl`, trackers that cannot hurt."""

import json
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llmtuner.extras.files import finite_or_null
from llmtuner.extras.logs import get_logger

logger = get_logger(__name__)

Metrics = dict[str, Any]


class LogFileCallback(TrainerCallback):
    """Append progress to `trainer_log.jsonl`, in the keys that LLaMA-Factory's tools read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._started = time.monotonic()
        self._first_step = 0

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Start the clock; a fresh run starts a fresh file, a resumed one goes on in it."""
        self._started = time.monotonic()
        self._first_step = state.global_step
        if state.is_world_process_zero and state.global_step == 0:
            self._path.unlink(missing_ok=True)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Log the last step too, so that a run shorter than `logging_steps` has a curve."""
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Metrics | None = None,
        **kwargs: Any,
    ) -> None:
        """Write one line for a training or evaluation entry."""
        if not state.is_world_process_zero or not logs:
            return
        if "loss" not in logs and not any(name.endswith("_loss") for name in logs):
            return
        if "train_loss" in logs:  # the summary at the end is in train_results.json
            return
        line = {
            "current_steps": state.global_step,
            "total_steps": state.max_steps,
            **{name: logs[name] for name in logs if name == "loss" or name.startswith("eval_")},
            "learning_rate": logs.get("learning_rate"),
            "grad_norm": logs.get("grad_norm"),
            "epoch": logs.get("epoch"),
            **self._time(state),
        }
        kept = {name: value for name, value in line.items() if value is not None}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite_or_null(kept), ensure_ascii=False) + "\n")

    def _time(self, state: TrainerState) -> dict[str, Any]:
        elapsed = time.monotonic() - self._started
        done = max(state.global_step - self._first_step, 1)
        total = max(state.max_steps, 1)
        remaining = elapsed / done * max(total - state.global_step, 0)
        return {
            "percentage": round(100 * state.global_step / total, 2),
            "elapsed_time": str(timedelta(seconds=int(elapsed))),
            "remaining_time": str(timedelta(seconds=int(remaining))),
        }


class MetricLogger(Protocol):
    """A tracker (`train/loggers/`): gets numbers and the resolved config, nothing else."""

    def log(self, metrics: Metrics, step: int) -> None:
        """Record the metrics of one step."""
        ...

    def close(self) -> None:
        """Finish the record."""
        ...


class TrackerCallback(TrainerCallback):
    """Feed one tracker; its first failure is reported and ends it, never the training."""

    def __init__(self, name: str, open_logger: Callable[[], MetricLogger]) -> None:
        self._name = name
        self._open = open_logger
        self._logger: MetricLogger | None = None
        self._is_dead = False

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Open the tracker on rank 0."""
        if state.is_world_process_zero:
            self._guard(self._open_now)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Metrics | None = None,
        **kwargs: Any,
    ) -> None:
        """Pass the numbers on."""
        tracker = self._logger
        if tracker is None:
            return
        numbers = {name: value for name, value in (logs or {}).items() if _is_number(value)}
        self._guard(lambda: tracker.log(numbers, state.global_step))

    def close(self) -> None:
        """Finish the tracker after the last metric."""
        tracker = self._logger
        if tracker is not None:
            self._guard(tracker.close)

    def _open_now(self) -> None:
        self._logger = self._open()

    def _guard(self, action: Callable[[], None]) -> None:
        if self._is_dead:
            return
        try:
            action()
        # A tracker can fail in any way (network, login, its own bugs); training must not care.
        except Exception as error:
            self._is_dead = True
            self._logger = None
            logger.warning("Tracker %s failed and is switched off: %s", self._name, error)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
