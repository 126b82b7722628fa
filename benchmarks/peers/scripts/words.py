"""The command line that the scripts here share."""

from pathlib import Path

from harness.jobs import Launch


def script_words(name: str, launch: Launch) -> list[str]:
    """Return the path of a script and its arguments."""
    task = launch.task
    return [
        str(Path(__file__).with_name(name)),
        *("--model", str(task.model), "--tokens", str(task.data_dir / "tokens.jsonl")),
        *("--method", task.method, "--steps", str(task.steps)),
        *("--batch_size", str(task.batch_size), "--learning_rate", str(task.learning_rate)),
        *("--lora_rank", str(task.lora_rank), "--lora_alpha", str(task.lora_alpha)),
        *("--cutoff_tokens", str(task.cutoff_tokens), "--seed", str(task.seed)),
        *("--output_dir", str(launch.output_dir / "out")),
    ]
