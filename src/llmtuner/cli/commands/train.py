"""Train a model: pre-training or supervised fine-tuning, full, freeze, LoRA or QLoRA."""

from collections.abc import Sequence

from llmtuner.cli.options import parse_or_help

_SHOWN = (
    *("train_loss", "eval_loss", "eval_perplexity"),
    *("predict_bleu-4", "predict_rouge-1", "predict_rouge-2", "predict_rouge-l"),
)


def run(argv: Sequence[str]) -> int:
    """Parse, train, and say where the results are."""
    config = parse_or_help("train", argv)
    if config is None:
        return 0
    from llmtuner.train.stages import STAGES  # only now: --help must not wait for torch

    report = STAGES.get(config.finetuning.stage)(config)
    if report.status == "finished":
        print(f"Done in {report.wall_time_s:.0f} s. Everything is in {report.output_dir}")
        for name in _SHOWN:
            if name in report.metrics:
                print(f"  {name}: {report.metrics[name]:.4f}")
    return 0
