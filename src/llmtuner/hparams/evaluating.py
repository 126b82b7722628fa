"""Options of benchmark evaluation."""

from typing import Literal

from pydantic.dataclasses import dataclass

from llmtuner.hparams.arg import arg


@dataclass(frozen=True, kw_only=True)
class EvaluatingArgs:
    """Which benchmark to run, and how."""

    task: str | None = arg(None, "Benchmark, with or without its split (mmlu, mmlu_test).")
    task_dir: str = arg("evaluation", "Folder with the benchmark files.")
    batch_size: int = arg(4, "Questions per batch.", low=1)
    lang: Literal["en", "zh"] = arg("en", "Language of the prompt.")
    n_shot: int = arg(5, "Worked examples before each question.", low=0)
    save_dir: str | None = arg(None, "Folder for the results; it must not exist yet.")
    download_mode: Literal[
        "reuse_dataset_if_exists", "reuse_cache_if_exists", "force_redownload"
    ] = arg("reuse_dataset_if_exists", "What to do with a benchmark that is already there.")
