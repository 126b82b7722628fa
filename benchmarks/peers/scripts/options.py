"""Reads the command line that `words.py` writes, and the rows, in the environment of a peer."""

import argparse
import json
from typing import Any


def read_options() -> argparse.Namespace:
    """Return the options of a script."""
    parser = argparse.ArgumentParser()
    for name in ("model", "tokens", "method", "output_dir"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("steps", "batch_size", "lora_rank", "lora_alpha", "cutoff_tokens", "seed"):
        parser.add_argument(f"--{name}", required=True, type=int)
    parser.add_argument("--learning_rate", required=True, type=float)
    parser.add_argument("--best", action="store_true", help="what is fastest on a CPU")
    return parser.parse_args()


def read_tokens(path: str) -> list[dict[str, list[int]]]:
    """Return tokenised rows with `input_ids` and `labels`."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def trainer_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return what every script tells transformers' Trainer."""
    return {
        "output_dir": options.output_dir,
        "per_device_train_batch_size": options.batch_size,
        "max_steps": options.steps,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "seed": options.seed,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
    }
