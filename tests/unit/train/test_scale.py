"""Formulas of traffic, memory and checkpoints over ranks, against counting by hand."""

import pytest

from llmtuner.train.scale import Model, kept_bytes, saved_bytes, step_seconds, traffic

MODEL = Model(sizes=(1000, 10), weight_bytes=2, gradient_bytes=2, state_bytes=12)
LARGE = Model(sizes=(2**20,) * 64)


@pytest.mark.parametrize("stage", range(4))
def test_one_rank_sends_nothing_and_keeps_everything(stage: int) -> None:
    assert traffic(MODEL, stage=stage, ranks=1).sent(1) == 0
    kept = kept_bytes(MODEL, stage=stage, ranks=1)
    assert (kept.weights, kept.gradients, kept.optimizer) == (2020, 2020, 12_120)
    assert kept.total == 16_160


@pytest.mark.parametrize(
    ("stage", "whole"), [(0, (2020, 0, 0)), (1, (2020, 2032, 0)), (2, (6060, 2032, 0))]
)
def test_traffic_up_to_zero_2(stage: int, whole: tuple[float, ...]) -> None:
    # 1,010 numbers are filled up to 1,016, a multiple of 2 x 4 ranks
    found = traffic(MODEL, stage=stage, ranks=4, passes=3)
    assert (found.all_reduced, found.gathered, found.scattered) == whole


def test_zero_3_gathers_twice_a_pass_and_small_weights_once_a_step() -> None:
    found = traffic(MODEL, stage=3, ranks=4, passes=3, persistent_below=10)
    assert found.gathered == 2 * 3 * 1000 * 2 + 12 * 2  # 10 numbers on 4 ranks are 12
    assert found.scattered == 3 * 1012 * 2
    assert found.sent(4) == 0.75 * (found.gathered + found.scattered)


@pytest.mark.parametrize("ranks", [1, 2, 8, 64, 512, 4096])
def test_growth_over_ranks(ranks: int) -> None:
    weights = 2**26
    kept = [kept_bytes(LARGE, stage=stage, ranks=ranks).total for stage in range(4)]
    expected = [16, 4 + 12 / ranks, 2 + 14 / ranks, 16 / ranks]
    assert kept == [share * weights for share in expected]
    sent = [traffic(LARGE, stage=stage, ranks=ranks).sent(ranks) for stage in range(4)]
    assert sent == [times * 2 * weights * (ranks - 1) / ranks for times in (2, 3, 3, 3)]
    saved = [saved_bytes(LARGE, stage=stage, ranks=ranks) for stage in range(4)]
    total = [one.per_rank * ranks + one.by_first for one in saved]
    assert total == [share * weights for share in (16, 16, 16, 14)]


def test_seconds() -> None:
    saved = saved_bytes(LARGE, stage=3, ranks=64)
    slow_disk = saved.seconds(64, rank_speed=1e9, shared_speed=2e9)
    assert slow_disk == pytest.approx(14 * 2**26 / 2e9)
    assert saved.seconds(64, rank_speed=1e9, shared_speed=1e12) == pytest.approx(
        (2 + 12 / 64) * 2**26 / 1e9
    )
    speeds = {"speed": 10.0, "link_speed": 5.0}
    assert step_seconds(100, 20, **speeds) == 14
    assert step_seconds(100, 20, **speeds, overlap=1) == 10
    assert step_seconds(10, 20, **speeds, overlap=1) == 4
