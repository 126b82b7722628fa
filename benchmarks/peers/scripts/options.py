"""Reads the command line that `words.py` writes, and the rows, in the environment of a peer."""

import argparse
import json


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
