"""A two-layer random Llama with a small tokenizer, on disk."""

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from llmtuner.model.precision import Precision

NUM_TOKENS = 320
FP32 = Precision("fp32", pure=False, reason="test")
BF16 = Precision("bf16", pure=False, reason="test")


def tiny_config(**changes: object) -> LlamaConfig:
    values: dict[str, object] = {
        "vocab_size": NUM_TOKENS,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**values | changes)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    marks = ["<unk>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*marks, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="<|im_end|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return tokenizer


def save_tiny(folder: Path, *, seed: int = 0, **changes: object) -> Path:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(tiny_config(**changes))
    # transformers' small random start makes all texts look alike; larger weights tell them apart.
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(std=0.2)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def random_lora(model: torch.nn.Module) -> None:
    """Let an adapter change the model; a new one adds zero."""
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("lora_B", "lora_embedding", "modules_to_save")):
            parameter.data += torch.randn_like(parameter) * 0.2


def make_adapter(
    base: Path, folder: Path, *, seed: int = 1, rank: int = 4, rows: int = 0, **more: object
) -> Path:
    """Save a random adapter of `base`, whose vocabulary may have grown to `rows`."""
    torch.manual_seed(seed)
    targets = more.pop("target_modules", ["q_proj", "down_proj"])
    config = LoraConfig(r=rank, target_modules=targets, task_type="CAUSAL_LM", **more)
    loaded = AutoModelForCausalLM.from_pretrained(base)
    if rows:
        loaded.resize_token_embeddings(rows)
    model: PeftModel = get_peft_model(loaded, config)
    random_lora(model)
    model.save_pretrained(folder)
    return folder
