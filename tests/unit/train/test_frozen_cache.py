"""Frozen layers run in the first epoch only, and every loss is the one of computing them again."""

import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_training import SIZES, make_trainer, samples, tiny_llama, tiny_mixtral
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from llmtuner.hparams.parser import parse
from llmtuner.model.attention import VARLEN, register_varlen
from llmtuner.model.fast.kernels import load_kernels
from llmtuner.model.fast.layer import can_share_prefix, use_fast_layers
from llmtuner.model.frozen import frozen_layers
from llmtuner.train.frozen_cache import FrozenCache, open_frozen_cache

LENGTHS = [5, 9, 2, 12, 7, 3, 8, 6, 4, 11]
NUM_LAYERS, LEARNING, EPOCHS = 4, 1, 3


def deep_llama() -> Any:
    register_varlen()
    torch.manual_seed(0)
    config = LlamaConfig(**{**SIZES, "num_hidden_layers": NUM_LAYERS, "initializer_range": 0.3})
    return LlamaForCausalLM._from_config(config, attn_implementation=VARLEN)


def freeze(model: Any) -> Any:
    model.requires_grad_(False)
    model.model.layers[-LEARNING:].requires_grad_(True)
    return model


def top_lora(model: Any) -> Any:
    torch.manual_seed(1)
    top = [NUM_LAYERS - 1]
    return get_peft_model(model, LoraConfig(target_modules=["q_proj"], layers_to_transform=top))


METHODS = {"freeze": freeze, "top lora": top_lora}


def inner_of(model: nn.Module) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def cache_of(model: nn.Module, folder: Path, *, most_bytes: float = 1e9) -> FrozenCache:
    return FrozenCache(
        frozen_layers(inner_of(model)),
        folder=folder,
        num_tokens=sum(LENGTHS),
        most_bytes=most_bytes,
    )


def train(folder: Path, model: nn.Module, cache: FrozenCache | None, **how: Any) -> list[float]:
    trainer = make_trainer(
        folder,
        train=samples(LENGTHS),
        model=model,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_train_epochs=EPOCHS,
        **how,
    )
    trainer.cache = cache
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


needs_kernels = pytest.mark.skipif(load_kernels() is None, reason="no C compiler")


@pytest.mark.parametrize("is_fast", [False, pytest.param(True, marks=needs_kernels)])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_losses_are_bit_for_bit_those_without_the_cache(
    tmp_path: Path, method: Any, is_fast: bool
) -> None:
    plain, cached = (method(deep_llama()) for _ in range(2))
    if is_fast:
        assert use_fast_layers(plain) == use_fast_layers(cached) == NUM_LAYERS
    cache = cache_of(cached, tmp_path)
    how = {"shuffle": False, "bf16": is_fast, "learning_rate": 0.5}
    expected = train(tmp_path, plain, None, **how)
    assert train(tmp_path, cached, cache, **how) == expected
    assert len(set(expected)) > len(expected) / EPOCHS  # something has been learned
    assert (cache.misses, cache.hits) == (len(LENGTHS), (EPOCHS - 1) * len(LENGTHS))


def test_shuffled_epochs_find_their_samples_too(tmp_path: Path) -> None:
    plain, cached = freeze(deep_llama()), freeze(deep_llama())
    cache = cache_of(cached, tmp_path)
    expected = train(tmp_path, plain, None)
    assert train(tmp_path, cached, cache) == pytest.approx(expected, rel=1e-5)
    assert cache.hits == (EPOCHS - 1) * len(LENGTHS)


def test_kept_layers_are_not_computed_again(tmp_path: Path) -> None:
    model = freeze(deep_llama())
    calls = [0] * NUM_LAYERS
    for number, layer in enumerate(model.model.layers):

        def count(module: object, inputs: object, number: int = number) -> None:
            calls[number] += 1

        layer.mlp.register_forward_pre_hook(count)
    train(tmp_path, model, cache_of(model, tmp_path))
    batches = len(LENGTHS) // 2
    assert calls == [batches] * (NUM_LAYERS - LEARNING) + [EPOCHS * batches] * LEARNING


def test_evaluation_computes_everything(tmp_path: Path) -> None:
    model = freeze(deep_llama())
    data = samples(LENGTHS)
    trainer = make_trainer(tmp_path, train=data, evals={"": data}, model=model)
    before = trainer.evaluate()["eval_loss"]
    trainer.cache = cache_of(model, tmp_path)
    assert trainer.evaluate()["eval_loss"] == before
    assert trainer.cache.hits == trainer.cache.misses == 0


@needs_kernels
def test_closing_gives_the_layers_back(tmp_path: Path) -> None:
    plain, fast = freeze(deep_llama()), freeze(deep_llama()).to(torch.bfloat16)
    assert use_fast_layers(fast) == NUM_LAYERS
    for model in (plain, fast):
        before = [layer.forward for layer in model.model.layers]
        cache = cache_of(model, tmp_path)
        assert [layer.forward for layer in model.model.layers] != before
        cache.close()
        assert [layer.forward for layer in model.model.layers] == before
    assert can_share_prefix(fast)


def test_the_file_has_no_name(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    model = freeze(deep_llama())
    cache = cache_of(model, folder)
    train(tmp_path, model, cache)
    assert cache.hits
    assert not list(folder.iterdir())


def test_a_file_that_would_be_too_large_is_not_begun(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, plain = freeze(deep_llama()), freeze(deep_llama())
    size = sum(LENGTHS) * SIZES["hidden_size"] * 4
    cache = cache_of(model, tmp_path, most_bytes=size - 1)
    with caplog.at_level("WARNING", logger="llmtuner"):
        assert train(tmp_path, model, cache) == train(tmp_path, plain, None)
    assert cache.hits == 0
    assert "computed in every epoch" in caplog.text


# ---- when ----


def opened(model: Any, folder: Path, words: str = "", train: Any = None) -> FrozenCache | None:
    fixed = "--model_name_or_path m --dataset d --do_train --cache_frozen_layers 1 --output_dir o"
    config = parse("train", shlex.split(f"{fixed} {words}"))
    return open_frozen_cache(config, model, train or samples(LENGTHS), folder=folder)


def test_it_is_there_when_asked_for(tmp_path: Path) -> None:
    for method in METHODS.values():
        model = method(deep_llama())
        assert opened(model, tmp_path) is not None
    assert opened(freeze(deep_llama()), tmp_path, "--cache_frozen_layers 0") is None


def with_dropout() -> Any:
    model = freeze(deep_llama())
    model.config.attention_dropout = 0.1
    return model


def padded() -> Any:
    model = freeze(deep_llama())
    model.set_attn_implementation("sdpa")
    return model


@pytest.mark.parametrize(
    ("build", "words", "why"),
    [
        (deep_llama, "", "every layer learns"),
        (padded, "", "end to end"),
        (with_dropout, "", "dropout"),
        (lambda: freeze(tiny_mixtral()), "", "balance of experts"),
        (lambda: freeze(tiny_llama()), "--num_train_epochs 1", "one epoch only"),
        (lambda: freeze(tiny_llama()), "--neftune_noise_alpha 5", "neftune"),
        (lambda: freeze(tiny_llama()), "--torch_compile", "torch_compile"),
    ],
)
def test_where_it_cannot_be_the_log_says_why(
    build: Any, words: str, why: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING", logger="llmtuner"):
        assert opened(build(), tmp_path, words) is None
    assert why in caplog.text


def test_a_stream_has_no_epochs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger="llmtuner"):
        assert opened(freeze(deep_llama()), tmp_path, train=iter([])) is None
    assert "stream" in caplog.text
