"""The plan that `llmtuner plan` shows: the user's data, the forecast, and the probe."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmtuner.data.build import build_datasets
from llmtuner.data.encoders import ENCODERS
from llmtuner.data.packing import is_packed
from llmtuner.extras.errors import ModelError
from llmtuner.hparams.config import RunConfig
from llmtuner.model.tokenizer import load_tokenizer
from llmtuner.train.hf_args import to_precision
from llmtuner.train.plan.forecast import Forecast, forecast
from llmtuner.train.plan.probe import Probe, run_probe


@dataclass(frozen=True)
class Plan:
    """What a run will need.

    Attributes:
        forecast: from shapes alone.
        probe: from two real steps; None without.
    """

    forecast: Forecast
    probe: Probe | None = None

    @property
    def peak_bytes(self) -> float:
        """The best estimate there is."""
        return self.probe.corrected_peak_bytes if self.probe else self.forecast.memory.peak

    @property
    def seconds_per_step(self) -> float:
        """The best estimate there is."""
        if self.probe is not None:
            return self.probe.corrected_seconds_per_step
        return self.forecast.seconds_per_step

    @property
    def fits(self) -> bool:
        """Whether the best estimate is within the limit."""
        return self.peak_bytes <= self.forecast.limit_bytes

    def to_dict(self) -> dict[str, Any]:
        """Return everything, ready for JSON."""
        values = self.forecast.to_dict()
        probe = None if self.probe is None else self.probe.to_dict()
        return {**values, "fits": self.fits, "probe": probe}


def make_plan(config: RunConfig) -> Plan:
    """Tokenise what is not tokenised yet, foretell the run, and probe it if asked.

    Raises:
        ModelError: the model's forward pass depends on numbers, so that it cannot be foretold.
    """
    config = replace(config, train=replace(config.train, do_train=True))
    data_args = config.data
    if data_args.tokenized_path is not None and not Path(data_args.tokenized_path).exists():
        data_args = replace(data_args, tokenized_path=None)  # training writes it, a plan does not
    tokenizer = load_tokenizer(config.model)
    by_default = ENCODERS.module(config.finetuning.stage).PACKS_BY_DEFAULT
    data = build_datasets(
        data_args,
        encode=ENCODERS.get(config.finetuning.stage)(data_args, tokenizer),
        seed=config.train.seed,
        packing=is_packed(data_args, by_default=by_default),
        for_training=True,
        audit=config.audit,
    )
    precision = to_precision(config)
    try:
        found = forecast(
            config, data=data, tokenizer=tokenizer, precision=precision, with_advice=True
        )
    except RuntimeError as error:
        raise ModelError(
            "The forward pass of this model depends on its numbers and cannot be foretold: "
            + str(error).strip().splitlines()[0],
            fix="train two steps with --max_steps 2 and read `plan` in run.json",
        ) from error
    if not config.planning.probe:
        return Plan(found)
    return Plan(found, run_probe(config, found))
