"""Packed samples do not see each other: to the last bit, in every architecture and number type."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from llmtuner.data.collate import FlatCollator
from llmtuner.model.attention import VARLEN, register_varlen, supports_varlen

LENGTHS = (5, 1, 17, 9)
NUM_TOKENS = 64
SHAPE = {
    "vocab_size": NUM_TOKENS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS = {"head_dim": 8}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SHAPE),
    "llama, every head its own keys": LlamaConfig(**SHAPE | {"num_key_value_heads": 4}),
    "llama, one head of keys": LlamaConfig(**SHAPE | {"num_key_value_heads": 1}),
    "mistral with a window": MistralConfig(**SHAPE, sliding_window=4),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen2 with a window": Qwen2Config(
        **SHAPE, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "qwen3": Qwen3Config(**SHAPE, **HEADS),
    "gemma": GemmaConfig(**SHAPE, **HEADS),
    "gemma3": Gemma3TextConfig(**SHAPE, **HEADS, sliding_window=4),
    "phi3": Phi3Config(**SHAPE),
    "olmo2": Olmo2Config(**SHAPE),
    "gpt2": GPT2Config(vocab_size=NUM_TOKENS, n_embd=32, n_layer=2, n_head=4, n_positions=64),
}


def build(name: str, dtype: torch.dtype) -> PreTrainedModel:
    assert supports_varlen(CONFIGS[name])
    register_varlen()
    model = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation=VARLEN, dtype=dtype)
    for parameter in model.parameters():
        if parameter.ndim == 2:  # large enough for tokens to matter to each other
            parameter.data.normal_(std=0.2)
    return model.eval()


def draw(length: int) -> list[int]:
    return torch.randint(3, NUM_TOKENS, (length,)).tolist()


def run(model: PreTrainedModel, samples: Sequence[list[int]]) -> Sequence[Tensor]:
    """Return the logits of each sample of one flat batch."""
    batch = FlatCollator()([{"input_ids": ids, "labels": ids} for ids in samples])
    inputs = {name: value for name, value in batch.items() if name not in ("kept", "targets")}
    return model(**inputs, use_cache=False).logits[0].split([len(ids) for ids in samples])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_replacing_a_sample_leaves_the_others_bit_identical(name: str, dtype: torch.dtype) -> None:
    model = build(name, dtype)
    samples = [draw(length) for length in LENGTHS]
    with torch.no_grad():
        before = run(model, samples)
        for replaced, length in enumerate(LENGTHS):
            others = [*samples]
            others[replaced] = draw(length)
            after = run(model, others)
            for number, (left, right) in enumerate(zip(before, after, strict=True)):
                assert torch.equal(left, right) == (number != replaced), (replaced, number)


@pytest.mark.parametrize("name", CONFIGS)
def test_no_gradient_flows_from_one_sample_into_another(name: str) -> None:
    model = build(name, torch.float32)
    found: list[Tensor] = []
    model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: found.append(output)
    )
    for number in range(len(LENGTHS)):
        logits = run(model, [draw(length) for length in LENGTHS])
        (gradient,) = torch.autograd.grad(logits[number].logsumexp(-1).sum(), found.pop())
        for other, part in enumerate(gradient[0].split(list(LENGTHS))):
            assert bool(part.any()) == (other == number), (number, other)
