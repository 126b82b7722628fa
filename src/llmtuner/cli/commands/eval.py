"""Score a model, with or without adapter, on a multiple-choice benchmark."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmtuner.cli.options import parse_or_help
from llmtuner.extras.errors import ScoreError
from llmtuner.extras.libraries import loading_libraries

if TYPE_CHECKING:
    from llmtuner.eval.evaluate import Costs


def run(argv: Sequence[str]) -> int:
    """Evaluate, print the scores, and fail if they are lower than allowed.

    Raises:
        ScoreError: the average is below `--fail_below`; the results are written all the same.
    """
    config = parse_or_help("eval", argv)
    if config is None:
        return 0
    with loading_libraries():  # only now: --help must not wait for torch
        from llmtuner.eval.evaluate import run_evaluation

    report = run_evaluation(config)
    print("\n".join(report.lines))
    print(_costs(report.costs))
    if report.save_dir is not None:
        print(f"Results: {report.save_dir}")
    limit = config.evaluating.fail_below
    if limit is not None and report.percent < limit:
        problem = f"The average is {report.percent:.2f} %."
        raise ScoreError(problem, where="--fail_below", allowed=f"{limit:g} % or more")
    return 0


def _costs(costs: "Costs") -> str:
    line = f"Asked in {costs.seconds:.1f} s"
    saved = costs.num_tokens_whole - costs.num_tokens_read
    if 0 < saved < costs.num_tokens_whole:
        line += f", reading {costs.num_tokens_read:,} tokens instead of {costs.num_tokens_whole:,}"
    return f"{line}."
