"""Where a model is: a folder, or a hub name that becomes a folder once its files are here."""

from collections.abc import Sequence
from pathlib import Path

from llmtuner.extras.env import process_env
from llmtuner.extras.errors import ConfigError, MissingExtraError, ModelError
from llmtuner.extras.logs import get_logger
from llmtuner.hparams.model import ModelArgs

logger = get_logger(__name__)

_TEXT_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
# Code is fetched only when the user allows it to run; pickled weights (*.bin) are never fetched.
_CODE_FILES = ("*.py",)
_WEIGHT_FILES = ("*.safetensors",)
# ModelScope writes the dot of a model name as three underscores in folder names.
_MODELSCOPE_DOT = "___"


def locate_model(args: ModelArgs, *, weights: bool = True) -> Path:
    """Return the folder of the base model, downloading it first if it is a hub name.

    Args:
        args: names the model, its revision, cache and tokens.
        weights: whether the weight files are needed too.

    Raises:
        ConfigError: no model was named.
        ModelError: there is no such folder, or the hub does not give it.
    """
    if not args.model_name_or_path:
        raise ConfigError(
            "No base model was named.", fix="give --model_name_or_path a folder or a hub name"
        )
    folder = locate(args.model_name_or_path, args, weights=weights)
    _check_is_model(folder)
    return folder


def locate(name: str, args: ModelArgs, *, weights: bool = True) -> Path:
    """Return the folder of any model or adapter named like the base model."""
    candidates = spellings(name)
    for folder in candidates:
        if folder.is_dir():
            return folder
    if _looks_like_path(name):
        raise ModelError(
            "There is no such model folder.",
            got=name,
            allowed="a folder or a hub name; looked for " + ", ".join(map(str, candidates)),
            fix="check the path",
        )
    patterns = [*_TEXT_FILES]
    patterns += _WEIGHT_FILES if weights else ()
    patterns += _CODE_FILES if args.trust_remote_code else ()
    if process_env().use_modelscope:
        return _from_modelscope(name, args, patterns)
    return _from_hugging_face(name, args, patterns)


def _check_is_model(folder: Path) -> None:
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ModelError(
            "This folder holds an adapter, not a model.",
            got=str(folder),
            fix="give it as --adapter_name_or_path beside its base model, or merge it first with "
            "`llmtuner export`",
        )


def spellings(name: str) -> list[Path]:
    """Return the folders that `name` may mean: as given, then with ModelScope's `___` for a dot."""
    path = Path(name).expanduser()
    last = path.name
    variants = [last, last.replace(".", _MODELSCOPE_DOT), last.replace(_MODELSCOPE_DOT, ".")]
    return [path.with_name(variant) if last else path for variant in dict.fromkeys(variants)]


def _looks_like_path(name: str) -> bool:
    """Tell a path from a hub name, which is `name` or `owner/name`."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


def _from_hugging_face(name: str, args: ModelArgs, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download  # only now: a folder needs no network library
    from huggingface_hub.errors import HFValidationError

    try:
        folder = snapshot_download(
            name,
            revision=args.model_revision,
            cache_dir=args.cache_dir,
            token=args.hf_hub_token,
            allow_patterns=list(patterns),
        )
    except (OSError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"This is neither a folder here nor available from the Hugging Face hub ({reason}).",
            got=name,
            fix="give the path of a downloaded model, or check the name, the network and "
            "--hf_hub_token",
        ) from error
    return Path(folder)


def _from_modelscope(name: str, args: ModelArgs, patterns: Sequence[str]) -> Path:
    try:
        from modelscope import snapshot_download as download
    except ImportError as error:
        raise MissingExtraError(
            "modelscope", extra="modelscope", needed_for="USE_MODELSCOPE_HUB"
        ) from error
    revision = "master" if args.model_revision == "main" else args.model_revision
    try:
        folder = download(
            name, revision=revision, cache_dir=args.cache_dir, allow_file_pattern=list(patterns)
        )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"This is neither a folder here nor available from ModelScope ({error}).",
            got=name,
            fix="give the path of a downloaded model, or check the name and the network",
        ) from error
    return Path(folder)
