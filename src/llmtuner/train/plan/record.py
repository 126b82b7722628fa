"""Predicted against actual: what `run.json` says about its own plan."""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from llmtuner.data.build import BuiltData
from llmtuner.extras.env import process_env
from llmtuner.extras.logs import get_logger
from llmtuner.hparams.config import RunConfig
from llmtuner.model.gradient_checkpointing import CheckpointingChoice
from llmtuner.model.precision import Precision
from llmtuner.train.plan.forecast import forecast
from llmtuner.train.plan.machine import peak_bytes

logger = get_logger(__name__)

_GB = 1e9
_KEPT = (
    *("peak_bytes", "baseline_bytes", "weights_bytes", "gradients_bytes", "optimizer_bytes"),
    *("working_bytes", "limit_bytes", "fits", "steps", "flops_per_step", "seconds_per_step"),
)


@dataclass
class StepClock(TrainerCallback):
    """Measures optimizer steps, without evaluations and checkpoints.

    Attributes:
        seconds: of every step.
    """

    seconds: list[float] = field(default_factory=list)
    _began: float = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self._began = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop it."""
        self.seconds.append(time.perf_counter() - self._began)


@dataclass(frozen=True)
class Prediction:
    """What is known of a run before it begins.

    Attributes:
        plan: for `run.json`; empty where nothing was planned.
        checkpointing: whether activations are to be computed again; None where it is not known.
    """

    plan: Mapping[str, Any]
    checkpointing: CheckpointingChoice | None = None


def predict_run(
    config: RunConfig,
    *,
    data: BuiltData,
    tokenizer: PreTrainedTokenizerBase,
    precision: Precision,
) -> Prediction:
    """Return the plan of a run that begins; a failure is written down, not raised.

    Only rank 0 plans, and only for training.
    """
    if not config.train.do_train or process_env().rank != 0:
        return Prediction({})
    started = time.monotonic()
    try:
        found = forecast(config, data=data, tokenizer=tokenizer, precision=precision)
    except Exception as error:  # a model that cannot be foretold can be trained all the same
        logger.info("The memory of this run cannot be foretold: %s", _first_line(error))
        return Prediction({"problem": _first_line(error)})
    memory, limit = found.memory.peak, found.limit_bytes
    logger.info(
        "Plan: %.2f GB of memory at the peak (%.2f GB are there), %.2f s a step, %d steps.",
        *(memory / _GB, limit / _GB, found.seconds_per_step, found.workload.steps),
    )
    if not found.fits:
        logger.warning("This may not fit into memory; `llmtuner plan` says what to change.")
    values = found.to_dict()
    seconds = round(time.monotonic() - started, 3)
    plan = {"predicted": {name: values[name] for name in _KEPT}, "planning_seconds": seconds}
    return Prediction(plan, found.checkpointing)


def add_actual(plan: Mapping[str, Any], clock: StepClock, *, device_type: str) -> Mapping[str, Any]:
    """Return the plan with what the run really took.

    Args:
        plan: of `predict_run`.
        clock: that was there during the run.
        device_type: where it computed.
    """
    if not plan or not clock.seconds:
        return plan
    peak = peak_bytes(device_type)
    seconds = statistics.fmean(clock.seconds[1:] or clock.seconds)
    actual = {
        "peak_bytes": peak,
        "seconds_per_step": round(seconds, 4),
        "first_step_seconds": round(clock.seconds[0], 4),
        "timed_steps": len(clock.seconds),
    }
    if "predicted" not in plan:
        return {**plan, "actual": actual}
    ratios = {
        "peak_ratio": round(plan["predicted"]["peak_bytes"] / peak, 4),
        "seconds_ratio": round(plan["predicted"]["seconds_per_step"] / seconds, 4),
    }
    return {**plan, "actual": actual, **ratios}


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0][:300]
