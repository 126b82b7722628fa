"""What a run will write: checkpoints and the final model."""

import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmtuner.hparams.config import RunConfig
from llmtuner.hparams.model import ModelArgs
from llmtuner.model.hub import locate_model
from llmtuner.train.plan.memory import Sizes
from llmtuner.train.plan.workload import Workload

_NO_WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf", ".md")


@dataclass(frozen=True)
class Disk:
    """What will be written.

    Attributes:
        is_adapter: only an adapter is written, not the model.
        model_bytes: the final model or adapter.
        checkpoint_bytes: one checkpoint.
        checkpoints: most that are there at once; a new one is written before an old one goes.
        total_bytes: all of it.
        free_bytes: where `output_dir` is; None without one.
    """

    is_adapter: bool
    model_bytes: int
    checkpoint_bytes: int
    checkpoints: int
    total_bytes: int
    free_bytes: int | None

    def to_dict(self) -> Mapping[str, Any]:
        """Return everything, ready for JSON."""
        return asdict(self)


def disk_of(config: RunConfig, workload: Workload, sizes: Sizes) -> Disk:
    """Add up what the run writes."""
    companions = _tokenizer_bytes(config.model)
    model = round(sizes.saved) + companions
    states = 0 if config.train.save_only_model else round(sizes.optimizer_file)
    count = _checkpoints(config, workload)
    free = _free_bytes(Path(config.train.output_dir)) if config.train.output_dir else None
    total = model + count * (model + states)
    is_adapter = config.method.uses_adapters
    return Disk(is_adapter, model, model + states, count, total, free)


def _checkpoints(config: RunConfig, workload: Workload) -> int:
    train, steps = config.train, workload.steps
    if train.save_strategy == "no":
        return 0
    if train.save_strategy == "epoch":
        count = math.ceil(workload.epochs or 1)
    elif train.save_strategy == "best":
        every = train.eval_steps or train.logging_steps
        count = (
            _times(steps, every)
            if train.eval_strategy == "steps"
            else math.ceil(workload.epochs or 1)
        )
    else:
        count = _times(steps, train.save_steps) or 1  # the Trainer saves the last step too
    limit = train.save_total_limit
    # the best one is kept beside the newest ones, and a new one is whole before an old one goes
    most = count if limit is None else limit + 1 + int(train.load_best_model_at_end)
    return min(count, most)


def _times(steps: int, every: float) -> int:
    interval = math.ceil(steps * every) if every < 1 else int(every)
    return math.ceil(steps / max(interval, 1))


def _tokenizer_bytes(args: ModelArgs) -> int:
    files = [path for path in locate_model(args).iterdir() if path.is_file()]
    return sum(path.stat().st_size for path in files if path.suffix not in _NO_WEIGHTS)


def _free_bytes(folder: Path) -> int:
    folder = folder.expanduser().absolute()
    while not folder.is_dir():
        folder = folder.parent
    return shutil.disk_usage(folder).free
