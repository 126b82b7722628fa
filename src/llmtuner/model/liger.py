"""Liger's Triton kernels for norms, rotary embedding and gated layers; the loss stays ours."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from peft import PeftModel
from transformers import PreTrainedModel
from transformers.integrations.liger import apply_liger_kernel

from llmtuner.extras.errors import ConfigError, MissingExtraError
from llmtuner.extras.logs import get_logger
from llmtuner.model.device import LIGER_KERNEL, Device

logger = get_logger(__name__)

_LOSSES = ("cross_entropy", "fused_linear_cross_entropy")


@dataclass(frozen=True)
class LigerChoice:
    """Whether Liger's kernels are used, and why.

    Attributes:
        enabled: they go into the model.
        asked: the user wants them.
        reason: for the log and the report.
        settings: of Liger: name of a kernel -> whether it is put in; others as Liger has them.
    """

    enabled: bool
    asked: bool
    reason: str
    settings: Mapping[str, bool] = field(default_factory=dict)


def pick_liger(
    device: Device, *, asked: bool, settings: Mapping[str, bool] | None = None
) -> LigerChoice:
    """Decide from the flag and the device.

    Args:
        device: where the run computes.
        asked: the user's `use_liger_kernel` (LLaMA-Factory: `enable_liger_kernel`).
        settings: the user's `liger_kernel_config`.

    Raises:
        MissingExtraError: the library is not installed.
        ConfigError: the settings ask for one of Liger's losses.
    """
    if not asked:
        return LigerChoice(False, asked, "use_liger_kernel was not given")
    losses = [name for name in _LOSSES if (settings or {}).get(name)]
    if losses:
        raise ConfigError(
            "Liger's losses are not used: the loss is computed in chunks behind the model, over "
            "the trained tokens of the whole step.",
            where="liger_kernel_config",
            got=losses,
            fix="leave them out",
        )
    if device.type != "cuda":
        return LigerChoice(False, asked, f"Liger's kernels run on GPUs, not on {device.type}")
    if LIGER_KERNEL not in device.libraries:
        raise MissingExtraError("liger-kernel", extra="liger", needed_for="use_liger_kernel")
    chosen = {**(settings or {}), **dict.fromkeys(_LOSSES, False)}
    return LigerChoice(True, asked, "use_liger_kernel was given", chosen)


def use_liger(model: PreTrainedModel | PeftModel, choice: LigerChoice) -> LigerChoice:
    """Put the kernels into a loaded model and say so; return what came of it.

    The rotary embedding is replaced in transformers' module of this architecture, so for the rest
    of the process.
    """
    if choice.enabled:
        choice = _apply(model, choice)
    if choice.enabled:
        logger.info("Liger kernels on: %s.", choice.reason)
    elif choice.asked:
        logger.warning("Liger kernels off: %s.", choice.reason)
    return choice


def _apply(model: PreTrainedModel | PeftModel, choice: LigerChoice) -> LigerChoice:
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    model_type = inner.config.model_type
    if model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:  # Liger itself would say nothing
        return replace(choice, enabled=False, reason=f"Liger has no kernels for {model_type}")
    apply_liger_kernel(model, dict(choice.settings))
    return choice
