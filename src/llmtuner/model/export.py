"""Export: base and adapters become one model folder that plain transformers loads.

The weights stream through memory a few rows at a time, so that the size of the model does not
matter. Neither torch nor transformers nor peft takes part.
"""

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtuner.extras.errors import ConfigError, ModelError, StorageError
from llmtuner.extras.files import remove_abandoned, staging_folder, sync_folder, sync_tree
from llmtuner.extras.logs import get_logger
from llmtuner.hparams.export import ExportArgs
from llmtuner.hparams.model import ModelArgs
from llmtuner.model.adapters import check_records, locate_adapters
from llmtuner.model.hub import locate_model
from llmtuner.model.modelfile import write_modelfile
from llmtuner.model.streaming.base_files import BaseFiles, read_base
from llmtuner.model.streaming.numbers import DTYPE_NAMES, STORED, STORED_NAMES
from llmtuner.model.streaming.plan import MergePlan, plan_merge
from llmtuner.model.streaming.shards import OutputTensor, write_shards
from llmtuner.model.streaming.texts import (
    check_vocabulary,
    copy_texts,
    tokenizer_folder,
    write_config,
)
from llmtuner.model.weights import weight_files

logger = get_logger(__name__)

Finish = Callable[[Path], None]


@dataclass(frozen=True)
class ExportTexts:
    """What changes beside the weights.

    Attributes:
        template_text: chat template without generation marks; None: the tokenizer's own.
        stop_ids: ids that end a turn of that template; empty: those of base and adapters.
        config_changes: other settings of the language model, by their names in `config.json`.
    """

    template_text: str | None = None
    stop_ids: Sequence[int] = ()
    config_changes: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        export_dir: the model folder.
        dtype: number type of most weights ("bfloat16").
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
    texts: ExportTexts | None = None,
    finish: Finish | None = None,
) -> ExportReport:
    """Merge the adapters into the base in float32, round once, and write the model.

    Everything goes to a folder beside `export_dir`, which is renamed when it is whole.

    Args:
        model_args: base and adapters.
        export_args: where to, and how.
        texts: what changes beside the weights.
        finish: called with the whole folder before it gets its name; an error keeps it from that.

    Raises:
        ConfigError: the options cannot be exported, or `export_dir` is in use.
        ModelError: base or adapter is missing, damaged, or they do not belong together.
        StorageError: the disk is too small.
    """
    texts = texts or ExportTexts()
    target = _check_options(model_args, export_args)
    base = read_base(locate_model(model_args))
    adapters = locate_adapters(model_args)
    wanted = STORED_NAMES.get(wanted_dtype(model_args, export_args))
    _check_quantised(base, adapters, wanted)
    check_records(adapters, base.folder)
    plan = plan_merge(base, adapters)
    _check_tokens(model_args, base, plan, adapters)
    outputs = _outputs(plan, base, wanted)
    dtype = wanted or base.main_dtype

    def write(folder: Path) -> list[Path]:
        write_shards(folder, outputs, shard_bytes=export_args.export_size * 10**9)
        write_config(
            folder,
            base,
            dtype=DTYPE_NAMES.get(dtype, "auto"),
            vocabulary_rows=plan.vocabulary_rows,
            is_untied=plan.is_untied,
            changes=texts.config_changes or {},
        )
        copy_texts(
            folder,
            base=base.folder,
            adapters=adapters,
            template_text=texts.template_text,
            stop_ids=texts.stop_ids,
        )
        write_modelfile(folder)
        if finish is not None:
            finish(folder)
        return weight_files(folder)

    _check_space(target, sum(output.num_bytes for output in outputs))
    sizes = _stage(target, write)
    return ExportReport(
        export_dir=target,
        dtype=DTYPE_NAMES.get(dtype, dtype),
        num_parameters=sum(math.prod(output.tensor.shape) for output in outputs),
        num_files=len(sizes),
        num_bytes=sum(sizes),
        merged_adapters=tuple(adapters),
    )


def wanted_dtype(model_args: ModelArgs, export_args: ExportArgs) -> str:
    """Return the number type that was asked for; LLaMA-Factory's name for it is infer_dtype."""
    both = (export_args.export_dtype, model_args.infer_dtype)
    return next((name for name in both if name != "auto"), "auto")


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
    if model_args.train_from_scratch:
        raise ConfigError(
            "A model with random weights cannot be exported.",
            where="train_from_scratch",
            fix="train it first, and export the folder of the training",
        )
    # Where a link leads is where the folder gets its name.
    target = Path(export_args.export_dir).expanduser().resolve()
    if target.is_mount():
        raise ConfigError(
            "The folder to export to is a mount point, which cannot appear as a whole.",
            where="export_dir",
            got=str(target),
            fix="give a new folder inside it",
        )
    is_used = target.is_file() or (target.is_dir() and any(target.iterdir()))
    if is_used:
        raise ConfigError(
            "The folder to export to is not empty.",
            where="export_dir",
            got=str(target),
            fix="give a new folder, or delete this one",
        )
    return target


def _check_quantised(base: BaseFiles, adapters: Sequence[Path], wanted: str | None) -> None:
    quantised = base.config.get("quantization_config")
    if quantised and (adapters or wanted):
        raise ModelError(
            "The base's files are quantised: no adapter can be merged into rounded weights, and "
            "they have no other type.",
            where=str(base.folder),
            got=quantised.get("quant_method") if isinstance(quantised, dict) else quantised,
            fix="give the plain base model",
        )


def _check_tokens(
    model_args: ModelArgs, base: BaseFiles, plan: MergePlan, adapters: Sequence[Path]
) -> None:
    if base.embedding is None:
        logger.info("The base's embedding has an unusual name; its size is not checked.")
        return
    rows = plan.vocabulary_rows or base.tensors[base.embedding].num_rows
    wanted = [*(model_args.add_tokens or ()), *(model_args.add_special_tokens or ())]
    check_vocabulary(tokenizer_folder(base.folder, adapters), num_rows=rows, wanted=wanted)


def _outputs(plan: MergePlan, base: BaseFiles, wanted: str | None) -> list[OutputTensor]:
    """Choose the type of every tensor: the base's, or the one asked for.

    Weights that the base keeps in another type than most are kept in it.
    """
    outputs = []
    for tensor in plan.tensors:
        # An untied head is new; it takes after the embedding.
        name = tensor.name if tensor.name in base.tensors else str(base.embedding)
        own = base.tensors[name].info.dtype
        is_usual = own == base.main_dtype and own in STORED
        outputs.append(OutputTensor(tensor, wanted if wanted and is_usual else own))
    return outputs


def _check_space(target: Path, needed: int) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
    except OSError as error:
        raise StorageError(
            f"The folder cannot be made ({error.strerror or error}).",
            where=str(target.parent),
            fix="give an --export_dir in a folder that you may write to",
        ) from error
    if free < needed:
        raise StorageError(
            "The disk is too small for the model.",
            where=str(target.parent),
            got=f"{free / 1e9:.1f} GB free",
            allowed=f"{needed / 1e9:.1f} GB or more",
            fix="free some space, or give another --export_dir",
        )


def _stage(target: Path, write: Callable[[Path], list[Path]]) -> list[int]:
    """Let the model be written beside `target`, rename it, and return the sizes of its files."""
    remove_abandoned(target)
    staging = staging_folder(target)
    try:
        staging.mkdir()
        sizes = [path.stat().st_size for path in write(staging)]
        sync_tree(staging)
        if target.exists():
            target.rmdir()
        staging.rename(target)
        sync_folder(target.parent)
    except OSError as error:
        raise StorageError(
            f"The model cannot be written ({error.strerror or error}).",
            where=str(target),
            fix="free some space, or give another --export_dir",
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return sizes
