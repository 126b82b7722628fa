"""How much memory one rank of a run needs at its worst moment, part by part."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from llmtuner.extras.files import read_json
from llmtuner.hparams.config import RunConfig
from llmtuner.model.attention import VARLEN, uses_flat_batches
from llmtuner.model.hub import locate_model
from llmtuner.model.load import load_config
from llmtuner.model.parameters import TrainableParameters
from llmtuner.model.precision import Precision
from llmtuner.model.weights import weight_files
from llmtuner.train.loading import wants_fast_layers
from llmtuner.train.plan.simulate import Pass, Setting, simulate
from llmtuner.train.plan.skeleton import Model, QuantisedLinear, build_skeleton, layers_of
from llmtuner.train.plan.workload import Workload

_STATES_PER_WEIGHT: Mapping[str, float] = {
    "adamw": 2,
    "ademamix": 3,
    "adalomo": 0,
    "adafactor": 0.01,
    "adagrad": 1,
    "lion": 1,
    "rmsprop": 1,
    "sgd": 0,
}
"""Numbers that an optimizer keeps for each weight; the longest prefix counts, others as AdamW."""

_ZERO_GRADIENTS, _ZERO_WEIGHTS = 2, 3


@dataclass(frozen=True)
class Situation:
    """Where and how a run computes.

    Attributes:
        config: the resolved settings.
        tokenizer: of the model.
        precision: number type.
        attention: transformers' `attn_implementation`.
        device_type: "cpu" or "cuda".
        world_size: ranks.
    """

    config: RunConfig
    tokenizer: PreTrainedTokenizerBase
    precision: Precision
    attention: str
    device_type: str
    world_size: int

    @property
    def zero_stage(self) -> int:
        """What DeepSpeed spreads over the ranks: 1 optimizer, 2 gradients too, 3 weights too."""
        path = self.config.train.deepspeed
        if path is None:
            return 0
        return int(read_json(Path(path)).get("zero_optimization", {}).get("stage", 0))

    @property
    def held(self) -> Precision:
        """The number types that the model is held in; under DeepSpeed all of it is short."""
        is_short = self.zero_stage > 0 and self.precision.name != "fp32"
        return replace(self.precision, pure=True) if is_short else self.precision

    @property
    def simulated_attention(self) -> str:
        """What stands in for `attention`: kernels of GPUs cannot run on tensors without numbers.

        They keep what the one that goes sample by sample keeps: no scores, only their sums.
        """
        return VARLEN if uses_flat_batches(self.attention) else self.attention

    def build(self) -> Model:
        """Return the model without numbers."""
        return build_skeleton(
            self.config,
            device_type=self.device_type,
            precision=self.held,
            attention=self.simulated_attention,
            tokenizer=self.tokenizer,
        )


@dataclass(frozen=True)
class Sizes:
    """Bytes of what lasts, on one rank.

    Attributes:
        weights: all of them.
        gradients: of the weights that learn, when complete.
        optimizer: its states, and its float32 weights under DeepSpeed.
        update: copies of gradients that DeepSpeed makes for the optimizer's step.
        saved: the final model or adapter on disk.
        optimizer_file: states in a checkpoint, over all ranks.
        parameters: counts.
    """

    weights: float
    gradients: float
    optimizer: float
    update: float
    saved: float
    optimizer_file: float
    parameters: TrainableParameters


@dataclass(frozen=True)
class Memory:
    """The estimate, in bytes on one rank.

    Attributes:
        baseline: the process before it has a model.
        weights: all of them, quantised ones as they are.
        gradients: when complete.
        optimizer: its states.
        working: most beside these: activations, logits, casts, gradients on their way.
        load_peak: while the model is loaded.
        train_peak: in the worst training step.
        eval_peak: while evaluating; 0 without.
        peak: the largest of the three.
    """

    baseline: float
    weights: float
    gradients: float
    optimizer: float
    working: float
    load_peak: float
    train_peak: float
    eval_peak: float

    @property
    def peak(self) -> float:
        """The most at any time."""
        return max(self.load_peak, self.train_peak, self.eval_peak)

    def with_baseline(self, baseline: float) -> "Memory":
        """Return the same for a process of another size."""
        more = baseline - self.baseline
        return replace(
            self,
            baseline=baseline,
            load_peak=self.load_peak + more,
            train_peak=self.train_peak + more,
            eval_peak=self.eval_peak and self.eval_peak + more,
        )

    def to_dict(self) -> dict[str, int]:
        """Return whole bytes by name, ready for JSON."""
        values = {**asdict(self), "peak": self.peak}
        return {f"{name}_bytes": round(value) for name, value in values.items()}


def place_weights(config: RunConfig) -> tuple[float, float]:
    """Return the bytes that a token and a trained place cost, only to compare micro-batches."""
    values = load_config(config.model).get_text_config().to_dict()
    width = int(values.get("hidden_size") or values.get("n_embd") or 1)
    depth = int(values.get("num_hidden_layers") or values.get("n_layer") or 1)
    per_block = 4 if config.train.gradient_checkpointing else 70
    return float(depth * width * per_block), 14.0 * int(values.get("vocab_size") or 1)


def sizes_of(situation: Situation, model: Model) -> Sizes:
    """Count what lasts."""
    ranks, stage = situation.world_size, situation.zero_stage
    learning = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    numbers = sum(p.numel() for p in learning)
    gradients = float(_bytes(learning))
    weights, full = gradients + _bytes(frozen), 4.0 * numbers
    optimizer = (full if stage else gradients) * _states_per_weight(situation.config.train.optim)
    if "8bit" in situation.config.train.optim or "4bit" in situation.config.train.optim:
        optimizer /= 4
    update = 0.0
    if stage:  # float32 weights beside the model's, and gradients in one piece, then in float32
        optimizer += full
        update = gradients + (0.0 if situation.precision.name == "fp32" else full)
    saved = gradients if situation.config.method.uses_adapters else weights
    return Sizes(
        weights=weights / ranks + _gathered(model, ranks) if stage >= _ZERO_WEIGHTS else weights,
        gradients=gradients / ranks if stage >= _ZERO_GRADIENTS else gradients,
        optimizer=optimizer / ranks if stage else optimizer,
        update=update / ranks,
        saved=saved,
        optimizer_file=optimizer,
        parameters=TrainableParameters(numbers, numbers + _num_weights(model, frozen)),
    )


def estimate(
    situation: Situation, workload: Workload, *, baseline: float
) -> tuple[Memory, Pass, Sizes]:
    """Simulate the largest micro-batches and add up what is there at the same time.

    Returns:
        The memory, the work of the largest micro-batch, and the sizes.
    """
    model = situation.build()
    sizes = sizes_of(situation, model)
    keeps = workload.micro_batches > 1
    is_shared = situation.zero_stage >= _ZERO_GRADIENTS
    setting = Setting(
        precision=situation.held,
        attention=situation.simulated_attention,
        has_gradients=keeps,
        gradient_share=1 / situation.world_size if is_shared else 1.0,
        is_fast=wants_fast_layers(
            situation.config, device_type=situation.device_type, attention=situation.attention
        ),
        label_smoothing=float(situation.config.train.other.get("label_smoothing_factor", 0.0)),
    )
    load_peak = baseline + sizes.weights + _mapped_bytes(situation) + _unquantised_bytes(model)
    work = simulate(lambda: model, [workload.largest], setting)  # which cuts the model
    lasting = sizes.weights + (sizes.optimizer if workload.steps > 1 else 0.0)
    during = work.peak_bytes + (sizes.gradients if keeps else 0.0)
    after = sizes.gradients + sizes.update + (0.0 if workload.steps > 1 else sizes.optimizer)
    evaluating = 0.0
    if workload.largest_eval is not None:
        check = replace(setting, trains=False, has_gradients=False)
        evaluating = simulate(situation.build, [workload.largest_eval], check).peak_bytes
        evaluating += sizes.weights
        evaluating += sizes.optimizer + baseline
    memory = Memory(
        baseline=baseline,
        weights=sizes.weights,
        gradients=sizes.gradients,
        optimizer=sizes.optimizer,
        working=work.peak_bytes,
        load_peak=load_peak,
        train_peak=baseline + lasting + max(during, after),
        eval_peak=evaluating,
    )
    return memory, work, sizes


def _mapped_bytes(situation: Situation) -> float:
    """Return the weight files, which main memory holds while they are read."""
    if situation.device_type != "cpu" or situation.config.model.train_from_scratch:
        return 0.0
    folder = locate_model(situation.config.model)
    return float(sum(path.stat().st_size for path in weight_files(folder)))


def _unquantised_bytes(model: Model) -> float:
    """Return what quantised layers have been before; the loader reads ahead of quantising."""
    packed = [layer for layer in model.modules() if isinstance(layer, QuantisedLinear)]
    return float(sum(layer.num_weights * layer.dtype.itemsize for layer in packed))


def _states_per_weight(optim: str) -> float:
    name = optim.removeprefix("paged_")
    fitting = [prefix for prefix in _STATES_PER_WEIGHT if name.startswith(prefix)]
    return _STATES_PER_WEIGHT[max(fitting, key=len)] if fitting else _STATES_PER_WEIGHT["adamw"]


def _bytes(parameters: list[torch.nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def _num_weights(model: Model, frozen: list[torch.nn.Parameter]) -> int:
    """Count frozen weights; a quantised one counts as what it stands for."""
    packed = [layer for layer in model.modules() if isinstance(layer, QuantisedLinear)]
    stored = sum(layer.weight.numel() + layer.scales.numel() for layer in packed)
    return sum(p.numel() for p in frozen) - stored + sum(layer.num_weights for layer in packed)


def _gathered(model: Model, ranks: int) -> float:
    """Return what ZeRO-3 holds whole at a time: about one block, and the next on its way."""
    if ranks == 1:  # nothing to gather
        return 0.0
    return 2.0 * max(_bytes(list(layer.parameters())) for layer in layers_of(model))
