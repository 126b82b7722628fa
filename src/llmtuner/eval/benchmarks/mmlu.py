"""MMLU: 57 subjects in English; its CSV files have no header, and their first row is a question."""

from pathlib import Path

from llmtuner.eval.benchmark import COMMON_WORDINGS, Benchmark, read_subjects

BENCHMARK = Benchmark(
    name="mmlu",
    version=1,
    splits=("validation", "test"),
    lang="en",
    wordings=COMMON_WORDINGS,
    subjects=read_subjects(Path(__file__).with_suffix(".json")),
    columns=("question", "A", "B", "C", "D", "answer"),
    origin="the data set cais/mmlu of the Hugging Face hub (MIT)",
)
