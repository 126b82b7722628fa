"""Full and freeze training: which weights learn, and in which type."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import BF16, FP32
from transformers import PreTrainedModel

from llmtuner.extras.errors import ConfigError
from llmtuner.hparams.freeze import FreezeArgs
from llmtuner.hparams.full import FullArgs
from llmtuner.hparams.model import ModelArgs
from llmtuner.model.methods import freeze, full
from llmtuner.model.parameters import log_parameters
from llmtuner.model.precision import Precision
from llmtuner.model.tokenizer import load_tokenizer

ArgsOf = Callable[..., ModelArgs]


def load_frozen(args: ModelArgs, *, precision: Precision = FP32, **options: object):
    tokenizer = load_tokenizer(args)
    return freeze.load_for_training(
        args, FreezeArgs(**options), precision=precision, attention="sdpa", tokenizer=tokenizer
    )


def learning(model: PreTrainedModel) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("pure", "dtype"), [(False, torch.float32), (True, torch.bfloat16)], ids=["mixed", "pure"]
)
def test_full_trains_everything(
    pure: bool, dtype: torch.dtype, tiny_model: Path, args_of: ArgsOf
) -> None:
    args = args_of(tiny_model)
    model = full.load_for_training(
        args,
        FullArgs(),
        precision=Precision("bf16", pure=pure, reason=""),
        attention="sdpa",
        tokenizer=load_tokenizer(args),
    )
    assert all(p.requires_grad and p.dtype == dtype for p in model.parameters())


def test_last_layers(tiny_model: Path, args_of: ArgsOf) -> None:
    names = learning(load_frozen(args_of(tiny_model), freeze_trainable_layers=1))
    assert len(names) == 9
    assert all(name.startswith("model.layers.1.") for name in names)


def test_first_layers_and_named_modules(tiny_model: Path, args_of: ArgsOf) -> None:
    model = load_frozen(
        args_of(tiny_model), freeze_trainable_layers=-1, freeze_trainable_modules=("mlp",)
    )
    assert learning(model) == {
        f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up", "down")
    }


def test_extra_modules(tiny_model: Path, args_of: ArgsOf) -> None:
    model = load_frozen(
        args_of(tiny_model),
        freeze_trainable_layers=0,
        freeze_extra_modules=("embed_tokens", "norm"),
    )
    assert learning(model) == {"model.embed_tokens.weight", "model.norm.weight"}


def test_types_meet_under_autocast(tiny_model: Path, args_of: ArgsOf) -> None:
    model = load_frozen(args_of(tiny_model), freeze_trainable_layers=1, precision=BF16)
    kinds = {p.requires_grad: p.dtype for p in model.parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    with BF16.autocast("cpu"):
        model(input_ids=torch.tensor([[5, 6]])).logits.sum().backward()
    assert model.model.layers[1].mlp.up_proj.weight.grad is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze_trainable_layers": 3}, r"fewer layers.*-2 to 2"),
        ({"freeze_trainable_modules": ("attention",)}, r"Allowed: all, self_attn, mlp"),
        ({"freeze_extra_modules": ("head",)}, r"Allowed: embed_tokens, norm, lm_head"),
        ({"freeze_trainable_layers": 0}, "Nothing would learn"),
    ],
)
def test_wrong_options(options: dict, message: str, tiny_model: Path, args_of: ArgsOf) -> None:
    with pytest.raises(ConfigError, match=message):
        load_frozen(args_of(tiny_model), **options)


def test_new_rows_of_the_vocabulary_learn(tiny_model: Path, args_of: ArgsOf) -> None:
    grown = args_of(tiny_model, add_special_tokens=("<|new|>",), resize_vocab=True)
    model = load_frozen(grown, freeze_trainable_layers=1)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert module.weight.requires_grad
    assert not load_frozen(args_of(tiny_model)).get_input_embeddings().weight.requires_grad


def test_parameter_list(
    tiny_model: Path, args_of: ArgsOf, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="llmtuner"):
        log_parameters(load_frozen(args_of(tiny_model), freeze_trainable_layers=1))
    assert "model.layers.1.mlp.up_proj.weight: torch.float32 (128, 64) learns" in caplog.text
    assert "lm_head.weight: torch.float32 (320, 64) frozen" in caplog.text
