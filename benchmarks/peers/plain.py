"""A script of peft, bitsandbytes and transformers' Trainer, as their manuals write it.

With defaults it prepares the model for training in few bits, which recomputes activations; at its
best it does not.
"""

from functools import partial

from harness.jobs import Contender, Launch, Peer

from peers.scripts.words import script_words
from peers.trl import PEER as TRL


def _command(launch: Launch, *, more: tuple[str, ...] = ()) -> list[str]:
    return [str(launch.python), *script_words("plain_trainer.py", launch), *more]


PEER = Peer(
    name="plain",
    requirements=TRL.requirements,
    environment=TRL.name,
    contenders=(
        Contender(name="peft + Trainer, default", command=_command),
        Contender(name="peft + Trainer, best", command=partial(_command, more=("--best",))),
    ),
)
