"""What is trained, by whom and how: plain descriptions that peers fill in and the harness runs."""

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

OWN = "llmtuner"


@dataclass(frozen=True, kw_only=True)
class Task:
    """One training job, the same for every contender.

    Attributes:
        model: folder of the base model.
        data_dir: folder with `rows.json` (alpaca rows in the order of training), its
            `dataset_info.json`, and `tokens.jsonl` (the same rows as `input_ids` and `labels`).
        method: "lora", "full" or "qlora".
        template: name of the chat template.
        steps: optimizer steps.
        batch_size: samples (with packing: packs) of a step, over all ranks.
        cutoff_tokens: longest sample.
        lora_rank: rank of the adapters on all linear layers.
        lora_alpha: their scale times their rank.
        learning_rate: constant, without warm-up.
        seed: of adapters and order.
    """

    model: Path
    data_dir: Path
    method: str
    template: str
    steps: int
    batch_size: int = 4
    cutoff_tokens: int = 512
    lora_rank: int = 8
    lora_alpha: int = 16
    learning_rate: float = 1e-4
    seed: int = 42


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Where a contender runs.

    Attributes:
        python: interpreter of its environment; the commands of its libraries lie beside it.
        task: what it trains.
        output_dir: an empty folder of this run alone, also its working directory.
    """

    python: Path
    task: Task
    output_dir: Path

    def program(self, name: str) -> str:
        """Return the path of a command of the environment."""
        return str(self.python.parent / name)


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A peer in one setting.

    Attributes:
        name: as the tables show it.
        command: writes what it needs into the output folder and returns the words to run.
        methods: what it can train in this setting.
        packing: whether samples share a row; its steps then hold more samples.
        ranks: processes that train.
        env: environment variables beside those of the caller.
    """

    name: str
    command: Callable[[Launch], Sequence[str]]
    methods: tuple[str, ...] = ("lora", "full", "qlora")
    packing: bool = False
    ranks: int = 1
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A project to compare with.

    Attributes:
        name: key, and the name of its environment.
        requirements: groups of pinned packages, one `pip install` each, in this order; empty: it
            runs in the environment of the harness.
        contenders: its settings.
        environment: the peer whose environment it shares; None: it has its own.
    """

    name: str
    requirements: tuple[tuple[str, ...], ...]
    contenders: tuple[Contender, ...]
    environment: str | None = None


def load_peers() -> dict[str, Peer]:
    """Return all peers by name, our own last."""
    package = importlib.import_module("peers")
    names = [info.name for info in pkgutil.iter_modules(package.__path__) if not info.ispkg]
    found = [importlib.import_module(f"peers.{name}").PEER for name in names]
    return {peer.name: peer for peer in sorted(found, key=lambda peer: peer.name == OWN)}


def select_contenders(
    peers: Sequence[Peer], *, method: str, packing: str
) -> list[tuple[Peer, Contender]]:
    """Return who takes part in one method, in the order of the tables.

    Args:
        peers: the chosen peers.
        method: "lora", "full" or "qlora".
        packing: "off", "on" or "both".
    """
    wanted = {"off": {False}, "on": {True}, "both": {False, True}}[packing]
    return [
        (peer, contender)
        for peer in peers
        for contender in peer.contenders
        if method in contender.methods and contender.packing in wanted
    ]
