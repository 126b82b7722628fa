"""Checkpoints that are whole or absent.

A checkpoint is written into a staging folder that no reader looks at, gets a manifest with the size
and sha256 of every file, is flushed to the disk, and appears under its name by one rename. That
rename is the commit point: a process killed at any moment leaves the earlier checkpoints as they
were. Old checkpoints are removed only after that, only those of the same run, never the best one.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from llmtuner.extras.dist import barrier
from llmtuner.extras.env import process_env
from llmtuner.extras.errors import ModelError, StorageError
from llmtuner.extras.files import read_json, sha256_of, sync_folder, sync_tree, write_json
from llmtuner.extras.logs import get_logger

MANIFEST = "MANIFEST.json"
_FORMAT_VERSION = 1
_REPLACED = ".replaced-"

logger = get_logger(__name__)


@dataclass(frozen=True)
class CheckpointStore:
    """The checkpoints of one run in one output folder.

    Attributes:
        output_dir: where `checkpoint-<step>` folders appear.
        run_id: written into every manifest; only checkpoints with this id are ever removed.
        identity: what a resumed run must share (model, data, seed, world size), for the manifest.
        keep: newest checkpoints to keep; None keeps all.
        write_companions: adds tokenizer, template and generation config to a folder with weights.
    """

    output_dir: Path
    run_id: str
    identity: Mapping[str, Any]
    keep: int | None
    write_companions: Callable[[Path], None]

    def path_of(self, step: int) -> Path:
        """Return the folder of one step's checkpoint."""
        return self.output_dir / f"checkpoint-{step}"

    @contextmanager
    def stage(self, step: int, progress: Mapping[str, Any]) -> Iterator[Path]:
        """Give every rank one staging folder to write into, and commit it when all are done.

        Args:
            step: optimizer steps done.
            progress: what the run has consumed so far, for the manifest.

        Raises:
            StorageError: the folder cannot be written (disk full, read-only, gone).
        """
        staging = self.output_dir / f".staging-{step}-{self.run_id}"
        try:
            if process_env().rank == 0:
                for left in self.output_dir.glob(f".staging-*-{self.run_id}"):
                    shutil.rmtree(left, ignore_errors=True)  # by a killed save of this run
                staging.mkdir(parents=True)
            barrier()
            yield staging
            barrier()
            if process_env().rank == 0:
                self._commit(staging, step, progress)
        # torch's and safetensors' writers have errors of their own for a full disk
        except (OSError, RuntimeError, SafetensorError) as error:
            if isinstance(error, RuntimeError) and not _is_torch_writer_error(error):
                raise
            shutil.rmtree(staging, ignore_errors=True)
            raise StorageError(
                f"The checkpoint of step {step} cannot be written: {error}.",
                got=str(self.output_dir),
                fix="free some space or choose another --output_dir; earlier checkpoints are whole",
            ) from error
        barrier()

    def _commit(self, staging: Path, step: int, progress: Mapping[str, Any]) -> None:
        files = {
            str(path.relative_to(staging)): {
                "bytes": path.stat().st_size,
                "sha256": sha256_of(path),
            }
            for path in sorted(staging.rglob("*"))
            if path.is_file()
        }
        manifest = {
            "format_version": _FORMAT_VERSION,
            "run_id": self.run_id,
            "step": step,
            "identity": dict(self.identity),
            "progress": dict(progress),
            "files": files,
        }
        write_json(staging / MANIFEST, manifest)
        sync_tree(staging)
        target = self.path_of(step)
        replaced = self._make_way(target, step)
        staging.rename(target)
        sync_folder(self.output_dir)
        if replaced is not None:
            shutil.rmtree(replaced)

    def _make_way(self, target: Path, step: int) -> Path | None:
        """Move aside what has this step's name; return it if it is this run's, to be removed.

        What another run or another program wrote is kept under a name of its own.
        """
        if not target.exists():
            return None
        manifest = read_manifest(target)
        if manifest is not None and manifest.get("run_id") == self.run_id:
            replaced = self.output_dir / f"{_REPLACED}{step}-{self.run_id}"
            shutil.rmtree(replaced, ignore_errors=True)
            target.rename(replaced)
            return replaced
        names = (f"before-{self.run_id}-{target.name}{'-' * bool(n)}{n or ''}" for n in count())
        aside = next(path for path in map(self.output_dir.joinpath, names) if not path.exists())
        target.rename(aside)
        logger.warning("%s belongs to another run; it is kept as %s.", target, aside)
        return None

    def rotate(self, *, newest: int, best: int | None) -> None:
        """Remove this run's checkpoints beyond the newest `keep`, but never the best one."""
        if self.keep is None or process_env().rank != 0:
            return
        own = [
            step
            for step, folder in list_checkpoints(self.output_dir)
            if (read_manifest(folder) or {}).get("run_id") == self.run_id
        ]
        for step in sorted(own, reverse=True)[max(self.keep, 1) :]:
            if step not in (newest, best):
                shutil.rmtree(self.path_of(step))


def _is_torch_writer_error(error: RuntimeError) -> bool:
    """Tell torch.save's way of saying "the disk is full" from errors of the computation."""
    return "inline_container" in str(error) or "PytorchStreamWriter" in str(error)


def list_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """Return (step, folder) of every `checkpoint-<number>` folder, by rising step."""
    found = []
    for folder in output_dir.glob("checkpoint-*"):
        number = folder.name.removeprefix("checkpoint-")
        if number.isascii() and number.isdigit() and folder.is_dir() and not folder.is_symlink():
            found.append((int(number), folder))
    return sorted(found)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return a checkpoint's manifest, or None when there is none or it cannot be read."""
    try:
        manifest = read_json(folder / MANIFEST)
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) else None


def verify_checkpoint(folder: Path) -> list[str]:
    """Compare a checkpoint with its manifest; return what is wrong, nothing when it is whole."""
    manifest = read_manifest(folder)
    files = manifest.get("files") if manifest is not None else None
    if not isinstance(files, dict) or not files or not all(map(_is_entry, files.values())):
        return [f"{folder / MANIFEST} is missing or damaged"]
    problems = []
    progress = manifest.get("progress") if manifest is not None else None
    if isinstance(progress, dict) and progress.get("is_resumable") is False:
        problems.append(f"{folder} holds no optimizer state (save_only_model)")
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{path} is missing")
        elif path.stat().st_size != expected["bytes"]:
            size = path.stat().st_size
            problems.append(f"{path} has {size} bytes instead of {expected['bytes']}")
        elif sha256_of(path) != expected["sha256"]:
            problems.append(f"{path} is damaged: its sha256 is not the one in the manifest")
    return problems


def _is_entry(value: object) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("bytes"), int)
        and isinstance(value.get("sha256"), str)
    )


def _bring_back_replaced(output_dir: Path) -> None:
    """Undo a replacement that was killed between moving the old one away and the new one in."""
    for folder in output_dir.glob(f"{_REPLACED}*"):
        step = folder.name.removeprefix(_REPLACED).partition("-")[0]
        target = output_dir / f"checkpoint-{step}"
        if not target.exists():
            folder.rename(target)


def newest_valid_checkpoint(output_dir: Path, run_id: str | None) -> Path | None:
    """Return the newest checkpoint that verifies; None when there is no checkpoint at all.

    Damaged ones are reported and passed over, never deleted.

    Args:
        output_dir: folder of the run.
        run_id: only look at checkpoints of this run, and at those that say nothing readable.

    Raises:
        ModelError: there are checkpoints and none of them is whole.
    """
    _bring_back_replaced(output_dir)
    candidates = [
        (step, folder)
        for step, folder in list_checkpoints(output_dir)
        if run_id is None or (read_manifest(folder) or {"run_id": run_id}).get("run_id") == run_id
    ]
    all_problems = []
    for _, folder in reversed(candidates):
        problems = verify_checkpoint(folder)
        if not problems:
            return folder
        all_problems += problems
        logger.warning("%s cannot be resumed: %s.", folder, "; ".join(problems))
    if not candidates:
        return None
    raise ModelError(
        "No checkpoint of the run can be resumed.",
        where=str(output_dir),
        got=all_problems,
        fix="restore a checkpoint, or start again with --overwrite_output_dir",
    )


# A resumed run may differ in these; the optimizer and the schedule of the checkpoint go on.
_FREE = (
    "world_size",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
)


def check_identity(checkpoint: Path, identity: Mapping[str, Any]) -> None:
    """Refuse to go on with another model, method, data or seed than the checkpoint's.

    Raises:
        ModelError: names what differs, old → new.
    """
    before = (read_manifest(checkpoint) or {}).get("identity", {})
    now = json.loads(json.dumps(identity))  # as it looks after a trip through the manifest
    changed = {
        name: f"{before[name]} → {now[name]}"
        for name in now
        if name in before and before[name] != now[name]
    }
    forbidden = [f"{name}: {change}" for name, change in changed.items() if name not in _FREE]
    if forbidden:
        raise ModelError(
            "The checkpoint belongs to a run with other settings.",
            where=str(checkpoint),
            got=forbidden,
            fix="resume with the settings of the checkpoint, or start over in another --output_dir",
        )
    for name, change in changed.items():
        logger.warning("Resuming with another %s (%s).", name, change)
