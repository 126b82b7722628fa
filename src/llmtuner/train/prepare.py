"""From the settings to a trainer that is ready: model, checkpoints, callbacks, predictions."""

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from transformers.training_args_seq2seq import Seq2SeqTrainingArguments

from llmtuner.data.build import BuiltData
from llmtuner.data.collate import FlatCollator, PaddedCollator
from llmtuner.data.verify import Contract
from llmtuner.extras.dist import agree
from llmtuner.extras.logs import get_logger
from llmtuner.hparams.config import RunConfig
from llmtuner.model.adapters import write_base_record
from llmtuner.model.attention import uses_flat_batches
from llmtuner.model.hub import locate_model
from llmtuner.model.liger import use_liger
from llmtuner.model.methods.lora import split_adapters
from llmtuner.model.parameters import trainable_report
from llmtuner.model.precision import Precision
from llmtuner.train.callbacks import LogFileCallback, TrackerCallback
from llmtuner.train.checkpoint import CheckpointStore, check_identity
from llmtuner.train.companions import write_companions
from llmtuner.train.frozen_cache import open_frozen_cache
from llmtuner.train.hf_args import to_hf_args, to_precision
from llmtuner.train.loading import Way, choose_way, load_for_run
from llmtuner.train.loggers import LOGGERS
from llmtuner.train.neftune import NeftuneNoise
from llmtuner.train.optimizer import build_optimizer
from llmtuner.train.output import Start
from llmtuner.train.plan.record import StepClock, predict_run
from llmtuner.train.predict import Predictions, write_predictions
from llmtuner.train.report import RunReport, begin_report
from llmtuner.train.trainer import LlmTrainer, TrainData

logger = get_logger(__name__)


@dataclass(frozen=True)
class Run:
    """Everything a stage has prepared.

    Attributes:
        config: the resolved settings.
        trainer: ready to train, evaluate and save.
        trackers: closed at the end.
        clock: measures the steps.
        predict: answers questions into the file `path`; see `write_predictions`.
        start: where training begins.
        report: what is known so far.
        started: monotonic clock at the start, seconds.
    """

    config: RunConfig
    trainer: LlmTrainer
    trackers: Sequence[TrackerCallback]
    clock: StepClock
    predict: Callable[..., Predictions]
    start: Start
    report: RunReport
    started: float


def prepare_run(
    config: RunConfig,
    *,
    start: Start,
    tokenizer: PreTrainedTokenizerBase,
    data: BuiltData,
    stop_ids: Sequence[int],
    contract: Contract | None = None,
) -> Run:
    """Load the model and wire the trainer.

    Args:
        config: the resolved settings.
        start: what `check_output_dir` decided.
        tokenizer: carries the chat template to save.
        data: the data sets.
        stop_ids: ids that end a turn.
        contract: what was proved of the data; None where there are no prompts.
    """
    started = time.monotonic()
    precision = to_precision(config)
    foretold = predict_run(config, data=data, tokenizer=tokenizer, precision=precision)
    hf_args = to_hf_args(config, precision)  # before any weights: ZeRO-3 shards them while loading
    run_id = agree(start.run_id or uuid.uuid4().hex[:12])
    identity = _identity(config, hf_args, data)
    if start.checkpoint is not None:
        check_identity(start.checkpoint, identity)
    device_type = hf_args.device.type
    way = choose_way(
        config,
        device_type=device_type,
        precision=precision,
        checkpointing=foretold.checkpointing,
    )
    model = load_for_run(
        config,
        device_type=device_type,
        precision=precision,
        attention=way.attention,
        tokenizer=tokenizer,
        checkpointing=way.checkpointing,
    )
    way = replace(way, liger=use_liger(model, way.liger))
    store = CheckpointStore(
        output_dir=start.output_dir,
        run_id=run_id,
        identity=identity,
        keep=config.train.save_total_limit,
        write_companions=_companions(config, model, tokenizer=tokenizer, stop_ids=stop_ids),
    )
    predict = partial(
        write_predictions,
        model=model,
        tokenizer=tokenizer,
        generating=config.generating,
        stop_ids=stop_ids,
        use_kv_cache=config.model.use_kv_cache,
        batch_size=config.train.per_device_eval_batch_size,
        precision=precision.autocast(hf_args.device.type),
    )
    trackers, clock = _trackers(config, start.output_dir), StepClock()
    trainer = LlmTrainer(
        model=model,
        args=hf_args,
        data=_train_data(data, attention=way.attention, tokenizer=tokenizer),
        tokenizer=tokenizer,
        store=store,
        optimizer=build_optimizer(config.method, model, hf_args),
        shuffle=not config.finetuning.disable_shuffling,
        with_accuracy=config.finetuning.compute_accuracy,
        noise=_noise(config, model),
        cache=open_frozen_cache(config, model, data.train, folder=start.output_dir),
        callbacks=[*_callbacks(config, start.output_dir), clock, *trackers],
    )
    report = replace(
        _data_report(config, run_id, data, contract),
        model=_describe(model, hf_args, precision, way),
        plan=foretold.plan,
    )
    return Run(config, trainer, trackers, clock, predict, start, report, started)


def _data_report(
    config: RunConfig, run_id: str, data: BuiltData, contract: Contract | None
) -> RunReport:
    return replace(
        begin_report(config, run_id=run_id),
        data=data.report,
        audit=data.audit,
        contract=contract.to_dict() if contract else {},
    )


def _describe(
    model: PreTrainedModel | PeftModel,
    hf_args: Seq2SeqTrainingArguments,
    precision: Precision,
    way: Way,
) -> dict[str, Any]:
    """Log what will be trained, and return it for the report."""
    parameters = trainable_report(model)
    batch, passes, ranks = (
        hf_args.train_batch_size,
        hf_args.gradient_accumulation_steps,
        hf_args.world_size,
    )
    logger.info("%s", parameters)
    logger.info(
        "Effective batch: %d per device x %d accumulated x %d processes = %d.",
        *(batch, passes, ranks, batch * passes * ranks),
    )
    return {
        "trainable_parameters": parameters.trainable,
        "parameters": parameters.total,
        "precision": precision.name,
        "precision_reason": precision.reason,
        **way.to_dict(),
        "torch_compile": hf_args.torch_compile,
        "world_size": ranks,
        "effective_batch_size": batch * passes * ranks,
    }


def _companions(
    config: RunConfig,
    model: PreTrainedModel | PeftModel,
    *,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Sequence[int],
) -> Callable[[Path], None]:
    """Return what completes a folder with weights: all that serving and checking need."""

    def write(folder: Path) -> None:
        write_companions(folder, tokenizer=tokenizer, model=model, stop_ids=stop_ids)
        if isinstance(model, PeftModel):
            merged, _ = split_adapters(config.model, config.lora)
            write_base_record(
                folder,
                locate_model(config.model),
                merged_adapters=merged,
                name=str(config.model.model_name_or_path),
            )

    return write


def _train_data(
    data: BuiltData, *, attention: str, tokenizer: PreTrainedTokenizerBase
) -> TrainData:
    packs = data.packs
    if packs is not None and not uses_flat_batches(attention):
        logger.warning("With this attention samples are padded, so they are not packed.")
        packs = None
    return TrainData(data.train, packs, data.evals, choose_collator(attention, tokenizer))


def choose_collator(
    attention: str, tokenizer: PreTrainedTokenizerBase
) -> FlatCollator | PaddedCollator:
    """Return what builds the micro-batches that this attention takes."""
    if uses_flat_batches(attention):
        return FlatCollator()
    return PaddedCollator(tokenizer.pad_token_id or 0)


def _identity(
    config: RunConfig, hf_args: Seq2SeqTrainingArguments, data: BuiltData
) -> dict[str, Any]:
    """Return what a resumed run must share with this one."""
    return {
        "model_name_or_path": config.model.model_name_or_path,
        "stage": config.finetuning.stage,
        "finetuning_type": config.finetuning.finetuning_type,
        "method": asdict(config.method),
        "seed": hf_args.seed,
        "world_size": hf_args.world_size,
        "per_device_train_batch_size": hf_args.per_device_train_batch_size,
        "gradient_accumulation_steps": hf_args.gradient_accumulation_steps,
        "learning_rate": hf_args.learning_rate,
        "lr_scheduler_type": str(config.train.lr_scheduler_type),
        "data": {
            name: [file["sha256"] for file in counts.get("files", [])]
            for name, counts in data.report.get("datasets", {}).items()
        },
    }


def _noise(config: RunConfig, model: PreTrainedModel | PeftModel) -> NeftuneNoise | None:
    if config.train.neftune_noise_alpha is None:
        return None
    noise = NeftuneNoise(config.train.neftune_noise_alpha)
    noise.attach(model)
    return noise


def _callbacks(config: RunConfig, output_dir: Path) -> list[TrainerCallback]:
    callbacks: list[TrainerCallback] = [LogFileCallback(output_dir / "trainer_log.jsonl")]
    if config.finetuning.early_stopping_steps is not None:
        callbacks.append(EarlyStoppingCallback(config.finetuning.early_stopping_steps))
    return callbacks


def _trackers(config: RunConfig, output_dir: Path) -> list[TrackerCallback]:
    folder = Path(config.train.logging_dir) if config.train.logging_dir else output_dir / "logs"
    run_name = config.train.run_name or output_dir.name
    return [
        TrackerCallback(
            name,
            partial(LOGGERS.get(name), settings=config.to_dict(), folder=folder, run_name=run_name),
        )
        for name in config.train.report_to
        if name != "none"
    ]
