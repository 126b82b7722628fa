"""Options of benchmark evaluation."""

from typing import Literal

from pydantic.dataclasses import dataclass

from llmtuner.hparams.arg import CHECKED_WHEN_MADE, arg


@dataclass(frozen=True, kw_only=True, config=CHECKED_WHEN_MADE)
class EvaluatingArgs:
    """Which benchmark to run, and how."""

    task: str | None = arg(
        None, "Benchmark, with or without its split (mmlu, mmlu_test): ceval, cmmlu, medical, mmlu."
    )
    task_dir: str = arg(
        "evaluation", "Folder with the benchmark's folder or zip file, or that zip file itself."
    )
    subjects: tuple[str, ...] | None = arg(
        None, "Subjects to ask, with commas between. Unset: all that have a file."
    )
    scoring: Literal["likelihood", "generate"] = arg(
        "likelihood", "Take the likeliest letter, or let the model write and read its answer."
    )
    batch_size: int = arg(4, "Questions per batch.", low=1)
    lang: Literal["en", "zh"] = arg(
        "en", "Language of the prompt; where it is not given, that of the benchmark counts."
    )
    n_shot: int = arg(
        5,
        "Worked examples before each question: the first rows of the dev file, or, where --seed is "
        "given, rows that it draws once for each subject.",
        low=0,
    )
    share_prefix: bool = arg(True, "Read the examples once for all questions of a subject.")
    save_dir: str | None = arg(None, "Folder for the results; it must not exist yet.")
    compare: str | None = arg(
        None, "The results.json of another model, to test whether the difference is chance."
    )
    fail_below: float | None = arg(
        None, "Exit with code 9 if the average is lower.", unit="percent", low=0, high=100
    )
    download_mode: Literal[
        "reuse_dataset_if_exists", "reuse_cache_if_exists", "force_redownload"
    ] = arg("reuse_dataset_if_exists", "No effect: benchmarks are read from files.")
