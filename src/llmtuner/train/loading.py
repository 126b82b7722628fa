"""The model of a run: which attention it computes with, and how it is loaded for training."""

from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmtuner.extras.dist import agree
from llmtuner.extras.logs import get_logger
from llmtuner.extras.seed import seed_everything
from llmtuner.hparams.config import RunConfig
from llmtuner.model.attention import VARLEN, pick_attention
from llmtuner.model.device import describe_device
from llmtuner.model.fast.layer import use_fast_layers
from llmtuner.model.gradient_checkpointing import (
    CheckpointingChoice,
    MemoryForecast,
    enable_gradient_checkpointing,
    pick_gradient_checkpointing,
)
from llmtuner.model.liger import LigerChoice, pick_liger
from llmtuner.model.load import load_config
from llmtuner.model.methods import METHODS
from llmtuner.model.parameters import log_parameters
from llmtuner.model.precision import Precision

logger = get_logger(__name__)


@dataclass(frozen=True)
class Way:
    """How a model computes on this device.

    Attributes:
        attention: transformers' `attn_implementation`.
        liger: whether Liger's kernels are in it.
        checkpointing: whether activations are computed again.
    """

    attention: str
    liger: LigerChoice
    checkpointing: CheckpointingChoice

    def to_dict(self) -> dict[str, Any]:
        """Return everything with its reasons, ready for JSON."""
        return {
            "attention": self.attention,
            "liger_kernels": self.liger.enabled,
            "liger_kernels_reason": self.liger.reason,
            "gradient_checkpointing": self.checkpointing.enabled,
            "gradient_checkpointing_reason": self.checkpointing.reason,
        }


def choose_way(
    config: RunConfig,
    *,
    device_type: str,
    precision: Precision,
    checkpointing: CheckpointingChoice | None,
) -> Way:
    """Decide how the model computes, before it is loaded; the same on every rank.

    Args:
        config: the resolved settings.
        device_type: where the run computes.
        precision: number type of the run.
        checkpointing: of rank 0, which has planned; None where it is not known.

    Raises:
        ConfigError: Liger's kernels are asked for and cannot be had.
    """
    other = config.train.other
    return Way(
        choose_attention(config, device_type, precision),
        pick_liger(
            describe_device(device_type),
            asked=bool(other.get("use_liger_kernel")),
            settings=other.get("liger_kernel_config"),
        ),
        agree(checkpointing or choose_checkpointing(config, device_type)),
    )


def choose_attention(config: RunConfig, device_type: str, precision: Precision) -> str:
    """Return transformers' `attn_implementation` for training this model on this device."""
    model_config = load_config(config.model, max_tokens=config.data.cutoff_len)
    return pick_attention(
        config.model.flash_attn,
        describe_device(device_type),
        config=model_config,
        dtype=precision.dtype,
    )


def wants_fast_layers(config: RunConfig, *, device_type: str, attention: str) -> bool:
    """Tell whether layers that are known compute with the fast kernels."""
    return config.model.fast_kernels and device_type == "cpu" and attention == VARLEN


def load_for_run(
    config: RunConfig,
    *,
    device_type: str,
    precision: Precision,
    attention: str,
    tokenizer: PreTrainedTokenizerBase,
    checkpointing: CheckpointingChoice | None = None,
) -> PreTrainedModel | PeftModel:
    """Return the model, ready to train; the same one every time for the same seed.

    Args:
        config: the resolved settings.
        device_type: where the run computes.
        precision: number type of the run.
        attention: transformers' `attn_implementation`.
        tokenizer: its length decides whether the vocabulary grows.
        checkpointing: whether activations are computed again; None: by flags and device.
    """
    load_for_training = METHODS.get(config.finetuning.finetuning_type)
    seed_everything(config.train.seed)  # adapters and new vocabulary rows start at random
    model = load_for_training(
        config.model,
        config.method,
        precision=precision,
        attention=attention,
        tokenizer=tokenizer,
        max_tokens=config.data.cutoff_len,
    )
    if wants_fast_layers(config, device_type=device_type, attention=attention):
        use_fast_layers(model)
    choice = checkpointing or choose_checkpointing(config, device_type)
    logger.info("Gradient checkpointing %s: %s.", "on" if choice.enabled else "off", choice.reason)
    if choice.enabled:
        enable_gradient_checkpointing(model, use_reentrant=config.model.use_reentrant_gc)
    if config.model.print_param_status:
        log_parameters(model)
    return model


def choose_checkpointing(
    config: RunConfig, device_type: str, memory: MemoryForecast | None = None
) -> CheckpointingChoice:
    """Tell whether activations are computed again, as asked, else from what a plan foretells."""
    return pick_gradient_checkpointing(
        config.model,
        asked=config.train.gradient_checkpointing,
        device_type=device_type,
        memory=memory,
    )
