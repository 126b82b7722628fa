"""Two real optimizer steps in a process of their own: what the plan is corrected by."""

import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmtuner.extras.errors import ConfigError, LlmtunerError
from llmtuner.extras.files import read_json, write_json
from llmtuner.hparams.config import HIDDEN, RunConfig
from llmtuner.train.output import RUN_FILE
from llmtuner.train.plan.forecast import Forecast

_STEPS = 2
_LAST_LINES = 3
_NOT_PASSED_ON = ("probe", "json", "push_to_hub", "deepspeed")


@dataclass(frozen=True)
class Probe:
    """What two steps really took.

    Attributes:
        peak_bytes: of the process, or of the GPU.
        predicted_peak_bytes: what the plan said of these two steps.
        seconds_per_step: of the second step.
        corrected_peak_bytes: the plan of the whole run, corrected by what these two showed.
        corrected_seconds_per_step: the same of a step.
    """

    peak_bytes: int
    predicted_peak_bytes: int
    seconds_per_step: float
    corrected_peak_bytes: int
    corrected_seconds_per_step: float

    def to_dict(self) -> Mapping[str, Any]:
        """Return everything, ready for JSON."""
        return asdict(self)


def run_probe(config: RunConfig, planned: Forecast) -> Probe:
    """Train two steps in a temporary folder, in another process, and measure them.

    Raises:
        ConfigError: several processes or DeepSpeed are asked for.
        LlmtunerError: the two steps failed.
    """
    if planned.world_size > 1 or config.train.deepspeed is not None:
        problem = "The probe is one process without DeepSpeed."
        fix = "plan without --probe, or without --deepspeed to probe one rank"
        raise ConfigError(problem, where="--probe", fix=fix)
    with tempfile.TemporaryDirectory(prefix="llmtuner-probe-") as name:
        settings = Path(name) / "probe.json"
        write_json(settings, _settings(config, Path(name) / "run"))
        words = [sys.executable, "-m", "llmtuner.cli.main", "train", str(settings)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise _failed(done)
        plan = read_json(Path(name) / "run" / RUN_FILE)["plan"]
    return _correct(planned, plan)


def _settings(config: RunConfig, output_dir: Path) -> dict[str, Any]:
    """Return the user's settings for two steps that leave nothing behind."""
    given = {
        name: value
        for name, value in config.to_dict().items()
        if name in config.given and name not in _NOT_PASSED_ON and value != HIDDEN
    }
    tokenized = config.data.tokenized_path
    if tokenized is not None and not Path(tokenized).exists():
        given.pop("tokenized_path")
    for name in ("do_eval", "do_predict", "eval_strategy", "load_best_model_at_end"):
        given.pop(name, None)
    return given | {
        "output_dir": str(output_dir),
        "do_train": True,
        "max_steps": _STEPS,
        "save_strategy": "no",
        "report_to": "none",
        "plot_loss": False,
        "val_size": config.data.val_size,
        "disable_tqdm": True,
    }


def _failed(done: subprocess.CompletedProcess[str]) -> LlmtunerError:
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    if done.returncode < 0:
        reason = f"The probe was ended by signal {-done.returncode}; memory may have run out."
        return LlmtunerError(reason, fix="follow the changes of the plan without --probe")
    return LlmtunerError("The two steps of the probe failed.", got=" | ".join(lines[-_LAST_LINES:]))


def _correct(planned: Forecast, plan: Mapping[str, Any]) -> Probe:
    """Scale the plan of the whole run by actual over predicted of the two steps."""
    actual = plan["actual"]
    predicted = plan.get("predicted")
    peak, seconds = actual["peak_bytes"], actual["seconds_per_step"]
    if predicted is None:
        return Probe(peak, 0, seconds, peak, seconds)
    own = planned.memory.peak - planned.memory.baseline
    foretold = predicted["peak_bytes"] - predicted["baseline_bytes"]
    real = peak - predicted["baseline_bytes"]
    rate = seconds * predicted["flops_per_step"] ** -1 if predicted["flops_per_step"] else 0.0
    return Probe(
        peak_bytes=peak,
        predicted_peak_bytes=predicted["peak_bytes"],
        seconds_per_step=seconds,
        corrected_peak_bytes=round(predicted["baseline_bytes"] + own * real / foretold),
        corrected_seconds_per_step=round(rate * planned.flops, 4),
    )
