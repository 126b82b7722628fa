"""The model of a run without its numbers: shapes, types and what learns, and no memory.

It is built by the same functions as the real one, so adapters, frozen layers, number types and
gradient checkpointing are what training will have. Only quantised layers are stood in for.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmtuner.hparams.config import RunConfig
from llmtuner.model.adapters import locate_adapters, read_adapter_config
from llmtuner.model.methods.freeze import transformer_layers
from llmtuner.model.precision import Precision
from llmtuner.model.quantize import StandIn
from llmtuner.train.loading import load_for_run

Model = PreTrainedModel | PeftModel

_SCALE_BLOCK = 64
"""Weights that share one float32 scale in 4 bits; double quantisation packs 256 scales again."""

_NOT_SHAPE = ("layer_idx", "training")


def build_skeleton(
    config: RunConfig,
    *,
    device_type: str,
    precision: Precision,
    attention: str,
    tokenizer: PreTrainedTokenizerBase,
) -> Model:
    """Return the model of the run on the meta device.

    Args:
        config: of a training run.
        device_type: where the run computes.
        precision: number type of the run.
        attention: transformers' `attn_implementation`.
        tokenizer: its length decides whether the vocabulary grows.
    """
    with torch.device("meta"):
        model = load_for_run(
            _without_weights(config),
            device_type=device_type,
            precision=precision,
            attention=attention,
            tokenizer=tokenizer,
        )
    if config.model.quantization_bit is not None:
        quantise(model, config.model.quantization_bit, with_double=config.model.double_quantization)
    return model


def _without_weights(config: RunConfig) -> RunConfig:
    """Return the settings that build the same shapes without reading a weight."""
    lora = config.lora
    folders = locate_adapters(config.model)
    if folders and not lora.create_new_adapter:  # trained further, with its own shape
        stored = read_adapter_config(folders[-1])
        targets = stored["target_modules"]
        names = (targets,) if isinstance(targets, str) else tuple(targets)
        whole = tuple(stored.get("modules_to_save") or ()) or None
        lora = replace(lora, lora_rank=stored["r"], lora_target=names, additional_target=whole)
    model = replace(
        config.model,
        train_from_scratch=True,
        adapter_name_or_path=None,
        quantization_bit=None,
        print_param_status=False,
        fast_kernels=False,  # put in where the model has fake numbers
    )
    return replace(config, model=model, lora=lora)


class _Unpacked(torch.autograd.Function):
    """A product with a quantised weight, which is unpacked for the backward pass."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, layer: "QuantisedLinear") -> Tensor:
        ctx.layer = layer
        ctx.rows = rows if layer.bits == 8 else None  # as bitsandbytes keeps them
        return nn.functional.linear(rows, layer.unpack())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].matmul(ctx.layer.unpack()), None


class QuantisedLinear(StandIn):
    """Stands in for a layer of bitsandbytes: the same bytes, the same shapes."""

    def __init__(self, linear: nn.Linear, *, bits: int, with_double: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bits, self.bias, self.dtype = bits, linear.bias, linear.weight.dtype
        self.num_weights = linear.weight.numel()
        bytes_of_scales = 4 * linear.out_features
        if bits == 4:
            num_scales = self.num_weights // _SCALE_BLOCK
            bytes_of_scales = num_scales + num_scales // 64 if with_double else 4 * num_scales
        size = self.num_weights * bits // 8
        self.weight = nn.Parameter(_bytes(size), requires_grad=False)
        self.scales = nn.Parameter(_bytes(bytes_of_scales), requires_grad=False)

    def unpack(self) -> Tensor:
        """Return the weight in full, [out, in]."""
        return torch.empty(self.out_features, self.in_features, dtype=self.dtype)

    def forward(self, rows: Tensor) -> Tensor:
        """Return [..., out] for [..., in], in the type of the computation."""
        product: Tensor = _Unpacked.apply(rows.to(self.dtype), self)
        return product if self.bias is None else product + self.bias


def _bytes(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.uint8, device="meta")


def quantise(model: Model, bits: int, *, with_double: bool) -> None:
    """Put quantised layers in the place of linear ones, but for the head and what learns."""
    head = model.get_output_embeddings()
    for owner in list(model.modules()):
        for name, child in list(owner.named_children()):
            is_frozen_linear = type(child) is nn.Linear and not child.weight.requires_grad
            if is_frozen_linear and child is not head:
                layer = QuantisedLinear(child, bits=bits, with_double=with_double)
                owner.register_module(name, layer)


def layers_of(model: Model) -> nn.ModuleList:
    """Return the blocks of the model, with adapters or without."""
    return transformer_layers(_inner(model))


def has_equal_layers(model: Model) -> bool:
    """Tell whether every block has the same shapes, types and settings."""
    kinds = [tuple(_kind(layer)) for layer in layers_of(model)]
    return all(kind == kinds[0] for kind in kinds)


def cut_layers(model: Model, count: int) -> None:
    """Keep only the first blocks."""
    del layers_of(model)[count:]
    _inner(model).config.get_text_config().num_hidden_layers = count


def give_fake_numbers(model: Model) -> None:
    """Move the model to the fake CPU of the FakeTensorMode that is on; tied weights stay tied."""
    moved: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                if id(parameter) not in moved:
                    fake = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                    moved[id(parameter)] = nn.Parameter(fake, parameter.requires_grad)
                module._parameters[name] = moved[id(parameter)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")


def _kind(layer: nn.Module) -> Iterator[object]:
    for name, parameter in layer.named_parameters():
        yield name, tuple(parameter.shape), parameter.dtype, parameter.requires_grad
    for name, module in layer.named_modules():
        plain = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, int | float | str | None) and key not in _NOT_SHAPE
        }
        yield name, type(module), tuple(sorted(plain.items()))


def _inner(model: Model) -> PreTrainedModel:
    inner: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
    return inner
