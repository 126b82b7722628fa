"""What was run, so that it can be run again: `run.json`."""

import platform
import time
from dataclasses import asdict
from importlib import metadata
from typing import Any

from llmtuner import __version__
from llmtuner.eval.asking import Costs
from llmtuner.eval.reader import Reader
from llmtuner.eval.sources import BenchmarkData
from llmtuner.eval.task import Task
from llmtuner.hparams.config import RunConfig

_LIBRARIES = ("torch", "transformers", "tokenizers", "peft", "bitsandbytes")


def run_record(
    config: RunConfig,
    task: Task,
    data: BenchmarkData,
    reader: Reader,
    costs: Costs,
) -> dict[str, Any]:
    """Return the settings, files and versions behind a score."""
    args = config.evaluating
    return {
        "task": task.benchmark.name,
        "split": task.split,
        "benchmark_version": task.benchmark.version,
        "n_shot": args.n_shot,
        "lang": args.lang if "lang" in config.given else task.benchmark.lang,
        "scoring": args.scoring,
        "template": reader.template.name or "the tokenizer's own",
        "shots": {
            found.subject.key: [shot.index for shot in found.shots] for found in data.subjects
        },
        "missing_subjects": list(data.missing),
        "files": dict(data.files),
        "model": {
            "name_or_path": config.model.model_name_or_path,
            "adapters": list(config.model.adapter_name_or_path or ()),
            "dtype": str(reader.model.dtype).removeprefix("torch."),
            "device": str(reader.model.device),
        },
        "costs": asdict(costs),
        "config": config.to_dict(),
        "versions": _versions(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _versions() -> dict[str, str]:
    found = {"llmtuner": __version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
