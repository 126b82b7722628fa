"""The plan of a run: memory, time, tokens, steps and disk, before a weight is loaded."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from llmtuner.data.build import BuiltData
from llmtuner.extras.env import process_env
from llmtuner.hparams.config import RunConfig
from llmtuner.model.attention import uses_flat_batches
from llmtuner.model.gradient_checkpointing import CheckpointingChoice, MemoryForecast
from llmtuner.model.load import load_config
from llmtuner.model.parameters import TrainableParameters
from llmtuner.model.precision import Precision
from llmtuner.train.loading import choose_attention, choose_checkpointing
from llmtuner.train.plan.advice import Change, advise
from llmtuner.train.plan.disk import Disk, disk_of
from llmtuner.train.plan.machine import Speed, measure_speed, memory_limit, resident_bytes
from llmtuner.train.plan.memory import Memory, Situation, estimate, place_weights
from llmtuner.train.plan.simulate import Pass
from llmtuner.train.plan.workload import Work, Workload, work_of
from llmtuner.train.quiet import quiet_loading

_MOST_ROWS = 1024
_UPDATE_TRAFFIC = 8
"""Numbers that clipping and an Adam step read and write for each weight that learns."""


@dataclass(frozen=True)
class Forecast:
    """What a run will need, and how long it will take.

    Attributes:
        parameters: how many numbers learn, out of how many.
        memory: of one rank.
        limit_bytes: what one rank may use of this machine's memory, or GPU's.
        workload: tokens, steps and micro-batches.
        flops: of one optimizer step of one rank.
        seconds_per_step: of all training steps, on average.
        disk: what is written.
        device_type: where it computes.
        precision: number type.
        attention: transformers' `attn_implementation`.
        world_size: ranks.
        checkpointing: whether activations are computed again, and why.
        changes: what to change if it does not fit.
    """

    parameters: TrainableParameters
    memory: Memory
    limit_bytes: int
    workload: Workload
    flops: float
    seconds_per_step: float
    disk: Disk
    device_type: str
    precision: str
    attention: str
    world_size: int
    checkpointing: CheckpointingChoice
    changes: tuple[Change, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether the estimate is within the limit."""
        return self.memory.peak <= self.limit_bytes

    def to_dict(self) -> dict[str, Any]:
        """Return everything, ready for JSON."""
        workload = asdict(self.workload)
        for name in ("largest", "largest_eval"):
            batch = workload[name]
            if batch is not None:
                lengths = batch["lengths"]
                workload[name] = {
                    "samples": len(lengths),
                    "tokens": sum(lengths),
                    "longest": max(lengths),
                    "kept": batch["num_kept"],
                }
        return {
            "trainable_parameters": self.parameters.trainable,
            "parameters": self.parameters.total,
            **self.memory.to_dict(),
            "limit_bytes": self.limit_bytes,
            "fits": self.fits,
            **workload,
            "flops_per_step": round(self.flops),
            "seconds_per_step": round(self.seconds_per_step, 4),
            "seconds": round(self.seconds_per_step * self.workload.steps, 2),
            "disk": self.disk.to_dict(),
            "device": self.device_type,
            "precision": self.precision,
            "attention": self.attention,
            "world_size": self.world_size,
            "gradient_checkpointing": asdict(self.checkpointing),
            "changes": [asdict(change) for change in self.changes],
        }


def forecast(
    config: RunConfig,
    *,
    data: BuiltData,
    tokenizer: PreTrainedTokenizerBase,
    precision: Precision,
    with_advice: bool = False,
) -> Forecast:
    """Foretell a run from its settings and its data; no weight is loaded.

    Args:
        config: of a training run.
        data: the data sets of the run.
        tokenizer: of the model.
        precision: number type of the run.
        with_advice: work out what to change where the run does not fit.
    """
    device_type = "cuda" if torch.cuda.is_available() and not config.train.use_cpu else "cpu"
    given = config
    config = _with_checkpointing(config, bool(config.train.gradient_checkpointing))
    with quiet_loading():
        situation = Situation(
            config=config,
            tokenizer=tokenizer,
            precision=precision,
            attention=choose_attention(config, device_type, precision),
            device_type=device_type,
            world_size=process_env().world_size,
        )
        work = work_of(
            config,
            data,
            world_size=situation.world_size,
            is_packed=data.packs is not None and uses_flat_batches(situation.attention),
            is_flat=uses_flat_batches(situation.attention),
        )
        workload = _lay_out(work)
        memory, largest, sizes = estimate(situation, workload, baseline=0.0)
        speed = measure_speed(device_type, precision.dtype, shape=_shape(config, workload))
        # Now, as everything that training imports is there, and nothing of the model.
        baseline = float(resident_bytes()) if device_type == "cpu" else 0.0
        memory = memory.with_baseline(baseline)
        limit = memory_limit(device_type, ranks_here=_ranks_here(situation))
        kept = MemoryForecast(memory.train_peak, limit)
        checkpointing = choose_checkpointing(given, device_type, kept)
        if checkpointing.enabled and not config.train.gradient_checkpointing:
            config = _with_checkpointing(config, True)
            situation, work = replace(situation, config=config), work.with_config(config)
            workload = _lay_out(work)
            memory, largest, sizes = estimate(situation, workload, baseline=baseline)
        changes: tuple[Change, ...] = ()
        if with_advice and memory.peak > limit:
            changes = advise(
                config,
                limit_bytes=limit,
                peak_of=lambda changed: _peak_of(changed, situation, work, baseline),
            )
    return Forecast(
        parameters=sizes.parameters,
        memory=memory,
        limit_bytes=limit,
        workload=workload,
        flops=_passes(workload) * largest.flops,
        seconds_per_step=_seconds(workload, largest, speed, sizes.parameters.trainable),
        disk=disk_of(config, workload, sizes),
        device_type=device_type,
        precision="pure bf16" if precision.pure else precision.name,
        attention=situation.attention,
        world_size=situation.world_size,
        checkpointing=checkpointing,
        changes=changes,
    )


def _with_checkpointing(config: RunConfig, enabled: bool) -> RunConfig:
    return replace(config, train=replace(config.train, gradient_checkpointing=enabled))


def _lay_out(work: Work) -> Workload:
    token_weight, kept_weight = place_weights(work.config)
    return work.workload(token_weight=token_weight, kept_weight=kept_weight)


def _peak_of(config: RunConfig, situation: Situation, work: Work, baseline: float) -> float:
    changed = replace(situation, config=config)
    memory, _, _ = estimate(changed, _lay_out(work.with_config(config)), baseline=baseline)
    return memory.peak


def _passes(workload: Workload) -> float:
    """Return how many of the largest micro-batch one mean optimizer step is worth."""
    return workload.micro_batches * workload.mean_tokens / workload.largest.num_tokens


def _seconds(workload: Workload, largest: Pass, speed: Speed, num_trained: int) -> float:
    one = largest.flops / speed.flops + largest.moved_bytes / speed.copied_bytes
    update = num_trained * _UPDATE_TRAFFIC * torch.float32.itemsize / speed.copied_bytes
    return _passes(workload) * one + update


def _shape(config: RunConfig, workload: Workload) -> tuple[int, int, int]:
    values: Mapping[str, Any] = load_config(config.model).get_text_config().to_dict()
    width = int(values.get("hidden_size") or values.get("n_embd") or 1024)
    inner = int(values.get("intermediate_size") or 4 * width)
    return min(_MOST_ROWS, workload.largest.num_tokens), width, inner


def _ranks_here(situation: Situation) -> int:
    return situation.world_size if situation.device_type == "cpu" else 1
