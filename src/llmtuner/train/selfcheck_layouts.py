"""One layout of a selfcheck: the user's own run, made quiet and exact, for a few steps."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from torch.nn.modules.dropout import _DropoutNd
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
)

from llmtuner.data.batches import StepBatches
from llmtuner.data.build import build_datasets
from llmtuner.data.encoders import ENCODERS
from llmtuner.data.lengths import sample_lengths
from llmtuner.data.packing import pack
from llmtuner.extras.errors import DataError
from llmtuner.extras.files import read_json, write_json
from llmtuner.extras.logs import get_logger
from llmtuner.hparams.config import RunConfig
from llmtuner.hparams.training import TrainArgs
from llmtuner.model.attention import pick_padded_attention, uses_flat_batches
from llmtuner.model.load import load_config
from llmtuner.model.precision import Precision
from llmtuner.model.tokenizer import load_tokenizer
from llmtuner.train.checkpoint import CheckpointStore
from llmtuner.train.hf_args import to_hf_args
from llmtuner.train.loading import choose_attention, load_for_run
from llmtuner.train.optimizer import build_optimizer
from llmtuner.train.prepare import choose_collator
from llmtuner.train.selfcheck_compare import GradientProbe, StepResult
from llmtuner.train.trainer import LlmTrainer, TrainData

logger = get_logger(__name__)

FP32 = Precision("fp32", pure=False, reason="the selfcheck compares in fp32")

# Arguments without a field of ours that decide the order, the loss or the update of a step.
_KEPT_ARGUMENTS = (
    *("label_smoothing_factor", "train_sampling_strategy", "average_tokens_across_devices"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "optim_args", "optim_target_modules"),
)
_SAMPLES_FILE = "samples.json"


@dataclass(frozen=True)
class CheckLayout:
    """How the samples of each step are spread.

    Attributes:
        name: for people.
        micro_batch_size: samples of one forward pass.
        accumulation_steps: forward passes of one process in one step.
        is_packed: the samples of a step are laid into packs, one for each forward pass.
        is_padded: padded batches, though the model takes flat ones.
        num_processes: CPU processes that share the step; 0: this process, on the run's device.
    """

    name: str
    micro_batch_size: int
    accumulation_steps: int
    is_packed: bool = False
    is_padded: bool = False
    num_processes: int = 0


@dataclass(frozen=True)
class CheckTask:
    """What all layouts of one check have in common; can be sent to another process.

    Attributes:
        config: the user's settings, made quiet by `quiet_config`.
        folder: for the gradients of the reference; a temporary one.
        trainer_class: the trainer that is checked.
    """

    config: RunConfig
    folder: Path
    trainer_class: type[LlmTrainer] = LlmTrainer


@dataclass(frozen=True)
class Samples:
    """The user's training set, and the tokenizer it was made with."""

    train: Dataset
    tokenizer: PreTrainedTokenizerBase


def quiet_config(config: RunConfig, folder: Path) -> RunConfig:
    """Return the settings of the user's run that decide a step, and nothing that writes.

    Args:
        config: of a training run.
        folder: instead of the output folder; nothing is saved in it.
    """
    train, check, data = config.train, config.selfcheck, config.data
    other = {name: value for name, value in train.other.items() if name in _KEPT_ARGUMENTS}
    quiet = TrainArgs(
        output_dir=str(folder),
        do_train=True,
        max_steps=check.selfcheck_steps,
        learning_rate=train.learning_rate,
        lr_scheduler_type="constant",
        optim=train.optim,
        weight_decay=train.weight_decay,
        max_grad_norm=0.0,
        seed=train.seed,
        data_seed=train.data_seed,
        bf16=False,
        tf32=False,
        use_cpu=train.use_cpu,
        gradient_checkpointing=train.gradient_checkpointing,
        logging_steps=1.0,
        save_strategy="no",
        other=other | {"disable_tqdm": True},
    )
    if data.streaming:  # a few rows of the head; without a held-out part, which is the head
        rows = min(data.max_samples or 10**9, 4 * check.selfcheck_steps * check.selfcheck_batch)
        data = replace(data, streaming=False, max_samples=rows, val_size=0.0)
    if data.tokenized_path is None:
        data = replace(data, eval_dataset=None)
    elif not Path(data.tokenized_path).exists():
        data = replace(data, tokenized_path=None, eval_dataset=None)
    flash_attn = "off" if config.model.flash_attn == "off" else "sdpa"  # FlashAttention has no fp32
    model = replace(config.model, flash_attn=flash_attn, print_param_status=False)
    return replace(config, train=quiet, data=data, model=model)


def load_samples(config: RunConfig) -> Samples:
    """Build the training set as training does, without packs.

    Raises:
        DataError: there is nothing to train on.
    """
    tokenizer = load_tokenizer(config.model)
    encode = ENCODERS.get(config.finetuning.stage)(config.data, tokenizer)
    data = build_datasets(
        config.data, encode=encode, seed=config.train.seed, packing=False, for_training=True
    )
    if not isinstance(data.train, Dataset):
        raise DataError("There is no training set to check.", where="--dataset")
    return Samples(data.train, tokenizer)


def run_layout(
    task: CheckTask,
    layout: CheckLayout,
    samples: Samples,
    *,
    reference: Sequence[StepResult] | None,
) -> list[StepResult]:
    """Train the steps of one layout from the start, and return what was seen.

    Args:
        task: what is checked.
        layout: how the steps are laid out.
        samples: the training set.
        reference: results to compare with; None: this layout becomes the reference.
    """
    train, packs, passes = samples.train, None, layout.accumulation_steps
    if layout.is_packed:
        steps = read_json(task.folder / _SAMPLES_FILE)
        train = train.select(list(itertools.chain.from_iterable(steps)))
        packs = _packs_of(train, steps, capacity=task.config.data.cutoff_len)
        passes = len(packs) // len(steps)
    config = _with_batch(task.config, layout, accumulation_steps=passes)
    hf_args = to_hf_args(config, FP32)
    if hf_args.n_gpu > 1:
        hf_args._n_gpu = 1  # torch's DataParallel, which training does not use either
    attention = _attention_of(config, layout, device_type=hf_args.device.type)
    model = load_for_run(
        config,
        device_type=hf_args.device.type,
        precision=FP32,
        attention=attention,
        tokenizer=samples.tokenizer,
    )
    names = switch_off_randomness(model)
    if names:
        logger.info("Off in the model: %s.", ", ".join(names))
    probe = GradientProbe(layout.name, task.folder, list(reference) if reference else None)
    probe.watch(model)
    collator = choose_collator(attention, samples.tokenizer)
    trainer = task.trainer_class(
        model=model,
        args=hf_args,
        data=TrainData(train, packs, {}, collator),
        tokenizer=samples.tokenizer,
        store=_no_store(task.folder),
        optimizer=build_optimizer(config.method, model, hf_args),
        shuffle=packs is None and not config.finetuning.disable_shuffling,
        callbacks=[probe],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if reference is None:
        write_json(task.folder / _SAMPLES_FILE, _samples_of_steps(trainer))
    trainer.train()
    return probe.results


def takes_flat_batches(config: RunConfig) -> bool:
    """Tell whether training lays samples end to end, for this model and these settings."""
    return uses_flat_batches(choose_attention(config, "cpu", FP32))


def switch_off_randomness(model: PreTrainedModel | PeftModel) -> list[str]:
    """Set dropout, jitter and the balance of experts of the model to zero; return what was on.

    The balance is no chance, but it belongs to a forward pass and so to the layout.
    """
    inner: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
    text = inner.config.get_text_config()
    found: set[str] = set()
    for owner in (text, *model.modules()):
        values = vars(owner)
        names = [name for name in values if "drop" in name or "jitter" in name]
        names += ["p"] if isinstance(owner, _DropoutNd) else []
        for name in names:
            if isinstance(values[name], float) and values[name] > 0:
                found.add("dropout" if name == "p" else name)
                values[name] = 0.0
    if text.to_dict().get("output_router_logits"):
        found.add("balance of experts")
        text.output_router_logits = False
    return sorted(found)


def _attention_of(config: RunConfig, layout: CheckLayout, *, device_type: str) -> str:
    if not layout.is_padded:
        return choose_attention(config, device_type, FP32)
    model_config = load_config(config.model, max_tokens=config.data.cutoff_len)
    return pick_padded_attention(config.model.flash_attn, device_type, config=model_config)


def _with_batch(config: RunConfig, layout: CheckLayout, *, accumulation_steps: int) -> RunConfig:
    train = replace(
        config.train,
        per_device_train_batch_size=layout.micro_batch_size,
        gradient_accumulation_steps=accumulation_steps,
        use_cpu=config.train.use_cpu or layout.num_processes > 0,
    )
    return replace(config, train=train)


def _samples_of_steps(trainer: LlmTrainer) -> list[list[int]]:
    """Return the sample numbers of each step that the trainer is about to make."""
    batches: Any = trainer.get_train_dataloader().batch_sampler
    passes = trainer.args.gradient_accumulation_steps

    def steps() -> Iterator[list[int]]:
        for epoch in itertools.count():
            batches.set_epoch(epoch)
            epoch_batches = list(batches)
            for start in range(0, len(epoch_batches), passes):
                yield list(itertools.chain(*epoch_batches[start : start + passes]))

    assert isinstance(batches, StepBatches)
    return list(itertools.islice(steps(), trainer.args.max_steps))


def _packs_of(train: Dataset, steps: Sequence[Sequence[int]], *, capacity: int) -> list[list[int]]:
    """Pack the samples of each step; every step gets the same number of packs, some may be empty.

    Args:
        train: the samples of the steps, one step after the other.
        steps: only their sizes count.
        capacity: tokens of a pack; less is used where a step would fit into one pack.
    """
    lengths = sample_lengths(train).tolist()
    packed: list[list[list[int]]] = []
    first = 0
    for size in map(len, steps):
        own = lengths[first : first + size]
        room = max(*own, min(capacity, math.ceil(sum(own) / 2)))
        groups = pack(own, capacity=room, seed=first)
        packed.append([[first + number for number in group] for group in groups])
        first += size
    most = max(map(len, packed))
    return [group for groups in packed for group in [*groups, *[[]] * (most - len(groups))]]


def _no_store(folder: Path) -> CheckpointStore:
    return CheckpointStore(folder, "selfcheck", {}, None, lambda path: None)
