"""Real DeepSpeed processes: two CPU ranks train exactly what one process trains."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import losses

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def run(command: list[str], *, cache: Path) -> None:
    env = {**os.environ, "LLMTUNER_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


def flags(model_dir: Path, data_dir: Path, output_dir: Path, *more: str) -> list[str]:
    return [
        "src/train_bash.py", "--stage", "sft", "--do_train", "--model_name_or_path", str(model_dir),
        "--dataset_dir", str(data_dir), "--dataset", "qa", "--output_dir", str(output_dir),
        "--learning_rate", "1e-2", "--max_steps", "4", "--logging_steps", "1", "--save_steps", "2",
        "--lora_rank", "4", "--val_size", "3", "--do_eval", *more,
    ]  # fmt: skip


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.parametrize(
    ("precision", "tolerance"), [("--no_bf16", 1e-5), ("--bf16", 2e-2)], ids=["fp32", "bf16"]
)
def test_two_ranks_equal_one_process(
    model_dir: Path, data_dir: Path, tmp_path: Path, precision: str, tolerance: float
) -> None:
    pytest.importorskip("deepspeed")
    single = tmp_path / "single"
    batch = "--per_device_train_batch_size"
    run(
        [sys.executable, *flags(model_dir, data_dir, single, batch, "8", precision)],
        cache=tmp_path / "cache",
    )
    expected = losses(single)
    for stage in ("2", "3"):
        output_dir = tmp_path / f"zero{stage}"
        run(
            [
                "deepspeed", "--num_gpus", "2", "--master_port", free_port(),
                *flags(model_dir, data_dir, output_dir, batch, "4", precision),
                "--deepspeed", f"configs/ds_z{stage}.json",
            ],
            cache=tmp_path / "cache",
        )  # fmt: skip
        assert losses(output_dir) == pytest.approx(expected, rel=tolerance), stage
        results = [
            json.loads((folder / "eval_results.json").read_text())["eval_loss"]
            for folder in (single, output_dir)
        ]
        assert results[1] == pytest.approx(results[0], rel=tolerance)
        from safetensors.torch import load_file

        weights = load_file(output_dir / "adapter_model.safetensors")
        assert all(tensor.numel() > 0 for tensor in weights.values())


def test_torchrun_equals_one_process(model_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    batch = "--per_device_train_batch_size"
    single, double = tmp_path / "single", tmp_path / "double"
    run(
        [sys.executable, *flags(model_dir, data_dir, single, batch, "8", "--no_bf16")],
        cache=tmp_path / "cache",
    )
    launcher = ["torchrun", "--nproc_per_node", "2", "--master_port", free_port()]
    run(
        [*launcher, *flags(model_dir, data_dir, double, batch, "4", "--no_bf16")],
        cache=tmp_path / "cache",
    )
    assert losses(double) == pytest.approx(losses(single), rel=1e-5)


def test_zero_checkpoints_resume(model_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    output_dir = tmp_path / "out"
    config = ["--deepspeed", "configs/ds_z2.json", "--no_bf16", "--lr_scheduler_type", "constant"]

    def train(steps: str, *more: str) -> None:
        launcher = ["deepspeed", "--num_gpus", "2", "--master_port", free_port()]
        run(
            [
                *launcher,
                *flags(model_dir, data_dir, output_dir, *config, "--max_steps", steps, *more),
            ],
            cache=tmp_path / "cache",
        )

    train("6")
    golden = losses(output_dir)
    train("4", "--overwrite_output_dir")
    train("6", "--resume_from_checkpoint", "true")
    assert losses(output_dir) == pytest.approx(golden, rel=1e-5)


@pytest.mark.parametrize("stage", ["2", "3"])
def test_evaluation_alone_under_a_launcher(
    model_dir: Path, data_dir: Path, tmp_path: Path, stage: str
) -> None:
    pytest.importorskip("deepspeed")
    common = [
        "src/train_bash.py", "--do_eval", "--do_predict", "--max_new_tokens", "2", "--no_bf16",
        "--per_device_eval_batch_size", "5",
        "--model_name_or_path", str(model_dir), "--dataset_dir", str(data_dir), "--dataset", "qa",
    ]  # fmt: skip
    single, double = tmp_path / "single", tmp_path / "double"
    run([sys.executable, *common, "--output_dir", str(single)], cache=tmp_path / "cache")
    launcher = ["deepspeed", "--num_gpus", "2", "--master_port", free_port()]
    flags = ["--deepspeed", f"configs/ds_z{stage}.json", "--output_dir", str(double)]
    run([*launcher, *common, *flags], cache=tmp_path / "cache")
    seen = [
        json.loads((folder / "eval_results.json").read_text())["eval_loss"]
        for folder in (single, double)
    ]
    assert seen[1] == pytest.approx(seen[0], rel=1e-5)
    predictions = [
        (folder / "generated_predictions.jsonl").read_text("utf-8").splitlines()
        for folder in (single, double)
    ]
    assert len(predictions[0]) == 24
    assert predictions[1] == predictions[0], "each batch has its own seed, whoever answers it"
    assert not list(double.glob("*.partial*"))
