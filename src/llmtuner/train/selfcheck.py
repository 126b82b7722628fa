"""The selfcheck: the user's own run, a few steps long, in every layout of the same samples.

The layouts of one step must give one loss and one gradient. What is compared, how and with which
limits stands in `selfcheck_compare`; how a layout is run in `selfcheck_layouts`.
"""

import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from llmtuner.extras.errors import LayoutError
from llmtuner.extras.logs import get_logger
from llmtuner.hparams.config import RunConfig
from llmtuner.train.quiet import quiet_loading
from llmtuner.train.selfcheck_compare import (
    MAX_LOSS_DIFFERENCE,
    MAX_NORM_DIFFERENCE,
    MAX_TENSOR_DIFFERENCE,
    StepResult,
)
from llmtuner.train.selfcheck_layouts import (
    CheckLayout,
    CheckTask,
    load_samples,
    quiet_config,
    run_layout,
    takes_flat_batches,
)
from llmtuner.train.selfcheck_ranks import run_in_processes
from llmtuner.train.trainer import LlmTrainer

logger = get_logger(__name__)


@dataclass(frozen=True)
class SelfcheckReport:
    """What a selfcheck found.

    Attributes:
        results: every step of every layout; the first layout is the reference.
        skipped: layouts that this model cannot have, with the reason.
        seconds: how long it took.
    """

    results: Sequence[StepResult]
    skipped: Mapping[str, str]
    seconds: float

    @property
    def reference(self) -> str:
        """Name of the layout that the others are compared with."""
        return self.results[0].layout

    def faults(self) -> list[str]:
        """Return a sentence for each quantity that differs by more than is allowed."""
        return [fault for result in self.results for fault in result.faults()]

    def check(self) -> None:
        """Raise if a layout differs.

        Raises:
            LayoutError: names layout, step, quantity and both values of the first difference.
        """
        faults = self.faults()
        if not faults:
            return
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise LayoutError(
            f"The layout changes what is learned: {faults[0]}{more}.",
            fix="do not trust a run of this model with these settings before this is understood",
        )

    def to_dict(self) -> dict[str, Any]:
        """Return everything, ready for JSON."""
        steps = [
            {
                **asdict(result),
                "loss_difference": result.loss_difference,
                "norm_difference": result.norm_difference,
                "is_equal": result.excess <= 1,
            }
            for result in self.results
        ]
        return {
            "is_equal": not self.faults(),
            "allowed": {
                "loss": MAX_LOSS_DIFFERENCE,
                "gradient_norm": MAX_NORM_DIFFERENCE,
                "tensor": MAX_TENSOR_DIFFERENCE,
            },
            "reference": self.reference,
            "steps": steps,
            "skipped": dict(self.skipped),
            "faults": self.faults(),
            "seconds": self.seconds,
        }


def run_selfcheck(
    config: RunConfig, *, trainer_class: type[LlmTrainer] = LlmTrainer
) -> SelfcheckReport:
    """Run every layout and compare it with the first one; the user's folders are not touched.

    Args:
        config: a training run, parsed for the command `selfcheck`.
        trainer_class: the trainer that is checked.
    """
    started = time.monotonic()
    _log_changes(config)
    results: list[StepResult] = []
    with tempfile.TemporaryDirectory(prefix="llmtuner-selfcheck-") as name:
        quiet = quiet_config(config, Path(name))
        layouts, skipped = plan_layouts(
            config.selfcheck.selfcheck_batch, is_flat=takes_flat_batches(quiet)
        )
        for skipped_name, reason in skipped.items():
            logger.warning("Layout %s is skipped: %s.", skipped_name, reason)
        task = CheckTask(quiet, Path(name), trainer_class)
        samples = load_samples(quiet)
        reference: list[StepResult] | None = None
        for number, layout in enumerate(layouts, start=1):
            logger.info("Layout %d of %d: %s.", number, len(layouts), layout.name)
            if layout.num_processes:
                results += _run_ranks(task, layout, reference)
            else:
                with quiet_loading() if reference else nullcontext():
                    results += run_layout(task, layout, samples, reference=reference)
            reference = reference or results[:]
    return SelfcheckReport(results, skipped, round(time.monotonic() - started, 3))


def plan_layouts(batch: int, *, is_flat: bool) -> tuple[list[CheckLayout], dict[str, str]]:
    """Return the layouts of `batch` samples a step, the reference first, and those left out.

    A name `2 x 4` means micro-batches of 2 samples, 4 of them in a step.
    """
    half = batch // 2
    per_rank = batch // 4 if batch % 4 == 0 else half
    layouts = [
        CheckLayout(f"1 x {batch}", 1, batch),
        CheckLayout(f"2 x {half}", 2, half),
        CheckLayout(f"{batch} x 1", batch, 1),
    ]
    skipped: dict[str, str] = {}
    if is_flat:
        layouts += [
            CheckLayout("packed", 1, batch, is_packed=True),
            CheckLayout("padded", batch, 1, is_padded=True),
        ]
    else:
        skipped["packed"] = "with this model or attention samples cannot be laid end to end"
        skipped["padded"] = f"every layout is padded here, {batch} x 1 is this one"
    layouts.append(CheckLayout("2 ranks", per_rank, half // per_rank, num_processes=2))
    return layouts, skipped


def _run_ranks(
    task: CheckTask, layout: CheckLayout, reference: Sequence[StepResult] | None
) -> list[StepResult]:
    """Run CPU processes; where the reference was made on a GPU, they get one of their own kind."""
    if torch.cuda.is_available() and not task.config.train.use_cpu:
        folder = task.folder / "cpu"
        folder.mkdir()
        task = CheckTask(task.config, folder, task.trainer_class)
        alone = CheckLayout("1 rank", 1, task.config.selfcheck.selfcheck_batch, num_processes=1)
        reference = run_in_processes(task, alone, reference=None)
    return run_in_processes(task, layout, reference=reference)


def _log_changes(config: RunConfig) -> None:
    train = config.train
    off = {
        "bf16 or fp16": train.bf16 or train.fp16 or config.finetuning.pure_bf16,
        "NEFTune": train.neftune_noise_alpha is not None,
        "DeepSpeed": train.deepspeed is not None,
        "streaming": config.data.streaming,
    }
    names = [name for name, is_on in off.items() if is_on]
    logger.info(
        "For the comparison everything is fp32, with a constant learning rate, without clipping "
        "and without anything random%s.",
        f"; off: {', '.join(names)}" if names else "",
    )
