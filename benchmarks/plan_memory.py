"""How well `llmtuner plan` foretells memory: plan, then train a few steps, for many settings.

    python benchmarks/plan_memory.py --model models/smollm2-135m-instruct --output plan_memory.json

One process at a time. The random models borrow the tokenizer of `--model`. A run that the plan
puts above `--most_gb` is not started. Ends with code 1 if an estimate is further off than
`--allowed`.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen3Config

_WORDS = (
    *("rest", "warm", "tea", "ginger", "root", "used", "in", "tonics", "sleep", "eight", "hours"),
    *("about", "helps", "against", "cold", "fever", "cough", "the", "patient", "should", "drink"),
    *("more", "water", "and", "take", "medicine", "daily", "after", "meals"),
)
_CHATS = ("--stage", "sft", "--dataset", "chats", "--cutoff_len", "512")


@dataclass(frozen=True)
class Case:
    """One setting: a name, a model, and the flags of training."""

    name: str
    model: str
    flags: tuple[str, ...]


def _texts(length: int, batch: int, *flags: str) -> tuple[str, ...]:
    """Return flags for samples that all have `length` tokens, `batch` of them at a time."""
    return (
        *("--stage", "pt", "--dataset", "texts", "--packing", "false"),
        *("--cutoff_len", str(length), "--per_device_train_batch_size", str(batch), *flags),
    )


def _batch(size: int, *flags: str) -> tuple[str, ...]:
    return ("--per_device_train_batch_size", str(size), *flags)


CASES = (
    Case("full, 4 x 256", "demo", _texts(256, 4, "--finetuning_type", "full")),
    Case("full, 1 x 128", "demo", _texts(128, 1, "--finetuning_type", "full")),
    Case("full, pure bf16, 2 x 512", "demo",
         _texts(512, 2, "--finetuning_type", "full", "--pure_bf16")),
    Case("full, fp32, 4 x 256", "demo", _texts(256, 4, "--finetuning_type", "full", "--no_bf16")),
    Case("full, adafactor, chats", "demo",
         (*_CHATS, *_batch(4, "--finetuning_type", "full", "--optim", "adafactor"))),
    Case("LoRA, 4 x 256", "demo", _texts(256, 4)),
    Case("LoRA, 2 x 1024", "demo", _texts(1024, 2)),
    Case("LoRA, recomputing, 4 x 512", "demo", _texts(512, 4, "--gradient_checkpointing")),
    Case("LoRA, chats, 8, accumulated", "demo",
         (*_CHATS, *_batch(8, "--gradient_accumulation_steps", "2"))),
    Case("LoRA, chats, evaluated", "demo",
         (*_CHATS, *_batch(2, "--val_size", "0.4", "--eval_strategy", "steps"),
          *("--eval_steps", "1"))),
    Case("freeze, 4 x 512", "demo", _texts(512, 4, "--finetuning_type", "freeze")),
    Case("QLoRA 4 bit, 2 x 128", "demo", _texts(128, 2, "--quantization_bit", "4")),
    Case("QLoRA 8 bit, 2 x 128", "demo", _texts(128, 2, "--quantization_bit", "8")),
    Case("full, 2 x 256", "large vocabulary", _texts(256, 2, "--finetuning_type", "full")),
    Case("LoRA, chats, 8", "large vocabulary", (*_CHATS, *_batch(8))),
    Case("QLoRA 4 bit, 1 x 128", "large vocabulary", _texts(128, 1, "--quantization_bit", "4")),
    Case("full, 2 x 512, accumulated", "untied",
         _texts(512, 2, "--finetuning_type", "full", "--gradient_accumulation_steps", "2")),
    Case("LoRA, packed 2 x 1024", "untied",
         ("--stage", "pt", "--dataset", "texts", "--cutoff_len", "1024", *_batch(2))),
    Case("freeze, 8 x 256", "untied",
         _texts(256, 8, "--finetuning_type", "freeze", "--freeze_trainable_layers", "4")),
)  # fmt: skip

PROBED = ("full, 1 x 128", "LoRA, chats, 8, accumulated")


def write_data(folder: Path) -> None:
    """Write long texts, and chats of many lengths."""
    chance = random.Random(0)
    texts = [{"text": " ".join(chance.choices(_WORDS, k=3000))} for _ in range(24)]
    chats = [
        {
            "instruction": " ".join(chance.choices(_WORDS, k=chance.randint(5, 120))),
            "input": "",
            "output": " ".join(chance.choices(_WORDS, k=chance.randint(5, 400))),
        }
        for _ in range(80)
    ]
    info: dict[str, Any] = {
        "texts": {"file_name": "texts.json", "columns": {"prompt": "text"}},
        "chats": {"file_name": "chats.json"},
    }
    for name, content in {"texts": texts, "chats": chats, "dataset_info": info}.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def write_models(folder: Path, demo: str) -> dict[str, str]:
    """Write random models of other shapes with the tokenizer of the demo model."""
    tokenizer = AutoTokenizer.from_pretrained(demo)
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    shapes = {
        "large vocabulary": LlamaConfig(
            vocab_size=151_936, hidden_size=512, intermediate_size=1408, num_hidden_layers=8,
            num_attention_heads=8, num_key_value_heads=2, tie_word_embeddings=True, **ends,
        ),
        "untied": Qwen3Config(
            vocab_size=49_152, hidden_size=768, intermediate_size=2048, num_hidden_layers=12,
            num_attention_heads=12, num_key_value_heads=4, head_dim=64, tie_word_embeddings=False,
            **ends,
        ),
    }  # fmt: skip
    found = {"demo": demo}
    for name, config in shapes.items():
        target = folder / name.replace(" ", "-")
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(target)
        tokenizer.save_pretrained(target)
        found[name] = str(target)
    return found


def measure(
    case: Case, model: str, folder: Path, *, most_gb: float, from_run: bool
) -> dict[str, Any]:
    """Plan a case, train it for two steps in another process, and compare."""
    flags = [
        *("--model_name_or_path", model, "--dataset_dir", str(folder), *case.flags),
        *("--max_steps", "2", "--save_steps", "2", "--disable_tqdm", "true"),
    ]
    probe = ["--probe"] if case.name in PROBED and case.model == "demo" else []
    row: dict[str, Any] = {"case": case.name, "model": case.model}
    plan = {} if from_run else json.loads(_llmtuner(["plan", *flags, "--json", *probe]))
    if plan and plan["peak_bytes"] / 1e9 > most_gb:
        row["predicted_gb"] = plan["peak_bytes"] / 1e9
        return {**row, "skipped": f"above {most_gb} GB"}
    with tempfile.TemporaryDirectory(dir=folder) as output:
        _llmtuner(["train", "--do_train", *flags, "--output_dir", f"{output}/run"])
        told = json.loads(Path(output, "run", "run.json").read_text(encoding="utf-8"))["plan"]
    actual = told["actual"]
    plan = plan or {**told["predicted"], "probe": None}
    row |= {
        "predicted_gb": plan["peak_bytes"] / 1e9,
        "predicted_s": plan["seconds_per_step"],
        "actual_gb": actual["peak_bytes"] / 1e9,
        "error_percent": 100 * (plan["peak_bytes"] / actual["peak_bytes"] - 1),
        "actual_s": actual["seconds_per_step"],
        "seconds_ratio": plan["seconds_per_step"] / actual["seconds_per_step"],
        "planning_s": told["planning_seconds"],
    }
    if plan["probe"]:
        corrected = plan["probe"]["corrected_peak_bytes"]
        row["probed_error_percent"] = 100 * (corrected / actual["peak_bytes"] - 1)
        seconds = plan["probe"]["corrected_seconds_per_step"]
        row["probed_seconds_ratio"] = seconds / actual["seconds_per_step"]
    return row


def _llmtuner(words: list[str]) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "llmtuner.cli.main", *words],
        capture_output=True, text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(words)}\n{done.stderr[-3000:]}")
    return done.stdout


def main() -> int:
    """Run all cases, print a table, and tell whether all are near enough."""
    args = _arguments()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder)
        models = write_models(folder, args.model)
        for case in CASES:
            if args.only and args.only not in f"{case.model}: {case.name}":
                continue
            row = measure(
                case, models[case.model], folder, most_gb=args.most_gb, from_run=args.from_run
            )
            rows.append(row)
            print(_line(rows[-1]), flush=True)
    if args.output:
        Path(args.output).write_text(json.dumps(rows, indent=2), encoding="utf-8")
    errors = [abs(row["error_percent"]) for row in rows if "error_percent" in row]
    near = sum(error <= args.allowed for error in errors)
    print(
        f"{near} of {len(errors)} within {args.allowed:g} %, worst {max(errors, default=0):.1f} %"
    )
    return 0 if near == len(errors) else 1


def _arguments() -> Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/smollm2-135m-instruct")
    parser.add_argument("--output", help="JSON file for the rows")
    parser.add_argument("--only", help="cases whose name holds this text")
    parser.add_argument("--most_gb", type=float, default=6.0, help="start no larger run (6)")
    parser.add_argument(
        "--from_run",
        action="store_true",
        help="take the forecast that each run makes itself: half the time, and no size is refused",
    )
    parser.add_argument("--allowed", type=float, default=15.0, help="percent off (15)")
    return parser.parse_args()


def _line(row: dict[str, Any]) -> str:
    head = f"{row['model']:<17}{row['case']:<30}{row['predicted_gb']:6.2f} GB"
    if "skipped" in row:
        return f"{head}  not run: {row['skipped']}"
    text = f"{head} {row['actual_gb']:6.2f} GB {row['error_percent']:+6.1f} %"
    text += f" {row['predicted_s']:7.2f} s {row['actual_s']:7.2f} s"
    if "probed_error_percent" in row:
        text += f"  probed {row['probed_error_percent']:+.1f} %, x{row['probed_seconds_ratio']:.2f}"
    return text


if __name__ == "__main__":
    sys.exit(main())
