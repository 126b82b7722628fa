"""A small medical benchmark of this project, in Chinese and English, to run without a download."""

from llmtuner.eval.benchmark import COMMON_WORDINGS, Benchmark

BENCHMARK = Benchmark(
    name="medical",
    version=1,
    splits=("validation", "test"),
    lang="zh",
    wordings=COMMON_WORDINGS,
    origin="the folder evaluation/medical of this project",
)
