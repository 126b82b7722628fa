"""The whole configuration of one command, resolved and checked."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from llmtuner.hparams.audit import AuditArgs
from llmtuner.hparams.data import DataArgs
from llmtuner.hparams.evaluating import EvaluatingArgs
from llmtuner.hparams.export import ExportArgs
from llmtuner.hparams.finetuning import FinetuningArgs
from llmtuner.hparams.freeze import FreezeArgs
from llmtuner.hparams.full import FullArgs
from llmtuner.hparams.generating import GeneratingArgs
from llmtuner.hparams.lora import LoraArgs
from llmtuner.hparams.model import ModelArgs
from llmtuner.hparams.options import GROUPS, OTHER_GROUP, options_of
from llmtuner.hparams.planning import PlanningArgs
from llmtuner.hparams.selfcheck import SelfcheckArgs
from llmtuner.hparams.showing import ShowingArgs
from llmtuner.hparams.swanlab import SwanlabArgs
from llmtuner.hparams.training import TrainArgs
from llmtuner.hparams.verifying import VerifyingArgs

MethodArgs = LoraArgs | FreezeArgs | FullArgs

HIDDEN = "***"
"""Stands for a token or password wherever a configuration is shown."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything one command was asked to do.

    Attributes:
        command: the command that was parsed for.
        given: names that the user set, under today's spelling.
        notices: what was renamed, ignored or derived, and why, for the log.
    """

    command: str
    model: ModelArgs = field(default_factory=ModelArgs)
    data: DataArgs = field(default_factory=DataArgs)
    audit: AuditArgs = field(default_factory=AuditArgs)
    showing: ShowingArgs = field(default_factory=ShowingArgs)
    finetuning: FinetuningArgs = field(default_factory=FinetuningArgs)
    lora: LoraArgs = field(default_factory=LoraArgs)
    freeze: FreezeArgs = field(default_factory=FreezeArgs)
    full: FullArgs = field(default_factory=FullArgs)
    train: TrainArgs = field(default_factory=TrainArgs)
    generating: GeneratingArgs = field(default_factory=GeneratingArgs)
    export: ExportArgs = field(default_factory=ExportArgs)
    verifying: VerifyingArgs = field(default_factory=VerifyingArgs)
    evaluating: EvaluatingArgs = field(default_factory=EvaluatingArgs)
    swanlab: SwanlabArgs = field(default_factory=SwanlabArgs)
    selfcheck: SelfcheckArgs = field(default_factory=SelfcheckArgs)
    planning: PlanningArgs = field(default_factory=PlanningArgs)
    given: frozenset[str] = frozenset()
    notices: tuple[str, ...] = ()

    @property
    def method(self) -> MethodArgs:
        """The options of the chosen finetuning type."""
        return self.methods[self.finetuning.finetuning_type]

    @property
    def methods(self) -> Mapping[str, MethodArgs]:
        """The options of every finetuning type."""
        return {"lora": self.lora, "freeze": self.freeze, "full": self.full}

    def values(self) -> dict[str, Any]:
        """Return every value by its flat name, secrets included: not for showing."""
        found: dict[str, Any] = {}
        for group in GROUPS:
            values = asdict(vars(self)[group])
            found |= values.pop(OTHER_GROUP, {})
            found |= values
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return the command's values by flat name, ready for JSON, with secrets masked.

        Written to a file and given to the same command, they ask for the same run.
        """
        options = options_of(self.command)
        return {
            name: HIDDEN if options[name].secret and value is not None else _plain(value)
            for name, value in self.values().items()
            if name in options
        }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
