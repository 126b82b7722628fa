"""LoRA adapters on disk: where they are, and which base model they were trained on."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

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


def check_records(adapters: Sequence[Path], model_dir: Path) -> None:
    """Check by our records that each adapter was trained on the base with the adapters before it.

    Raises:
        ModelError: one was not.
    """
    for index, folder in enumerate(adapters):
        check_record(folder, model_dir, merged_adapters=adapters[:index])


def check_record(
    adapter_dir: Path, model_dir: Path, *, merged_adapters: Sequence[Path] = ()
) -> None:
    """Check by our record that an adapter was trained on these weights.

    Adapters from other programs have none: their shapes are checked, and nothing else can be.

    Raises:
        ModelError: it was trained on other weights.
    """
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
