"""LLaMA-Factory: `llamafactory-cli train` with its defaults, and with what is fastest on a CPU.

Its defaults compute in float32 and recompute activations in the backward pass.
"""

import json
from functools import partial
from typing import Any

from harness.jobs import Contender, Launch, Peer

_BEST = {"bf16": True, "disable_gradient_checkpointing": True}
_PACKED = {"packing": True, "neat_packing": True}  # samples of a pack do not see each other


def _command(launch: Launch, *, more: dict[str, Any] | None = None) -> list[str]:
    task = launch.task
    settings: dict[str, Any] = {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": str(task.model),
        "finetuning_type": "full" if task.method == "full" else "lora",
        "dataset_dir": str(task.data_dir),
        "dataset": "rows",
        "template": task.template,
        "cutoff_len": task.cutoff_tokens,
        "disable_shuffling": True,
        "per_device_train_batch_size": task.batch_size,
        "gradient_accumulation_steps": 1,
        "max_steps": task.steps,
        "learning_rate": task.learning_rate,
        "lr_scheduler_type": "constant",
        "seed": task.seed,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "output_dir": str(launch.output_dir / "out"),
        **(more or {}),
    }
    if task.method != "full":
        settings |= {"lora_rank": task.lora_rank, "lora_alpha": task.lora_alpha}
        settings |= {"lora_target": "all", "lora_dropout": 0.0}
    if task.method == "qlora":
        settings |= {"quantization_bit": 4, "quantization_method": "bnb"}
    path = launch.output_dir / "settings.yaml"
    path.write_text(json.dumps(settings, indent=2), encoding="utf-8")
    return [launch.program("llamafactory-cli"), "train", str(path)]


PEER = Peer(
    name="llamafactory",
    requirements=(("llamafactory==0.9.5",), ("bitsandbytes==0.50.2",)),
    contenders=(
        Contender(name="LLaMA-Factory, default", command=_command),
        Contender(name="LLaMA-Factory, best", command=partial(_command, more=_BEST)),
        Contender(
            name="LLaMA-Factory, best, packed",
            command=partial(_command, more=_BEST | _PACKED),
            packing=True,
        ),
    ),
)
