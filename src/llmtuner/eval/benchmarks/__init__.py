"""Benchmarks, one file each; what a file must say stands in `eval/benchmark.py`."""

from llmtuner.extras.registry import Registry

BENCHMARKS = Registry("benchmark", "llmtuner.eval.benchmarks", exports="BENCHMARK")
