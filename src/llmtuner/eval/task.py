"""Which benchmark and which split: `--task ceval --split test`, or `--task ceval_test`."""

from dataclasses import dataclass

from llmtuner.eval.benchmark import SPLITS, Benchmark
from llmtuner.eval.benchmarks import BENCHMARKS
from llmtuner.extras.errors import ConfigError


@dataclass(frozen=True)
class Task:
    """What is asked.

    Attributes:
        benchmark: an entry of `eval/benchmarks`.
        split: one of its splits.
    """

    benchmark: Benchmark
    split: str


def find_task(name: str, split: str | None) -> Task:
    """Return benchmark and split.

    Args:
        name: of the benchmark, with or without its split.
        split: what `--split` says.

    Raises:
        ConfigError: there is no such benchmark or split, or the two options contradict each other.
    """
    head, _, tail = name.rpartition("_")
    in_name = None
    if name not in BENCHMARKS.names() and head and tail in SPLITS:
        name, in_name = head, tail
    try:
        benchmark: Benchmark = BENCHMARKS.get(name)
    except ConfigError as error:
        raise error.at(f"--task {name}") from None
    asked = [word for word in (in_name, split) if word is not None]
    chosen = [SPLITS.get(word.lower(), word) for word in asked] or [benchmark.splits[0]]
    if len(set(chosen)) > 1:
        problem = "--task and --split name different splits."
        raise ConfigError(problem, got=asked, fix="drop one of the two")
    if chosen[0] not in benchmark.splits:
        raise ConfigError(
            f"The benchmark {name} has no such split.",
            where="--split",
            got=asked[0],
            allowed=benchmark.splits,
        )
    return Task(benchmark, chosen[0])
