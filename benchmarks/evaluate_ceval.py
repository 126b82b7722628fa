"""How long scoring takes: three medical subjects of C-Eval, 5 examples, with and without sharing.

    python benchmarks/evaluate_ceval.py --model MODEL --task_dir ceval.zip
    python benchmarks/evaluate_ceval.py --model MODEL --task_dir evaluation --task medical --whole

Imports and loading are timed apart. `--whole` also reads every prompt alone and whole, and says how
far the probabilities are apart.
"""

import os
import statistics
import sys
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path

_STARTED = time.perf_counter()

from llmtuner.eval.asking import Costs, ask  # noqa: E402 (imports are timed)
from llmtuner.eval.reader import load_reader  # noqa: E402
from llmtuner.eval.results import Answer, scores_by_category  # noqa: E402
from llmtuner.eval.sources import load_benchmark  # noqa: E402
from llmtuner.eval.task import find_task  # noqa: E402
from llmtuner.hparams.config import RunConfig  # noqa: E402
from llmtuner.hparams.parser import parse  # noqa: E402

_MEDICAL = "basic_medicine,clinical_medicine,physician"


def main() -> int:
    """Measure and print; return 1 if `--whole` finds another prediction in float32."""
    import_s = time.perf_counter() - _STARTED
    options = _options()
    config = _config(options)
    started = time.perf_counter()
    reader = load_reader(config)
    load_s = time.perf_counter() - started
    task = find_task(str(config.evaluating.task), config.data.split)
    data = load_benchmark(
        task.benchmark,
        Path(config.evaluating.task_dir),
        split=task.split,
        num_shots=config.evaluating.n_shot,
        wanted=config.evaluating.subjects,
    )
    print(f"imports {import_s:.1f} s, loading {load_s:.1f} s, {reader.model.dtype}, {_machine()}")
    seconds = []
    for number in range(options.repeats):
        answers, costs = ask(config, task.benchmark, data, reader)
        seconds.append(costs.seconds)
        print(f"run {number + 1}: {costs.seconds:.2f} s, {_machine()}")
    print(f"scoring {len(answers)} questions: median {statistics.median(seconds):.2f} s")
    print(_tokens(costs))
    print(f"accuracy {scores_by_category(answers)[0].line().strip()}")
    if not options.whole:
        return 0
    alone = _config(options, "--no_share_prefix", "--batch_size", "1")
    whole, whole_costs = ask(alone, task.benchmark, data, reader)
    num_changed, distance = _difference(answers, whole)
    print(
        f"one by one and whole: {whole_costs.seconds:.2f} s, {num_changed} other predictions, "
        f"probabilities at most {distance:.1e} apart"
    )
    return int(num_changed > 0 and options.dtype == "float32")


def _options() -> Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--task_dir", required=True, help="folder or zip of the benchmark")
    parser.add_argument("--task", default="ceval", help="benchmark (ceval)")
    parser.add_argument("--subjects", help=f"subjects ({_MEDICAL} of ceval)")
    parser.add_argument("--dtype", default="auto", help="type of the weights (auto)")
    parser.add_argument("--batch_size", default="8", help="questions per pass (8)")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs (3)")
    parser.add_argument("--whole", action="store_true", help="also read every prompt whole")
    return parser.parse_args()


def _config(options: Namespace, *more: str) -> RunConfig:
    subjects = options.subjects or (_MEDICAL if options.task == "ceval" else None)
    words = [
        *("--model_name_or_path", options.model, "--task", options.task),
        *("--task_dir", options.task_dir, "--infer_dtype", options.dtype),
        *("--batch_size", options.batch_size, *(("--subjects", subjects) if subjects else ())),
    ]
    return parse("eval", [*words, *more])


def _tokens(costs: Costs) -> str:
    saved = costs.num_tokens_whole - costs.num_tokens_read
    share = 100 * saved / costs.num_tokens_whole
    return (
        f"tokens: {costs.num_tokens_read:,} read, {saved:,} saved of {costs.num_tokens_whole:,} "
        f"({share:.0f} %)"
    )


def _difference(some: list[Answer], others: list[Answer]) -> tuple[int, float]:
    pairs = list(zip(some, others, strict=True))
    distance = max(
        abs(one.probabilities[letter] - other.probabilities[letter])
        for one, other in pairs
        for letter in one.probabilities
    )
    return sum(one.prediction != other.prediction for one, other in pairs), distance


def _machine() -> str:
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    return f"{threads} threads, load {os.getloadavg()[0]:.1f}"


if __name__ == "__main__":
    sys.exit(main())
