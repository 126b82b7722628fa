"""Options of LoRA and QLoRA."""

from typing import ClassVar

from pydantic.dataclasses import dataclass

from llmtuner.hparams.arg import CHECKED_WHEN_MADE, arg


@dataclass(frozen=True, kw_only=True, config=CHECKED_WHEN_MADE)
class LoraArgs:
    """Low-rank adapters: where they sit and how large they are."""

    trains_quantized: ClassVar[bool] = True
    uses_adapters: ClassVar[bool] = True

    lora_rank: int = arg(8, "Rank of the adapters.", low=1)
    lora_alpha: int | None = arg(None, "Scale of the adapters. Unset: 2 x lora_rank.", low=1)
    lora_dropout: float = arg(0.0, "Dropout before the adapters.", low=0, high=1)
    lora_target: tuple[str, ...] = arg(
        ("all",), "Linear layers that get an adapter, or all of them."
    )
    additional_target: tuple[str, ...] | None = arg(
        None, "Modules that are trained and saved whole (embed_tokens,lm_head)."
    )
    use_rslora: bool = arg(False, "Scale by alpha / sqrt(rank) instead of alpha / rank.")
    use_dora: bool = arg(False, "Learn the size and the direction of each weight apart.")
    create_new_adapter: bool = arg(
        False, "Merge the given adapters and train a new one, instead of going on with the last."
    )
    loraplus_lr_ratio: float | None = arg(
        None, "Learning rate of the B matrices over that of the A matrices (LoRA+).", low=0
    )
    loraplus_lr_embedding: float = arg(1e-6, "Learning rate of the embeddings in LoRA+.", low=0)
