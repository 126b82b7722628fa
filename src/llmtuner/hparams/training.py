"""Options of the training loop, under Hugging Face's names."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from llmtuner.hparams.arg import CHECKED_WHEN_MADE, arg

_OWNED = frozenset(
    {
        # Not an argument of transformers 5, or ours to decide while the run starts.
        "overwrite_output_dir",
        "logging_dir",
        "local_rank",
        "bf16",
        "fp16",
        # Our own checkpoints, trackers and generation replace the Trainer's.
        "resume_from_checkpoint",
        "save_total_limit",
        "report_to",
        "predict_with_generate",
        "generation_max_length",
        "generation_num_beams",
        "generation_config",
        "gradient_checkpointing",
        "gradient_checkpointing_kwargs",
        "cache_frozen_layers",
        "other",
    }
)


@dataclass(frozen=True, kw_only=True, config=CHECKED_WHEN_MADE)
class TrainArgs:
    """How long, how fast, on what, and what is written on the way."""

    output_dir: str | None = arg(None, "Folder for everything that the run writes.")
    overwrite_output_dir: bool = arg(False, "Start afresh in an output_dir that holds a run.")
    do_train: bool = arg(False, "Train.")
    do_eval: bool = arg(False, "Evaluate the loss.")
    do_predict: bool = arg(False, "Generate answers for the evaluation data.")
    predict_with_generate: bool = arg(False, "Write the model's own answers (with do_predict).")
    resume_from_checkpoint: bool | str | None = arg(
        None, "Checkpoint folder, or true for the newest. Unset: go on if there is one."
    )

    per_device_train_batch_size: int = arg(8, "Batch of one device.", unit="samples", low=1)
    per_device_eval_batch_size: int = arg(
        8, "Batch of one device when evaluating.", unit="samples", low=1
    )
    gradient_accumulation_steps: int = arg(1, "Batches per optimizer step.", low=1)
    num_train_epochs: float = arg(3.0, "Passes over the data.", low=0)
    max_steps: int = arg(-1, "Optimizer steps; above 0 it replaces num_train_epochs.", low=-1)

    learning_rate: float = arg(5e-5, "Highest learning rate.", low=0)
    lr_scheduler_type: str = arg("linear", "Course of the learning rate.")
    warmup_steps: float = arg(
        0.0, "Steps of rising learning rate; below 1, a fraction of all steps.", low=0
    )
    optim: str = arg("adamw_torch_fused", "Optimizer.")
    weight_decay: float = arg(0.0, "Decay of the weights.", low=0)
    max_grad_norm: float = arg(1.0, "Gradients are scaled down to this norm; 0 for never.", low=0)
    neftune_noise_alpha: float | None = arg(None, "Noise on the embeddings (NEFTune).", low=0)
    seed: int = arg(42, "Seed of everything random.", low=0, high=2**32 - 1)
    data_seed: int | None = arg(None, "Seed of the order of the data. Unset: seed.", low=0)

    bf16: bool | None = arg(None, "bfloat16 mixed precision. Unset: where the device has it.")
    fp16: bool = arg(False, "float16 mixed precision, for older GPUs.")
    tf32: bool | None = arg(None, "TF32 matrix products on NVIDIA GPUs.")
    use_cpu: bool = arg(False, "Train on the CPU even if there is a GPU.")
    gradient_checkpointing: bool | None = arg(
        None, "Recompute activations to save memory. Unset: only where they will not fit."
    )
    gradient_checkpointing_kwargs: dict[str, Any] | None = arg(
        None, "Only use_reentrant is read; see use_reentrant_gc."
    )
    cache_frozen_layers: float = arg(
        0.0,
        "Disk for what the frozen lower layers make of each sample, computed in the first epoch "
        "only; 0: off. CPU, one process.",
        unit="GB",
        low=0,
    )
    deepspeed: str | None = arg(None, "DeepSpeed configuration, a JSON file.")
    ddp_timeout: int = arg(1800, "How long processes wait for each other.", unit="s", low=1)
    local_rank: int = arg(-1, "Number of this process on its host; launchers set it.")

    logging_steps: float = arg(
        500.0, "Steps between log lines; below 1, a fraction of all steps.", low=0
    )
    logging_first_step: bool = arg(False, "Log the first step too.")
    logging_dir: str | None = arg(None, "Folder of TensorBoard files.")
    report_to: tuple[str, ...] = arg(("none",), "Trackers: wandb, swanlab, tensorboard, none.")
    run_name: str | None = arg(None, "Name of the run at the trackers.")
    save_strategy: Literal["no", "steps", "epoch", "best"] = arg("steps", "When to save.")
    save_steps: float = arg(
        500.0, "Steps between checkpoints; below 1, a fraction of all steps.", low=0
    )
    save_total_limit: int | None = arg(None, "Checkpoints kept; older ones are deleted.", low=1)
    save_only_model: bool = arg(False, "Save no optimizer state: smaller, cannot be resumed.")
    eval_strategy: Literal["no", "steps", "epoch"] = arg("no", "When to evaluate.")
    eval_steps: float | None = arg(
        None, "Steps between evaluations; below 1, a fraction. Unset: logging_steps.", low=0
    )
    load_best_model_at_end: bool = arg(False, "End with the best checkpoint, not with the last.")
    metric_for_best_model: str | None = arg(None, "What is best. Unset: the evaluation loss.")
    greater_is_better: bool | None = arg(None, "Whether more of that metric is better.")
    push_to_hub: bool = arg(False, "Upload the result to the Hugging Face hub.")
    hub_model_id: str | None = arg(None, "Repository to upload to.")
    hub_token: str | None = arg(None, "Login token for the upload.", secret=True)

    other: Mapping[str, Any] = Field(default_factory=dict, description="Further given arguments.")

    @property
    def compiles(self) -> bool:
        """Whether the model goes through torch.compile; any of its three options asks for it."""
        names = ("torch_compile", "torch_compile_backend", "torch_compile_mode")
        return any(self.other.get(name) for name in names)

    def hf_values(self) -> dict[str, Any]:
        """Return what `transformers.Seq2SeqTrainingArguments` gets.

        Left out: what the package decides itself (precision, resuming, checkpoint rotation,
        gradient checkpointing, generation). `report_to` is always "none": our loggers report.
        """
        own = {f.name: vars(self)[f.name] for f in fields(self) if f.name not in _OWNED}
        given = {name: value for name, value in self.other.items() if name not in _OWNED}
        values = own | given | {"report_to": "none"}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
        }
