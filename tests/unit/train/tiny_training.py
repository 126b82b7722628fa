"""A tiny Llama (or Mixtral), made-up samples, and a trainer around them."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from checkpoint_parts import make_store
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.training_args_seq2seq import Seq2SeqTrainingArguments

from llmtuner.data.collate import Batch, FlatCollator, PaddedCollator
from llmtuner.data.conversation import IGNORE_INDEX
from llmtuner.model.attention import VARLEN, register_varlen
from llmtuner.train.trainer import LlmTrainer, TrainData

NUM_TOKENS = 50
SIZES: Mapping[str, Any] = {
    "vocab_size": NUM_TOKENS,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
COLLATORS: Mapping[str, Callable[..., Batch]] = {"flat": FlatCollator(), "padded": PaddedCollator()}


def tiny_llama(layout: str = "flat") -> PreTrainedModel:
    """Return a Llama whose weights are large enough to tell tokens apart."""
    return _with_large_weights(LlamaForCausalLM(LlamaConfig(**SIZES)), layout)


def tiny_mixtral(layout: str = "flat") -> PreTrainedModel:
    config = MixtralConfig(
        **SIZES,
        num_local_experts=4,
        num_experts_per_tok=2,
        output_router_logits=True,
        router_aux_loss_coef=0.5,
    )
    return _with_large_weights(MixtralForCausalLM(config), layout)


def _with_large_weights(model: PreTrainedModel, layout: str) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.3, generator=generator)
    register_varlen()
    model.set_attn_implementation(VARLEN if layout == "flat" else "sdpa")
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "</s>": 1, **{f"w{n}": n for n in range(2, NUM_TOKENS)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="w2"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")


def samples(lengths: Sequence[int], *, seed: int = 0) -> Dataset:
    """Return samples of these lengths; about half of their tokens are trained."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number, length in enumerate(lengths):
        ids = torch.randint(2, NUM_TOKENS, (length,), generator=generator).tolist()
        coins = torch.rand(length, generator=generator).tolist()
        labels = [token if coin < 0.5 else IGNORE_INDEX for token, coin in zip(ids, coins)]  # noqa: B905
        labels[-1] = ids[-1]
        rows.append({"input_ids": ids, "labels": labels, "source": f"f:{number}"})
    return Dataset.from_list(rows)


def reference_loss(model: PreTrainedModel, rows: Sequence[Mapping[str, Any]]) -> tuple[float, int]:
    """Return the summed loss and the trained tokens: one sample at a time, token by token."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    total, num_trained = 0.0, 0
    with torch.no_grad():
        for row in rows:
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double()
            for place, label in enumerate(row["labels"][1:]):
                if label != IGNORE_INDEX:
                    total -= F.log_softmax(logits[place], dim=-1)[label].item()
                    num_trained += 1
    model.set_attn_implementation(before)
    return total, num_trained


def make_trainer(
    tmp_path: Path,
    *,
    train: Dataset | None = None,
    evals: Mapping[str, Dataset] | None = None,
    packs: list[list[int]] | None = None,
    model: PreTrainedModel | None = None,
    layout: str = "flat",
    with_accuracy: bool = False,
    shuffle: bool = True,
    **values: Any,
) -> LlmTrainer:
    settings: dict[str, Any] = {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "report_to": [],
        "remove_unused_columns": False,
        "label_names": ["targets"],
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
    }
    return LlmTrainer(
        model=tiny_llama(layout) if model is None else model,
        args=Seq2SeqTrainingArguments(**settings | values),
        data=TrainData(train, packs, evals or {}, COLLATORS[layout]),
        tokenizer=tiny_tokenizer(),
        store=make_store(tmp_path),
        shuffle=shuffle,
        with_accuracy=with_accuracy,
    )
