"""This checkout: as it comes, packed, and under DeepSpeed on one rank and on two."""

import random
import sys
from functools import partial
from pathlib import Path

from harness.jobs import OWN, Contender, Launch, Peer

_ROOT = Path(__file__).parents[2]
_TRAIN = str(_ROOT / "src" / "train_bash.py")
_ZERO = str(_ROOT / "deepspeed_config.json")


def _flags(launch: Launch, *, packing: bool, ranks: int) -> list[str]:
    task = launch.task
    flags = [
        *("--stage", "sft", "--do_train", "--model_name_or_path", str(task.model)),
        *("--dataset_dir", str(task.data_dir), "--dataset", "rows", "--template", task.template),
        *("--cutoff_len", str(task.cutoff_tokens), "--packing", str(packing).lower()),
        *("--finetuning_type", "full" if task.method == "full" else "lora"),
        *("--per_device_train_batch_size", str(task.batch_size // ranks)),
        *("--gradient_accumulation_steps", "1", "--max_steps", str(task.steps)),
        *("--learning_rate", str(task.learning_rate), "--lr_scheduler_type", "constant"),
        *("--seed", str(task.seed), "--logging_steps", "1", "--save_strategy", "no"),
        *("--disable_shuffling", "--use_cpu", "--disable_tqdm", "true"),
        *("--output_dir", str(launch.output_dir / "out")),
    ]
    if task.method != "full":
        flags += ["--lora_rank", str(task.lora_rank), "--lora_alpha", str(task.lora_alpha)]
        flags += ["--lora_target", "all", "--lora_dropout", "0"]
    return [*flags, "--quantization_bit", "4"] if task.method == "qlora" else flags


def _command(launch: Launch, *, packing: bool = False) -> list[str]:
    return [sys.executable, _TRAIN, *_flags(launch, packing=packing, ranks=1)]


def _deepspeed(launch: Launch, *, ranks: int) -> list[str]:
    launcher = [launch.program("deepspeed"), "--num_gpus", str(ranks), "--master_port", _port()]
    return [*launcher, _TRAIN, *_flags(launch, packing=False, ranks=ranks), "--deepspeed", _ZERO]


def _port() -> str:
    return str(random.randint(20_000, 29_999))  # runs that follow each other must not wait for it


PEER = Peer(
    name=OWN,
    requirements=(),
    contenders=(
        Contender(name="llmtuner", command=_command),
        Contender(name="llmtuner, packed", command=partial(_command, packing=True), packing=True),
        *(
            Contender(
                name=f"llmtuner, DeepSpeed, {ranks} rank{'s' * (ranks > 1)}",
                command=partial(_deepspeed, ranks=ranks),
                methods=("lora", "full"),
                ranks=ranks,
            )
            for ranks in (1, 2)
        ),
    ),
)
