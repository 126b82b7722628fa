"""Prediction: the model's answers beside those of the data (`generated_predictions.jsonl`)."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from rich.progress import track
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmtuner.data.conversation import IGNORE_INDEX
from llmtuner.extras.env import process_env
from llmtuner.hparams.generating import GeneratingArgs
from llmtuner.inference.generate import generate_texts, generation_config


def predictions_file(output_dir: Path, name: str) -> Path:
    """Return where the answers for an evaluation set go; the nameless one is the only set."""
    suffix = f"_{name.replace('/', '_')}" if name else ""
    return output_dir / f"generated_predictions{suffix}.jsonl"


def write_predictions(
    dataset: Dataset,
    *,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    generating: GeneratingArgs,
    stop_ids: Sequence[int],
    use_kv_cache: bool,
    batch_size: int,
    path: Path,
    precision: AbstractContextManager[object],
) -> int:
    """Answer the prompt of every sample and write one line for each; return their number.

    Every rank answers every prompt, since a sharded model (ZeRO-3) needs all of them in each
    forward pass; rank 0 writes.

    Args:
        dataset: samples; the last trained span is the label, all before it the prompt.
        model: to generate with, on its device.
        tokenizer: decodes.
        generating: how to choose tokens.
        stop_ids: ids that end an answer.
        use_kv_cache: keep keys and values between tokens.
        batch_size: prompts per batch.
        path: the file to write.
        precision: the number type of the forward pass.
    """
    config = generation_config(
        generating, tokenizer=tokenizer, stop_ids=stop_ids, use_kv_cache=use_kv_cache
    )
    is_main = process_env().rank == 0
    model.eval()
    with path.open("w" if is_main else "a", encoding="utf-8") as file, precision:
        starts = range(0, len(dataset), batch_size)
        for start in track(starts, description="Predicting", disable=not is_main, transient=True):
            rows = dataset[start : start + batch_size]
            pairs = list(map(split_sample, rows["input_ids"], rows["labels"]))
            texts = generate_texts(model, tokenizer, [prompt for prompt, _ in pairs], config=config)
            for line in _lines(pairs, texts, tokenizer) if is_main else ():
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
    return len(dataset)


def split_sample(input_ids: Sequence[int], labels: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return the ids before the last trained span, and those of the span."""
    end = max((n for n, label in enumerate(labels) if label != IGNORE_INDEX), default=-1) + 1
    start = end
    while start > 0 and labels[start - 1] != IGNORE_INDEX:
        start -= 1
    return list(input_ids[:start]), list(input_ids[start:end])


def _lines(
    pairs: Sequence[tuple[list[int], list[int]]],
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
) -> Iterator[Mapping[str, Any]]:
    for (prompt, label), text in zip(pairs, texts, strict=True):
        yield {
            "prompt": tokenizer.decode(prompt, skip_special_tokens=False),
            "label": tokenizer.decode(label, skip_special_tokens=True),
            "predict": text,
        }
