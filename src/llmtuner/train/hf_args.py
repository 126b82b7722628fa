"""From our fields to transformers' training arguments.

Must run before any weights are loaded: under ZeRO-3 the model has to be born sharded, and
transformers learns that from these arguments.
"""

import torch
from transformers.training_args_seq2seq import Seq2SeqTrainingArguments

from llmtuner.extras.errors import ConfigError
from llmtuner.extras.logs import get_logger
from llmtuner.hparams.config import RunConfig
from llmtuner.model.precision import Precision, pick_precision

logger = get_logger(__name__)


def to_precision(config: RunConfig) -> Precision:
    """Pick the number type of the run, and say why."""
    train = config.train
    precision = pick_precision(
        bf16=train.bf16,
        fp16=train.fp16,
        pure_bf16=config.finetuning.pure_bf16,
        use_cpu=train.use_cpu,
    )
    logger.info("Precision %s: %s", precision.name, precision.reason)
    return precision


def to_hf_args(config: RunConfig, precision: Precision) -> Seq2SeqTrainingArguments:
    """Build transformers' arguments; the process group exists afterwards when there is a launcher.

    Raises:
        ConfigError: transformers refuses a value.
    """
    # pure bf16 has no float32 weights to protect, so there is nothing for autocast to do
    is_mixed = not precision.pure
    ours = {
        "bf16": precision.name == "bf16" and is_mixed,
        "fp16": precision.name == "fp16",
        "use_cpu": config.train.use_cpu or not torch.cuda.is_available(),
        "report_to": [],  # our loggers never see the environment
        "save_total_limit": None,  # our rotation only removes this run's checkpoints
        "remove_unused_columns": False,
        "label_names": ["targets"],
        "logging_nan_inf_filter": False,  # a NaN must be seen, not averaged away
        "disable_tqdm": config.train.other.get("disable_tqdm", False),
    }
    try:
        return Seq2SeqTrainingArguments(**{**config.train.hf_values(), **ours})
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise ConfigError(f"The training arguments were refused: {error}") from error
