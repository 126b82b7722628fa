"""Say what a training run will need: memory, time, tokens, steps and disk; nothing is trained."""

import json
from collections.abc import Sequence

from llmtuner.cli.options import parse_or_help
from llmtuner.extras.libraries import loading_libraries


def run(argv: Sequence[str]) -> int:
    """Plan the run that `llmtuner train` with the same words would make."""
    config = parse_or_help("plan", argv)
    if config is None:
        return 0
    with loading_libraries():  # only now: --help must not wait for torch
        from llmtuner.cli.plan_print import print_plan
        from llmtuner.train.plan.make import make_plan

    plan = make_plan(config)
    if config.showing.json:
        print(json.dumps(plan.to_dict(), ensure_ascii=False, allow_nan=False))
    else:
        print_plan(plan)
    return 0
