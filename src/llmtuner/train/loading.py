"""The model of a run: which attention it computes with, and how it is loaded for training."""

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmtuner.extras.logs import get_logger
from llmtuner.extras.seed import seed_everything
from llmtuner.hparams.config import RunConfig
from llmtuner.model.attention import VARLEN, pick_attention
from llmtuner.model.device import describe_device
from llmtuner.model.fast.layer import use_fast_layers
from llmtuner.model.gradient_checkpointing import (
    enable_gradient_checkpointing,
    pick_gradient_checkpointing,
)
from llmtuner.model.liger import LigerChoice, pick_liger
from llmtuner.model.load import load_config
from llmtuner.model.methods import METHODS
from llmtuner.model.parameters import log_parameters
from llmtuner.model.precision import Precision

logger = get_logger(__name__)


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
) -> PreTrainedModel | PeftModel:
    """Return the model, ready to train; the same one every time for the same seed."""
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
    choice = pick_gradient_checkpointing(
        config.model, asked=config.train.gradient_checkpointing, device_type=device_type
    )
    logger.info("Gradient checkpointing %s: %s.", "on" if choice.enabled else "off", choice.reason)
    if choice.enabled:
        enable_gradient_checkpointing(model, use_reentrant=config.model.use_reentrant_gc)
    if config.model.print_param_status:
        log_parameters(model)
    return model


def choose_liger(config: RunConfig, device_type: str) -> LigerChoice:
    """Tell whether Liger's kernels go into the model; needs no model yet.

    Raises:
        ConfigError: they are asked for and cannot be had.
    """
    other = config.train.other
    return pick_liger(
        describe_device(device_type),
        asked=bool(other.get("use_liger_kernel")),
        settings=other.get("liger_kernel_config"),
    )
