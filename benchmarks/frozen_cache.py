"""What keeping the frozen layers' output saves: the same run without and with it, and the ratio.

    python benchmarks/frozen_cache.py --model models/smollm2-135m-instruct

Both train the last layers for some epochs in a process of their own. Steps of the first epoch (in
which the cache is filled) and of the later ones are told apart; losses are compared step by step.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

# Writes the seconds of every step beside the losses.
TRAIN = """
import json, sys
from pathlib import Path
from llmtuner.cli.main import main
from llmtuner.train import workflow
add_actual, out = workflow.add_actual, Path(sys.argv.pop(1))
def noted(plan, clock, **named):
    out.write_text(json.dumps(clock.seconds))
    return add_actual(plan, clock, **named)
workflow.add_actual = noted
raise SystemExit(main(sys.argv[1:]))
"""


def main() -> None:
    """Run both and print medians of a step, their ratio, and how far the losses are apart."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", default="data/tcm_alpaca.json")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--layers", type=int, default=2, help="layers that learn")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        plain = run(given, Path(folder) / "plain", "0")
        cached = run(given, Path(folder) / "cached", "10")
    per_epoch = len(plain[0]) // given.epochs
    for name, part in (("first epoch", slice(1, per_epoch)), ("later", slice(per_epoch, None))):
        before, after = (statistics.median(seconds[part]) for seconds, _ in (plain, cached))
        print(f"{name}: {before:.3f} s a step without, {after:.3f} s with: {before / after:.2f}x")
    furthest = max(abs(a - b) / a for a, b in zip(plain[1], cached[1], strict=True))
    print(f"losses: {furthest:.2%} apart at most, {len(plain[1])} steps")


def run(given: argparse.Namespace, output_dir: Path, gigabytes: str) -> tuple[list[float], list]:
    """Train once; return the seconds and the losses of all steps."""
    words = ["train", "--stage", "sft", "--do_train", "--model_name_or_path", given.model]
    words += ["--dataset", given.data, "--max_samples", str(given.rows), "--template", "deepseek"]
    words += ["--finetuning_type", "freeze", "--freeze_trainable_layers", str(given.layers)]
    words += ["--per_device_train_batch_size", "4", "--num_train_epochs", str(given.epochs)]
    words += ["--cutoff_len", "512", "--save_strategy", "no", "--logging_steps", "1"]
    words += ["--output_dir", str(output_dir), "--cache_frozen_layers", gigabytes, "--use_cpu"]
    clock = output_dir.with_suffix(".json")
    subprocess.run([sys.executable, "-c", TRAIN, str(clock), *words], check=True, stdout=sys.stderr)
    lines = (output_dir / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    losses = [entry["loss"] for entry in entries if entry.get("loss") is not None]
    return json.loads(clock.read_text(encoding="utf-8")), losses


if __name__ == "__main__":
    main()
