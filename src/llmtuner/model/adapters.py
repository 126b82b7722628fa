"""LoRA adapters on disk: where they are, and whether they fit the base model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from llmtuner.extras.errors import ModelError
from llmtuner.extras.files import read_json, sha256_of, write_json
from llmtuner.extras.logs import get_logger
from llmtuner.hparams.model import ModelArgs
from llmtuner.model.hub import locate
from llmtuner.model.weights import base_digest, read_header

logger = get_logger(__name__)

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
BASE_RECORD = "llmtuner_base.json"
_PREFIX = "base_model.model."
_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings", "lm_head")


def locate_adapters(args: ModelArgs) -> list[Path]:
    """Return the folders of the adapters in `args`, in order, each one checked to be LoRA.

    Raises:
        ModelError: a folder or file is missing, or the adapter is not LoRA.
    """
    folders = []
    for name in args.adapter_name_or_path or ():
        full_name = str(Path(args.adapter_folder) / name) if args.adapter_folder else name
        folder = locate(full_name, args)
        check_adapter_files(folder)
        folders.append(folder)
    return folders


def check_adapter_files(folder: Path) -> None:
    """Check that the folder holds a whole LoRA adapter.

    Raises:
        ModelError: it does not.
    """
    found = sorted(path.name for path in folder.iterdir())
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if name not in found:
            pickled = "; the pickled adapter_model.bin is not read" if "bin" in str(found) else ""
            raise ModelError(
                f"The adapter folder has no {name}{pickled}.",
                where=str(folder),
                got=found,
                fix="give the folder that a LoRA training wrote",
            )
    kind = read_adapter_config(folder).get("peft_type")
    if kind != "LORA":
        raise ModelError(
            "The adapter is of a kind that is not supported.",
            where=str(folder / CONFIG_FILE),
            got=kind,
            allowed=["LORA"],
        )


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Read `adapter_config.json`.

    Raises:
        ModelError: it is not a JSON object.
    """
    try:
        config = read_json(folder / CONFIG_FILE)
    except ValueError as error:
        config = str(error)
    if not isinstance(config, dict):
        raise ModelError(
            "The adapter's configuration is not a JSON object.",
            where=str(folder / CONFIG_FILE),
            got=config,
        )
    return config


def write_base_record(
    adapter_dir: Path, model_dir: Path, *, merged_adapters: Sequence[Path] = (), name: str = ""
) -> None:
    """Write beside an adapter which weights it was trained on.

    Args:
        adapter_dir: where the adapter is saved.
        model_dir: folder of the base model.
        merged_adapters: adapters that were merged into the base before training, in order.
        name: the base as the user named it.
    """
    record = {
        "base_model": name or str(model_dir),
        "base_digest": base_digest(model_dir),
        "merged_adapters": [sha256_of(folder / WEIGHTS_FILE) for folder in merged_adapters],
    }
    write_json(adapter_dir / BASE_RECORD, record)


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
    record_file = adapter_dir / BASE_RECORD
    if not record_file.is_file():
        name = read_adapter_config(adapter_dir).get("base_model_name_or_path")
        logger.info(
            "Adapter %s: no record of its base (it names %r); only the shapes were checked.",
            adapter_dir,
            name,
        )
        return
    record = read_json(record_file)
    if record["base_digest"] != base_digest(model_dir):
        raise ModelError(
            "The adapter was trained on another base model.",
            where=str(adapter_dir),
            got=str(model_dir),
            allowed=f"the weights of {record['base_model']}",
            fix="give that model as --model_name_or_path",
        )
    merged = [sha256_of(folder / WEIGHTS_FILE) for folder in merged_adapters]
    if record["merged_adapters"] != merged:
        raise ModelError(
            "The adapter was trained on top of other adapters than those given before it.",
            where=str(adapter_dir),
            got=[str(folder) for folder in merged_adapters],
            allowed=f"{len(record['merged_adapters'])} adapters, as in {record_file}",
            fix="list all adapters of the chain in --adapter_name_or_path, in order",
        )


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


def vocabulary_rows(adapter_dir: Path) -> int:
    """Return the rows of the embedding that an adapter carries whole, 0 if it carries none."""
    whole = read_adapter_config(adapter_dir).get("modules_to_save") or []
    embeddings = [name for name in whole if name.rpartition(".")[2] in _EMBEDDINGS]
    rows = [
        info.shape[0]
        for name, info in read_header(adapter_dir / WEIGHTS_FILE).items()
        if any(name.endswith(f"{module}.weight") for module in embeddings)
    ]
    return max(rows, default=0)


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
