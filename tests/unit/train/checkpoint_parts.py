"""Checkpoints with small made-up files, and the ways to damage them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmtuner.train.checkpoint import MANIFEST, CheckpointStore

RUN = "run0"
FILES: Mapping[str, bytes] = {
    "model.safetensors": bytes(range(256)) * 4,
    "optimizer.pt": b"moments " * 40,
    "rng_state.pth": b"dice" * 16,
    "trainer_state.json": b'{"global_step": 1}\n',
    "global_step1/mp_rank_00_model_states.pt": b"shard" * 30,
}


def make_store(output_dir: Path, *, run_id: str = RUN, keep: int | None = None) -> CheckpointStore:
    output_dir.mkdir(parents=True, exist_ok=True)
    identity = {"model_name_or_path": "m", "seed": 42}
    return CheckpointStore(
        output_dir=output_dir,
        run_id=run_id,
        identity=identity,
        keep=keep,
        write_companions=lambda folder: None,
    )


def write_files(folder: Path, step: int = 1) -> None:
    """Write files whose content tells the step."""
    for name, content in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content + str(step).encode())


def save(store: CheckpointStore, step: int) -> Path:
    """Commit one checkpoint and return its folder."""
    with store.stage(step, {"tokens_seen": 100 * step}) as folder:
        write_files(folder, step)
    return store.path_of(step)


def manifest_of(folder: Path) -> Any:
    return json.loads((folder / MANIFEST).read_text("utf-8"))
