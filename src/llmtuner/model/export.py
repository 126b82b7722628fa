"""Export: base and adapters become one model folder that plain transformers loads."""

import math
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from llmtuner.extras.errors import ConfigError, ModelError, StorageError
from llmtuner.extras.files import sync_folder, sync_tree
from llmtuner.extras.logs import get_logger
from llmtuner.hparams.export import ExportArgs
from llmtuner.hparams.model import ModelArgs
from llmtuner.model.adapters import check_chain, locate_adapters, vocabulary_rows
from llmtuner.model.hub import locate_model
from llmtuner.model.load import load_config, load_model
from llmtuner.model.merge import merge_adapters
from llmtuner.model.parameters import cast_parameters
from llmtuner.model.tokenizer import load_tokenizer
from llmtuner.model.weights import read_header, weight_files

logger = get_logger(__name__)

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMED_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_GENERATION_FILE = "generation_config.json"


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        export_dir: the model folder.
        dtype: number type of the weights ("bfloat16").
        num_parameters: numbers in the model.
        num_files: weight files.
        num_bytes: size of the weight files.
        merged_adapters: the adapters, in the order they were merged.
    """

    export_dir: Path
    dtype: str
    num_parameters: int
    num_files: int
    num_bytes: int
    merged_adapters: tuple[Path, ...]


def export_model(
    model_args: ModelArgs,
    export_args: ExportArgs,
    *,
    template_text: str | None = None,
    stop_ids: Sequence[int] = (),
) -> ExportReport:
    """Merge the adapters into the base in float32, round once, and write the model.

    Everything goes to a folder beside `export_dir`, which is renamed when it is whole.

    Args:
        model_args: base and adapters.
        export_args: where to, and how.
        template_text: chat template without generation marks; None: the tokenizer's own.
        stop_ids: ids that end a turn of that template; empty: those of base and adapters.

    Raises:
        ConfigError: the options cannot be exported, or `export_dir` is in use.
        ModelError: base or adapter is missing, damaged, or they do not belong together.
        StorageError: the disk is too small.
    """
    target = _check_options(model_args, export_args)
    base = locate_model(model_args)
    adapters = locate_adapters(model_args)
    check_chain(adapters, base)
    dtype = export_dtype(model_args, base)
    _check_space(target, base, dtype)
    tokenizer = load_tokenizer(model_args)
    if template_text is not None:
        tokenizer.chat_template = template_text
    model = _merge(model_args, export_args, adapters, dtype=dtype, num_tokens=len(tokenizer))
    _set_generation(model, [base, *adapters])
    if stop_ids:
        model.generation_config.eos_token_id = list(stop_ids)
    max_shard_size = f"{export_args.export_size}GB"
    num_files, num_bytes = _write(model, tokenizer, target, max_shard_size=max_shard_size)
    return ExportReport(
        export_dir=target,
        dtype=str(dtype).removeprefix("torch."),
        num_parameters=model.num_parameters(),
        num_files=num_files,
        num_bytes=num_bytes,
        merged_adapters=tuple(adapters),
    )


def export_dtype(model_args: ModelArgs, base: Path) -> torch.dtype:
    """Return the type to write: the one asked for, else that of most of the base's numbers."""
    if model_args.infer_dtype in _NAMED_DTYPES:
        return _NAMED_DTYPES[model_args.infer_dtype]
    num_bytes: Counter[str] = Counter()
    for path in weight_files(base):
        for info in read_header(path).values():
            num_bytes[info.dtype] += info.num_bytes
    most = max(num_bytes, key=lambda name: num_bytes[name], default="F32")
    return _DTYPES.get(most, torch.float32)


def _check_options(model_args: ModelArgs, export_args: ExportArgs) -> Path:
    if export_args.export_dir is None:
        raise ConfigError("No folder to export to was named.", fix="give --export_dir")
    if model_args.quantization_bit is not None:
        raise ConfigError(
            "A quantised model cannot be exported: its weights are rounded.",
            where="quantization_bit",
            got=model_args.quantization_bit,
            fix="drop --quantization_bit; a QLoRA adapter merges into the plain base",
        )
    quantised = load_config(model_args).to_dict().get("quantization_config")
    if quantised and model_args.adapter_name_or_path:
        raise ModelError(
            "The base's files are quantised, and an adapter cannot be merged into rounded weights.",
            got=quantised.get("quant_method"),
            fix="give the plain base model",
        )
    target = Path(export_args.export_dir).expanduser().absolute()
    is_used = target.is_file() or (target.is_dir() and any(target.iterdir()))
    if is_used:
        raise ConfigError(
            "The folder to export to is not empty.",
            where="export_dir",
            got=str(target),
            fix="give a new folder, or delete this one",
        )
    return target


def _check_space(target: Path, base: Path, dtype: torch.dtype) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    headers = [read_header(path) for path in weight_files(base)]
    numbers = sum(math.prod(info.shape) for header in headers for info in header.values())
    needed = numbers * dtype.itemsize
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise StorageError(
            "The disk is too small for the model.",
            where=str(target.parent),
            got=f"{free / 1e9:.1f} GB free",
            allowed=f"{needed / 1e9:.1f} GB or more",
            fix="free some space, or give another --export_dir",
        )


def _merge(
    model_args: ModelArgs,
    export_args: ExportArgs,
    adapters: list[Path],
    *,
    dtype: torch.dtype,
    num_tokens: int,
) -> PreTrainedModel:
    spread = export_args.export_device == "auto" and torch.cuda.is_available()
    model = load_model(
        model_args,
        dtype=torch.float32 if adapters else dtype,
        attention="eager",
        device="auto" if spread else "cpu",
        num_tokens=num_tokens,
        min_rows=max(map(vocabulary_rows, adapters), default=0),
    )
    model = merge_adapters(model, adapters)
    cast_parameters(model, dtype)
    return model


def _write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    target: Path,
    *,
    max_shard_size: str,
) -> tuple[int, int]:
    """Write the model beside `target`, rename it, and return number and size of its files."""
    staging = target.with_name(f".{target.name}.staging-{os.getpid()}")
    try:
        model.save_pretrained(staging, max_shard_size=max_shard_size)
        tokenizer.save_pretrained(staging)
        counts = _check_saved(staging)
        sync_tree(staging)
        if target.exists():
            target.rmdir()
        staging.rename(target)
        sync_folder(target.parent)
    except OSError as error:
        raise StorageError(
            f"The model cannot be written ({error.strerror or error}).", where=str(target)
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return counts


def _set_generation(model: PreTrainedModel, folders: list[Path]) -> None:
    """Take the newest generation config: training saves one with the adapter."""
    for folder in reversed(folders):
        if (folder / _GENERATION_FILE).is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
            return


def _check_saved(folder: Path) -> tuple[int, int]:
    """Return number and size of the weight files, after reading back their headers."""
    files = weight_files(folder)
    for path in files:
        empty = [name for name, info in read_header(path).items() if 0 in info.shape]
        if empty:
            raise ModelError("Some of the written weights are empty.", got=empty, where=str(path))
    return len(files), sum(path.stat().st_size for path in files)
