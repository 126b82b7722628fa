"""What two layouts of the same step are compared by, and what counts as a difference.

The first layout of a check is the reference: its gradients are written to a folder. Every other
layout compares its own with them before the optimizer moves, and then goes on with the
reference's gradients. So each step starts from the same weights in every layout, and a difference
in one step neither grows into the next nor hides there.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from llmtuner.extras.errors import StorageError

MAX_LOSS_DIFFERENCE = 1e-5
MAX_NORM_DIFFERENCE = 1e-5
MAX_TENSOR_DIFFERENCE = 1e-4

LOSS_FLOOR = 0.1
"""A loss below this is compared as if it were this: fp32 rounds the logits, not the loss."""

TENSOR_FLOOR = 1e-4
"""A tensor's gradient below this share of the global norm is compared as if it were this share.

Gradients that are zero in exact arithmetic (a bias that the softmax cancels) hold only rounding
errors, which are relative to the whole and not to the tensor.
"""


@dataclass(frozen=True)
class TensorDifference:
    """How far one tensor's gradient is from the reference.

    Attributes:
        name: the parameter; empty when nothing was compared.
        norm: of its gradient here.
        expected_norm: of its gradient in the reference.
        difference: norm of (here - reference), relative to the reference (see `TENSOR_FLOOR`).
    """

    name: str = ""
    norm: float = 0.0
    expected_norm: float = 0.0
    difference: float = 0.0


@dataclass(frozen=True)
class StepResult:
    """One optimizer step of one layout beside the same step of the reference.

    Attributes:
        layout: its name.
        step: counted from 1.
        loss: as it is logged.
        expected_loss: of the reference.
        gradient_norm: over all tensors, as it is logged.
        expected_norm: of the reference.
        worst: the tensor that differs most.
        num_displaced: forward passes in which the positions did not restart with every sample.
    """

    layout: str
    step: int
    loss: float
    expected_loss: float
    gradient_norm: float
    expected_norm: float
    worst: TensorDifference
    num_displaced: int = 0

    @property
    def loss_difference(self) -> float:
        """Relative difference of the losses (see `LOSS_FLOOR`)."""
        return _relative(self.loss, self.expected_loss, floor=LOSS_FLOOR)

    @property
    def norm_difference(self) -> float:
        """Relative difference of the global gradient norms."""
        return _relative(self.gradient_norm, self.expected_norm, floor=0.0)

    @property
    def excess(self) -> float:
        """The largest difference, in units of what is allowed; above 1 the layouts differ."""
        if self.num_displaced:
            return math.inf
        return max(
            self.loss_difference / MAX_LOSS_DIFFERENCE,
            self.norm_difference / MAX_NORM_DIFFERENCE,
            self.worst.difference / MAX_TENSOR_DIFFERENCE,
        )

    def faults(self) -> list[str]:
        """Return a sentence for each quantity that differs by more than is allowed."""
        place = f"layout {self.layout}, step {self.step}"
        worst = self.worst
        rows = (
            ("loss", self.loss, self.expected_loss, self.loss_difference, MAX_LOSS_DIFFERENCE),
            (
                "global gradient norm",
                *(self.gradient_norm, self.expected_norm),
                *(self.norm_difference, MAX_NORM_DIFFERENCE),
            ),
            (
                f"gradient of {worst.name} (norm)",
                *(worst.norm, worst.expected_norm, worst.difference, MAX_TENSOR_DIFFERENCE),
            ),
        )
        found = [
            f"{place}: {what} {value:.8g}, reference {expected:.8g}, "
            f"relative difference {difference:.1e} (allowed {allowed:.0e})"
            for what, value, expected, difference, allowed in rows
            if difference > allowed
        ]
        if self.num_displaced:
            found.append(
                f"{place}: the positions do not restart with every sample "
                f"in {self.num_displaced} forward passes"
            )
        return found


class GradientProbe(TrainerCallback):
    """Writes the gradients of the reference, or compares those of another layout with them.

    Args:
        layout: name of the layout that is running.
        folder: where the gradients of the reference are.
        reference: its results; None when this run is the reference.
    """

    def __init__(self, layout: str, folder: Path, reference: list[StepResult] | None) -> None:
        self.results: list[StepResult] = []
        self._layout = layout
        self._folder = folder
        self._reference = reference
        self._worst = TensorDifference()
        self._num_displaced = 0

    def watch(self, model: PreTrainedModel | PeftModel) -> None:
        """Look at every flat batch on its way into the model.

        Rotary positions only count by their distance, so a sample that starts late has the same
        loss up to rounding, until the positions reach the end of what the model knows.
        """
        model.register_forward_pre_hook(self._look, with_kwargs=True)

    def _look(self, module: torch.nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        borders = kwargs.get("cu_seq_lens_q")
        if borders is None:
            return
        expected = torch.cat([torch.arange(length) for length in borders.diff().tolist()])
        if not torch.equal(kwargs["position_ids"][0].cpu(), expected):
            self._num_displaced += 1

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Read the gradients of the whole step, which are neither clipped nor used yet."""
        model: PreTrainedModel | PeftModel = kwargs["model"]
        path = self._folder / f"gradients-{state.global_step + 1}.safetensors"
        if self._reference is None:
            _write_gradients(model, path)
            return
        whole = self._reference[state.global_step].gradient_norm
        self._worst = replace_gradients(model, path, floor=TENSOR_FLOOR * whole)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Note the loss and the norm of the step that was just made."""
        logs = kwargs["logs"]
        if "loss" not in logs:
            return
        loss, norm = float(logs["loss"]), float(logs["grad_norm"])
        expected_loss, expected_norm = loss, norm
        if self._reference is not None:
            expected = self._reference[state.global_step - 1]
            expected_loss, expected_norm = expected.loss, expected.gradient_norm
        self.results.append(
            StepResult(
                layout=self._layout,
                step=state.global_step,
                loss=loss,
                expected_loss=expected_loss,
                gradient_norm=norm,
                expected_norm=expected_norm,
                worst=self._worst,
                num_displaced=self._num_displaced,
            )
        )
        self._num_displaced = 0


def replace_gradients(
    model: PreTrainedModel | PeftModel, path: Path, *, floor: float
) -> TensorDifference:
    """Compare the gradients with those in a file, put the file's in their place.

    Args:
        model: after the backward passes of a step.
        path: safetensors file of the reference's gradients; one that is missing there is zero.
        floor: smallest norm that a difference is divided by.

    Returns:
        The tensor that differs most.
    """
    worst = TensorDifference()
    with safe_open(path, "pt") as file:
        names = set(file.keys())
        for name, parameter in _trained(model):
            expected = file.get_tensor(name).to(parameter.device) if name in names else None
            found = _compare(name, parameter.grad, expected, floor=floor)
            if not worst.name or found.difference > worst.difference:
                worst = found
            parameter.grad = expected
    return worst


def _compare(
    name: str, gradient: Tensor | None, expected: Tensor | None, *, floor: float
) -> TensorDifference:
    present = [tensor for tensor in (gradient, expected) if tensor is not None]
    if not present:
        return TensorDifference(name)
    zero = torch.zeros_like(present[0])
    here, there = (zero if tensor is None else tensor for tensor in (gradient, expected))
    norm, expected_norm = _norm(here), _norm(there)
    distance = _norm(here - there)
    difference = _quotient(distance, max(expected_norm, floor))
    return TensorDifference(name, norm, expected_norm, difference)


def _write_gradients(model: PreTrainedModel | PeftModel, path: Path) -> None:
    gradients = {
        name: parameter.grad.detach().cpu().contiguous()
        for name, parameter in _trained(model)
        if parameter.grad is not None
    }
    try:
        save_file(gradients, path)
    except (OSError, SafetensorError) as error:
        size = sum(gradient.nbytes for gradient in gradients.values())
        raise StorageError(
            f"The gradients of the reference cannot be written: {error}",
            where=str(path.parent),
            got=f"{size / 1e9:.1f} GB for each step",
            fix="let TMPDIR name a folder with more room, or lower --selfcheck_steps",
        ) from error


def _trained(model: PreTrainedModel | PeftModel) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, value) for name, value in model.named_parameters() if value.requires_grad]


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


def _relative(value: float, expected: float, *, floor: float) -> float:
    return _quotient(abs(value - expected), max(abs(expected), floor))


def _quotient(distance: float, scale: float) -> float:
    """Return distance / scale; infinite for what is not a number, or not zero beside zero."""
    if distance == 0:
        return 0.0
    return distance / scale if scale > 0 and math.isfinite(distance) else math.inf
