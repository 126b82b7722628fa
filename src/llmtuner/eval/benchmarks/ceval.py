"""C-Eval: 52 subjects in Chinese; the answers of its test split are not public."""

from pathlib import Path

from llmtuner.eval.benchmark import COMMON_WORDINGS, Benchmark, read_subjects

BENCHMARK = Benchmark(
    name="ceval",
    version=1,
    splits=("validation", "test"),
    lang="zh",
    wordings=COMMON_WORDINGS,
    subjects=read_subjects(Path(__file__).with_suffix(".json")),
    origin="the data set ceval/ceval-exam of the Hugging Face hub (CC BY-NC-SA 4.0)",
)
