"""Decoder layers of the Llama family on a CPU: the same numbers, with less between the products.

A layer's `forward` is replaced for flat batches in bfloat16; everything else (generation, padded
batches, float32) goes to the one of transformers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from llmtuner.extras.logs import get_logger
from llmtuner.model.fast.attention import Attention, Places, SharedPrefix, attend_behind
from llmtuner.model.fast.functions import AddNorm, GatedLinear, Linear
from llmtuner.model.fast.kernels import Heads, Kernels, load_kernels
from llmtuner.model.fast.linear import LinearGroup, read_projection

logger = get_logger(__name__)


@dataclass(frozen=True)
class _Kind:
    """What a class of layers has that is not in its configuration.

    All are norm, attention with rotary embedding, norm, silu(gate) * up, each with its residual.

    Attributes:
        qkv, gate_up: names of the linear layers; one name where they are one layer.
        head_norms: names of the norms of queries and of keys.
        turns: tells whether this attention turns queries and keys at all.
    """

    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    head_norms: tuple[str, ...] = ()
    turns: Callable[[Any], bool] = lambda attention: True


_KINDS = {
    "CwmDecoderLayer": _Kind(),
    "LlamaDecoderLayer": _Kind(),
    "MinistralDecoderLayer": _Kind(),
    "MistralDecoderLayer": _Kind(),
    "Phi3DecoderLayer": _Kind(qkv=("qkv_proj",), gate_up=("gate_up_proj",)),
    "Qwen2DecoderLayer": _Kind(),
    "Qwen3DecoderLayer": _Kind(head_norms=("q_norm", "k_norm")),
    "SmolLM3DecoderLayer": _Kind(turns=lambda attention: bool(attention.use_rope)),
}


@dataclass(frozen=True)
class FastLayer:
    """One decoder layer.

    Attributes:
        norms: before attention, before the gated layers.
        qkv, output, gate_up, down: the linear layers by their inputs.
        heads: shape of the attention.
        head_norms: of queries and of keys; or nothing.
        number: of the layer, from 0.
        kernels: what runs between the products.
        places: of the batch that the layers are computing.
        original: transformers' forward.
    """

    norms: tuple[nn.Module, nn.Module]
    qkv: LinearGroup
    output: LinearGroup
    gate_up: LinearGroup
    down: LinearGroup
    heads: Heads
    head_norms: tuple[nn.Module, ...]
    number: int
    kernels: Kernels
    places: "PlacesOfBatch"
    original: Callable[..., Tensor]

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        cu_seq_lens_q: Tensor | None = None,
        shared_prefix: SharedPrefix | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Take what transformers' layer takes, [1, T, n] -> [1, T, n]; and a prefix to share."""
        is_flat = cu_seq_lens_q is not None and position_embeddings is not None
        if not is_flat or not _computes_bfloat16(hidden_states):
            return self.original(
                hidden_states,
                *args,
                position_embeddings=position_embeddings,
                cu_seq_lens_q=cu_seq_lens_q,
                **kwargs,
            )
        places = self.places.of(cu_seq_lens_q, position_embeddings)
        hidden = hidden_states.squeeze(0).to(torch.bfloat16)
        layer: Any = self.original.__self__  # type: ignore[attr-defined]
        if layer.gradient_checkpointing and layer.training:
            run = layer._gradient_checkpointing_func
            return run(partial(self._run, places=places, prefix=shared_prefix), hidden)[None]
        return self._run(hidden, places, shared_prefix)[None]

    def _run(self, x: Tensor, places: Places, prefix: SharedPrefix | None) -> Tensor:
        kernels = self.kernels
        x, normed = self._norm(0, x, None)
        qkv = Linear.apply(normed, self.qkv, *self.qkv.trained)
        norms: list[Any] = [norm.weight for norm in self.head_norms]
        if prefix is None:
            mixed = Attention.apply(qkv, places, self.heads, kernels, *norms)
        else:
            at = places, self.heads, kernels, norms
            mixed = attend_behind(qkv, *at, prefix=prefix, number=self.number)
        branch = Linear.apply(mixed, self.output, *self.output.trained)
        x, normed = self._norm(1, x, branch)
        gate_up = Linear.apply(normed, self.gate_up, *self.gate_up.trained)
        return x + GatedLinear.apply(gate_up, self.down, kernels, *self.down.trained)

    def _norm(self, number: int, x: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
        norm: Any = self.norms[number]
        return AddNorm.apply(x, branch, norm.weight, norm.variance_epsilon, self.kernels)


def use_fast_layers(model: nn.Module) -> int:
    """Replace the forward passes of all layers that are known.

    Args:
        model: loaded, with its adapters, on the CPU, with varlen attention.

    Returns:
        How many layers compute the fast way.
    """
    on_cpu = all(parameter.device.type in ("cpu", "meta") for parameter in model.parameters())
    # under ZeRO-3 the weights are only there while their own layer's forward runs
    kernels = load_kernels() if on_cpu and not is_deepspeed_zero3_enabled() else None
    if kernels is None:
        return 0
    count = 0
    places = PlacesOfBatch()
    for module in model.modules():
        kind = _kind(module)
        if kind is not None and _fast_part(module) is None:
            fast = _fast_layer(module, kind, kernels, places)
            if fast is not None:
                module.forward = fast.forward
                count += 1
    if count:
        _let_go_of_files(model)
        logger.info("Fast CPU kernels: %d layers compute with them.", count)
    return count


def _let_go_of_files(model: nn.Module) -> None:
    """Copy what still lies in the mapped weight file, which stays in memory as long as one does.

    Most weights have been joined or quantised by now, so the file would be held beside them.
    """
    joined = {
        group.storage_address
        for module in model.modules()
        if (part := _fast_part(module)) is not None
        for group in (part.qkv, part.output, part.gate_up, part.down)
    }
    for parameter in model.parameters():
        is_frozen = type(parameter) is nn.Parameter and not parameter.requires_grad
        if is_frozen and not parameter.is_meta and _address(parameter) not in joined:
            parameter.data = parameter.data.clone()


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def can_share_prefix(model: PreTrainedModel) -> bool:
    """Tell whether every layer computes the fast way, looking back on everything.

    Such layers take a `shared_prefix`.
    """
    if model.dtype != torch.bfloat16 or model.device.type != "cpu":
        return False
    fast = [_fast_part(module) for module in model.modules()]
    ready = [part for part in fast if part is not None and not part.heads.window]
    return len(ready) == model.config.get_text_config().num_hidden_layers


def _kind(module: nn.Module) -> _Kind | None:
    """Return what is known of transformers' own layers; code that comes with a model may differ."""
    of_transformers = type(module).__module__.startswith("transformers.")
    return _KINDS.get(type(module).__name__) if of_transformers else None


def _fast_part(layer: nn.Module) -> FastLayer | None:
    """Return what has replaced a layer's forward."""
    forward = vars(layer).get("forward")
    owner = forward.__self__ if isinstance(forward, MethodType) else None
    return owner if isinstance(owner, FastLayer) else None


def _fast_layer(
    layer: Any, kind: _Kind, kernels: Kernels, places: "PlacesOfBatch"
) -> FastLayer | None:
    attention, mlp = layer.self_attn, layer.mlp
    config = attention.config
    groups = [
        _group(*map(attention.get_submodule, kind.qkv)),
        _group(attention.o_proj),
        _group(*map(mlp.get_submodule, kind.gate_up)),
        _group(mlp.down_proj),
    ]
    if not _is_plain(config) or any(group is None for group in groups):
        return None
    return FastLayer(
        (layer.input_layernorm, layer.post_attention_layernorm),
        *groups,
        _heads(attention, kind),
        tuple(map(attention.get_submodule, kind.head_norms)),
        attention.layer_idx,
        kernels,
        places,
        layer.forward,
    )


def _is_plain(config: PreTrainedConfig) -> bool:
    """Tell whether nothing is dropped, and gates are those of `swiglu`."""
    dropped = config.attention_dropout, config.to_dict().get("resid_pdrop", 0)
    return config.hidden_act in ("silu", "swish") and not any(dropped)


def _heads(attention: Any, kind: _Kind) -> Heads:
    config = attention.config
    return Heads(
        (config.num_attention_heads, config.num_key_value_heads, attention.head_dim),
        attention.scaling,
        _window(config, attention.layer_idx),
        is_turned=kind.turns(attention),
        epsilon=config.rms_norm_eps if kind.head_norms else 0.0,
    )


def _window(config: PreTrainedConfig, number: int) -> int:
    """Return how many tokens layer `number` looks back; 0: all."""
    settings = config.to_dict()
    kinds = settings.get("layer_types")
    is_off = settings.get("use_sliding_window") is False
    if is_off or (kinds is not None and kinds[number] != "sliding_attention"):
        return 0
    return settings.get("sliding_window") or 0


def _group(*modules: nn.Module) -> LinearGroup | None:
    projections = [read_projection(module) for module in modules]
    known = [projection for projection in projections if projection is not None]
    return LinearGroup(known) if len(known) == len(modules) else None


def _computes_bfloat16(x: Tensor) -> bool:
    if x.device.type != "cpu":
        return False
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu") == torch.bfloat16
    return x.dtype == torch.bfloat16


class PlacesOfBatch:
    """Where the tokens of a batch stand, worked out by the first layer for all of them."""

    def __init__(self) -> None:
        """Begin without a batch."""
        self._source: tuple[Tensor, Tensor] | None = None
        self._places: Places | None = None

    def of(self, borders: Tensor, embeddings: tuple[Tensor, Tensor]) -> Places:
        """Read borders and angles; both halves of a head turn by the same angles."""
        if self._places is None or embeddings is not self._source:
            cosine, sine = (
                part[0, :, : part.shape[-1] // 2].float().contiguous() for part in embeddings
            )
            self._places = Places(borders, borders.diff().tolist(), (cosine, sine))
            self._source = embeddings
        return self._places
