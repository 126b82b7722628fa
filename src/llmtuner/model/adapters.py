"""LoRA adapters on disk: where they are, and whether they fit the base model."""

import hashlib
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from llmtuner.extras.errors import ModelError
from llmtuner.extras.files import read_json, sha256_of, write_json
from llmtuner.extras.logs import get_logger
from llmtuner.hparams.model import ModelArgs
from llmtuner.model.hub import locate

logger = get_logger(__name__)

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
BASE_RECORD = "llmtuner_base.json"
_SAMPLE_BYTES = 1024
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class TensorInfo:
    """What a safetensors header says of one tensor.

    Attributes:
        dtype: safetensors' name of the type ("BF16").
        shape: sizes of the dimensions.
        start: offset of the first byte in the file.
        num_bytes: size of the tensor.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


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


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read the names, types and shapes of the tensors in a safetensors file, and check its size.

    Raises:
        ModelError: the file is cut short or damaged.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size:
                raise ValueError(f"header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        tensors = {name: _tensor_info(entry, 8 + length) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, struct.error) as error:
        raise ModelError(f"The weight file is damaged ({error}).", where=str(path)) from error
    end = max((info.start + info.num_bytes for info in tensors.values()), default=8 + length)
    if end != size:
        raise ModelError(
            "The weight file is cut short or damaged.",
            where=str(path),
            got=f"{size} bytes",
            allowed=f"{end} bytes",
            fix="copy or download it again",
        )
    return tensors


def base_digest(model_dir: Path) -> str:
    """Return a sha256 that tells one base model from another in well under a second.

    It covers name, type, shape and the first and last KiB of every tensor, so that a fine-tuned
    sibling differs although its shapes agree, while another shard size does not matter.
    """
    parts: dict[str, str] = {}
    for path in weight_files(model_dir):
        header = read_header(path)
        with path.open("rb") as file:
            for name, info in header.items():
                digest = hashlib.sha256(f"{name}|{info.dtype}|{info.shape}|".encode())
                file.seek(info.start)
                digest.update(file.read(min(_SAMPLE_BYTES, info.num_bytes)))
                file.seek(info.start + max(0, info.num_bytes - _SAMPLE_BYTES))
                digest.update(file.read(min(_SAMPLE_BYTES, info.num_bytes)))
                parts[name] = digest.hexdigest()
    lines = "\n".join(f"{name} {parts[name]}" for name in sorted(parts))
    return hashlib.sha256(lines.encode()).hexdigest()


def weight_files(model_dir: Path) -> list[Path]:
    """Return the safetensors files that `from_pretrained` would read."""
    index = model_dir / "model.safetensors.index.json"
    single = model_dir / "model.safetensors"
    if single.is_file() or not index.is_file():
        return [single] if single.is_file() else []
    return [model_dir / name for name in sorted(set(read_json(index)["weight_map"].values()))]


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
    shapes = _linear_shapes(model_dir)
    if shapes is None:
        return
    for name, info in read_header(adapter_dir / WEIGHTS_FILE).items():
        layer, _, rest = name.removeprefix(_PREFIX).partition(".lora_")
        side = rest.partition(".")[0]
        if side not in ("A", "B"):
            continue
        if layer not in shapes:
            raise ModelError(
                "The adapter changes a layer that this model does not have.",
                where=str(adapter_dir),
                got=layer,
                fix="give the base model that the adapter was trained on",
            )
        num_out, num_in = shapes[layer]
        size, expected = (info.shape[1], num_in) if side == "A" else (info.shape[0], num_out)
        if size != expected:
            raise ModelError(
                f"The adapter does not fit this base model: layer {layer} is of another size.",
                where=str(adapter_dir),
                got=size,
                allowed=str(expected),
                fix="give the base model that the adapter was trained on",
            )


def vocabulary_rows(adapter_dir: Path) -> int:
    """Return the rows of the embedding that an adapter carries whole, 0 if it carries none."""
    header = read_header(adapter_dir / WEIGHTS_FILE)
    whole = read_adapter_config(adapter_dir).get("modules_to_save") or []
    embeddings = [name for name in whole if name.rpartition(".")[2] in ("embed_tokens", "wte")]
    rows = [
        info.shape[0]
        for name, info in header.items()
        if any(name.endswith(f"{module}.weight") for module in embeddings)
    ]
    return max(rows, default=0)


def _linear_shapes(model_dir: Path) -> dict[str, tuple[int, int]] | None:
    """Return (out, in) of the model's matrices by module; None for a model of unknown code."""
    try:
        config = AutoConfig.from_pretrained(
            model_dir, trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError):
        # The model brings its own code, which is not run for a check.
        return None
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    shapes = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is None or weight.ndim != 2:
            continue
        num_out, num_in = weight.shape
        # GPT-2's Conv1D keeps its matrix the other way round.
        is_turned = type(module).__name__ == "Conv1D"
        shapes[name] = (num_in, num_out) if is_turned else (num_out, num_in)
    return shapes


def _tensor_info(entry: dict[str, Any], data_start: int) -> TensorInfo:
    begin, end = entry["data_offsets"]
    return TensorInfo(entry["dtype"], tuple(entry["shape"]), data_start + begin, end - begin)
