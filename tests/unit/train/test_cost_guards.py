"""What a step may cost, counted and not timed: operator calls, bytes kept, logits, padding, casts.

The bounds are what the code needs today. A change that lowers a count lowers the bound with it; one
that has to raise it says in its commit what the calls or bytes buy. To read the counts of now, set
the bounds to 0 and run this file: the failures show them.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_training import SIZES, make_trainer, samples
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from llmtuner.data.packing import pack
from llmtuner.model.attention import VARLEN, register_varlen
from llmtuner.model.fast import products
from llmtuner.model.fast.kernels import Kernels, load_kernels
from llmtuner.model.fast.layer import use_fast_layers
from llmtuner.train.trainer import LlmTrainer

needs_kernels = pytest.mark.skipif(load_kernels() is None, reason="no C compiler: no fast layers")

WIDTH, KEY_WIDTH, NUM_WORDS = 64, 32, 1009  # no other dimension is as large as the vocabulary
LENGTHS = [40, 31, 17, 8]
NUM_TOKENS = sum(LENGTHS)
CHUNK_ROWS = 16  # the least that the head takes at once

_ANYWHERE = {"empty_like": 9, "add": 1}
_OWN_CALLS: Mapping[str, Mapping[str, int]] = {
    "lora": {
        **{"_to_copy": 2, "new_empty": 45, "new_zeros": 4, "add_": 14},
        **{"product": 16, "product_transposed": 11, "pair_rows": 8, "round_scaled": 14},
    },
    "full": {
        **{"_to_copy": 7, "new_empty": 27, "cat": 4, "add_": 9},
        **{"product": 8, "product_transposed": 7, "pair_rows": 4},
    },
}
_TORCH_CALLS: Mapping[str, Mapping[str, int]] = {
    "lora": {
        **{"_to_copy": 16, "new_empty": 10, "new_zeros": 4, "add_": 14},
        **{"mm": 27, "addmm": 8, "mul": 14, "mul_": 7, "clone": 7},
    },
    "full": {"_to_copy": 14, "new_empty": 8, "cat": 4, "add_": 9, "mm": 15},
}
MOST_CALLS = {"own": _OWN_CALLS, "torch": _TORCH_CALLS}
"""Calls of one more layer in a step with four samples, views left out, by who multiplies."""

KERNEL_CALLS: Mapping[str, int] = {
    **{"rms_norm": 2, "rotate_heads": 2, "attention": 1, "attention_backward": 1, "swiglu": 1},
    **{"rms_norm_backward": 2, "rms_norm_backward_weight": 2, "swiglu_backward": 1},
}

MOST_KEPT_BYTES: Mapping[str, int] = {"lora": 1622, "full": 1560}
"""Bytes of one more layer for each token that wait for the backward pass."""

MOST_FLOAT32 = 12
"""Tensors as large as activations: those of the norm behind the last layer, and its output."""


class Recorder(TorchDispatchMode):
    """Counts operators and kernels by name, and lists the tensors that they make."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.made: list[tuple[str, tuple[int, ...], torch.dtype]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._overloadpacket.__name__
        aliases = [value.alias_info for value in func._schema.returns]
        if any(alias is not None and not alias.is_write for alias in aliases):
            return out  # a view
        self.calls[name] += 1
        if not any(aliases):
            tensors = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
            self.made += [(name, tuple(tensor.shape), tensor.dtype) for tensor in tensors]
        return out


def trainer_of(
    tmp_path: Path, method: str, *, layers: int = 2, layout: str = "flat", **values: Any
) -> LlmTrainer:
    """Return a trainer as a run on a CPU has it: bfloat16, LoRA on all layers or full."""
    register_varlen()
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 160, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": NUM_WORDS}
    config = LlamaConfig(**SIZES | sizes | heads)
    model: nn.Module = LlamaForCausalLM(config)
    model.set_attn_implementation(VARLEN if layout == "flat" else "sdpa")
    if method == "lora":
        model = get_peft_model(
            model.to(torch.bfloat16), LoraConfig(r=4, target_modules="all-linear")
        )
    if layout == "flat":
        use_fast_layers(model)
    data = samples(LENGTHS)
    settings = {"per_device_train_batch_size": len(LENGTHS), "max_steps": 1, "bf16": True}
    return make_trainer(
        tmp_path, train=data, evals={"": data}, model=model, layout=layout, **settings | values
    )


@contextmanager
def counted_kernels(monkeypatch: pytest.MonkeyPatch, recorder: Recorder) -> Iterator[None]:
    call = Kernels._run

    def counting(self: Kernels, name: str, *args: Any) -> None:
        recorder.calls[name] += 1
        call(self, name, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Kernels, "_run", counting)
        yield


@needs_kernels
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("by", ["own", "torch"])
def test_operator_calls_of_a_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str, method: str
) -> None:
    if by == "own" and products.own_products() is None:
        pytest.skip("this CPU multiplies with torch")
    if by == "torch":
        monkeypatch.setattr(products, "own_products", lambda: None)
    counts = []
    for layers in (2, 3):
        trainer = trainer_of(tmp_path, method, layers=layers)
        with Recorder() as recorder, counted_kernels(monkeypatch, recorder):
            trainer.train()
        counts.append(recorder.calls)
    allowed = Counter({**MOST_CALLS[by][method], **_ANYWHERE, **KERNEL_CALLS})
    of_a_layer = counts[1] - counts[0]
    assert {"_to_copy", "attention"} <= of_a_layer.keys()  # the count works
    assert of_a_layer - allowed == Counter(), "more calls than allowed"


@needs_kernels
@pytest.mark.parametrize("method", ["lora", "full"])
def test_bytes_that_a_layer_keeps_for_the_backward_pass(tmp_path: Path, method: str) -> None:
    sums = []
    for layers in (2, 3):
        trainer = trainer_of(tmp_path, method, layers=layers)
        weights = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}
        kept: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: Tensor, kept: dict[int, torch.UntypedStorage] = kept) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            trainer.train()
        sums.append(sum(s.nbytes() for place, s in kept.items() if place not in weights))
    assert (sums[1] - sums[0]) / NUM_TOKENS <= MOST_KEPT_BYTES[method]


@pytest.mark.parametrize(
    ("method", "layout", "values"),
    [
        ("lora", "flat", {}),
        ("full", "flat", {"label_smoothing_factor": 0.1}),
        ("full", "padded", {"bf16": False}),
    ],
)
def test_logits_are_never_larger_than_a_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, layout: str, values: dict
) -> None:
    monkeypatch.setattr("llmtuner.model.head._CHUNK_NUMBERS", NUM_WORDS * CHUNK_ROWS)
    trainer = trainer_of(tmp_path, method, layout=layout, **values)
    for work in (trainer.train, trainer.evaluate):
        with Recorder() as recorder:
            work()
        rows = {shape[0] for _, shape, _ in recorder.made if shape[1:] == (NUM_WORDS,)}
        assert max(rows) == CHUNK_ROWS
        wide = [made for made in recorder.made if NUM_WORDS in made[1][1:]]
        assert all(shape[0] <= CHUNK_ROWS for _, shape, _ in wide)


@pytest.mark.parametrize("is_packed", [False, True])
def test_no_token_of_a_batch_is_padding(tmp_path: Path, is_packed: bool) -> None:
    lengths = [5, 9, 2, 12, 7, 3, 8, 6, 4, 11]
    data = samples(lengths)
    packs = pack(lengths, capacity=16, seed=0) if is_packed else None
    trainer = make_trainer(tmp_path, train=data, packs=packs, per_device_train_batch_size=3)
    for loader in (trainer.get_train_dataloader(), trainer.get_eval_dataloader(data)):
        tokens = torch.cat([batch["input_ids"].flatten() for batch in loader])
        assert len(tokens) == sum(lengths)
        assert trainer.processing_class.pad_token_id not in tokens


# Heads that share keys and values add up their gradients in these, which are gone at once.
_SUMS_OF_HEADS = ("new_empty", (2, 4, NUM_TOKENS, 64))


@needs_kernels
def test_a_lora_step_makes_no_activation_in_float32(tmp_path: Path) -> None:
    found = []
    for layers in (2, 3):
        trainer = trainer_of(tmp_path, "lora", layers=layers)
        with Recorder() as recorder:
            trainer.train()
        long = [(name, shape) for name, shape, dtype in recorder.made if dtype.itemsize >= 4]
        smallest = NUM_TOKENS * KEY_WIDTH
        large = Counter(one for one in long if math.prod(one[1]) >= smallest)
        found.append(large - Counter({_SUMS_OF_HEADS: layers}))
    assert found[1] - found[0] == Counter(), "made by a layer"
    assert found[0].total() <= MOST_FLOAT32
