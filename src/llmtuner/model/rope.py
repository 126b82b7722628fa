"""Stretched rotary positions, for texts longer than the model was made for."""

import math

from transformers import PreTrainedConfig

from llmtuner.extras.errors import ConfigError
from llmtuner.extras.logs import get_logger

logger = get_logger(__name__)

# Without a length to reach, positions are stretched to twice the model's own.
_DEFAULT_FACTOR = 2.0


def scale_rope(config: PreTrainedConfig, kind: str, *, max_tokens: int | None = None) -> None:
    """Change the positions of a model's configuration, before its weights are loaded.

    Args:
        config: changed in place.
        kind: "linear", "dynamic", "yarn" or "llama3".
        max_tokens: length to reach; None: twice the model's own.

    Raises:
        ConfigError: the model has no rotary positions, or several kinds of them.
    """
    text = config.get_text_config()
    values = text.to_dict()
    rope = values.get("rope_parameters")
    limit = values.get("max_position_embeddings")
    if not rope or not limit or "rope_theta" not in rope:
        raise ConfigError(
            "This model's positions cannot be stretched.",
            where="rope_scaling",
            got=config.model_type,
            allowed="models with one kind of rotary positions",
            fix="drop --rope_scaling",
        )
    if max_tokens is not None and max_tokens <= limit:
        logger.info("RoPE: %d tokens fit into %d positions; not stretched.", max_tokens, limit)
        return
    factor = _DEFAULT_FACTOR if max_tokens is None else float(math.ceil(max_tokens / limit))
    text.rope_parameters = _parameters(rope, kind, factor=factor, limit=limit)
    # Dynamic scaling measures against the model's own length at run time.
    if kind != "dynamic":
        text.max_position_embeddings = int(limit * factor)
    logger.info("RoPE: %s scaling by %g, %d -> %d positions.", kind, factor, limit, limit * factor)


def _parameters(
    rope: dict[str, object], kind: str, *, factor: float, limit: int
) -> dict[str, object]:
    kept: dict[str, object] = {
        key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope
    }
    parameters: dict[str, object] = {**kept, "rope_type": kind, "factor": factor}
    if kind in ("yarn", "llama3"):
        parameters["original_max_position_embeddings"] = limit
    if kind == "llama3":
        parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return parameters
