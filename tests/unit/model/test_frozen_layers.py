"""Below the lowest layer that learns there is no backward pass, however activations are kept."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from llmtuner.model.attention import VARLEN, register_varlen
from llmtuner.model.fast.kernels import load_kernels
from llmtuner.model.fast.layer import use_fast_layers
from llmtuner.model.frozen import frozen_layers
from llmtuner.model.gradient_checkpointing import (
    disable_gradient_checkpointing,
    enable_gradient_checkpointing,
)

NUM_LAYERS, LEARNING = 6, 2
BORDERS = torch.tensor([0, 7, 12, 20], dtype=torch.int32)
CHECKPOINTING = {"keep": None, "reentrant": True, "other kind": False}


def build(num_layers: int = NUM_LAYERS, **changes: Any) -> LlamaForCausalLM:
    register_varlen()
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, **heads, num_hidden_layers=num_layers, **changes)
    return LlamaForCausalLM._from_config(config, attn_implementation=VARLEN)


def freeze(model: LlamaForCausalLM) -> nn.Module:
    model.requires_grad_(False)
    for layer in model.model.layers[-LEARNING:]:
        layer.requires_grad_(True)
    return model


def top_lora(model: LlamaForCausalLM) -> nn.Module:
    last = len(model.model.layers)
    config = LoraConfig(
        r=2,
        target_modules=["q_proj", "v_proj", "down_proj"],
        layers_to_transform=list(range(last - LEARNING, last)),
    )
    return get_peft_model(model, config)


METHODS = {"freeze": freeze, "top lora": top_lora}


class Calls(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.counts[func._overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def forward(model: nn.Module, *, is_fast: bool) -> Tensor:
    places = torch.cat([torch.arange(n) for n in BORDERS.diff().tolist()])[None]
    ids = (torch.arange(20) * 7 % 64)[None]
    with torch.autocast("cpu", torch.bfloat16, enabled=is_fast):
        outputs = model(input_ids=ids, position_ids=places, cu_seq_lens_q=BORDERS, use_cache=False)
    return outputs["logits"].float().logsumexp(-1).sum()


def prepare(
    method: Callable[[LlamaForCausalLM], nn.Module],
    *,
    use_reentrant: bool | None,
    is_fast: bool,
    num_layers: int = NUM_LAYERS,
) -> nn.Module:
    model = method(build(num_layers)).train()
    if is_fast:
        assert use_fast_layers(model) == num_layers
    if use_reentrant is not None:
        enable_gradient_checkpointing(model, use_reentrant=use_reentrant)
    return model


def layers_of(model: nn.Module) -> nn.ModuleList:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner.model.layers


def backward_calls(model: nn.Module, *, is_fast: bool) -> Counter[str]:
    loss = forward(model, is_fast=is_fast)
    with Calls() as calls:
        loss.backward()
    return calls.counts


needs_kernels = pytest.mark.skipif(load_kernels() is None, reason="no C compiler")
is_fast = pytest.mark.parametrize(
    "is_fast", [False, pytest.param(True, marks=needs_kernels)], ids=["plain", "fast"]
)
kinds = pytest.mark.parametrize("use_reentrant", CHECKPOINTING.values(), ids=CHECKPOINTING)
methods = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


@is_fast
@kinds
@methods
def test_more_frozen_layers_cost_the_backward_pass_nothing(
    method: Callable[..., nn.Module], use_reentrant: bool | None, is_fast: bool
) -> None:
    counts = [
        backward_calls(
            prepare(method, use_reentrant=use_reentrant, is_fast=is_fast, num_layers=depth),
            is_fast=is_fast,
        )
        for depth in (LEARNING + 1, NUM_LAYERS)
    ]
    assert counts[0] == counts[1]
    assert counts[0]["mm"] > 0


@is_fast
@kinds
@methods
def test_gradients_stop_where_nothing_learns_and_are_the_same(
    method: Callable[..., nn.Module], use_reentrant: bool | None, is_fast: bool
) -> None:
    plain = prepare(method, use_reentrant=None, is_fast=is_fast)
    model = prepare(method, use_reentrant=use_reentrant, is_fast=is_fast)
    reached: set[int] = set()
    for number, layer in enumerate(layers_of(model)):

        def watch(module: object, inputs: object, output: Tensor, number: int = number) -> None:
            if output.grad_fn is not None:
                output.register_hook(lambda grad: reached.add(number))

        layer.register_forward_hook(watch)
    for each in (plain, model):
        forward(each, is_fast=is_fast).backward()
    assert reached == set(range(NUM_LAYERS - LEARNING, NUM_LAYERS))
    expected = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys() != set()
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-5, atol=1e-6, msg=name)


class KeptBytes:
    """Counts what waits for the backward pass."""

    def __init__(self) -> None:
        self.total = 0

    def pack(self, tensor: Tensor) -> Tensor:
        self.total += tensor.numel() * tensor.element_size()
        return tensor


def kept_bytes(model: nn.Module, *, is_fast: bool) -> int:
    counter = KeptBytes()
    with torch.autograd.graph.saved_tensors_hooks(counter.pack, lambda tensor: tensor):
        forward(model, is_fast=is_fast)
    return counter.total


@is_fast
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_layers_that_compute_again_keep_little(use_reentrant: bool, is_fast: bool) -> None:
    def whole(model: LlamaForCausalLM) -> nn.Module:
        return model.requires_grad_(True)

    keeping = prepare(whole, use_reentrant=None, is_fast=is_fast)
    again = prepare(whole, use_reentrant=use_reentrant, is_fast=is_fast)
    assert kept_bytes(again, is_fast=is_fast) < 0.4 * kept_bytes(keeping, is_fast=is_fast)
    disable_gradient_checkpointing(again)
    assert kept_bytes(again, is_fast=is_fast) > 0.9 * kept_bytes(keeping, is_fast=is_fast)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_layers_that_keep_nothing_are_not_asked_to_compute_again(use_reentrant: bool) -> None:
    model = prepare(freeze, use_reentrant=use_reentrant, is_fast=False)
    asked = [layer.gradient_checkpointing for layer in layers_of(model)]
    assert asked == [False] * (NUM_LAYERS - LEARNING) + [True] * LEARNING


# ---- which layers ----


def test_frozen_layers_are_those_below_the_lowest_that_learns() -> None:
    model = build()
    assert frozen_layers(model) == []
    freeze(model)
    assert frozen_layers(model) == list(model.model.layers[: NUM_LAYERS - LEARNING])
    model.model.layers[2].mlp.down_proj.requires_grad_(True)
    assert frozen_layers(model) == list(model.model.layers[:2])


def test_an_embedding_that_learns_leaves_no_layer_out() -> None:
    model = build()
    freeze(model).model.embed_tokens.requires_grad_(True)
    assert frozen_layers(model) == []


@pytest.mark.parametrize(("is_tied", "count"), [(True, 0), (False, NUM_LAYERS)])
def test_a_head_that_learns_is_above_the_layers_unless_it_is_tied(
    is_tied: bool, count: int
) -> None:
    model = build(tie_word_embeddings=is_tied)
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    assert len(frozen_layers(model)) == count


def test_a_model_without_layers_has_no_frozen_ones() -> None:
    assert frozen_layers(nn.Sequential(nn.Linear(2, 2))) == []
