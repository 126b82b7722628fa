"""CMMLU: 67 subjects in Chinese, with dev and test files only."""

from pathlib import Path

from llmtuner.eval.benchmark import COMMON_WORDINGS, Benchmark, read_subjects

BENCHMARK = Benchmark(
    name="cmmlu",
    version=1,
    splits=("test",),
    lang="zh",
    wordings=COMMON_WORDINGS,
    subjects=read_subjects(Path(__file__).with_suffix(".json")),
    origin="the data set haonan-li/cmmlu of the Hugging Face hub (CC BY-NC 4.0)",
)
