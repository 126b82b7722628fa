"""The rows that all contenders train, in one order, as text and as tokens."""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtuner.data.build import build_datasets
from llmtuner.data.encoders.sft import build_encoder
from llmtuner.extras.errors import LlmtunerError
from llmtuner.hparams.config import RunConfig
from llmtuner.hparams.parser import parse
from llmtuner.model.tokenizer import load_tokenizer

_PACKED_SPARE = 1.1  # packs are not quite full, and no step may be short of rows


@dataclass(frozen=True)
class Sample:
    """One tokenised row; `labels` is -100 where nothing is trained."""

    input_ids: list[int]
    labels: list[int]


def read_alpaca(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSON file in the alpaca layout; stop with one line where it is none."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path}: {error}") from error
    if not isinstance(rows, list) or not rows:
        raise SystemExit(f"{path}: a list of rows is needed.")
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or not (row.get("instruction") and row.get("output")):
            raise SystemExit(f"{path}: row {number} has no `instruction` or no `output`.")
        if row.get("history") or row.get("system"):
            raise SystemExit(f"{path}: row {number} has `history` or `system`: one turn is needed.")
    return [
        {
            "instruction": row["instruction"],
            "input": row.get("input") or "",
            "output": row["output"],
        }
        for row in rows
    ]


def write_rows(
    rows: Sequence[dict[str, Any]], folder: Path, *, model: Path, template: str, cutoff_tokens: int
) -> list[Sample]:
    """Write `rows.json` with its `dataset_info.json`, and return the rows tokenised by llmtuner."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "rows.json", list(rows))
    _write_json(folder / "dataset_info.json", {"rows": {"file_name": "rows.json"}})
    config = _config(folder, model=model, template=template, cutoff_tokens=cutoff_tokens)
    try:
        encode = build_encoder(config.data, load_tokenizer(config.model))
        built = build_datasets(config.data, encode=encode, seed=0, packing=False, for_training=True)
    except LlmtunerError as error:
        raise SystemExit(f"Error: {error}") from error
    samples = [Sample(row["input_ids"], row["labels"]) for row in built.train]
    if len(samples) != len(rows):
        raise SystemExit(f"{len(rows)} rows became {len(samples)} samples: one each is needed.")
    with (folder / "tokens.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(vars(sample)) + "\n" for sample in samples)
    return samples


def _config(folder: Path, *, model: Path, template: str, cutoff_tokens: int) -> RunConfig:
    return parse(
        "train",
        [
            *("--stage", "sft", "--do_train", "--model_name_or_path", str(model)),
            *("--dataset_dir", str(folder), "--dataset", "rows", "--template", template),
            *("--cutoff_len", str(cutoff_tokens), "--output_dir", str(folder / "unused")),
        ],
    )


def repeat_rows(rows: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Return the first `count` rows, starting over where there are fewer."""
    return list(itertools.islice(itertools.cycle(rows), count))


def num_packed_rows(lengths: Sequence[int], *, num_packs: int, capacity_tokens: int) -> int:
    """Return how many rows fill that many packs; rows start over where there are fewer."""
    needed = num_packs * capacity_tokens * _PACKED_SPARE
    return next(number for number, total in enumerate(_totals(lengths), start=1) if total >= needed)


def _totals(lengths: Sequence[int]) -> Iterator[int]:
    return itertools.accumulate(itertools.cycle(lengths))


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
