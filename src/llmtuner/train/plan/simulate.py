"""A forward and backward pass on tensors without numbers, to see what would be in memory.

Every tensor that the real model, loss and autograd would make is made here as well, as a shape with
a type. So the layout of the batch, mixed precision, adapters, recomputation and the loss count
themselves, whatever the architecture; there is no formula per model.
"""

import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from llmtuner.model.attention import supports_kept_logits, uses_flat_batches
from llmtuner.model.fast.layer import use_fast_layers
from llmtuner.model.head import head_loss, head_metrics, passing_on, separable_head
from llmtuner.model.precision import Precision
from llmtuner.train.plan.skeleton import (
    Model,
    cut_layers,
    give_fake_numbers,
    has_equal_layers,
    layers_of,
)


@dataclass(frozen=True)
class MicroBatch:
    """The shape of one forward pass.

    Attributes:
        lengths: tokens of each sample.
        num_kept: places whose next token is trained.
    """

    lengths: tuple[int, ...]
    num_kept: int

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return sum(self.lengths)


@dataclass(frozen=True)
class Pass:
    """What one micro-batch needs beside weights, older gradients and the optimizer's state.

    Attributes:
        forward_bytes: most at once up to the loss.
        backward_begin_bytes: most at once until the last block is done backward.
        backward_end_bytes: most at once from the second block on to the end.
        flops: floating point operations of matrix products and attention, forward and backward.
        moved_bytes: read and written by all operations.
    """

    forward_bytes: float
    backward_begin_bytes: float
    backward_end_bytes: float
    flops: float
    moved_bytes: float

    @property
    def peak_bytes(self) -> float:
        """Most at once."""
        return max(self.forward_bytes, self.backward_begin_bytes, self.backward_end_bytes)

    def at_depth(self, deeper: "Pass", *, depths: tuple[int, int], wanted: int) -> "Pass":
        """Go on in the line through two depths: every value grows by the same with each block."""
        first, second = depths
        steps = (wanted - first) / (second - first)
        values = {
            field.name: vars(self)[field.name]
            + steps * (vars(deeper)[field.name] - vars(self)[field.name])
            for field in fields(self)
        }
        return Pass(**values)


@dataclass(frozen=True)
class Setting:
    """How a pass is run.

    Attributes:
        precision: number type.
        attention: transformers' `attn_implementation`.
        trains: with a backward pass; otherwise as in evaluation.
        has_gradients: earlier micro-batches of the step have left their gradients.
        gradient_share: share of each gradient that this rank keeps (ZeRO 2 and 3).
        label_smoothing: of the loss.
        is_fast: the layers that are known compute with the fast kernels.
    """

    precision: Precision
    attention: str
    trains: bool = True
    has_gradients: bool = False
    gradient_share: float = 1.0
    label_smoothing: float = 0.0
    is_fast: bool = False


_SHALLOW = (2, 3)
"""Depths that are simulated where all blocks are equal."""


def simulate(build: Callable[[], Model], batches: Sequence[MicroBatch], setting: Setting) -> Pass:
    """Return the needs of the most demanding of the batches.

    Args:
        build: makes the model on the meta device.
        batches: at least one.
        setting: how the passes are run.
    """
    model = build()
    num_layers = len(layers_of(model))
    if num_layers <= max(_SHALLOW) + 1 or not has_equal_layers(model):
        return _simulate_model(model, batches, setting)
    shallow = []
    for depth in sorted(_SHALLOW, reverse=True):
        cut_layers(model, depth)
        shallow.append([_simulate_model(model, [batch], setting) for batch in batches])
    deeper, first = shallow
    passes = [
        one.at_depth(other, depths=_SHALLOW, wanted=num_layers)
        for one, other in zip(first, deeper, strict=True)
    ]
    return max(passes, key=lambda one: one.peak_bytes)


def _simulate_model(model: Model, batches: Sequence[MicroBatch], setting: Setting) -> Pass:
    with FakeTensorMode(allow_non_fake_inputs=True):
        give_fake_numbers(model)
        if setting.is_fast:
            use_fast_layers(model)  # now, as it joins weights
        passes = [_simulate_batch(model, batch, setting) for batch in batches]
    for layer in layers_of(model):
        vars(layer).pop("forward", None)  # the next simulation joins its own weights
    return max(passes, key=lambda one: one.peak_bytes)


def _simulate_batch(model: Model, batch: MicroBatch, setting: Setting) -> Pass:
    model.train(setting.trains)
    meter = _Meter(setting.gradient_share)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.grad = torch.empty_like(parameter) if setting.has_gradients else None
    with meter, torch.set_grad_enabled(setting.trains):
        loss = _loss(model, batch, setting)
        forward = meter.take_peak()
        begin = end = 0.0
        if setting.trains:
            begin, end = _backward(model, loss, meter)
    for parameter in learning:
        parameter.grad = None
    return Pass(forward, begin, end, float(meter.flops), float(meter.moved_bytes))


def _loss(model: Model, batch: MicroBatch, setting: Setting) -> Tensor:
    """Run the model and the loss as `LlmTrainer` does."""
    targets = torch.zeros(batch.num_kept, dtype=torch.long)
    head, dtype = separable_head(model), setting.precision.dtype
    with setting.precision.autocast("cpu"), nullcontext() if head is None else passing_on(head):
        rows = _kept_rows(model, batch, is_flat=uses_flat_batches(setting.attention))
    smoothing = setting.label_smoothing
    if head is not None and not setting.trains:
        return head_metrics(rows, head, targets, dtype=dtype)[0]
    if head is not None:
        return head_loss(rows, head, targets, dtype=dtype, smoothing=smoothing)
    return F.cross_entropy(rows.float(), targets, reduction="sum", label_smoothing=smoothing)


def _kept_rows(model: Model, batch: MicroBatch, *, is_flat: bool) -> Tensor:
    """Return what stands before the trained tokens: logits, or hidden states without a head."""
    kept = torch.zeros(batch.num_kept, dtype=torch.long)
    inputs = _flat_inputs(batch) if is_flat else _padded_inputs(batch)
    if is_flat and supports_kept_logits(model):
        rows: Tensor = model(**inputs, logits_to_keep=kept, use_cache=False)["logits"][0]
    else:
        rows = model(**inputs, use_cache=False)["logits"].flatten(0, 1)[kept]
    return rows


def _backward(model: Model, loss: Tensor, meter: "_Meter") -> tuple[float, float]:
    """Return the peaks until the last block is done, and from the second block on."""
    layers = layers_of(model)
    last = {id(p) for p in layers[-1].parameters() if p.requires_grad}
    second = {id(p) for p in layers[min(1, len(layers) - 1)].parameters() if p.requires_grad}
    peaks: dict[str, float] = {}

    def arrived(parameter: Tensor) -> None:
        assert parameter.grad is not None
        meter.is_gradient(parameter.grad)
        for name, waiting in (("begin", last), ("middle", second)):
            waiting.discard(id(parameter))
            if not waiting and name not in peaks:
                peaks[name] = max(meter.take_peak(), peaks.get("begin", 0.0))

    hooks = [
        parameter.register_post_accumulate_grad_hook(arrived)
        for parameter in model.parameters()
        if parameter.requires_grad
    ]
    loss.backward()  # type: ignore[no-untyped-call]
    for hook in hooks:
        hook.remove()
    end = meter.take_peak()
    return peaks.get("begin", end), end


class _Borders:
    """Borders of samples whose numbers are known, where tensors have none."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self._lengths = list(lengths)

    def diff(self) -> "_Borders":
        return self

    def tolist(self) -> list[int]:
        return self._lengths

    def __len__(self) -> int:
        return len(self._lengths) + 1

    def is_contiguous(self) -> bool:
        return True


def _flat_inputs(batch: MicroBatch) -> dict[str, Any]:
    borders, longest = _Borders(batch.lengths), max(batch.lengths)
    return {
        "input_ids": torch.zeros(1, batch.num_tokens, dtype=torch.long),
        "position_ids": torch.zeros(1, batch.num_tokens, dtype=torch.long),
        **{"cu_seq_lens_q": borders, "cu_seq_lens_k": borders},
        **{"max_length_q": longest, "max_length_k": longest},
    }


def _padded_inputs(batch: MicroBatch) -> dict[str, Any]:
    shape = (len(batch.lengths), max(batch.lengths))
    return {
        "input_ids": torch.zeros(shape, dtype=torch.long),
        "attention_mask": torch.ones(shape, dtype=torch.long),
    }


class _Meter(TorchDispatchMode):
    """Counts the bytes of storages made while it is on, and the work of each operation."""

    def __init__(self, gradient_share: float) -> None:
        super().__init__()
        self.flops = 0
        self.moved_bytes = 0
        self._share = gradient_share
        self._live = 0.0
        self._peak = 0.0
        self._sizes: dict[int, float] = {}

    def take_peak(self) -> float:
        """Return the most bytes at once since the last call."""
        peak, self._peak = max(self._peak, self._live), self._live
        return peak

    def is_gradient(self, gradient: Tensor) -> None:
        """Keep only this rank's share of a gradient that is complete."""
        key = gradient.untyped_storage()._cdata
        size = self._sizes.get(key, 0.0)
        self._sizes[key] = size * self._share
        self._live -= size - size * self._share

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # two of three calls, and no work
        is_grouped = func._overloadpacket is torch.ops.aten._grouped_mm
        out = _grouped_product(*args[:3]) if is_grouped else func(*args, **(kwargs or {}))
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        given = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        seen = {tensor.untyped_storage()._cdata for tensor in given}  # a view is nothing new
        is_new = [self._add(tensor, seen) for tensor in results]
        if any(is_new) or func._schema.is_mutable:
            self.moved_bytes += sum(t.numel() * t.element_size() for t in [*given, *results])
        self.flops += _flops(func, args, kwargs or {}, out)
        return out

    def _add(self, tensor: Tensor, seen: set[int]) -> bool:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes or key in seen:
            return False
        self._sizes[key] = size = float(storage.nbytes())
        self._live += size
        self._peak = max(self._peak, self._live)
        weakref.finalize(storage, self._drop, key)
        return True

    def _drop(self, key: int) -> None:
        self._live -= self._sizes.pop(key, 0.0)


def _grouped_product(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """Return the shape of a product of experts; torch's own rule knows only bfloat16 ones."""
    if right.ndim == left.ndim:
        return left.new_empty(ends.shape[0], left.shape[0], right.shape[-1])
    return left.new_empty(left.shape[-2], right.shape[-1])


def _flops(func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> int:
    count = flop_registry.get(func._overloadpacket)
    if count is not None:
        return int(count(*args, **kwargs, out_val=out))
    name = func._overloadpacket.__name__
    if name == "_grouped_mm":
        return int(2 * args[0].shape[-2] * args[0].shape[-1] * args[1].shape[-1])
    if not name.startswith("_scaled_dot_product_flash_attention_for_cpu"):
        return 0
    is_backward = name.endswith("backward")
    query, key, value = args[1:4] if is_backward else args[:3]
    product = query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2]
    one_way = 2 * product * (query.shape[3] + value.shape[3])
    return int(one_way * (2.5 if is_backward else 1))
