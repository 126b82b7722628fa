"""`adapter_config.json` read without peft: what it says of the merge; the rest is refused by name.

The fields and their meaning: peft's `LoraConfig`, up to version 0.21.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtuner.extras.errors import ModelError
from llmtuner.model.adapters import CONFIG_FILE, read_adapter_config

_READ = (
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"),
    *("lora_bias", "fan_in_fan_out", "modules_to_save", "bias", "init_lora_weights"),
)
# What they decide is over once training ends, or is plain from the names of the tensors.
_WITHOUT_EFFECT = (
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
    *("revision", "inference_mode", "lora_dropout", "target_modules", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "megatron_core", "loftq_config", "eva_config"),
    *("corda_config", "lora_ga_config", "qalora_group_size", "ensure_weight_tying"),
    *("runtime_config",),
)
_UNSUPPORTED = {
    "target_parameters": "adapters of single parameters (fused experts) are not supported",
    "trainable_token_indices": "single trained rows of the embedding are not supported",
    "layer_replication": "the model of this adapter has more layers than its base",
    "alora_invocation_tokens": "it is switched on by words in the prompt, so it cannot be merged",
    "arrow_config": "it chooses among adapters for each token, so it cannot be merged",
    "use_qalora": "it pools its inputs, so it cannot be merged into a plain base",
}
# These change the base before the training starts: the adapter does not belong to the base on disk.
_NEUTRAL_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class AdapterSettings:
    """How the tensors of one adapter are to be added.

    Attributes:
        where: the file, for messages.
        rank: of modules that no pattern names.
        alpha: scale of modules that no pattern names.
        rank_pattern: pattern of module names -> rank.
        alpha_pattern: pattern of module names -> alpha.
        use_rslora: divide alpha by the root of the rank instead of the rank.
        use_dora: every module has a vector of magnitudes.
        lora_bias: the B matrices have a bias.
        fan_in_fan_out: matrices of unclear layout are stored [in, out].
        modules_to_save: endings of the names of the modules that are saved whole.
        trains_bias: biases of the base may be saved too.
    """

    where: str
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    use_dora: bool
    lora_bias: bool
    fan_in_fan_out: bool
    modules_to_save: tuple[str, ...]
    trains_bias: bool

    def rank_of(self, module: str) -> int:
        """Return the rank of a module, given its full name."""
        return int(self._of(module, self.rank_pattern, self.rank))

    def scale_of(self, module: str) -> float:
        """Return the factor of B·A, given the module's full name."""
        alpha = float(self._of(module, self.alpha_pattern, self.alpha))
        rank = self.rank_of(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def saves_whole(self, module: str) -> bool:
        """Tell whether a module, or one that it is a part of, is saved whole."""
        # As peft: "norm" also names every "input_layernorm".
        parts = module.split(".")
        owners = [".".join(parts[: n + 1]) for n in range(len(parts))]
        return any(owner.endswith(name) for owner in owners for name in self.modules_to_save)

    def _of(self, module: str, patterns: Mapping[str, float], default: float) -> float:
        # As peft: the first pattern that matches a whole ending of the name wins.
        for pattern, value in patterns.items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        return default


def read_settings(folder: Path) -> AdapterSettings:
    """Read the settings of an adapter.

    Raises:
        ModelError: a setting is of a kind that cannot be merged, unknown, or damaged.
    """
    config = read_adapter_config(folder)
    where = str(folder / CONFIG_FILE)
    _refuse_unsupported(config, where)
    try:
        settings = AdapterSettings(
            where=where,
            rank=int(config["r"]),
            alpha=float(config["lora_alpha"]),
            rank_pattern={_pattern(k): int(v) for k, v in _table(config, "rank_pattern")},
            alpha_pattern={_pattern(k): float(v) for k, v in _table(config, "alpha_pattern")},
            use_rslora=bool(config.get("use_rslora")),
            use_dora=bool(config.get("use_dora")),
            lora_bias=bool(config.get("lora_bias")),
            fan_in_fan_out=bool(config.get("fan_in_fan_out")),
            modules_to_save=tuple(config.get("modules_to_save") or ()),
            trains_bias=config.get("bias", "none") != "none",
        )
    except (KeyError, TypeError, ValueError, AttributeError, re.error) as error:
        raise ModelError(
            f"The adapter's configuration is damaged ({error!r}).", where=where
        ) from error
    ranks = [settings.rank, *settings.rank_pattern.values()]
    scales = [settings.alpha, *settings.alpha_pattern.values()]
    if min(ranks) < 1 or not all(math.isfinite(scale) for scale in scales):
        raise ModelError(
            "The adapter's configuration has no usable rank or scale.", where=where, got=ranks
        )
    return settings


def _refuse_unsupported(config: Mapping[str, Any], where: str) -> None:
    for name, reason in _UNSUPPORTED.items():
        if config.get(name):
            raise ModelError(f"{name}: {reason}.", where=where, got=config[name])
    start = config.get("init_lora_weights")
    if start not in _NEUTRAL_STARTS:
        raise ModelError(
            "init_lora_weights: this way to begin changes the base model, which is not the one on "
            "disk any more.",
            where=where,
            got=start,
            allowed=_NEUTRAL_STARTS,
            fix="convert the adapter to a plain one first: save_pretrained with "
            "path_initial_model_for_weight_conversion in peft",
        )
    known = {*_READ, *_WITHOUT_EFFECT, *_UNSUPPORTED}
    for name, value in config.items():
        if name not in known and value not in (None, False, [], {}):
            raise ModelError(
                f"The adapter uses {name}, which is not known here.",
                where=where,
                got=value,
                fix="merge it with the peft that wrote it",
            )


def _table(config: Mapping[str, Any], name: str) -> list[tuple[str, Any]]:
    return list((config.get(name) or {}).items())


def _pattern(text: str) -> str:
    re.compile(text)
    return text
