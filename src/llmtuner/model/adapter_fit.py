"""Whether adapters fit the base model, judged by the modules that transformers builds from it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from llmtuner.extras.errors import ModelError
from llmtuner.model.adapters import WEIGHTS_FILE, check_record
from llmtuner.model.weights import read_header

_PREFIX = "base_model.model."


def check_chain(adapters: Sequence[Path], model_dir: Path) -> None:
    """Check that each adapter was trained on the base with the adapters before it.

    Raises:
        ModelError: one was not.
    """
    for index, folder in enumerate(adapters):
        check_base(folder, model_dir, merged_adapters=adapters[:index])


def check_base(adapter_dir: Path, model_dir: Path, *, merged_adapters: Sequence[Path] = ()) -> None:
    """Check that an adapter was trained on these weights.

    Adapters without our record, from other programs, are checked by their shapes only.

    Raises:
        ModelError: it was trained on other weights, or the shapes do not fit.
    """
    check_shapes(adapter_dir, model_dir)
    check_record(adapter_dir, model_dir, merged_adapters=merged_adapters)


def check_shapes(adapter_dir: Path, model_dir: Path) -> None:
    """Check every LoRA matrix of an adapter against the layer it changes; loads no weights.

    Raises:
        ModelError: a layer is missing or of another size.
    """
    base = _base_shapes(model_dir)
    if base is None:
        return
    for name, info in read_header(adapter_dir / WEIGHTS_FILE).items():
        layer, _, rest = name.removeprefix(_PREFIX).partition(".lora_")
        side = rest.partition(".")[0]
        if side not in ("A", "B"):
            continue
        num_out, num_in = base.layers.get(layer, (0, 0))
        size, expected = (info.shape[1], num_in) if side == "A" else (info.shape[0], num_out)
        # The head of a grown vocabulary has more rows than the base on disk.
        grew = side == "B" and layer == base.head and size > expected
        if size != expected and not grew:
            what = f"layer {layer} is of another size" if expected else f"it has no layer {layer}"
            raise ModelError(
                f"The adapter does not fit this base model: {what}.",
                where=str(adapter_dir),
                got=size,
                allowed=str(expected) if expected else None,
                fix="give the base model that the adapter was trained on",
            )


@dataclass(frozen=True)
class _BaseShapes:
    """(out, in) of the base model's matrices by module name, and which of them is the head."""

    layers: dict[str, tuple[int, int]]
    head: str | None


def _base_shapes(model_dir: Path) -> _BaseShapes | None:
    """Build the model without memory for its weights; None for a model that brings its own code."""
    try:
        config = AutoConfig.from_pretrained(
            model_dir, trust_remote_code=False, local_files_only=True
        )
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError):
        return None
    layers: dict[str, tuple[int, int]] = {}
    head = None
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is None or weight.ndim != 2:
            continue
        num_out, num_in = weight.shape
        # GPT-2's Conv1D keeps its matrix the other way round.
        layers[name] = (num_in, num_out) if isinstance(module, Conv1D) else (num_out, num_in)
        head = name if module is model.get_output_embeddings() else head
    return _BaseShapes(layers, head)
