"""Flat batches: every sample is computed as if it were alone."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GemmaConfig,
    GptOssConfig,
    JetMoeConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3NextConfig,
)

from llmtuner.extras.errors import ModelError
from llmtuner.model.attention import (
    VARLEN,
    padded_attention,
    pick_attention,
    register_varlen,
    supports_kept_logits,
    supports_varlen,
    uses_flat_batches,
)
from llmtuner.model.device import Device
from llmtuner.model.gradient_checkpointing import (
    disable_gradient_checkpointing,
    enable_gradient_checkpointing,
)

LENGTHS = (3, 11, 7)
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "mistral with a window": MistralConfig(**SHAPE, sliding_window=4),
    "qwen2 with a window": Qwen2Config(
        **SHAPE, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "qwen3": Qwen3Config(**SHAPE),
    "gemma": GemmaConfig(**SHAPE),
    "jetmoe": JetMoeConfig(**SHAPE, kv_channels=8, num_local_experts=4, num_experts_per_tok=2),
}


def build(config: PreTrainedConfig, attention: str = VARLEN) -> PreTrainedModel:
    register_varlen()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation=attention, dtype=torch.float32
    )
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(std=0.2)
    return model.eval()


def samples(seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.randint(3, 64, (1, length)) for length in LENGTHS]


def run_flat(model: nn.Module, parts: Sequence[Tensor], **others: object) -> Tensor:
    lengths = [part.shape[1] for part in parts]
    borders = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return model(
        input_ids=torch.cat(list(parts), dim=1),
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        cu_seq_lens_q=borders,
        cu_seq_lens_k=borders,
        max_length_q=max(lengths),
        max_length_k=max(lengths),
        use_cache=False,
        **others,
    ).logits


@pytest.mark.parametrize("name", CONFIGS)
def test_flat_batch_equals_separate_samples(name: str) -> None:
    assert supports_varlen(CONFIGS[name])
    model = build(CONFIGS[name])
    with torch.no_grad():
        flat = run_flat(model, samples())
        with padded_attention(model):
            apart = torch.cat([model(input_ids=part).logits for part in samples()], dim=1)
    assert (flat - apart).abs().max() < 1e-5


def test_a_window_cuts_what_a_token_sees() -> None:
    wide = build(MistralConfig(**SHAPE, sliding_window=None))
    narrow = build(MistralConfig(**SHAPE, sliding_window=4))
    with torch.no_grad():
        differ = (run_flat(wide, samples()) - run_flat(narrow, samples())).abs().amax(-1)[0]
    assert differ[3:7].max() < 1e-5
    assert differ[7:14].min() > 1e-5


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("with_adapter", [True, False])
def test_gradient_checkpointing_keeps_borders_and_gradients(
    use_reentrant: bool, with_adapter: bool
) -> None:
    model: nn.Module = build(CONFIGS["qwen2 with a window"])
    if with_adapter:
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"]))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.1)
    model.train()

    def gradients() -> list[Tensor]:
        model.zero_grad()
        run_flat(model, samples()).logsumexp(-1).sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    enable_gradient_checkpointing(model, use_reentrant=use_reentrant)
    recomputed = gradients()
    disable_gradient_checkpointing(model)
    assert len(plain) == len(recomputed)
    assert all(grad.abs().sum() > 0 for grad in recomputed)
    for left, right in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-6)


def test_kept_logits_are_the_rows_asked_for() -> None:
    model = build(CONFIGS["llama"])
    assert supports_kept_logits(model)
    positions = torch.tensor([1, 5, 20])
    with torch.no_grad():
        every = run_flat(model, samples())
        kept = run_flat(model, samples(), logits_to_keep=positions)
    torch.testing.assert_close(kept, every[:, positions])


def test_kept_logits_are_found_behind_an_adapter_and_not_invented() -> None:
    model = get_peft_model(build(CONFIGS["llama"]), LoraConfig(target_modules=["q_proj"]))
    assert supports_kept_logits(model)
    assert not supports_kept_logits(nn.Linear(2, 2))


def test_call_without_borders_is_refused() -> None:
    model = build(CONFIGS["llama"])
    with pytest.raises(ModelError, match="without the borders"):
        model(input_ids=samples()[0])


def test_padded_batch_is_refused() -> None:
    model = build(CONFIGS["llama"])
    borders = torch.tensor([0, 3], dtype=torch.int32)
    with pytest.raises(ModelError, match="batch 2"):
        model(input_ids=samples()[0].repeat(2, 1), cu_seq_lens_q=borders)


def test_soft_capped_scores_are_refused() -> None:
    model = build(Gemma2Config(**SHAPE))
    with pytest.raises(ModelError, match="softcap"):
        run_flat(model, samples())


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**SHAPE),
        GptOssConfig(),
        BloomConfig(),
        MambaConfig(),
        Qwen3NextConfig(),
        PreTrainedConfig(),
    ],
    ids=lambda config: type(config).__name__,
)
def test_models_that_cannot_be_cut_fall_back(config: PreTrainedConfig) -> None:
    assert not supports_varlen(config)
    assert not uses_flat_batches(pick_attention("auto", Device("cpu"), config=config))


def test_generation_works_with_padded_attention(tiny_model: Path) -> None:
    register_varlen()
    model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation=VARLEN)
    ids = torch.tensor([[5, 6, 7]])
    mask = torch.ones_like(ids)
    with padded_attention(model):
        text = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    assert text.shape[1] > 3
    assert model.config._attn_implementation == VARLEN


@pytest.mark.parametrize(
    ("flash_attn", "expected"),
    [("auto", VARLEN), ("sdpa", VARLEN), ("fa2", VARLEN), ("off", "eager")],
)
def test_pick_attention_on_cpu(flash_attn: str, expected: str, tiny_model: Path) -> None:
    config = AutoConfig.from_pretrained(tiny_model)
    assert pick_attention(flash_attn, Device("cpu"), config=config) == expected
