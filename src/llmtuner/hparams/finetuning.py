"""Options of the training method that hold for every stage and finetuning type."""

from typing import Literal

from pydantic.dataclasses import dataclass

from llmtuner.hparams.arg import CHECKED_WHEN_MADE, arg


@dataclass(frozen=True, kw_only=True, config=CHECKED_WHEN_MADE)
class FinetuningArgs:
    """What kind of training this is."""

    stage: Literal["pt", "sft"] = arg(
        "sft", "pt learns whole texts, sft learns the answers of conversations."
    )
    finetuning_type: Literal["lora", "freeze", "full"] = arg(
        "lora", "Which weights learn: added low-rank ones, a few layers, or all."
    )
    pure_bf16: bool = arg(False, "Train in bfloat16 only, without float32 copies.")
    plot_loss: bool = arg(False, "Draw the loss curves into output_dir.")
    compute_accuracy: bool = arg(False, "Report token accuracy when evaluating.")
    disable_shuffling: bool = arg(False, "Train in file order.")
    early_stopping_steps: int | None = arg(
        None, "Stop after this many evaluations without progress.", low=1
    )
