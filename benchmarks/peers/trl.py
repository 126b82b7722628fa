"""TRL: a script around `SFTTrainer`, with its defaults, and with what is fastest on a CPU.

Its defaults load float32 weights, compute in bfloat16 and recompute activations.
"""

from functools import partial

from harness.jobs import Contender, Launch, Peer

from peers.scripts.words import script_words


def _command(launch: Launch, *, more: tuple[str, ...] = ()) -> list[str]:
    return [str(launch.python), *script_words("trl_sft.py", launch), *more]


PEER = Peer(
    name="trl",
    requirements=(
        ("torch==2.13.0",),  # alone and first: nothing else shall pick another version
        (
            *("trl==1.16.0", "transformers==5.23.0", "peft==0.21.2", "accelerate==1.15.0"),
            *("datasets==5.2.0", "bitsandbytes==0.50.2"),
        ),
    ),
    contenders=(
        Contender(name="TRL, default", command=_command, methods=("lora", "full")),
        Contender(
            name="TRL, best", command=partial(_command, more=("--best",)), methods=("lora", "full")
        ),
    ),
)
