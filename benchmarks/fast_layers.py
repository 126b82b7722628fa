"""What the fast CPU layers save: a LoRA run of a random model without and with them, and the ratio.

    python benchmarks/fast_layers.py --model models/smollm2-135m-instruct --family qwen3

The shape is that of Qwen3-0.6B with fewer layers and the tokenizer of `--model`; each run has a
process of its own, and the two take turns. Seconds are means without the first step.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

WAYS = {"without": ["--no_fast_kernels"], "with": []}


def main() -> None:
    """Print seconds of a step and the most memory of both ways, and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="whose tokenizer is used")
    parser.add_argument("--family", default="qwen3", help="transformers' model_type")
    parser.add_argument("--data", default="data/tcm_alpaca.json")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch", type=int, default=16, help="samples of a step")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--turns", type=int, default=2)
    given = parser.parse_args()
    found: dict[str, list[dict]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(given, Path(folder) / "model")
        for turn in range(given.turns):
            for way, flags in WAYS.items():
                output = Path(folder) / f"{way}-{turn}"
                found[way].append(train(given, model, output, flags))
    print(f"{given.family}: {given.layers} layers, {given.steps} steps of {given.batch} samples")
    for name, unit in (("seconds_per_step", "s"), ("peak_bytes", "bytes"), ("last_loss", "")):
        before, after = (
            statistics.median(run[name] for run in found[way]) for way in ("without", "with")
        )
        print(f"{name}: {before:.4g} {unit} without, {after:.4g} with: {before / after:.3f}x")


def write_model(given: argparse.Namespace, folder: Path) -> Path:
    """Write a random model with a tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    ends = {name: tokenizer.eos_token_id for name in ("eos_token_id", "pad_token_id")}
    config = AutoConfig.for_model(
        given.family,
        **{"vocab_size": len(tokenizer), "hidden_size": 1024, "intermediate_size": 3072},
        **{"num_hidden_layers": given.layers, "num_attention_heads": 16, "head_dim": 128},
        **{"num_key_value_heads": 8, "tie_word_embeddings": True, "bos_token_id": None, **ends},
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train(given: argparse.Namespace, model: Path, output: Path, flags: list[str]) -> dict:
    """Train once; return what the run says of itself."""
    words = ["train", "--stage", "sft", "--do_train", "--model_name_or_path", str(model), *flags]
    words += ["--dataset", given.data, "--finetuning_type", "lora", "--lora_target", "all"]
    words += ["--per_device_train_batch_size", str(given.batch)]
    words += ["--max_steps", str(given.steps)]
    words += ["--cutoff_len", "512", "--save_strategy", "no", "--logging_steps", "1"]
    words += ["--output_dir", str(output), "--use_cpu", "--bf16"]
    command = [sys.executable, "-m", "llmtuner.cli.main", *words]
    subprocess.run(command, check=True, stdout=sys.stderr)
    told = json.loads((output / "run.json").read_text(encoding="utf-8"))["plan"]["actual"]
    lines = (output / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [entry["loss"] for entry in map(json.loads, lines) if entry.get("loss") is not None]
    return {**told, "last_loss": losses[-1]}


if __name__ == "__main__":
    main()
