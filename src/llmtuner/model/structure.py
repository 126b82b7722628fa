"""What a model is made of, from its configuration alone: no weight is read or allocated."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmtuner.extras.errors import ModelError
from llmtuner.hparams.model import ModelArgs
from llmtuner.model.load import load_config
from llmtuner.model.methods.freeze import transformer_layers
from llmtuner.model.methods.lora import linear_names

_NUM_EXPERT_DIMENSIONS = 3


@dataclass(frozen=True)
class ModuleKind:
    """The modules that share a name, a class and the shapes of their weights.

    Attributes:
        name: last part of their names ("q_proj").
        type: their class.
        shape: of the weight; of several, with commas between.
        role: "linear", "head", "embedding", "experts", "norm" or "other".
        count: how many there are.
        parameters: in all of them; weights that are shared count once.
        is_target: whether LoRA sits on them when all linear layers are asked for.
    """

    name: str
    type: str
    shape: str
    role: str
    count: int
    parameters: int
    is_target: bool


@dataclass(frozen=True)
class ModelStructure:
    """What a model is made of.

    Attributes:
        model_type: of its configuration.
        architecture: class of the model.
        layers: number of blocks; 0 where they cannot be told apart.
        parameters: in all; shared weights count once.
        kinds: modules with weights, in the order of the forward pass.
        targets: names for `lora_target`.
        lora_rank: that `lora_parameters` holds for.
        lora_parameters: numbers that LoRA of this rank on the targets would train.
        is_tied: whether head and embedding share their weights.
        notes: what a user should know before taking the targets.
    """

    model_type: str
    architecture: str
    layers: int
    parameters: int
    kinds: tuple[ModuleKind, ...]
    targets: tuple[str, ...]
    lora_rank: int
    lora_parameters: int
    is_tied: bool
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return everything, ready for JSON."""
        return {**asdict(self), "lora_target": ",".join(self.targets)}


def read_structure(args: ModelArgs, *, lora_rank: int = 8) -> ModelStructure:
    """Build the model without weights and look at it.

    Args:
        args: names a folder with a `config.json`, or a model of the hub.
        lora_rank: to count the parameters of an adapter.

    Raises:
        ModelError: there is no such model, or it is no causal language model.
    """
    model = _build(args)
    targets = tuple(linear_names(model))
    kinds = tuple(_kinds(model, targets))
    return ModelStructure(
        model_type=str(model.config.model_type),
        architecture=type(model).__name__,
        layers=_num_layers(model),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        kinds=kinds,
        targets=targets,
        lora_rank=lora_rank,
        lora_parameters=sum(lora_rank * sum(sides) for sides in _sides(model)),
        is_tied=bool(model.config.get_text_config().tie_word_embeddings),
        notes=tuple(_notes(kinds, targets)),
    )


def _build(args: ModelArgs) -> PreTrainedModel:
    config = load_config(args)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, trust_remote_code=args.trust_remote_code
            )
    except (ValueError, TypeError, AttributeError, ImportError, OSError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ModelError(
            f"No causal language model can be built from this configuration: {reason}",
            where=str(args.model_name_or_path),
            got=str(config.model_type),
            fix="check config.json",
        ) from error
    model.tie_weights()
    return model


def _num_layers(model: PreTrainedModel) -> int:
    has_lists = any(isinstance(module, nn.ModuleList) for module in model.modules())
    return len(transformer_layers(model)) if has_lists else 0


def _sides(model: PreTrainedModel) -> Iterator[tuple[int, int]]:
    """Yield the inputs and outputs of every layer that LoRA would sit on."""
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D) and module is not head:
            rows, columns = module.weight.shape
            yield rows, columns


def _kinds(model: PreTrainedModel, targets: tuple[str, ...]) -> Iterator[ModuleKind]:
    found: dict[tuple[str, str, str, str], list[int]] = {}
    counted: set[int] = set()
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if not own:
            continue
        key = (
            name.rpartition(".")[2],
            type(module).__name__,
            ", ".join("x".join(map(str, weight.shape)) for weight in own.values()),
            _role(module, model),
        )
        new = [weight for weight in own.values() if id(weight) not in counted]
        counted |= {id(weight) for weight in new}
        numbers = found.setdefault(key, [0, 0])
        numbers[0] += 1
        numbers[1] += sum(weight.numel() for weight in new)
    for (name, kind, shape, role), (count, parameters) in found.items():
        is_target = role == "linear" and name in targets
        yield ModuleKind(name, kind, shape, role, count, parameters, is_target)


def _role(module: nn.Module, model: PreTrainedModel) -> str:
    if module is model.get_output_embeddings():
        return "head"
    if isinstance(module, nn.Linear | Conv1D):
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    weights = list(module.parameters(recurse=False))
    if any(weight.ndim == _NUM_EXPERT_DIMENSIONS for weight in weights):
        return "experts"
    if all(weight.ndim == 1 for weight in weights) and "norm" in type(module).__name__.lower():
        return "norm"
    return "other"


def _notes(kinds: tuple[ModuleKind, ...], targets: tuple[str, ...]) -> Iterator[str]:
    experts = [kind for kind in kinds if kind.role == "experts"]
    if experts:
        total = sum(kind.parameters for kind in kinds)
        share = sum(kind.parameters for kind in experts) / max(total, 1)
        yield (
            f"This is a mixture of experts. Its experts ({share:.0%} of the parameters) are "
            "stacked in one tensor each and are no linear layers: LoRA on the targets leaves them "
            "as they are."
        )
    if any(kind.type == "Conv1D" for kind in kinds):
        yield "Its linear layers are Conv1D, which hold the weight transposed; LoRA knows them."
    if not targets:
        yield "It has no linear layer beside the head: use freeze or full."
