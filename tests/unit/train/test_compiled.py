"""torch.compile on flat batches: the same losses, and no new graph for every new length."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import make_trainer, samples, tiny_llama
from torch._dynamo.utils import counters
from transformers import TrainerCallback

# two trained tokens at least in each: one alone is a shape of its own to the compiler
LENGTHS = [20, 9, 17, 12, 22, 18, 8, 21, 19, 11, 15, 10, 13, 14, 23, 16]


@pytest.fixture(autouse=True)
def _a_fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class GraphCounter(TrainerCallback):
    """Notes how many graphs there are after each step."""

    def __init__(self) -> None:
        self.graphs: list[int] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.graphs.append(counters["stats"]["unique_graphs"])


def losses(tmp_path: Path, counter: GraphCounter | None = None, **values: Any) -> list[float]:
    trainer = make_trainer(
        tmp_path,
        train=samples(LENGTHS),
        model=tiny_llama(),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        max_steps=8,
        **values,
    )
    if counter is not None:
        trainer.add_callback(counter)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_compiled_model_trains_the_same(tmp_path: Path, backend: str) -> None:
    counter = GraphCounter()
    compiled = losses(tmp_path, counter, torch_compile=True, torch_compile_backend=backend)
    assert compiled == pytest.approx(losses(tmp_path), rel=1e-5)
    assert counter.graphs[0] > 0
    # the second length makes graphs for all lengths; thirteen other lengths come after it
    assert counter.graphs[-1] == counter.graphs[1]
