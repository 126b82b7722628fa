"""The Trainer: transformers' loop with our batches, our loss and our checkpoints.

What differs from `transformers.Trainer`, and why:

- batches come from `StepBatches`, so every layout trains the same samples in the same step;
- the head runs only where a token is trained, and the loss is the sum over trained tokens divided
  by the trained tokens of the whole optimizer step, over all accumulations and ranks;
- evaluation sums over tokens, so it does not depend on the batch size either;
- a checkpoint is committed by one rename and carries a manifest (see `checkpoint.py`);
- a loss or gradient that is not finite stops the run before the weights change.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.training_args_seq2seq import Seq2SeqTrainingArguments

from llmtuner.data.batches import Layout, StepBatches
from llmtuner.data.collate import Batch, FlatCollator
from llmtuner.data.lengths import sample_lengths
from llmtuner.data.stream import SampleStream
from llmtuner.extras.errors import ConfigError, NonFiniteError
from llmtuner.extras.files import follow_umask
from llmtuner.extras.logs import get_logger
from llmtuner.model.attention import supports_kept_logits
from llmtuner.model.head import head_loss, head_metrics, passing_on, separable_head
from llmtuner.train.checkpoint import CheckpointStore
from llmtuner.train.frozen_cache import FrozenCache
from llmtuner.train.neftune import NeftuneNoise

logger = get_logger(__name__)


@dataclass(frozen=True)
class TrainData:
    """What a trainer reads.

    Attributes:
        train: samples to learn; None when only evaluating.
        packs: sample numbers that share a micro-batch unit; None without packing.
        evals: named evaluation sets; the name "" gives plain `eval_loss`.
        collator: builds a micro-batch from samples.
    """

    train: Dataset | SampleStream | None
    packs: Sequence[Sequence[int]] | None
    evals: Mapping[str, Dataset]
    collator: Callable[..., Batch]


class LlmTrainer(Trainer):
    """Trains and evaluates a causal language model on flat (or padded) batches."""

    # `compute_loss` already divides by the tokens of the whole step.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *,
        model: torch.nn.Module,
        args: Seq2SeqTrainingArguments,
        data: TrainData,
        tokenizer: PreTrainedTokenizerBase,
        store: CheckpointStore,
        optimizer: torch.optim.Optimizer | None = None,
        shuffle: bool = True,
        with_accuracy: bool = False,
        noise: NeftuneNoise | None = None,
        cache: FrozenCache | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        """Wire the parts together; nothing is loaded or moved here that the caller did not give."""
        super().__init__(
            model=model,
            args=args,
            data_collator=data.collator,
            train_dataset=data.train,
            eval_dataset=dict(data.evals) or None,
            processing_class=tokenizer,
            callbacks=list(callbacks),
            optimizers=(optimizer, None),
        )
        self.data = data
        self.store = store
        self.shuffle = shuffle
        self.with_accuracy = with_accuracy
        self.noise = noise
        self.cache = cache
        self.learning: list[torch.nn.Parameter] | None = None  # known once it is wrapped
        self.is_prepared = False  # preparing twice would wrap `forward` twice
        self.skips_head = supports_kept_logits(model)
        self.head = separable_head(model)  # run in chunks, behind the model
        is_wrapped_in_ddp = args.world_size > 1 and args.deepspeed is None
        if self.head is not None and self.head.weight.requires_grad and is_wrapped_in_ddp:
            self.head = None  # DDP looks for what learns behind the outputs of the forward pass
        self.num_parameters = self.accelerator.unwrap_model(model).num_parameters(
            exclude_embeddings=True
        )
        self.supervised_tokens_seen = 0
        self.tokens_seen_before = 0  # by the runs that this one resumes

    # ---- batches ----

    def get_train_dataloader(self) -> DataLoader:
        """Return the micro-batches of this rank, in an order that is the same for every layout."""
        train = self.data.train
        assert train is not None, "train() needs a training set"
        if isinstance(train, SampleStream):
            return self._loader(train, batch_size=self._train_batch_size)
        by_length = self.args.train_sampling_strategy == "group_by_length"
        layout = self._layout(
            self._train_batch_size, accumulation_steps=self.args.gradient_accumulation_steps
        )
        # packs are level as they are, and padded batches are as long as their longest sample
        levels = isinstance(self.data.collator, FlatCollator) and layout.num_batches > 1
        needed = self.data.packs is None and (by_length or levels)
        lengths = sample_lengths(train).tolist() if needed else None
        batches = StepBatches(
            len(train),
            layout=layout,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            shuffle=self.shuffle and self.args.train_sampling_strategy != "sequential",
            packs=self.data.packs,
            lengths=lengths if by_length else None,
            levelled=lengths if levels else None,
            drop_last=self.args.dataloader_drop_last,
        )
        return self._loader(train, batch_sampler=batches)

    def get_eval_dataloader(self, eval_dataset: Dataset | None = None) -> DataLoader:
        """Return the micro-batches of one evaluation set, in file order."""
        assert eval_dataset is not None, "evaluate() names its data set"
        layout = self._layout(self.args.eval_batch_size, accumulation_steps=1)
        batches = StepBatches(len(eval_dataset), layout=layout, seed=0, shuffle=False)
        return self._loader(eval_dataset, batch_sampler=batches)

    def num_examples(self, dataloader: DataLoader) -> int:
        """Return the samples behind a loader, for logs."""
        return len(dataloader.dataset)

    def _layout(self, micro_batch_size: int, *, accumulation_steps: int) -> Layout:
        return Layout(
            micro_batch_size=micro_batch_size,
            accumulation_steps=accumulation_steps,
            rank=self.args.process_index,
            world_size=self.args.world_size,
        )

    def _loader(self, dataset: Any, **how: Any) -> "EpochLoader":
        return EpochLoader(
            dataset,
            collate_fn=self.data.collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
            prefetch_factor=self.args.dataloader_prefetch_factor,
            persistent_workers=self.args.dataloader_persistent_workers,
            **how,
        )

    # ---- loss ----

    def _get_num_items_in_batch(
        self, batch_samples: list[Batch], device: torch.device
    ) -> torch.Tensor:
        """Count the trained tokens of one optimizer step, over all accumulations and ranks."""
        counts = torch.tensor(
            [
                sum(batch["targets"].numel() for batch in batch_samples),
                sum(batch["input_ids"].numel() for batch in batch_samples),
            ]
        )
        trained, seen = self._sum_over_ranks(counts.to(device))
        self.supervised_tokens_seen += int(trained)
        self.state.num_input_tokens_seen += int(seen)
        return trained.clamp(min=1)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Return this micro-batch's share of the step's mean loss over trained tokens.

        Ranks average their gradients, so the share is multiplied by their number.

        Args:
            model: the wrapped model.
            inputs: a batch of `llmtuner.data.collate`.
            return_outputs: also return the model's outputs.
            num_items_in_batch: [] trained tokens of the step over all ranks.
        """
        smoothing = self.args.label_smoothing_factor
        rows, targets, outputs = self._kept_rows(model, inputs)
        if self.head is None:
            loss = F.cross_entropy(
                rows.float(), targets, reduction="sum", label_smoothing=smoothing
            )
        else:
            dtype = self._head_dtype(self.head)
            loss = head_loss(rows, self.head, targets, dtype=dtype, smoothing=smoothing)
        count = targets.numel() if num_items_in_batch is None else num_items_in_batch
        loss = loss / count * self.args.world_size
        if outputs.get("aux_loss") is not None:  # mixture of experts: keep the experts balanced
            config = self.accelerator.unwrap_model(model).config
            passes = self.current_gradient_accumulation_steps
            loss = loss + config.router_aux_loss_coef * outputs["aux_loss"] / passes
        return (loss, outputs) if return_outputs else loss

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: Batch,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run forward and backward on one micro-batch.

        Raises:
            NonFiniteError: the loss is NaN or infinite; the weights are those of the last step.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._check_finite(loss, what="loss")
        return loss

    def _clip_grad_norm(self, model: torch.nn.Module) -> torch.Tensor | None:
        """Clip what learns; walking through thousands of adapter modules takes 1 % of a step."""
        if self.learning is None:
            self.learning = [p for p in model.parameters() if p.requires_grad]
        return self.accelerator.clip_grad_norm_(self.learning, self.args.max_grad_norm)

    def _get_grad_norm(
        self, model: torch.nn.Module, grad_norm: torch.Tensor | float | None = None
    ) -> torch.Tensor | float | None:
        """Return the norm for the log; also without clipping, so that a NaN stops the step."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None:  # DeepSpeed has none before its first step
            self._check_finite(torch.as_tensor(norm), what="gradient norm")
        return norm

    def _kept_rows(
        self, model: torch.nn.Module, inputs: Batch
    ) -> tuple[torch.Tensor, torch.Tensor, Mapping[str, Any]]:
        """Run the model; return what a trained token follows, and the targets [N].

        The rows are hidden states [N, n] where the head can be run apart, else logits [N, V].
        """
        inputs = dict(inputs)
        kept, targets = inputs.pop("kept"), inputs.pop("targets")
        if self.noise is not None:
            self.noise.prepare(inputs)
        cache = self.cache if model.training else None
        with (
            nullcontext() if self.head is None else passing_on(self.head),
            nullcontext() if cache is None else cache.serving(inputs),
        ):
            if "cu_seq_lens_q" in inputs and self.skips_head:
                outputs = model(**inputs, logits_to_keep=kept, use_cache=False)
                return outputs["logits"][0], targets, outputs
            outputs = model(**inputs, use_cache=False)
        return outputs["logits"].flatten(0, 1)[kept], targets, outputs

    def _head_dtype(self, head: torch.nn.Linear) -> torch.dtype:
        """Return what the head computes in; autocast ends with the model's forward pass."""
        types = {"bf16": torch.bfloat16, "fp16": torch.float16}
        return types.get(self.accelerator.mixed_precision, head.weight.dtype)

    def floating_point_ops(self, inputs: Batch) -> int:
        """Return what transformers estimates, 6 x parameters x tokens, without counting anew."""
        return 6 * self.num_parameters * inputs["input_ids"].numel()

    def _check_finite(self, value: torch.Tensor, *, what: str) -> None:
        if torch.isfinite(value).all():
            return
        raise NonFiniteError(
            f"The {what} of step {self.state.global_step + 1} is not finite.",
            got=float(value),
            fix="lower --learning_rate, or train in bf16 or fp32 instead of fp16; "
            "the weights are those of the step before",
        )

    def _sum_over_ranks(self, value: torch.Tensor) -> torch.Tensor:
        if self.args.world_size > 1:
            torch.distributed.all_reduce(value)
        return value

    # ---- optimizer ----

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer.

        Raises:
            ConfigError: it needs a library that is not installed, or other arguments.
        """
        try:
            return super().create_optimizer(model)
        except (ImportError, ValueError, TypeError) as error:
            raise ConfigError(
                f"The optimizer cannot be made: {error}",
                where="--optim",
                got=str(self.args.optim),
                fix="install what it names, give --optim_args, or use adamw_torch",
            ) from error

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """Create the learning rate schedule.

        Raises:
            ConfigError: it needs other arguments.
        """
        total = kwargs.get("num_training_steps", args[0] if args else 0)
        warmup = self.args.get_warmup_steps(total)
        if total and warmup >= total:
            logger.warning(
                "The learning rate rises for %d steps, but the run has only %d: it never reaches "
                "%g. Lower --warmup_steps.",
                *(warmup, total, self.args.learning_rate),
            )
        try:
            return super().create_scheduler(*args, **kwargs)
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"The learning rate schedule cannot be made: {error}",
                where="--lr_scheduler_type",
                got=str(self.args.lr_scheduler_type),
                fix="give its arguments with --lr_scheduler_kwargs, or use cosine or linear",
            ) from error

    # ---- evaluation ----

    def evaluate(
        self,
        eval_dataset: Dataset | Mapping[str, Dataset] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Return loss, perplexity and speed over every trained token of the evaluation data.

        Several sets give `eval_<name>_loss` each, and `eval_loss` over all their tokens.
        """
        data = self.data.evals if eval_dataset is None else eval_dataset
        named = data if isinstance(data, Mapping) else {"": data}
        metrics: dict[str, float] = {}
        together = torch.zeros(3, dtype=torch.float64)
        for name, dataset in named.items():
            prefix = f"{metric_key_prefix}_{name}" if name else metric_key_prefix
            started = time.monotonic()
            sums = self._evaluate_one(dataset)
            seconds = time.monotonic() - started
            together += sums
            metrics |= self._metrics_of(sums, prefix=prefix)
            metrics[f"{prefix}_runtime"] = round(seconds, 4)
            metrics[f"{prefix}_samples_per_second"] = round(len(dataset) / max(seconds, 1e-9), 3)
        metrics |= self._metrics_of(together, prefix=metric_key_prefix)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    @torch.no_grad()
    def _evaluate_one(self, dataset: Dataset) -> torch.Tensor:
        """Return [3] float64: summed loss, trained tokens and right guesses, over all ranks."""
        model = self._model_for_evaluation()
        model.eval()
        sums = torch.zeros(3, dtype=torch.float64)
        for inputs in self.get_eval_dataloader(dataset):
            sums += self._evaluate_batch(model, self._prepare_inputs(inputs)).cpu()
            self.control = self.callback_handler.on_prediction_step(
                self.args, self.state, self.control
            )
        return self._sum_over_ranks(sums.to(self.args.device)).cpu()

    def _metrics_of(self, sums: torch.Tensor, *, prefix: str) -> dict[str, float]:
        loss, tokens, right = sums.tolist()
        mean = loss / max(tokens, 1)
        metrics = {
            f"{prefix}_loss": mean,
            f"{prefix}_perplexity": math.exp(min(mean, 700.0)),
            f"{prefix}_supervised_tokens": int(tokens),
        }
        if self.with_accuracy:
            metrics[f"{prefix}_accuracy"] = right / max(tokens, 1)
        return metrics

    def _evaluate_batch(self, model: torch.nn.Module, inputs: Batch) -> torch.Tensor:
        with self.compute_loss_context_manager():
            rows, targets, _ = self._kept_rows(model, inputs)
        if self.head is None:
            logits = rows.float()
            loss = F.cross_entropy(logits, targets, reduction="sum").double()
            right = (logits.argmax(-1) == targets).sum().double()
        else:
            dtype = self._head_dtype(self.head)
            loss, right = head_metrics(rows, self.head, targets, dtype=dtype)
        return torch.stack([loss, right.new_tensor(targets.numel()), right])

    def _model_for_evaluation(self) -> torch.nn.Module:
        """Return the wrapped model; wrap it now when there was no training (ZeRO-3 has shards)."""
        if self.is_deepspeed_enabled and self.deepspeed is None:
            from transformers.integrations.deepspeed import deepspeed_init

            _, _ = deepspeed_init(self, num_training_steps=0, inference=True)
            self.deepspeed = self.model_wrapped = self.accelerator.prepare(self.model)
        elif not self.is_prepared:
            self.model_wrapped = self.accelerator.prepare_model(self.model, evaluation_mode=True)
        self.is_prepared = True
        return self.model_wrapped

    # ---- checkpoints ----

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Resume with the logging, saving and evaluation steps of now, not of the checkpoint."""
        begin = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)
        self.is_prepared = True  # by the training loop, right after this
        return begin

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Commit a checkpoint by one rename, then remove old ones of this run."""
        self.store_flos()
        step = self.state.global_step
        progress = {
            "tokens_seen": self.state.num_input_tokens_seen,
            "supervised_tokens_seen": self.supervised_tokens_seen,
            "epoch": self.state.epoch,
            "is_resumable": not self.args.save_only_model,
        }
        with self.store.stage(step, progress) as folder:
            self.save_model(str(folder), _internal_call=True)
            if not self.args.save_only_model:
                self._save_optimizer_and_scheduler(str(folder))
                self._save_scaler(str(folder))
                self._save_rng_state(str(folder))
            best = self.state.best_global_step
            if best and (best == step or self.store.path_of(best).is_dir()):
                self.state.best_model_checkpoint = str(self.store.path_of(best))
            if self.args.should_save:
                self._record_callbacks()
                self.state.save_to_json(str(folder / "trainer_state.json"))
        self.store.rotate(newest=step, best=self.state.best_global_step)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Tell whether this evaluation is the best so far, and save it if it is to be kept.

        Raises:
            ConfigError: `metric_for_best_model` names no metric of this run.
        """
        try:
            is_best = super()._determine_best_metric(metrics, trial)
        except KeyError as error:
            raise ConfigError(
                "There is no such metric.",
                where="--metric_for_best_model",
                got=self.args.metric_for_best_model,
                allowed=sorted(name for name in metrics if name != "epoch"),
            ) from error
        if is_best and self.args.load_best_model_at_end:
            self.control.should_save = True  # whatever save_steps says: it is wanted at the end
        return is_best

    def _record_callbacks(self) -> None:
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                self.state.stateful_callbacks[type(callback).__name__] = callback.state()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save weights and what serving needs; no pickled arguments."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.model.save_pretrained(folder, state_dict=state_dict)
        self.store.write_companions(folder)
        follow_umask(folder)


class EpochLoader(DataLoader):
    """A data loader that tells its batch sampler which epoch begins."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the epoch, counted from 0."""
        if isinstance(self.batch_sampler, StepBatches):
            self.batch_sampler.set_epoch(epoch)
