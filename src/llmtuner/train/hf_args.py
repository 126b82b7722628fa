"""From our fields to transformers' training arguments.

Must run before any weights are loaded: under ZeRO-3 the model has to be born sharded, and
transformers learns that from these arguments.
"""

from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from transformers.training_args_seq2seq import Seq2SeqTrainingArguments

from llmtuner.extras.env import announce_single_process, process_env
from llmtuner.extras.errors import ConfigError
from llmtuner.extras.files import read_json
from llmtuner.extras.logs import get_logger
from llmtuner.hparams.config import RunConfig
from llmtuner.model.patches import deepspeed_without_own_buffers
from llmtuner.model.precision import Precision, pick_precision
from llmtuner.train.rank_group import start_ranks

_ZERO_SHARDS_WEIGHTS = 3
_LIMIT_S = 1800  # transformers' own default of `ddp_timeout`

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
        # said outright: only then does accelerate know that several CPU processes are a group
        "use_cpu": config.train.use_cpu or not torch.cuda.is_available(),
        "report_to": [],  # our loggers never see the environment
        "save_total_limit": None,  # our rotation only removes this run's checkpoints
        "push_to_hub": False,  # we upload once, at the end, when everything is on disk
        "remove_unused_columns": False,
        "label_names": ["targets"],
        "neftune_noise_alpha": None,  # ours knows where samples begin
        "use_liger_kernel": False,  # ours keeps Liger's loss out: `model/liger.py`
        "include_num_input_tokens_seen": "no",  # counted by our trainer, without padding
        "logging_nan_inf_filter": False,  # a NaN must be seen, not averaged away
        "disable_tqdm": config.train.other.get("disable_tqdm", False),
    }
    deepspeed_file = _needed_deepspeed_file(config)
    values = {**config.train.hf_values(), **ours, "deepspeed": deepspeed_file}
    if values["use_cpu"] and process_env().world_size > 1 and not dist.is_initialized():
        start_ranks(timeout=timedelta(seconds=values.get("ddp_timeout", _LIMIT_S)))
    try:
        hf_args = Seq2SeqTrainingArguments(**values)
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise ConfigError(f"The training arguments were refused: {error}") from error
    use_one_gpu(hf_args)
    if deepspeed_file is not None:
        _start_deepspeed(hf_args)
    return hf_args


def use_one_gpu(hf_args: Seq2SeqTrainingArguments) -> None:
    """Keep one process on one GPU.

    transformers would wrap the model in DataParallel, which cuts a flat batch along its one row.
    """
    if hf_args.n_gpu > 1:
        logger.warning(
            "One process uses one of the %d GPUs; start with torchrun --nproc_per_node %d, or with "
            "deepspeed, to use all.",
            *(hf_args.n_gpu, hf_args.n_gpu),
        )
        hf_args._n_gpu = 1


def _needed_deepspeed_file(config: RunConfig) -> str | None:
    """Return the DeepSpeed file, unless the run only evaluates and the file shards no weights."""
    path = config.train.deepspeed
    if path is None or config.train.do_train:
        return path
    if read_json(Path(path)).get("zero_optimization", {}).get("stage") == _ZERO_SHARDS_WEIGHTS:
        return path
    logger.info("DeepSpeed is not used: without training there is nothing for it to shard.")
    return None


def _start_deepspeed(hf_args: Seq2SeqTrainingArguments) -> None:
    """Tell DeepSpeed about the process group; ZeRO-3 needs it before the model is created."""
    import deepspeed

    from llmtuner.train.build_locks import clear_build_locks  # torch's builder is slow to import

    backend = "gloo" if hf_args.device.type == "cpu" else "nccl"
    if not dist.is_initialized() and hf_args.world_size == 1:
        # started without a launcher: a group of one, which needs no address and no port
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        announce_single_process()
    clear_build_locks()
    with deepspeed_without_own_buffers():
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False)
