"""Optimizers that need more than transformers' `optim` can say."""

from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from torch.optim import Optimizer
from transformers import PreTrainedModel, Trainer
from transformers.training_args_seq2seq import Seq2SeqTrainingArguments

from llmtuner.hparams.config import MethodArgs
from llmtuner.hparams.lora import LoraArgs


def build_optimizer(
    method: MethodArgs, model: PreTrainedModel | PeftModel, hf_args: Seq2SeqTrainingArguments
) -> Optimizer | None:
    """Return the optimizer of the method, or None where transformers' own will do.

    With `loraplus_lr_ratio` the B matrices learn that much faster than the A matrices.
    Source: https://arxiv.org/abs/2402.12354 (LoRA+).
    """
    if not isinstance(method, LoraArgs) or method.loraplus_lr_ratio is None:
        return None
    optimizer_class, settings = Trainer.get_optimizer_cls_and_kwargs(hf_args, model)
    return create_loraplus_optimizer(
        model,
        optimizer_class,
        loraplus_lr_ratio=method.loraplus_lr_ratio,
        loraplus_lr_embedding=method.loraplus_lr_embedding,
        loraplus_weight_decay=hf_args.weight_decay,
        **settings,
    )
