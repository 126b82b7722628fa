"""Train a model: pre-training or supervised fine-tuning, full, freeze, LoRA or QLoRA."""

from collections.abc import Sequence

from llmtuner.cli.options import parse_or_help
from llmtuner.extras.env import accelerate_starts_deepspeed
from llmtuner.extras.libraries import absent, loading_libraries
from llmtuner.hparams.config import RunConfig

_SHOWN = (
    *("train_loss", "eval_loss", "eval_perplexity"),
    *("predict_bleu-4", "predict_rouge-1", "predict_rouge-2", "predict_rouge-l"),
)


def run(argv: Sequence[str]) -> int:
    """Parse, train, and say where the results are."""
    config = parse_or_help("train", argv)
    if config is None:
        return 0
    with loading_libraries():  # only now: --help must not wait for torch
        from llmtuner.train.stages import STAGES

        run_stage = STAGES.get(config.finetuning.stage)
    with absent(*_unused_libraries(config)):
        report = run_stage(config)
    if report.status == "finished":
        print(f"Done in {report.wall_time_s:.0f} s. Everything is in {report.output_dir}")
        for name in _SHOWN:
            if name in report.metrics:
                print(f"  {name}: {report.metrics[name]:.4f}")
    return 0


def _unused_libraries(config: RunConfig) -> tuple[str, ...]:
    """Name what accelerate 1.15 would import, where installed, to ask if the model is of its kind.

    To be removed when `extract_model_from_parallel` asks only for libraries that are loaded.
    """
    uses_deepspeed = config.train.deepspeed is not None or accelerate_starts_deepspeed()
    return () if uses_deepspeed else ("deepspeed",)
