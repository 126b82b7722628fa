"""Files of numbered texts, and the settings and encoder to read them with."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tiny_tokenizers import byte_level

from llmtuner.data.encoders.pt import TextEncoder
from llmtuner.hparams.data import DataArgs


def write_texts(folder: Path, **texts: Iterable[str]) -> None:
    """Write one data set for each name, and its entry in dataset_info.json."""
    info = {}
    for name, rows in texts.items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps([{"text": text} for text in rows]), encoding="utf-8")
        info[name] = {"file_name": path.name, "columns": {"prompt": "text"}}
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")


def numbered(prefix: str, count: int) -> list[str]:
    return [f"{prefix}{number}" for number in range(count)]


def data_args(folder: Path, *names: str, **values: Any) -> DataArgs:
    settings = {"dataset_dir": str(folder), "dataset": names or None, "cutoff_len": 64}
    return DataArgs(**settings | values)


def text_encoder(cutoff_len: int = 64) -> TextEncoder:
    return TextEncoder(tokenizer=byte_level(), cutoff_len=cutoff_len)


def texts_of(rows: Iterable[Any]) -> list[str]:
    """Return the texts of samples, without the token that ends them."""
    return [byte_level().decode(row["input_ids"], skip_special_tokens=True) for row in rows]
