"""Stopping, resuming and refusing: nothing is lost, nothing is overwritten unasked."""

from pathlib import Path

import pytest

from llmtuner.cli.main import main

from .conftest import Train, losses, read_json


def test_resumed_equals_uninterrupted(train: Train) -> None:
    golden = train("--max_steps", "9", "--lora_dropout", "0.1", name="golden")
    flags = ["--lora_dropout", "0.1", "--save_steps", "2"]
    interrupted = train(*flags, "--max_steps", "4", name="run")
    train(*flags, "--max_steps", "9", "--resume_from_checkpoint", "true", name="run")
    assert losses(interrupted) == losses(golden)
    weights = "adapter_model.safetensors"
    assert (interrupted / weights).read_bytes() == (golden / weights).read_bytes()
    report = read_json(interrupted / "run.json")
    assert (
        report["metrics"]["train_supervised_tokens_seen"]
        == (read_json(golden / "run.json")["metrics"]["train_supervised_tokens_seen"])
    )


def test_an_unfinished_run_goes_on_by_itself(train: Train) -> None:
    output_dir = train("--max_steps", "4", "--save_steps", "2")
    mark_as_killed(output_dir)
    train("--max_steps", "6", "--save_steps", "2")
    assert len(losses(output_dir)) == 6


def test_a_finished_run_is_not_overwritten(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    output_dir = train("--max_steps", "2")
    train("--max_steps", "2", code=2)
    assert "--overwrite_output_dir" in capsys.readouterr().err
    train("--max_steps", "3", "--overwrite_output_dir")
    assert len(losses(output_dir)) == 3


def test_a_foreign_folder_is_not_written_into(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    train("--max_steps", "2", code=2)
    assert "thesis.txt" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_passed_over(train: Train) -> None:
    output_dir = train("--max_steps", "4", "--save_steps", "2")
    mark_as_killed(output_dir)
    damage(output_dir / "checkpoint-4" / "optimizer.pt")
    train("--max_steps", "5", "--save_steps", "2")
    assert (output_dir / "checkpoint-4").is_dir()
    assert read_json(output_dir / "run.json")["metrics"]["epoch"] == pytest.approx(5 / 6)


def test_only_damaged_checkpoints_stop_the_run(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    output_dir = train("--max_steps", "4", "--save_steps", "2")
    mark_as_killed(output_dir)
    damage(output_dir / "checkpoint-4" / "optimizer.pt")
    (output_dir / "checkpoint-2" / "scheduler.pt").unlink()
    train("--max_steps", "5", code=4)
    assert "scheduler.pt is missing" in capsys.readouterr().err


def test_rotation_keeps_the_newest_the_best_and_everything_foreign(train: Train) -> None:
    output_dir = train("--max_steps", "2", "--save_steps", "2", "--save_total_limit", "1")
    mark_as_killed(output_dir)
    (output_dir / "checkpoint-golden").mkdir()
    (output_dir / "checkpoint-1").mkdir()
    train(
        "--max_steps", "6", "--save_steps", "1", "--save_total_limit", "2", "--val_size", "4",
        "--eval_strategy", "steps", "--eval_steps", "1", "--load_best_model_at_end",
        "--learning_rate", "1e-4",
    )  # fmt: skip
    names = {path.name for path in output_dir.glob("checkpoint-*")}
    assert {"checkpoint-golden", "checkpoint-1", "checkpoint-5", "checkpoint-6"} <= names
    assert "checkpoint-3" not in names


def mark_as_killed(output_dir: Path) -> None:
    """Make the run look as if its process had died before the end."""
    path = output_dir / "run.json"
    path.write_text(path.read_text("utf-8").replace('"finished"', '"running"'), "utf-8")


def damage(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def test_an_evaluation_keeps_the_record_of_the_training(
    train: Train, model_dir: Path, data_dir: Path
) -> None:
    output_dir = train("--max_steps", "2")
    before = read_json(output_dir / "run.json")
    argv = [
        "train", "--do_eval", "--model_name_or_path", str(model_dir), "--adapter_name_or_path",
        str(output_dir), "--dataset_dir", str(data_dir), "--dataset", "few", "--output_dir",
        str(output_dir), "--no_bf16",
    ]  # fmt: skip
    assert main(argv) == 0
    assert read_json(output_dir / "run.json") == before
    assert read_json(output_dir / "eval_run.json")["metrics"]["eval_loss"] > 0


def test_the_best_checkpoint_is_saved_and_kept(train: Train) -> None:
    output_dir = train(
        "--finetuning_type", "full", "--val_size", "4", "--eval_strategy", "steps", "--eval_steps",
        "1", "--save_steps", "4", "--max_steps", "8", "--load_best_model_at_end",
        "--learning_rate", "0.15", "--save_total_limit", "1",
    )  # fmt: skip
    state = read_json(output_dir / "trainer_state.json")
    evaluated = {e["step"]: e["eval_loss"] for e in state["log_history"] if "eval_loss" in e}
    best = min(evaluated, key=lambda step: evaluated[step])
    assert Path(state["best_model_checkpoint"]).name == f"checkpoint-{best}"
    weights = "model.safetensors"
    saved = (output_dir / weights).read_bytes()
    assert saved == (output_dir / f"checkpoint-{best}" / weights).read_bytes()


def test_starting_over_leaves_no_old_results(train: Train) -> None:
    output_dir = train("--val_size", "4", "--do_eval", "--max_steps", "2")
    train("--max_steps", "2", "--overwrite_output_dir", "--finetuning_type", "full")
    assert (output_dir / "model.safetensors").is_file()
    assert not (output_dir / "adapter_model.safetensors").exists()
    assert "eval_loss" not in read_json(output_dir / "all_results.json")


@pytest.mark.parametrize(
    "flags", [["--dataset", "few"], ["--lora_rank", "2"], ["--finetuning_type", "full"]]
)
def test_other_settings_are_not_resumed(
    train: Train, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    train("--max_steps", "2", "--save_steps", "1")
    train("--max_steps", "4", "--resume_from_checkpoint", "true", *flags, code=4)
    assert "other settings" in capsys.readouterr().err


def test_weights_without_optimizer_are_not_resumed(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    train("--max_steps", "2", "--save_steps", "1", "--save_only_model")
    train("--max_steps", "4", "--resume_from_checkpoint", "true", code=4)
    assert "save_only_model" in capsys.readouterr().err
