"""Layouts of a selfcheck in CPU processes of their own, which share every step."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException, spawn

from llmtuner.extras.env import become_process
from llmtuner.extras.errors import DistributedError, LlmtunerError
from llmtuner.extras.files import read_json, write_json, write_text
from llmtuner.extras.logs import set_up_logs
from llmtuner.train.quiet import quiet_loading
from llmtuner.train.rank_group import start_ranks
from llmtuner.train.selfcheck_compare import StepResult, TensorDifference
from llmtuner.train.selfcheck_layouts import (
    CheckLayout,
    CheckTask,
    load_samples,
    run_layout,
)


def run_in_processes(
    task: CheckTask, layout: CheckLayout, *, reference: Sequence[StepResult] | None
) -> list[StepResult]:
    """Run a layout in `layout.num_processes` new processes.

    Returns:
        For each step the result of the process that differs most.

    Raises:
        DistributedError: a process failed.
    """
    arguments = (task, layout, None if reference is None else list(reference))
    started = spawn(_work, args=arguments, nprocs=layout.num_processes, join=False)
    try:
        while not started.join():
            pass
    except (ProcessExitedException, ProcessRaisedException) as error:
        told = [path.read_text("utf-8") for path in task.folder.glob("error-*")]
        raise DistributedError(
            f"A process of layout {layout.name} failed.",
            got=told[0] if told else str(error).strip().splitlines()[-1],
            fix="see its messages above; with --debug also the traceback",
        ) from error
    finally:  # an interruption reaches only this process
        for process in started.processes:
            process.kill()
            process.join()
    ranks = [read_results(_results_of(task, rank)) for rank in range(layout.num_processes)]
    return [max(same_step, key=lambda result: result.excess) for same_step in zip(*ranks)]  # noqa: B905


def read_results(path: Path) -> list[StepResult]:
    """Return what a process wrote about its steps."""
    rows: list[dict[str, Any]] = read_json(path)
    return [StepResult(**row | {"worst": TensorDifference(**row["worst"])}) for row in rows]


def _work(
    rank: int, task: CheckTask, layout: CheckLayout, reference: list[StepResult] | None
) -> None:
    """Be one process of the layout."""
    size = layout.num_processes
    num_threads = max(1, torch.get_num_threads() // size)
    become_process(rank, world_size=size, num_threads=num_threads)
    torch.set_num_threads(num_threads)
    set_up_logs()
    try:
        if size > 1:
            meeting = f"file://{task.folder / 'meeting'}"  # a file needs no free port
            start_ranks(init_method=meeting, rank=rank, world_size=size)
        with quiet_loading():
            samples = load_samples(task.config)
            results = run_layout(task, layout, samples, reference=reference)
    except LlmtunerError as error:
        write_text(task.folder / f"error-{rank}", str(error))
        raise
    write_json(_results_of(task, rank), [asdict(result) for result in results])
    if size > 1:
        dist.destroy_process_group()


def _results_of(task: CheckTask, rank: int) -> Path:
    return task.folder / f"results-{rank}.json"
