"""Every option there is, read off the dataclasses and the generated Hugging Face table."""

import json
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Le
from pydantic.fields import FieldInfo

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
from llmtuner.hparams.planning import PlanningArgs
from llmtuner.hparams.selfcheck import SelfcheckArgs
from llmtuner.hparams.showing import ShowingArgs
from llmtuner.hparams.swanlab import SwanlabArgs
from llmtuner.hparams.training import TrainArgs
from llmtuner.hparams.verifying import VerifyingArgs

GROUPS: Mapping[str, type] = {
    "model": ModelArgs,
    "data": DataArgs,
    "audit": AuditArgs,
    "showing": ShowingArgs,
    "finetuning": FinetuningArgs,
    "lora": LoraArgs,
    "freeze": FreezeArgs,
    "full": FullArgs,
    "train": TrainArgs,
    "generating": GeneratingArgs,
    "export": ExportArgs,
    "verifying": VerifyingArgs,
    "evaluating": EvaluatingArgs,
    "swanlab": SwanlabArgs,
    "selfcheck": SelfcheckArgs,
    "planning": PlanningArgs,
}
"""Group name (an attribute of RunConfig) -> its dataclass."""

OTHER_GROUP = "other"
"""Group of the trainer arguments that no dataclass spells out; they land in `TrainArgs.other`."""

_METHODS = ("model", "data", "finetuning", "lora", "freeze", "full")
_TRAIN = (*_METHODS, "audit", "train", "swanlab", "generating", "export", OTHER_GROUP)
_DATA = (*_TRAIN, "showing")  # a whole training file can be given to them
COMMAND_GROUPS: Mapping[str, tuple[str, ...]] = {
    "train": _TRAIN,
    "selfcheck": (*_TRAIN, "selfcheck"),
    "plan": (*_TRAIN, "planning", "showing"),
    "export": (*_METHODS, "export", "verifying", "generating"),
    "chat": (*_METHODS, "generating", "export"),
    "eval": (*_METHODS, "evaluating", "generating", "export"),
    "data audit": _DATA,
    "data show": _DATA,
    "data verify": _DATA,
}
"""Command -> groups whose options it takes, as LLaMA-Factory's command of that name does."""

NOT_FOR: Mapping[str, tuple[str, ...]] = {"plan": ("row", "report_dir")}
"""Command -> options of its groups that it does not take."""

ALSO_ANYWHERE = ("seed", "use_cpu", "local_rank")
"""Training options that every command takes."""

Base = Literal["bool", "int", "float", "str", "dict", "object"]

_PATH_OR_MAPPING = ("accelerator_config", "fsdp_config")
_CLOSED_IN_HF_TABLE = ("lr_scheduler_type", "optim")


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What text a value may be written as.

    Attributes:
        bases: accepted types, the most special first; text comes last.
        optional: null, None and nothing mean "unset".
        is_list: several values, with commas between.
        choices: the only values allowed.
        low: smallest allowed number.
        high: largest allowed number.
    """

    bases: tuple[Base, ...]
    optional: bool = False
    is_list: bool = False
    choices: tuple[str | int, ...] = ()
    low: float | None = None
    high: float | None = None

    @property
    def is_switch(self) -> bool:
        """Whether the bare flag means true."""
        return self.bases[0] == "bool"


@dataclass(frozen=True, kw_only=True)
class Option:
    """One name of the flat namespace."""

    name: str
    group: str
    kind: Kind
    default: Any
    help: str = ""
    unit: str | None = None
    secret: bool = False


@cache
def all_options() -> Mapping[str, Option]:
    """Return every option of every command by name."""
    table = _hf_table()
    found = {
        option.name: option
        for group, owner in GROUPS.items()
        for option in _options_of(group, owner, table)
    }
    for name, row in table.items():
        found.setdefault(name, _hf_option(name, row))
    return found


@cache
def options_of(command: str) -> Mapping[str, Option]:
    """Return the options that a command takes."""
    groups = COMMAND_GROUPS[command]
    return {
        name: option
        for name, option in all_options().items()
        if (option.group in groups and name not in NOT_FOR.get(command, ()))
        or name in ALSO_ANYWHERE
    }


@cache
def _hf_table() -> Mapping[str, Mapping[str, Any]]:
    path = Path(__file__).with_name("hf_training_args.json")
    table: Mapping[str, Mapping[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return table


def _hf_option(name: str, row: Mapping[str, Any]) -> Option:
    is_list = row["kind"] == "list"
    bases: tuple[Base, ...] = ("str",) if is_list else (row["kind"],)
    kind = Kind(
        bases=("dict", "str") if name in _PATH_OR_MAPPING else bases,
        optional=row["optional"],
        is_list=is_list,
        choices=tuple(row.get("choices", ())),
    )
    return Option(name=name, group=OTHER_GROUP, kind=kind, default=row["default"])


def _options_of(
    group: str, owner: type, table: Mapping[str, Mapping[str, Any]]
) -> Sequence[Option]:
    infos: Mapping[str, FieldInfo] = vars(owner)["__pydantic_fields__"]
    return [
        _own_option(group, name, info, table) for name, info in infos.items() if name != OTHER_GROUP
    ]


def _own_option(
    group: str, name: str, info: FieldInfo, table: Mapping[str, Mapping[str, Any]]
) -> Option:
    extra = info.json_schema_extra
    assert isinstance(extra, dict), name
    # transformers knows more schedulers and optimizers from release to release: the table has them.
    choices = tuple(table[name]["choices"]) if name in _CLOSED_IN_HF_TABLE else ()
    return Option(
        name=name,
        group=group,
        kind=_kind_of(info, choices),
        default=info.default,
        help=info.description or "",
        unit=None if extra["unit"] is None else str(extra["unit"]),
        secret=bool(extra["secret"]),
    )


def _kind_of(info: FieldInfo, choices: tuple[str | int, ...]) -> Kind:
    parts = _members(info.annotation)
    types_in_it = [part for part in parts if part is not types.NoneType]
    main = types_in_it[0]
    if get_origin(main) is Literal:
        choices = get_args(main)
        main = type(choices[0])
    is_list = get_origin(main) is tuple
    item = get_args(main)[0] if is_list else get_origin(main) or main
    others = tuple(part.__name__ for part in types_in_it[1:])
    return Kind(
        bases=(item.__name__, *others),
        optional=types.NoneType in parts,
        is_list=is_list,
        choices=choices,
        low=next((_number(rule.ge) for rule in info.metadata if isinstance(rule, Ge)), None),
        high=next((_number(rule.le) for rule in info.metadata if isinstance(rule, Le)), None),
    )


def _number(limit: Any) -> float:
    assert isinstance(limit, int | float)
    return limit


def _members(annotation: Any) -> tuple[Any, ...]:
    is_union = get_origin(annotation) in (Union, types.UnionType)
    return get_args(annotation) if is_union else (annotation,)
