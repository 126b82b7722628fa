"""Options of the data: which rows, which template, how long, how mixed."""

from typing import Literal

from pydantic.dataclasses import dataclass

from llmtuner.hparams.arg import CHECKED_WHEN_MADE, arg


@dataclass(frozen=True, kw_only=True, config=CHECKED_WHEN_MADE)
class DataArgs:
    """Which rows to train on and how to turn them into tokens."""

    dataset: tuple[str, ...] | None = arg(
        None, "Names from dataset_info.json, or paths of data files, with commas between."
    )
    eval_dataset: tuple[str, ...] | None = arg(None, "Data sets to evaluate on.")
    dataset_dir: str = arg("data", "Folder with dataset_info.json.")
    template: str | None = arg(None, "Chat template. Unset: the tokenizer's own.")
    cutoff_len: int = arg(2048, "Longest training sequence.", unit="tokens", low=2)
    truncation: Literal["turns", "llamafactory"] = arg(
        "turns",
        "How longer samples are cut: whole old turns first, never a header (turns), "
        "or by token counts from the right (llamafactory).",
    )
    max_samples: int | None = arg(
        None, "Use at most this many rows of each data set.", unit="rows", low=0
    )
    val_size: float = arg(
        0.0, "Rows held out for evaluation: a fraction below 1, or a count above 1.", low=0
    )
    eval_on_each_dataset: bool = arg(False, "Evaluate every data set on its own.")
    split: str | None = arg(
        None, "Split of hub data sets (train) or of the benchmark (validation)."
    )

    train_on_prompt: bool = arg(False, "Learn the user's words too.")
    mask_history: bool = arg(False, "Learn only the last answer of a conversation.")
    default_system: str | None = arg(None, "System message for rows that have none.")
    enable_thinking: bool | None = arg(
        True, "Reasoning models: true thinks, false answers at once, null follows the data."
    )

    packing: bool | None = arg(
        None, "Lay short samples together in one batch. Unset: on for pt, off for sft."
    )
    neat_packing: bool = arg(False, "Packing without attention between samples, as always here.")
    streaming: bool = arg(False, "Read rows while training; needs max_steps.")
    buffer_size: int = arg(16384, "Rows to shuffle among when streaming.", unit="rows", low=1)
    mix_strategy: Literal["concat", "interleave_under", "interleave_over"] = arg(
        "concat", "How several data sets are joined."
    )
    interleave_probs: tuple[float, ...] | None = arg(
        None, "Share of each data set when interleaving, with commas between."
    )

    overwrite_cache: bool = arg(False, "Tokenise again even if a cache is there.")
    preprocessing_num_workers: int | None = arg(
        None, "Processes that tokenise. Unset: one for each core when there are many rows.", low=1
    )
    tokenized_path: str | None = arg(
        None, "Folder of tokenised data: read if there, else written (and the run ends)."
    )
    encoding: str | None = arg(None, "Text encoding of the files. Unset: UTF-8 or GB18030.")
    custom_formats: str | None = arg(None, "Folder with your own dataset formats (*.py).")
    on_bad_row: Literal["error", "skip"] = arg("error", "Stop at a bad row, or skip and count it.")
    max_bad_rows: float = arg(
        0.01,
        "Share of the rows of a data set that may be skipped; more stop the run. Above 0, up to "
        "two bad rows are let through in any set of which half is good.",
        low=0,
        high=1,
    )
