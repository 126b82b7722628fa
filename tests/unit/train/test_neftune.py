"""NEFTune: the noise of a sample has the size that the paper gives, in every layout."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llmtuner.data.collate import Batch, FlatCollator, PaddedCollator
from llmtuner.train.neftune import NeftuneNoise

LENGTHS = [4, 100]
WIDTH = 32


@pytest.fixture
def model() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16,
            hidden_size=WIDTH,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )


def batch(collator: FlatCollator | PaddedCollator) -> Batch:
    return collator([{"input_ids": [3] * n, "labels": [3] * n} for n in LENGTHS])


@pytest.mark.parametrize("collator", [FlatCollator(), PaddedCollator()])
def test_noise_depends_on_the_sample_and_not_on_the_layout(
    model: LlamaForCausalLM, collator: FlatCollator | PaddedCollator
) -> None:
    embedding = model.get_input_embeddings()
    inputs = batch(collator)
    clean = embedding(inputs["input_ids"]).detach()
    noise = NeftuneNoise(alpha=5.0)
    noise.attach(model)
    noise.prepare(inputs)
    model.train()
    added = (embedding(inputs["input_ids"]).detach() - clean).abs().reshape(-1, WIDTH)
    starts = [0, LENGTHS[0]] if isinstance(collator, FlatCollator) else [0, max(LENGTHS)]
    for start, length in zip(starts, LENGTHS, strict=True):
        largest = 5.0 / (length * WIDTH) ** 0.5
        seen = added[start : start + length]
        assert seen.max() <= largest * 1.001
        assert seen.max() > 0.8 * largest


def test_evaluation_has_no_noise(model: LlamaForCausalLM) -> None:
    inputs = batch(FlatCollator())
    clean = model.get_input_embeddings()(inputs["input_ids"])
    noise = NeftuneNoise(alpha=5.0)
    noise.attach(model)
    noise.prepare(inputs)
    model.eval()
    assert torch.equal(model.get_input_embeddings()(inputs["input_ids"]), clean)
