"""Shapes without numbers need what real tensors need; depth is a straight line."""

import math
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_training import SIZES, tiny_llama
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen3Config,
)

from llmtuner.model.attention import VARLEN, pick_attention, register_varlen
from llmtuner.model.device import Device
from llmtuner.model.fast.kernels import Kernels, load_kernels
from llmtuner.model.fast.layer import use_fast_layers
from llmtuner.model.gradient_checkpointing import enable_gradient_checkpointing
from llmtuner.model.head import head_loss, passing_on
from llmtuner.model.precision import Precision
from llmtuner.train.plan import simulate as simulation
from llmtuner.train.plan.simulate import (
    MicroBatch,
    Setting,
    _backward,
    _flat_inputs,
    _loss,
    _Meter,
    simulate,
)
from llmtuner.train.plan.skeleton import (
    Model,
    QuantisedLinear,
    cut_layers,
    has_equal_layers,
    layers_of,
    quantise,
)

BF16 = Precision("bf16", pure=False, reason="test")
FP32 = Precision("fp32", pure=False, reason="test")
BATCH = MicroBatch((13, 20), 25)


def build(
    method: str = "full",
    *,
    recompute: bool = False,
    device: str = "meta",
    kind: type[PreTrainedConfig] = LlamaConfig,
    **changes: int,
) -> Model:
    register_varlen()
    with torch.device(device):
        config = kind(**{**SIZES, **changes})
        model: Model = AutoModelForCausalLM.from_config(config, attn_implementation=VARLEN)
        if method == "lora":
            model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
        if method == "freeze":
            model.requires_grad_(False)
            layers_of(model)[-1].requires_grad_(True)
    if recompute:
        enable_gradient_checkpointing(model, use_reentrant=True)
    return model


@pytest.mark.parametrize(
    ("method", "recompute", "precision"),
    [
        ("full", False, BF16),
        ("full", True, FP32),
        ("lora", False, FP32),
        ("lora", True, BF16),
        ("freeze", False, BF16),
    ],
)
def test_shapes_need_what_real_tensors_need(monkeypatch, method, recompute, precision):
    setting = Setting(precision, VARLEN)
    simulated = simulate(lambda: build(method, recompute=recompute), [BATCH], setting)
    model = build(method, recompute=recompute, device="cpu").train()
    own = own_operations(monkeypatch)
    with _Meter(1.0) as meter:
        loss = _loss(model, BATCH, setting)
        forward = meter.take_peak()
        begin, end = _backward(model, loss, meter)
    assert torch.isfinite(loss)
    real = (forward, begin, end)
    found = (simulated.forward_bytes, simulated.backward_begin_bytes, simulated.backward_end_bytes)
    assert found == pytest.approx(real, rel=0.01)
    assert simulated.flops == meter.flops + sum(own)


def own_operations(monkeypatch):
    """Return a list that gets the operations of products that torch does not see."""
    found, run = [], Kernels._run

    def counting(self, name, tensors, *numbers):
        if name == "product":
            rows, columns, depth, depth2 = numbers[:4]
            found.append(2 * rows * columns * (depth + depth2))
        elif name == "product_transposed":
            found.append(2 * math.prod(numbers[:3]))
        run(self, name, tensors, *numbers)

    monkeypatch.setattr(Kernels, "_run", counting)
    return found


def test_the_meter_counts_bytes_that_live():
    given = torch.zeros(1000)  # made before: not counted
    with _Meter(1.0) as meter:
        same = given.detach()[5:]  # nor is a view of it
        first = given.exp()  # 4,000 bytes
        second = first.double()  # and 8,000
        view = second[:10]
        assert meter.take_peak() == 12_000
        del first, second, same
        assert meter.take_peak() == 12_000
        assert meter.take_peak() == 8_000  # the view keeps the whole
        del view
        torch.mm(torch.zeros(3, 5), torch.zeros(5, 7))
    assert meter.flops == 2 * 3 * 5 * 7
    assert meter.moved_bytes == 8_000 + 12_000 + 4 * (15 + 35) + 4 * (15 + 35 + 21)


@pytest.mark.skipif(load_kernels() is None, reason="no compiler: no fast layers")
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("kind", [LlamaConfig, Qwen3Config])
def test_fast_layers_need_what_real_ones_need(method, kind):
    setting = Setting(BF16, VARLEN, is_fast=True)
    simulated = simulate(lambda: build(method, kind=kind), [BATCH], setting)
    model = build(method, device="cpu", kind=kind).train()
    assert use_fast_layers(model) == 2
    head, borders = model.get_output_embeddings(), torch.tensor([0, 13, 33], dtype=torch.int32)

    def real_loss() -> torch.Tensor:
        targets, kept = torch.zeros(25, dtype=torch.long), torch.arange(25)
        inputs = {**_flat_inputs(BATCH), "cu_seq_lens_q": borders, "logits_to_keep": kept}
        with BF16.autocast("cpu"), passing_on(head):
            rows = model(**inputs, use_cache=False)["logits"][0]
        return head_loss(rows, head, targets, dtype=BF16.dtype, smoothing=0.0)

    with _Meter(1.0) as meter:
        loss = real_loss()
        forward = meter.take_peak()
        begin, end = _backward(model, loss, meter)
    found = (simulated.forward_bytes, simulated.backward_begin_bytes, simulated.backward_end_bytes)
    assert found == pytest.approx((forward, begin, end), rel=0.01)
    slow = replace(setting, is_fast=False)
    slow = simulate(lambda: build(method, kind=kind), [BATCH], slow)
    assert simulated.moved_bytes < 0.7 * slow.moved_bytes


@pytest.mark.parametrize(("method", "has_gradients"), [("full", True), ("lora", False)])
def test_depth_is_a_straight_line(monkeypatch, method, has_gradients):
    setting = Setting(BF16, VARLEN, has_gradients=has_gradients)
    make = lambda: build(method, num_hidden_layers=6)  # noqa: E731
    line = simulate(make, [BATCH], setting)
    monkeypatch.setattr(simulation, "_SHALLOW", (100, 101))
    whole = simulate(make, [BATCH], setting)
    assert vars(line) == pytest.approx(vars(whole), rel=1e-6)


def test_unequal_layers_are_seen():
    assert has_equal_layers(build("lora"))
    assert not has_equal_layers(build("freeze"))
    window = build(num_hidden_layers=3)
    layers_of(window)[1].self_attn.sliding_window = 4
    assert not has_equal_layers(window)


def test_layers_are_cut_off():
    model = build("lora", num_hidden_layers=5)
    cut_layers(model, 2)
    assert len(layers_of(model)) == 2


def test_flops_follow_the_weights_and_the_tokens():
    model = tiny_llama()
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    body = sum(p.numel() for p in matrices if p.shape[0] != SIZES["vocab_size"])
    head = sum(p.numel() for p in matrices) - body
    products = 6 * (body * BATCH.num_tokens + head * BATCH.num_kept)
    attention = 2 * 14 * 16 * sum(length**2 for length in BATCH.lengths)  # 2 layers, width 16
    found = simulate(build, [BATCH], Setting(FP32, VARLEN)).flops
    assert found == products + attention


def test_more_of_everything_needs_more():
    setting = Setting(BF16, VARLEN)
    peak = simulate(build, [BATCH], setting).peak_bytes
    assert simulate(build, [MicroBatch((13, 20), 32)], setting).peak_bytes > peak
    assert simulate(build, [MicroBatch((40, 40), 25)], setting).peak_bytes > peak
    assert simulate(build, [BATCH], replace(setting, trains=False)).peak_bytes < peak
    sharded = replace(setting, gradient_share=0.5)
    wide = MicroBatch((2,), 1)
    whole = simulate(build, [wide], setting).backward_end_bytes
    assert simulate(build, [wide], sharded).backward_end_bytes < whole


def test_recomputing_saves_memory_and_costs_work():
    batch, deep = MicroBatch((60,), 1), {"num_hidden_layers": 8, "hidden_size": 64}
    setting = Setting(BF16, VARLEN)
    plain = simulate(lambda: build("lora", **deep), [batch], setting)
    again = simulate(lambda: build("lora", recompute=True, **deep), [batch], setting)
    assert again.peak_bytes < 0.5 * plain.peak_bytes
    assert plain.flops < again.flops < 1.6 * plain.flops


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=50, bos_token_id=1, eos_token_id=1),
        Gemma2Config(**SIZES, head_dim=8),
        MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    ],
    ids=lambda config: config.model_type,
)
def test_other_architectures(config: PreTrainedConfig):
    attention = pick_attention("auto", Device("cpu"), config=config)

    def make() -> Model:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, attn_implementation=attention)

    found = simulate(make, [BATCH], Setting(BF16, attention))
    weights = sum(p.numel() for p in make().parameters())
    assert found.peak_bytes > 4 * weights
    assert found.flops > 2 * 16 * BATCH.num_tokens


@pytest.mark.parametrize(("bits", "share"), [(4, 0.53), (8, 1.07)])
def test_quantised_layers_hold_less(bits, share):
    model = build("lora", hidden_size=64, intermediate_size=128)
    quantise(model, bits, with_double=True)
    layers = [layer for layer in model.modules() if isinstance(layer, QuantisedLinear)]
    assert len(layers) == 14  # 7 in each block, and not the head
    stored = sum(layer.weight.numel() + layer.scales.numel() for layer in layers)
    assert stored / sum(layer.num_weights for layer in layers) == pytest.approx(share, abs=0.04)
    assert all(type(m) is not QuantisedLinear for n, m in model.named_modules() if "lora_" in n)
    passed = simulate(lambda: model, [BATCH], Setting(BF16, VARLEN))
    assert passed.peak_bytes > 0


@pytest.mark.skipif(load_kernels() is None, reason="no compiler: no fast layers")
@pytest.mark.parametrize(("bits", "num_fast"), [(4, 2), (8, 0)])
def test_layers_over_4_bits_compute_the_fast_way(bits, num_fast):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    base = build(**sizes)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    quantise(model, bits, with_double=True)
    unpacked = simulate(lambda: model, [BATCH], Setting(BF16, VARLEN, is_fast=True))
    assert unpacked.peak_bytes > 2 * 3 * 64 * 128  # the joined gate and up
    assert use_fast_layers(model) == num_fast
