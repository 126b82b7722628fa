"""What the probe counts and times inside a contender."""

import json

import pytest
import torch
import training_probe as probe

INFINITE = torch.finfo(torch.float32).min


def mask_4d(*, seen: list[list[int]]) -> torch.Tensor:
    return torch.where(torch.tensor(seen)[None, None] == 1, 0.0, INFINITE)


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        pytest.param(
            {
                "input_ids": torch.zeros(2, 4),
                "labels": torch.tensor([[-100, -100, 5, 6], [-100, 7, -100, -100]]),
                "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
            },
            {"tokens": 6, "slots": 8, "supervised": 3, "samples": 2},
            id="padded",
        ),
        pytest.param(
            {
                "input_ids": torch.zeros(1, 5),
                "targets": torch.zeros(2),
                "cu_seq_lens_q": torch.tensor([0, 2, 5]),
            },
            {"tokens": 5, "slots": 5, "supervised": 2, "samples": 2},
            id="end to end",
        ),
        pytest.param(
            {"input_ids": torch.zeros(3, 2), "targets": torch.zeros(3), "attention_mask": None},
            {"tokens": 6, "slots": 6, "supervised": 3, "samples": 3},
            id="kept, but padded",
        ),
        pytest.param(
            {
                "input_ids": torch.zeros(1, 5),
                "labels": torch.tensor([[-100, 1, -100, 2, -100]]),
                "attention_mask": torch.tensor([[1, 1, 2, 2, 0]]),
            },
            {"tokens": 4, "slots": 5, "supervised": 2, "samples": 2},
            id="numbers of packed samples",
        ),
        pytest.param(
            {
                "input_ids": torch.zeros(1, 3),
                "labels": torch.tensor([[-100, 1, -100]]),
                "attention_mask": mask_4d(seen=[[1, 0, 0], [1, 1, 0], [0, 0, 0]]),
            },
            {"tokens": 2, "slots": 3, "supervised": 1, "samples": 1},
            id="four dimensions, added",
        ),
        pytest.param(
            {
                "input_ids": torch.zeros(1, 3),
                "labels": torch.tensor([[-100, 1, -100]]),
                "attention_mask": mask_4d(seen=[[1, 0, 0], [1, 1, 0], [0, 0, 0]]) == 0,
            },
            {"tokens": 2, "slots": 3, "supervised": 1, "samples": 1},
            id="four dimensions, true or false",
        ),
    ],
)
def test_a_batch_is_counted(batch, expected):
    assert probe.count(batch) == expected


class Callback:
    """Stands for transformers' base class."""


class Trainer:
    """A training loop of two micro-batches a step, as the probe meets it."""

    def __init__(self, losses: list[float]) -> None:
        self.losses = losses
        self.callbacks: list = []

    def add_callback(self, callback: Callback) -> None:
        self.callbacks.append(callback)

    def training_step(self, model, inputs, num_items_in_batch=None):
        return torch.tensor(self.losses.pop(0))

    def train(self) -> None:
        batch = {"input_ids": torch.zeros(1, 4), "labels": torch.tensor([[-100, 1, 2, 3]])}
        self.callbacks[0].on_train_begin(None, None, None)
        while self.losses:
            self.training_step(None, batch)
            self.training_step(None, batch, num_items_in_batch=6)
            self.callbacks[0].on_step_end(None, None, None)
        self.callbacks[0].on_train_end(None, None, None)


def test_a_trainer_is_watched(tmp_path, monkeypatch):
    monkeypatch.setenv("TRAINING_PROBE_DIR", str(tmp_path))
    monkeypatch.setenv("TRAINING_PROBE_START", repr(probe.time.monotonic() - 5))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("atexit.register", lambda write: None)
    watched = type("Watched", (Trainer,), {})
    probe.watch(watched, Callback)
    watched([1.0, 2.0, 0.5, 0.25]).train()
    found = json.loads((tmp_path / "probe-1.json").read_text())
    assert [step["loss"] for step in found["steps"]] == [3.0, 0.75]
    assert [step["tokens"] for step in found["steps"]] == [8, 8]
    assert 5 <= found["begin_s"] <= found["first_step_s"] < 6
    assert found["peak_bytes"] > 10**7
    assert found["versions"]["torch"] == torch.__version__


def test_only_the_trainer_module_is_touched():
    assert probe.TrainerFinder.find_spec("transformers.trainer_utils") is None
