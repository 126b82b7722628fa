"""What a run finds in its output folder: nothing, a finished run, or something to go on from."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtuner.extras.errors import ConfigError, ModelError, StorageError
from llmtuner.extras.files import read_json
from llmtuner.extras.logs import get_logger
from llmtuner.hparams.training import TrainArgs
from llmtuner.train.checkpoint import (
    newest_valid_checkpoint,
    read_manifest,
    verify_checkpoint,
)

RUN_FILE = "run.json"
_RESULTS = (
    "adapter_*",
    "llmtuner_base.json",
    "config.json",
    "model*.safetensors*",
    "*_results.json",
    "generated_predictions*.jsonl",
    "training_*.png",
    "trainer_log.jsonl",
    "trainer_state.json",
)

logger = get_logger(__name__)


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        output_dir: writable, exists.
        checkpoint: continue from here; None starts at step 0.
        run_id: id of the run that is continued; None for a new run.
    """

    output_dir: Path
    checkpoint: Path | None = None
    run_id: str | None = None


def check_output_dir(train: TrainArgs) -> Start:
    """Decide how to start, before anything is loaded.

    Raises:
        ConfigError: the folder holds a finished run or foreign files.
        ModelError: there is something to resume and none of it is whole.
        StorageError: the folder cannot be written.
    """
    assert train.output_dir is not None, "checked by hparams"
    output_dir = Path(train.output_dir)
    _check_writable(output_dir)
    if not train.do_train:
        return Start(output_dir)
    wish = train.resume_from_checkpoint
    if isinstance(wish, str):
        return _resume(output_dir, _named_checkpoint(Path(wish)))
    if train.overwrite_output_dir and not wish:
        return Start(output_dir)
    run = _read_run(output_dir)
    if run.get("status") == "finished" and not wish:
        raise ConfigError(
            "The output folder holds a finished run.",
            where=f"--output_dir {output_dir}",
            fix="choose another --output_dir, or start over with --overwrite_output_dir",
        )
    checkpoint = None if wish is False else newest_valid_checkpoint(output_dir, run.get("run_id"))
    if checkpoint is not None:
        return _resume(output_dir, checkpoint)
    if wish:
        raise ModelError(
            "There is no checkpoint to resume.",
            where=f"--output_dir {output_dir}",
            fix="leave out --resume_from_checkpoint to start a new run",
        )
    if not run and any(output_dir.iterdir()):
        raise ConfigError(
            "The output folder is not empty and holds no run of llmtuner.",
            where=f"--output_dir {output_dir}",
            got=sorted(path.name for path in output_dir.iterdir())[:5],
            fix="choose another --output_dir, or allow it with --overwrite_output_dir",
        )
    return Start(output_dir)


def clear_results(output_dir: Path) -> None:
    """Remove what an earlier run left at the top of the folder, so that nothing gets mixed.

    An old adapter beside new weights would be loaded on top of them. Checkpoints stay.
    """
    for pattern in _RESULTS:
        for path in output_dir.glob(pattern):
            if path.is_file():
                path.unlink()


def _resume(output_dir: Path, checkpoint: Path) -> Start:
    logger.info("Resuming from %s.", checkpoint)
    manifest = read_manifest(checkpoint) or {}
    return Start(output_dir, checkpoint, manifest.get("run_id"))


def _named_checkpoint(folder: Path) -> Path:
    if not folder.is_dir():
        raise ModelError("The checkpoint folder does not exist.", where=str(folder))
    if read_manifest(folder) is None:
        logger.warning("%s has no manifest; it cannot be verified and is used as it is.", folder)
        return folder
    if problems := verify_checkpoint(folder):
        fix = "resume from another checkpoint"
        raise ModelError("The checkpoint is damaged.", where=str(folder), got=problems, fix=fix)
    return folder


def _read_run(output_dir: Path) -> dict[str, Any]:
    try:
        run = read_json(output_dir / RUN_FILE)
    except (OSError, ValueError):
        return {}
    return run if isinstance(run, dict) else {}


def _check_writable(output_dir: Path) -> None:
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=output_dir, prefix=".probe-"):
            pass
    except OSError as error:
        raise StorageError(
            f"The output folder cannot be written: {error.strerror}.",
            where=f"--output_dir {output_dir}",
            fix="choose a folder that you may write to",
        ) from error
